"""A run, from a pretrained checkpoint to a better one: both stages, evaluations, report.

Everything that a run is lies in its directory (see the README). A run that was stopped goes on at
its last complete checkpoint; what it had already evaluated is not evaluated again.
"""

import contextlib
import shutil
from pathlib import Path

from flax import nnx

from lens_jax import checkpoints
from lens_jax.config import ConfigError, RunConfig, leaves
from lens_jax.distribution import processes
from lens_jax.reports import report
from lens_jax.training import programs, run_directory
from lens_jax.training.compilations import Compilations
from lens_jax.training.job import Job, say, stop_if_asked
from lens_jax.training.scoring import score
from lens_jax.training.setup import Start, check, prepare
from lens_jax.training.stages import align, reinforce
from lens_jax.training.stopping import Stopping


def run(config: RunConfig, start: Start, stopping: Stopping) -> None:
    """Trains as `config` says.

    Raises:
        ConfigError: the directory holds another run, or the configuration does not fit.
        Stopped, KeyboardInterrupt: as `stopping` was asked to, with everything saved.
        NotFinite: after `max_skipped` updates in a row that were left out, with everything saved.
        CheckpointError: the last checkpoint of a stage or before a stop could not be written.
    """
    directory = Path(config.run_dir)
    _agree(config)
    found = processes.by_main(lambda: run_directory.inspect(directory, config))
    if found["finished"]:
        say(f"{directory} is finished: see {directory / 'report.html'}")
        return
    stopping.where = "nothing had been trained"
    if found["begun"]:
        stopping.where = f"{directory} goes on at its last checkpoint"
    with (
        programs.precision(config),
        Compilations() as compilations,
        contextlib.ExitStack() as held,
    ):
        checked = check(config, directory, start, converted=not found["reconvert"])
        stop_if_asked(stopping)
        processes.by_main(lambda: held.enter_context(run_directory.locked(directory)))
        processes.by_main(lambda: run_directory.claim(directory, config, found))
        job = prepare(config, directory, start.make(), checked, compilations, stopping)
        score(job, "before")
        if config.alignment.steps:
            align(job)
            score(job, "after_alignment")
        if config.grpo.steps:
            reinforce(job)
            score(job, "after_grpo")
        _finish(job)
    say(compilations)


def _agree(config: RunConfig) -> None:
    """Raises ConfigError, in every process, if one was started with another configuration."""
    mine = leaves(config)
    mine = {key: value for key, value in mine.items() if not key.startswith("distributed.")}
    first, *others = processes.gather(mine)
    for number, other in enumerate(others, start=1):
        changed = [key for key in first if first[key] != other[key]]
        if changed:
            raise ConfigError(
                f"process {number} was started with another configuration than process 0 "
                f"({', '.join(changed)}); all need the same flags and the same file"
            )


def _finish(job: Job) -> None:
    """Writes the trained model as a pretrained checkpoint, and the report."""
    final = job.directory / "final"

    def params():
        yield from checkpoints.unstack(nnx.to_pure_dict(job.params))
        unused = [n for n in checkpoints.saved_params(job.start) if n.startswith("unused/")]
        yield from checkpoints.read_params(job.start, unused)

    # A shorter training of the same run may have written one.
    processes.by_main(lambda: shutil.rmtree(final, ignore_errors=True))
    checkpoints.save_pretrained(final, params(), job.start_config, files_from=job.start)
    processes.by_main(lambda: str(report.write(job.directory)))
    say(f"{final}: the trained model\n{job.directory / 'report.html'}: the report")

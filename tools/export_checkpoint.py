"""A checkpoint of a run as a pretrained directory: `python -m tools.export_checkpoint --help`.

RUN_DIR/final is the last state of a run; this is for any other one, and for runs that go on.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lens_jax import checkpoints
from lens_jax.checkpoints.arrays import group_layers
from lens_jax.commands import cli
from lens_jax.config import ConfigError, RunConfig, read_yaml
from lens_jax.flags import NonNegativeInt

EXAMPLE = "  python -m tools.export_checkpoint --run_dir runs/tiny --step best --output best"


def export_checkpoint(
    run_dir: Path,
    output: Path,
    stage: Literal["alignment", "grpo"] = "grpo",
    step: NonNegativeInt | Literal["last", "best"] = "last",
) -> None:
    """Writes parameters that a run has saved as a pretrained checkpoint.

    Args:
        run_dir: The run's directory.
        output: The new directory.
        stage: Whose checkpoint.
        step: Which one; best: by checkpoint.best_by, of those that are kept.
    """
    from lens_jax.training import metrics

    config = _config(run_dir)
    start = Path(config.model.checkpoint or run_dir / "start")
    settings = config.lens_config(checkpoints.read_config(start))
    trained: dict[str, np.ndarray] = {}
    for name in metrics.STAGES[: metrics.STAGES.index(stage) + 1]:
        place = config.checkpoint.directory or run_dir / "checkpoints"
        store = checkpoints.TrainingCheckpoints(f"{place}/{name}", keep=1)
        found = store.latest() if name != stage or step == "last" else step
        if found == "best":
            found = store.best()
        if found is not None and found in store.steps():
            trained |= store.params(found)
        elif name == stage:
            kept = ", ".join(map(str, store.steps())) or "none"
            raise checkpoints.CheckpointError(
                f"{store.directory} holds no {step} checkpoint; kept are: {kept}"
            )
        elif lost := _trained_before(config, stage):
            raise checkpoints.CheckpointError(
                f"{store.directory} holds no checkpoint, and {stage} goes on with what {name} "
                f"trained ({', '.join(lost)}): bring its last one back"
            )
    shapes = _shapes(start)
    for path, value in trained.items():
        if shapes.get(path) != value.shape:
            raise checkpoints.CheckpointError(
                f"{start} is not what {run_dir} began with: {path} has shape {shapes.get(path)} "
                f"there and {value.shape} in the run"
            )

    def params() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in checkpoints.iterate_params(start):
            path, layer = checkpoints.layer_of(name)
            if path in trained:
                value = trained[path] if layer is None else trained[path][layer]
            yield name, value

    checkpoints.save_pretrained(output, params(), settings, files_from=start)
    print(f"{output}: {stage} step {found}")


def _config(run_dir: Path) -> RunConfig:
    """The configuration of the run in a directory."""
    if not (run_dir / "config.yaml").is_file():
        raise cli.UsageError(f"--run_dir {run_dir}: no run is there, for it holds no config.yaml")
    try:
        return read_yaml(run_dir / "config.yaml")
    except ConfigError as error:
        raise cli.UsageError(str(error)) from error


def _trained_before(config: RunConfig, stage: str) -> list[str]:
    """Parts that stages before `stage` have trained and it does not train itself."""
    before = config.alignment.trained if config.alignment.steps else ()
    return [part for part in before if part not in getattr(config, stage).trained]


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a pretrained checkpoint's parameters, layers stacked."""
    saved = checkpoints.saved_params(directory)
    return {
        path: saved[path].shape if path in saved else (len(members), *saved[members[0]].shape)
        for path, members in group_layers(saved).items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        export_checkpoint, argv, prog="python -m tools.export_checkpoint", example=EXAMPLE
    )


if __name__ == "__main__":
    sys.exit(main())

"""A checkpoint of a run as a pretrained directory: `python -m tools.export_checkpoint --help`.

RUN_DIR/final is the last state of a run; this is for any other one, and for runs that go on.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lens_jax import checkpoints, cli
from lens_jax.config import read_yaml
from lens_jax.training import metrics

EXAMPLE = "  python -m tools.export_checkpoint --run_dir runs/tiny --step best --output best"


def export_checkpoint(
    run_dir: Path,
    output: Path,
    stage: Literal["alignment", "grpo"] = "grpo",
    step: int | Literal["last", "best"] = "last",
) -> None:
    """Writes parameters that a run has saved as a pretrained checkpoint.

    Args:
        run_dir: the run's directory.
        output: the new directory.
        stage: whose checkpoint.
        step: which one; best: by checkpoint.best_by, of those that are kept.
    """
    config = read_yaml(run_dir / "config.yaml")
    start = Path(config.model.checkpoint or run_dir / "start")
    trained: dict[str, np.ndarray] = {}
    for name in metrics.STAGES[: metrics.STAGES.index(stage) + 1]:
        place = config.checkpoint.directory or run_dir / "checkpoints"
        store = checkpoints.TrainingCheckpoints(f"{place}/{name}", keep=1)
        found = store.latest()
        if name == stage and step == "best":
            found = store.best()
        elif name == stage and step != "last":
            found = step
        if found is not None:
            trained |= store.params(found)
        elif name == stage:
            raise checkpoints.CheckpointError(f"{store.directory} holds no {step} checkpoint")

    def params() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in checkpoints.iterate_params(start):
            path, layer = checkpoints.layer_of(name)
            if path in trained:
                value = trained[path] if layer is None else trained[path][layer]
            yield name, value

    settings = config.lens_config(checkpoints.read_config(start))
    checkpoints.save_pretrained(output, params(), settings, files_from=start)
    print(f"{output}: {stage} step {found}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(export_checkpoint, argv, prog="tools.export_checkpoint", example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())

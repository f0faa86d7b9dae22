"""Trains LENS: `python launch/train.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    from lens_jax import cli
    from lens_jax import config as configuration

    config = configuration.load(argv)

    cli.keep_compiled_programs()
    from lens_jax.checkpoints import CheckpointError
    from lens_jax.data.sample import SampleError
    from lens_jax.training import loop
    from tools.convert_weights import WeightsError, from_torch

    def start() -> Path:
        """The checkpoint to start from; Hugging Face weights are converted first."""
        model = config.model
        if model.checkpoint:
            return Path(model.checkpoint)
        converted = Path(config.run_dir) / "start"
        if not converted.exists():
            from_torch(
                output=converted,
                mllm=Path(model.mllm),
                sam=Path(model.sam),
                num_queries=model.num_queries,
                seed=config.seed,
            )
        return converted

    try:
        loop.run(config, start)
    except loop.Stopped as stop:
        print(stop)
    except (
        configuration.ConfigError, CheckpointError, SampleError, WeightsError, OSError,
    ) as error:  # fmt: skip
        return cli.complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

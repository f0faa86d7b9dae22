"""The configuration of a run: typed, complete, read from defaults < a YAML file < flags.

The defaults are the published recipe for RefCOCO (paper arXiv 2508.14153); `configs/tiny.yaml` is
the run that fits a laptop.
"""

from lens_jax.config.checks import batch_rows, check_batches, import_function, validate
from lens_jax.config.keys import FREE, differences, dump_yaml, key_names, leaves
from lens_jax.config.reading import DEFAULT_CONFIG, config_files, load, read_yaml
from lens_jax.config.sections import (
    AlignmentConfig,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    Dataset,
    DistributedConfig,
    GRPOConfig,
    MeshConfig,
    ModelConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    ShapesConfig,
    StageConfig,
)

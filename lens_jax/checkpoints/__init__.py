"""Checkpoints on disk: the state of a training run, and pretrained model directories.

Both are orbax checkpoints of flat, plain arrays, so that files do not depend on Python classes.
Both carry `manifest.json`, the size and SHA-256 of every file, written last: orbax itself does not
notice a flipped byte, and a directory without a manifest was not written to its end.
"""

from lens_jax.checkpoints.arrays import layer_of, stack, unstack
from lens_jax.checkpoints.manifest import MANIFEST, check_manifest, write_manifest
from lens_jax.checkpoints.pretrained import (
    CONFIG,
    check_sizes,
    copy_processor_files,
    iterate_params,
    load_pretrained,
    model_shapes,
    new_directory,
    read_config,
    read_params,
    save_pretrained,
    saved_params,
)
from lens_jax.checkpoints.training import TrainingCheckpoints
from lens_jax.files import CheckpointError

"""Official PyTorch weights to checkpoints of ours, and back: `-m tools.convert_weights --help`."""

from lens_jax.convert_weights.convert import Conversion, check_torch, from_torch
from lens_jax.convert_weights.export import to_torch
from lens_jax.convert_weights.table import WeightsError
from lens_jax.convert_weights.tables import lens_table, load_lens_state, parameter_shapes
from lens_jax.convert_weights.verify import verify

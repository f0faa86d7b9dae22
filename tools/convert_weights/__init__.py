"""Official PyTorch weights to checkpoints of ours: `python -m tools.convert_weights --help`."""

from tools.convert_weights.convert import (
    Conversion,
    from_torch,
    lens_table,
    load_lens_state,
    parameter_shapes,
)
from tools.convert_weights.table import WeightsError

__all__ = [
    "Conversion",
    "WeightsError",
    "from_torch",
    "lens_table",
    "load_lens_state",
    "parameter_shapes",
]

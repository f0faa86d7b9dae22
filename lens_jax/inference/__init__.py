"""Masks from expressions: a pretrained checkpoint as one object.

`lens` holds that object, `programs` the compiled programs that it and evaluation run, `inputs` what
is checked and prepared before them.
"""

from lens_jax.inference.generation import Generation
from lens_jax.inference.inputs import check_length
from lens_jax.inference.lens import Lens, Responses, Result

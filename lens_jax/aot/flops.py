"""Exact arithmetic of a program, counted on its jaxpr: matrix products times loop lengths.

XLA's own cost analysis counts a loop's body once; here a scan counts as often as it runs. Only
matrix products and convolutions are counted, forward, backward and recomputed alike.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *args: Any, while_trips: int | None = None) -> int:
    """Floating-point operations of `function(*args)`, a multiplication and an addition being two.

    Args:
        args: arrays, or `jax.ShapeDtypeStruct`s: nothing is computed.
        while_trips: how often the body of a `while_loop` runs; None refuses programs with one.

    Raises:
        ValueError: the program holds a `while_loop` and `while_trips` is None.
    """
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr, while_trips)


def _jaxpr(jaxpr: core.Jaxpr, while_trips: int | None) -> int:
    return sum(_equation(equation, while_trips) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn, while_trips: int | None) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        out_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // out_channels
    inner = [_jaxpr(jaxpr, while_trips) for jaxpr in inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "while":
        if while_trips is None and any(inner):
            raise ValueError("the program holds a while loop: say how often it runs (while_trips)")
        return sum(inner) * (while_trips or 0)
    if name == "shard_map":
        shape = params["mesh"].shape
        return sum(inner) * math.prod(shape[axis] for axis in params["newly_manual_axes"])
    return sum(inner) * params.get("length", 1)


def inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The programs among an equation's parameters: a loop's body, the branches of a condition."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part

"""What runs in JAX, as calls without arguments that have been compiled for one kernel; and how results are read."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def compiled(function: Callable, op, shape: tuple[int, ...]) -> Callable:
    """`function(kernel, op)` for float32 kernels of a shape; only the call is left to be timed."""
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(lambda kernel: function(kernel, op)).lower(spec).compile()


def jax_call(function: Callable, kernel: np.ndarray, op) -> Callable:
    """The compiled `function(kernel, op)`, as a call without arguments."""
    return functools.partial(compiled(function, op, kernel.shape), jnp.asarray(kernel))


def values_by_frequency(kernel, op):
    """The two lines of Sedghi, Gupta, Long 2019: the singular values at each frequency."""
    symbol = jnp.fft.fft2(kernel, op.input_shape, axes=(0, 1))
    return jnp.linalg.svd(symbol, compute_uv=False)


def two_liner(kernel, op):
    """The norm by the two lines."""
    return jnp.max(values_by_frequency(kernel, op))


def all_values(kernel, op):
    """All singular values by the two lines, in descending order."""
    return jnp.sort(values_by_frequency(kernel, op).reshape(-1))[::-1]


def ends(result) -> tuple[float, float]:
    """An interval's lower and upper end; a number is both ends of its own."""
    return (float(result.lower), float(result.upper)) if hasattr(result, "lower") else (float(result),) * 2


def relative_width(interval) -> float:
    """By how much the upper end exceeds the lower one, relative to the latter."""
    lower, upper = ends(interval)
    return upper / lower - 1

"""Functions of a batch of samples: what `f(params, x)` must be, and its values as rows.

The samples of a batch lie along the first axis of `x` and of the output, and do not depend on each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.checks import ensure, ensure_same_on_devices, float_dtype
from jaxsrn._tools.linalg import norm_along

__all__ = [
    "check_network",
    "checked_batches",
    "full_precision",
    "has_nan",
    "nan_where_nan",
    "norms_of_samples",
    "output_of",
    "rows",
]


def full_precision():
    """A context in which products of a network that asks for no precision are at least in float32.

    The default precision of TPUs and of recent GPUs is below float32, and the residual of a search for singular
    vectors could not fall below that rounding.
    """
    return jax.default_matmul_precision("highest")


def output_of(f: Callable, params, x) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `f(params, x)`.

    Raises:
      ValueError: an output that is not one real floating-point array with the samples of `x` along its first axis.
    """
    output = jax.eval_shape(f, params, x)
    leaves = jax.tree.leaves(output)
    got = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "nothing"
    ensure(
        len(leaves) == 1
        and leaves[0].shape[:1] == x.shape[:1]
        and leaves[0].size > 0
        and jnp.issubdtype(leaves[0].dtype, jnp.floating),
        f"f: got {got} for an input of shape {x.shape}, expected one real floating-point array with the same first "
        "axis, that of the samples, and at least one output.",
    )
    return leaves[0]


def check_network(f) -> None:
    """Raises `ValueError` unless `f` is a function by which programs can be found."""
    ensure(
        callable(f) and isinstance(f, Hashable),
        f"f: got {f!r}, expected a hashable function f(params, x); its compiled programs are found by it.",
    )


def checked_batches(f: Callable, params, *batches) -> list[jax.Array]:
    """Batches of samples of equal shape, in float32 or wider and at least as wide as the output of `f`.

    Raises:
      ValueError: a batch that is no real floating-point array, batches of different shapes, or an output that does not
        fit.
    """
    ensure_same_on_devices(params, "params")
    arrays = [jnp.asarray(batch) for batch in batches]
    for array in arrays:
        ensure_same_on_devices(array, "x")
        ensure(
            array.ndim > 0 and array.size > 0 and jnp.issubdtype(array.dtype, jnp.floating),
            f"x: got {array.dtype}{list(array.shape)}, expected a real floating-point array of shape (samples, ...).",
        )
        ensure(
            array.shape == arrays[0].shape,
            f"y: got shape {array.shape} beside x of {arrays[0].shape}, expected pairs of samples of equal shape.",
        )
    dtype = float_dtype(*(array.dtype for array in arrays))
    dtype = float_dtype(dtype, output_of(f, params, arrays[0].astype(dtype)).dtype)
    return [array.astype(dtype) for array in arrays]


def rows(f: Callable, params, x: Float[Array, "samples ..."]) -> Float[Array, "samples out"]:
    """The outputs of `f`, one row a sample, in the dtype of `x`."""
    with full_precision():
        y = jax.tree.leaves(f(params, x))[0]
    return y.reshape((len(x), -1)).astype(x.dtype)


def nan_where_nan(f: Callable, params, x, values):
    """A tree of values of the samples, NaN where the sample, its output or a parameter has a NaN.

    A Jacobian need not show it: that of a linear network does not depend on the sample.
    """
    void = has_nan(params, x, rows(f, params, x))
    return jax.tree.map(lambda own: jnp.where(void, jnp.nan, own), values)


def has_nan(params, *batches: Float[Array, "samples ..."]) -> Bool[Array, "..."]:
    """Whether a parameter is NaN, or a number of the sample in one of the batches."""
    numbers = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    is_nan = [jnp.any(jnp.isnan(leaf)) for leaf in numbers]
    is_nan += [jnp.any(jnp.isnan(batch.reshape((len(batch), -1))), axis=1) for batch in batches]
    return functools.reduce(jnp.logical_or, is_nan)


def norms_of_samples(x: Float[Array, "samples ..."]) -> Float[Array, " samples"]:
    """The Euclidean norm of each sample, with derivative 0 at zero."""
    return norm_along(x.reshape((len(x), -1)), 1)[:, 0]

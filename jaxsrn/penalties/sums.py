"""The sum of any function of a layer over the layers of a model, with one compilation per distinct shape."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.checks import float_dtype
from jaxsrn.operators.layers import Layers, one_number, values_of_stacks

__all__ = [
    "total",
]


def total(function: Callable, layers: Layers, params) -> Float[Array, ""]:
    """`sum function(kernel, op)` over layers of a model: a penalty on all of them at once.

    Kernels of equal operator, shape and dtype are stacked, and `function` is mapped over each stack, so that it is
    compiled once per distinct shape.

    Args:
      function: a map from `(kernel, op)` to a scalar, such as `spectral_norm`, `bounds.tensor_norm`, `stable_rank` or
        `functools.partial(penalties.extreme_singular_values, alpha=2.0)`.
      layers: `{path: operator}`; a path is the tuple of plain keys to the kernel, `("conv1", "kernel")`, as
        `flax.traverse_util.flatten_dict` and `flax.nnx.to_flat_state` name it. It may name a stack of layers, whose
        array has axes before those of a kernel, as `nn.scan` and `nnx.vmap` make it; all its layers are summed.
      params: nested dicts, an `nnx.State`, or any pytree; other leaves are not read.

    Returns:
      A scalar in float32 or wider.

    Raises:
      ValueError: no layers, a path that is not in `params` (it is named), a kernel that does not fit its operator, or a
        function whose value is not a floating-point scalar.
    """
    running = jnp.zeros((), jnp.float32)
    for values in values_of_stacks(one_number(function), layers, params):
        dtype = float_dtype(running.dtype, values.dtype)
        running = running.astype(dtype) + jnp.sum(values).astype(dtype)
    return running

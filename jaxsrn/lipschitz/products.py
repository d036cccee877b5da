"""Upper bounds of the global Lipschitz constant: products of the norms of layers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.checks import float_dtype
from jaxsrn.bounds.interval import certified
from jaxsrn.operators.layers import Layers, one_number, values_of_stacks
from jaxsrn.spectra.norms import spectral_norm

__all__ = ["certified_upper_bound", "log_of", "of_layers", "upper_bound"]


def upper_bound(layers: Layers, params, *, norm: Callable = spectral_norm, log: bool = False) -> Float[Array, ""]:
    """The product of the norms of layers: an upper bound of the Lipschitz constant of a chain.

    It bounds a network that applies these layers one after the other, between them only functions of Lipschitz
    constant at most 1: ReLU, tanh, sigmoid, pooling in windows that do not overlap; not GELU or swish. There must be no
    skips: a residual block `x + g(x)` has the bound `1 + L_g`, and branches that are added have the sum of theirs.
    Attention is no such layer, nor is batch normalization; fold it into its convolution (`penalties.fold_batch_norm`).
    Every layer that is not 1-Lipschitz must be named: the function does not see the network, and cannot check it. A
    stack of layers counts as a chain of them, as `nn.scan` applies them. Members of an ensemble (`nnx.vmap`) stand side
    by side: bound them one by one, and take the largest bound.
    Source: Sanyal, Torr, Dokania 2020, section 2.

    The product is an upper bound as far as `norm` is one. `spectral_norm` is exact to rounding, but of large layers
    with zero padding not proven; `certified_upper_bound` is guaranteed.

    Args:
      layers: `{path: operator}`, as `penalties.total` takes it and `layer_operators` of the Flax modules gives it.
      params: nested dicts, an `nnx.State`, or any pytree; other leaves are not read.
      norm: a map from `(kernel, op)` to a norm or a bound of it, such as `bounds.tensor_norm`.
      log: static; with `True` the logarithm, which stays within the range of float32 for deep networks.

    Returns:
      A scalar in float32 or wider, differentiable as `norm` is, finite also at zero kernels; NaN where a kernel has
      one.

    Raises:
      ValueError: no layers, a path that is not in `params`, a kernel that does not fit its operator, or a function
        whose value is not a scalar.
    """
    norms = of_layers(one_number(norm), layers, params)
    return jnp.sum(log_of(norms)) if log else jnp.prod(norms)


def certified_upper_bound(layers: Layers, params, *, resolution: float = 0.01, log: bool = False) -> Float[Array, ""]:
    """The product of certified norms: a guaranteed upper bound of the Lipschitz constant of a chain.

    It is `upper_bound` with the upper ends of `bounds.certified`, and room for the rounding of the product. With
    `UnboundedConv` operators it holds at every image size and with every padding, circular or zero. What it assumes of
    the network is what `upper_bound` assumes.

    Args:
      layers, params: as in `upper_bound`.
      resolution: static; as in `bounds.certified`. The product exceeds that of the norms by about this share a layer.
      log: static; with `True` the logarithm.

    Returns:
      A scalar in float32 or wider, differentiable; NaN where a kernel has one.

    Raises:
      ValueError: what `upper_bound` and `bounds.certified` refuse.
    """
    norms = of_layers(lambda kernel, op: certified(kernel, op, resolution=resolution).upper, layers, params)
    # Each factor adds at most one rounding, and so does the widening.
    rounding = (len(norms) + 2) * jnp.finfo(norms.dtype).eps
    if not log:
        return jnp.prod(norms) * (1 + rounding)
    logs = log_of(norms)
    size = jnp.sum(jnp.where(jnp.isfinite(logs), jnp.abs(logs), 0))
    return jnp.sum(logs) + jax.lax.stop_gradient(2 * rounding * (1 + size))


def of_layers(function: Callable, layers: Layers, params):
    """The values of `function(kernel, op)`, a tree of scalars, as one array over all layers for each."""
    values = values_of_stacks(function, layers, params)

    def joined(*arrays):
        dtype = float_dtype(*(array.dtype for array in arrays))
        return jnp.concatenate([array.astype(dtype) for array in arrays])

    return jax.tree.map(joined, *values)


def log_of(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """The logarithm, minus infinity at 0 and with derivative 0 there."""
    zero = values == 0
    return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, values)))

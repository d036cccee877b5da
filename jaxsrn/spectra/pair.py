"""One record for a singular pair of every operator, and the scale in which pairs are looked for."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from jaxsrn.operators.base import Operator

__all__ = ["Found", "Pair", "by_largest", "first_of", "matrix_size", "rescaled"]


class Pair(NamedTuple):
    """Unit vectors `(u, v)` on the two sides of a map, `u` among its inputs and `v` among its outputs.

    The singular value that they stand for is `<v, T(K) u>`. A pair is stored where it is small: circular layers have
    complex amplitudes at one site of the torus, all others the vectors themselves, with site 0.

    Attributes:
      site: the flat index of a (frequency, group), see `circular/sites.py`.
      input: amplitudes of the input channels (times phases), or a vector of `in_shape`.
      output: amplitudes of the output channels, or a vector of `out_shape`.
    """

    site: Int[Array, "..."]
    input: Inexact[Array, "..."]
    output: Inexact[Array, "..."]


class Found(NamedTuple):
    """A pair and its singular value."""

    value: Float[Array, ""]
    pair: Pair


def first_of(pairs: Pair) -> Pair:
    """The first of a stack of pairs."""
    return jax.tree.map(lambda leaf: leaf[0], pairs)


def matrix_size(op: Operator, kernel_shape: tuple[int, ...]) -> int:
    """Entries of the explicit matrix (static)."""
    return math.prod(op.in_shape(kernel_shape)) * math.prod(op.out_shape(kernel_shape))


def rescaled(kernel: Float[Array, "..."], op: Operator) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """The same map up to its scale: `(kernel / scale, scale)`, the largest entry as a constant (1 for zero).

    Squares of very small or large kernels leave the range of the dtype; pairs and stable ranks have no scale. Taps
    that meet no sample have no part in the map: they become 0, but for NaN.
    """
    return by_largest(kernel * jnp.asarray(op._tap_counts(kernel.shape) > 0, kernel.dtype))


def by_largest(kernel: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """`(kernel / scale, scale)`, the largest entry as a constant (1 for zero)."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(kernel)))
    scale = jnp.where(largest == 0, 1.0, largest)
    return kernel / scale, scale

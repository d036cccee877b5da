"""Unit singular pairs `(u, v)` of every operator, and the linear functional `K -> <u, T(K) v>` of each.

A pair is stored where it is small: at one site (frequency and group) of a circular convolution, as plain vectors
of a matrix, as two images otherwise. Everything that optimises over pairs needs the same four things of them:
the leading pair and a leading pair near a given one (`leading.py`), the functional, and the two real vectors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsrn._tools.linalg import top_pairs, unit
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import site_shape, site_symbol
from jaxsrn.spectra.circular.waves import site_gradient, site_of_images, wave
from jaxsrn.spectra.pair import Pair

__all__ = [
    "pair_images",
    "pair_of_images",
    "pair_shapes",
    "plain_gradient",
    "site_pairs",
]


def pair_shapes(op: Operator, kernel_shape: tuple[int, ...]) -> Pair:
    """The shapes of a pair's arrays, in their places (static)."""
    if not isinstance(op, CircularConv):
        return Pair((), op.in_shape(kernel_shape), op.out_shape(kernel_shape))
    rows, columns = site_shape(op, kernel_shape)
    return Pair((), (rows,), (columns,))


def site_pairs(kernel, op: CircularConv, sites: Int[Array, " k"]) -> tuple[Float[Array, " k"], Pair]:
    """The leading pairs at the given sites, with their singular values."""
    matrices = jax.vmap(site_symbol, (None, None, 0))(kernel, op, sites)
    values, u, v = top_pairs(matrices)
    return values, Pair(sites, u, v)


def plain_gradient(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`grad_K <u, T(K) v>`, so that `<u, T(K) v> = sum(gradient * K)` for every kernel of this shape."""
    if isinstance(op, CircularConv):
        return site_gradient(op, kernel_shape, pair.site, pair.right, pair.left)
    return op.kernel_gradient(kernel_shape, pair.right, pair.left)


def pair_images(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]):
    """The two real unit vectors, `(left, right)`, of `out_shape` and `in_shape`."""
    if not isinstance(op, CircularConv):
        return pair.left, pair.right
    ones = (1,) * op.num_axes
    reach = [np.arange(n) + c for n, c in zip(op.input_shape, op.centre(kernel_shape), strict=True)]
    right = wave(op, pair.site, pair.right, reach, op.strides)
    left = wave(op, pair.site, pair.left, [np.arange(n) for n in op.grid], ones)
    return unit(left), unit(right)


def pair_of_images(left: Float[Array, "..."], right: Float[Array, "..."], op: Operator, kernel_shape) -> Pair:
    """The pair closest to two real vectors: their strongest site (circular), or themselves."""
    if not isinstance(op, CircularConv):
        return Pair(jnp.asarray(0), unit(right), unit(left))
    site, u, v = site_of_images(op, kernel_shape, right, left)
    return Pair(site, unit(u), unit(v))

"""Unit singular pairs `(u, v)` of every operator, and the linear functional `K -> <u, T(K) v>` of each.

A pair is stored where it is small: at one site (frequency and group) of a circular convolution, as plain vectors
of a matrix, as two images otherwise. Everything that optimises over pairs needs the same four things of them:
the leading pair and a leading pair near a given one (`leading.py`), the functional, and the two real vectors.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int

from jaxsrn._tools.linalg import top_pairs, unit
from jaxsrn._tools.subspaces import leading_singular_vectors
from jaxsrn.operators.maps import CircularConv, Operator, ZeroPaddedConv
from jaxsrn.spectra.circular import fourier as _fourier

__all__ = [
    "Found",
    "Pair",
    "as_images",
    "by_largest",
    "circular_layer",
    "flat_products",
    "images",
    "matrix_free",
    "matrix_size",
    "pair_of_images",
    "pair_shapes",
    "plain_gradient",
    "rescaled",
    "site_pairs",
    "windowed",
]


class Pair(NamedTuple):
    """A pair of unit vectors: complex amplitudes at `site` (circular), or the vectors themselves (`site` is 0)."""

    site: Int[Array, "..."]
    right: Inexact[Array, "..."]
    left: Inexact[Array, "..."]


def pair_shapes(op: Operator, kernel_shape: tuple[int, ...]) -> Pair:
    """The shapes of a pair's arrays, in their places (static)."""
    if not isinstance(op, CircularConv):
        return Pair((), op.in_shape(kernel_shape), op.out_shape(kernel_shape))
    rows, columns = _fourier.site_shape(op, kernel_shape)
    return Pair((), (rows,), (columns,))


def as_images(right: Float[Array, " in"], left: Float[Array, " out"], op: Operator, kernel_shape) -> Pair:
    """The pair of two flat vectors, of a layer that is not circular."""
    return Pair(jnp.asarray(0), right.reshape(op.in_shape(kernel_shape)), left.reshape(op.out_shape(kernel_shape)))


def matrix_size(op: Operator, kernel_shape: tuple[int, ...]) -> int:
    """Entries of the explicit matrix (static)."""
    return math.prod(op.in_shape(kernel_shape)) * math.prod(op.out_shape(kernel_shape))


def rescaled(kernel: Float[Array, "..."], op: Operator) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """The same map up to its scale: `(kernel / scale, scale)`, the largest entry as a constant (1 for zero).

    Squares of very small or large kernels leave the range of the dtype; pairs and stable ranks have no scale. Taps
    that meet no sample have no part in the map: they become 0, but for NaN.
    """
    return by_largest(kernel * jnp.asarray(op.tap_counts(kernel.shape) > 0, kernel.dtype))


def by_largest(kernel: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """`(kernel / scale, scale)`, the largest entry as a constant (1 for zero)."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(kernel)))
    scale = jnp.where(largest == 0, 1.0, largest)
    return kernel / scale, scale


def site_pairs(kernel, op: CircularConv, sites: Int[Array, " k"]) -> tuple[Float[Array, " k"], Pair]:
    """The leading pairs at the given sites, with their singular values."""
    matrices = jax.vmap(_fourier.site_symbol, (None, None, 0))(kernel, op, sites)
    values, u, v = top_pairs(matrices)
    return values, Pair(sites, u, v)


def flat_products(kernel: Float[Array, "..."], op: Operator):
    """The map on flat vectors: `(matvec, rmatvec, in_size, out_size)`."""
    in_shape, out_shape = op.in_shape(kernel.shape), op.out_shape(kernel.shape)
    highest = jax.lax.Precision.HIGHEST

    def matvec(x):
        return op.apply(kernel, x.reshape(in_shape), precision=highest).reshape(-1)

    def rmatvec(y):
        return op.transpose(kernel, y.reshape(out_shape), precision=highest).reshape(-1)

    return matvec, rmatvec, math.prod(in_shape), math.prod(out_shape)


class Found(NamedTuple):
    """A pair and its singular value."""

    value: Float[Array, ""]
    pair: Pair


def matrix_free(kernel, op: Operator, start: Float[Array, "..."], tolerance, **options) -> Found:
    """Lanczos with the real operator from a given right vector; options of `leading_singular_vectors`."""
    matvec, rmatvec, _, out_size = flat_products(kernel, op)
    value, left, right, _ = leading_singular_vectors(matvec, rmatvec, start.reshape(-1), out_size, tolerance, **options)
    return Found(value, as_images(unit(right), unit(left), op, kernel.shape))


def circular_layer(op: ZeroPaddedConv, kernel_shape, sizes: tuple[int, ...], strides: tuple[int, ...]) -> CircularConv:
    """A circular convolution with the same taps, on an image of at least `sizes` that holds them and whole strides."""
    sizes = (max(size, extent) for size, extent in zip(sizes, op.extents(kernel_shape), strict=True))
    return CircularConv(
        tuple(-(-n // s) * s for n, s in zip(sizes, strides, strict=True)),
        strides=strides,
        kernel_dilation=op.kernel_dilation,
        feature_group_count=op.feature_group_count,
    )


def _window(shape: tuple[int, ...], dtype) -> Float[Array, "... 1"]:
    """A half sine on each axis: what the leading vectors of a zero-padded convolution look like."""
    axes = [np.sin(np.pi * (np.arange(n) + 0.5) / n) for n in shape]
    return jnp.asarray(functools.reduce(np.multiply.outer, axes)[..., None], dtype)


def windowed(pair: Pair, layer: CircularConv, op: ZeroPaddedConv, kernel_shape) -> Pair:
    """The waves of a circular layer with the same taps on the images of a zero-padded one, faded out at the edges."""
    samples = zip(op.input_shape, op.input_dilation, op.pads(kernel_shape), strict=True)
    reach = [np.arange(n) * dilation + low for n, dilation, (low, _) in samples]
    outputs = [np.arange(n) for n in op.out_shape(kernel_shape)[:-1]]
    right = _fourier.wave(layer, pair.site, pair.right, reach, op.strides)
    left = _fourier.wave(layer, pair.site, pair.left, outputs, (1,) * op.num_axes)
    right, left = (unit(image * _window(image.shape[:-1], image.dtype)) for image in (right, left))
    return Pair(jnp.asarray(0), right, left)


def plain_gradient(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`grad_K <u, T(K) v>`, so that `<u, T(K) v> = sum(gradient * K)` for every kernel of this shape."""
    if isinstance(op, CircularConv):
        return _fourier.site_gradient(op, kernel_shape, pair.site, pair.right, pair.left)
    return op.kernel_gradient(kernel_shape, pair.right, pair.left)


def images(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]):
    """The two real unit vectors, `(left, right)`, of `out_shape` and `in_shape`."""
    if not isinstance(op, CircularConv):
        return pair.left, pair.right
    ones = (1,) * op.num_axes
    reach = [np.arange(n) + c for n, c in zip(op.input_shape, op.centre(kernel_shape), strict=True)]
    right = _fourier.wave(op, pair.site, pair.right, reach, op.strides)
    left = _fourier.wave(op, pair.site, pair.left, [np.arange(n) for n in op.grid], ones)
    return unit(left), unit(right)


def pair_of_images(left: Float[Array, "..."], right: Float[Array, "..."], op: Operator, kernel_shape) -> Pair:
    """The pair closest to two real vectors: their strongest site (circular), or themselves."""
    if not isinstance(op, CircularConv):
        return Pair(jnp.asarray(0), unit(right), unit(left))
    site, u, v = _fourier.site_of_images(op, kernel_shape, right, left)
    return Pair(site, unit(u), unit(v))

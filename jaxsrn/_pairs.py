"""Unit singular pairs `(u, v)` of every operator, and the linear functional `K -> <u, T(K) v>` of each.

A pair is stored where it is small: at one site (frequency and group) of a circular convolution, as plain vectors
of a matrix, as two images otherwise. Everything that optimises over pairs needs the same four things of them:
the leading pair, a leading pair near a given one, the functional, and the two real vectors.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int

from jaxsrn import _fourier
from jaxsrn._lanczos import default_tolerance, leading_singular_vectors, random_start, search_tolerance
from jaxsrn._linalg import top_pairs, top_values, unit
from jaxsrn._search import (
    are_below,
    branch_and_bound,
    branch_and_bound_pays,
    finer_grids_are_free,
    squared_limit,
    svds_are_dear,
)
from jaxsrn.operators import CircularConv, Dense, Operator, ZeroPaddedConv

__all__ = [
    "Pair",
    "as_images",
    "by_largest",
    "circular_layer",
    "flat_products",
    "images",
    "leading",
    "leading_wave",
    "matrix_size",
    "nearby",
    "pair_of_images",
    "pair_shapes",
    "plain_gradient",
    "rescaled",
    "site_pairs",
    "windowed",
]

# Of the random part of a cold start, relative to the wave: other waves may be as large, and all take part.
_NOISE = 0.3
# Of a phase of that wave in a start, relative to the other: with less, the search may end at the wrong one.
_SHARE = 0.35
# Two phases whose norms differ by more than that are no rivals: the noise has enough of both.
_RIVALS = 0.05
# Norms of phases differ as the coefficients of the window at the doubled frequency, by about `samples ** -3`: on more
# samples one is as good as the other, unless even those of the waves differ by more than that share of the tolerance.
_FEW_SAMPLES, _SAME = 512, 0.05
# Lanczos steps that a cold start takes at least: with that much noise it is not near a singular vector.
_COLD_STEPS = 12
# How much finer than those of the image the frequencies are among which that wave is looked for.
_FINER = 4
# Entries of an explicit matrix up to which a zero-padded layer's norm is proven: 512 x 512.
_PROVEN_SIZE = 2**18


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
    that meet no sample have no part in the map: they become 0.
    """
    return by_largest(jnp.where(jnp.asarray(op.tap_counts(kernel.shape) > 0), kernel, 0.0))


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


def _first(pairs: Pair) -> Pair:
    return jax.tree.map(lambda leaf: leaf[0], pairs)


def flat_products(kernel: Float[Array, "..."], op: Operator):
    """The map on flat vectors: `(matvec, rmatvec, in_size, out_size)`."""
    in_shape, out_shape = op.in_shape(kernel.shape), op.out_shape(kernel.shape)
    highest = jax.lax.Precision.HIGHEST

    def matvec(x):
        return op.apply(kernel, x.reshape(in_shape), precision=highest).reshape(-1)

    def rmatvec(y):
        return op.transpose(kernel, y.reshape(out_shape), precision=highest).reshape(-1)

    return matvec, rmatvec, math.prod(in_shape), math.prod(out_shape)


def _matrix_free(kernel, op: Operator, start: Float[Array, "..."], tolerance, **options) -> Pair:
    """Lanczos with the real operator from a given right vector; options of `leading_singular_vectors`."""
    matvec, rmatvec, _, out_size = flat_products(kernel, op)
    _, left, right, _ = leading_singular_vectors(matvec, rmatvec, start.reshape(-1), out_size, tolerance, **options)
    return as_images(unit(right), unit(left), op, kernel.shape)


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


def _circular_start(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Float[Array, "2 ..."]:
    """Near the leading right vector: a leading wave of the circular layer, faded out at the edges, in two phases.

    Nothing binds its frequency to the grid of the image: half a step off, the wave runs out of phase at the edges.
    """
    sizes = (tuple(scale * n for n in op.dilated_shape) for scale in (1, _FINER))
    layer, finer = (circular_layer(op, kernel.shape, size, op.strides) for size in sizes)
    # Sites are counted in 32 bits.
    if finer_grids_are_free(kernel.shape, layer) and math.prod(finer.grid) * op.feature_group_count < 2**31:
        layer = finer
    pair, _ = leading_wave(kernel, layer)
    phases = (pair._replace(right=turn * pair.right) for turn in (1, 1j))
    wave, turned = (windowed(phase, layer, op, kernel.shape).right for phase in phases)
    return jnp.stack([wave, unit(turned - jnp.vdot(wave, turned) * wave)])


class _Search(NamedTuple):
    """Where a search starts, what it found, how often there was one, and whether there has to be another."""

    start: Float[Array, "..."]
    pair: Pair
    count: Int[Array, ""]
    again: Bool[Array, ""]


def _from_circular(kernel: Float[Array, "..."], op: ZeroPaddedConv, noise: Float[Array, "..."], tolerance) -> Pair:
    """Lanczos with the real operator from a wave of the circular layer.

    The edges tell two phases of the wave apart, but often by less than 1e-4 of their norms. A start with next to
    nothing of one of them ends at the other: the search is repeated from both.
    """
    waves = _circular_start(kernel, op)
    images = op.apply(kernel, waves, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.linalg.norm(images.reshape((2, -1)), axis=1)
    apart = jnp.abs(norms[1] - norms[0]) / jnp.where(norms[0] == 0, 1, norms[0])
    few = math.prod(op.input_shape) <= _FEW_SAMPLES
    rivals = (apart < _RIVALS) & (few | (apart > _SAME * tolerance))

    def search(state: _Search) -> _Search:
        pair = _matrix_free(kernel, op, state.start + _NOISE * noise, tolerance, first_check=_COLD_STEPS)
        shares = jnp.abs(jnp.tensordot(waves, pair.right, pair.right.ndim))
        again = (state.count == 0) & rivals & (shares[1] < _SHARE * shares[0])
        return _Search(pair.right + waves[1], pair, state.count + 1, again)

    nothing = Pair(jnp.asarray(0), jnp.zeros_like(waves[0]), jnp.zeros(op.out_shape(kernel.shape), kernel.dtype))
    start = _Search(waves[0], nothing, jnp.asarray(0), jnp.asarray(True))
    return jax.lax.while_loop(lambda state: state.again, search, start).pair


def leading_wave(kernel: Float[Array, "..."], op: CircularConv, excess: float = 0.0) -> tuple[Pair, float]:
    """The leading pair over all sites: by branch and bound, or SVDs where they take less.

    Returns:
      `(pair, excess)`: no singular value exceeds that of the pair by more than that share; at most what was allowed.
    """
    if math.prod(kernel.shape[:-2]) == op.feature_group_count == 1:
        return _constant_wave(kernel, op), 0.0
    layer = _fourier.without_idle_axes(op, kernel.shape)
    if branch_and_bound_pays(kernel.shape, layer):
        pair = Pair(*branch_and_bound(kernel, layer, excess))
    else:
        sites, excess = jnp.asarray(_fourier.distinct_sites(layer)[0]), 0.0
        values = top_values(_fourier.half_symbol(kernel, layer)[sites])
        pair = _first(site_pairs(kernel, layer, sites[jnp.argmax(values)][None])[1])
    return pair._replace(site=_fourier.same_site(op, layer, pair.site)), excess


def _constant_wave(kernel: Float[Array, "..."], op: CircularConv) -> Pair:
    """That of a single tap: its symbol is one matrix everywhere, in the first phase."""
    pair = _leading_of_matrix(kernel.reshape(kernel.shape[-2:]))
    rows, _ = _fourier.site_shape(op, kernel.shape)
    right = jnp.pad(pair.right, (0, rows - pair.right.size))
    dtype = _fourier.complex_dtype(kernel.dtype)
    return Pair(pair.site, right.astype(dtype), pair.left.astype(dtype))


def _leading_of_matrix(matrix: Float[Array, "in out"]) -> Pair:
    """By an SVD; of large matrices only where a Cholesky factorization does not prove what Lanczos finds."""
    if not svds_are_dear(1, matrix.shape):
        return _by_svd(matrix)
    start = random_start(matrix.shape[:1], matrix.dtype)
    pair = _matrix_free(matrix, Dense(), start, default_tolerance(matrix.dtype))
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    limit = squared_limit(max(matrix.shape), jnp.vdot(pair.right, product(matrix, pair.left)))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    proven = are_below(product(wide, wide.T)[None, None], limit[None])[0]

    def fall_back(state):
        # Whatever does not change in a loop XLA moves out of it.
        return ~state[0], _by_svd(jax.lax.optimization_barrier((matrix, state[0]))[0])

    # Not a condition: mapped, that takes both ways.
    return jax.lax.while_loop(lambda state: ~state[0], fall_back, (proven, pair))[1]


def _by_svd(matrix: Float[Array, "in out"]) -> Pair:
    _, u, v = top_pairs(matrix[None])
    return Pair(jnp.asarray(0), u[0], v[0])


def leading(kernel: Float[Array, "..."], op: Operator, tolerance=None, start=None) -> Pair:
    """The leading pair of `T(kernel)`, found without any assumption. The kernel's scale must not be extreme.

    `tolerance` is the relative residual at which a matrix-free search stops, by default `search_tolerance`, or a proof
    in its place where the matrix is small. `start`, a right vector, only speeds that search up: a fixed random part is
    mixed in, so that a start that happens to be another singular vector cannot trap it.
    """
    if isinstance(op, Dense):
        return _leading_of_matrix(kernel)
    if isinstance(op, CircularConv):
        return leading_wave(kernel, op)[0]
    if tolerance is None and matrix_size(op, kernel.shape) <= _PROVEN_SIZE:
        pair = _leading_of_matrix(op.to_dense(kernel).T)
        return as_images(pair.right, pair.left, op, kernel.shape)
    tolerance = search_tolerance(kernel.dtype) if tolerance is None else tolerance
    noise = unit(random_start(op.in_shape(kernel.shape), kernel.dtype))
    if start is None:
        return _from_circular(kernel, op, noise, tolerance)
    return _matrix_free(kernel, op, start + 1e-3 * noise, tolerance)


def nearby(kernel: Float[Array, "..."], op: Operator, pair: Pair, tolerance) -> Pair:
    """The leading pair within reach of `pair`: at its site (circular), or in the Krylov space that it starts."""
    if isinstance(op, CircularConv):
        return _first(site_pairs(kernel, op, pair.site[None])[1])
    return _matrix_free(kernel, op, pair.right, tolerance)


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

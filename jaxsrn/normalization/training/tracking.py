"""Leading singular pairs that follow a kernel while it changes: one cheap warm step after the other.

A power step where no more is wanted. Zero padding and dense layers: the best pair in a small space of images.
Circular convolutions: frequency power iteration, for fixed vectors the best frequency, for a fixed frequency better
vectors. That follows one frequency's vectors, and would not see another frequency with other vectors overtake. So a
coarse grid of frequencies is watched: one vector at each, with a power step of its own each time, and the best of every
part of the grid climb along.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Complex, Float, Inexact, Int

from jaxsrn._tools.linalg import einsum, real_times, unit
from jaxsrn._tools.subspaces import random_start
from jaxsrn.operators.maps import CircularConv, Operator
from jaxsrn.spectra.circular import fourier as _fourier
from jaxsrn.spectra.pairs import Pair, pair_shapes

__all__ = ["Track", "follow", "has_turned", "power_step", "start", "track_shapes"]

# Of the right vectors of one pair before and after a step; those of different pairs are orthogonal.
_SAME_OVERLAP = 0.9
_KRYLOV_STEPS = 2
_CLIMBS = 2
# Images: vectors kept beside the leading one, and of how many a power step is taken.
_RUNNERS_UP = 2
_EXPANDED = 2
# Watched frequencies per axis: all of a small grid, of a large one so many per degree of the symbol. Between them it
# can be higher by 1 / cos(pi / 12), 3.5%, an axis (see `overshoot`): little enough for climbing to do the rest.
_WATCH_ALL = 16
_WATCHED_PER_DEGREE = 6
_NUM_CLIMBERS = 8
_COLD_STEPS = 30


class Track(NamedTuple):
    """What is known of a kernel's leading pair from one step to the next.

    Attributes:
      pair: the leading pair.
      watch: what may overtake it. Circular: unit right vectors of the symbol, `(watched frequencies, groups, c_out //
        groups)`. Others: right vectors of the runners-up, `(2, *in_shape)`. `None`: the pair takes power steps alone.
    """

    pair: Pair
    watch: Inexact[Array, "..."] | None


class _Candidates(NamedTuple):
    """Pairs of vectors on their way up, `(k, rows)` and `(k, columns)`, each in its group."""

    group: Int[Array, " k"]
    left: Complex[Array, "k rows"]
    right: Complex[Array, "k columns"]


def start(kernel: Float[Array, "..."], op: Operator, pair: Pair, is_watched: bool) -> Track:
    """The track of a kernel whose leading pair is known. The kernel's scale must not be extreme."""
    if not is_watched:
        return Track(pair, None)
    if not isinstance(op, CircularConv):
        others = random_start((_RUNNERS_UP, pair.right.size), kernel.dtype)
        others = _orthonormal(others, pair.right.reshape((1, -1)))[1:]
        track = Track(pair, others.reshape((-1, *pair.right.shape)))
        return lax.fori_loop(0, _COLD_STEPS, lambda _, track: _follow_images(kernel, op, track), track)
    coefficients, exponents = _fourier.polynomial(kernel, op)
    waves = _watched_waves(op, kernel.shape, exponents, coefficients.dtype)
    shape = (len(waves), len(coefficients), coefficients.shape[-1])
    vectors = _unit_rows(random_start(shape, coefficients.dtype).astype(waves.dtype))
    step = functools.partial(_watch_step, coefficients, waves)
    return Track(pair, lax.fori_loop(0, _COLD_STEPS, lambda _, v: step(v)[1], vectors))


def track_shapes(op: Operator, kernel_shape: tuple[int, ...], is_watched: bool) -> Track:
    """The shapes of a track's arrays, in their places (static)."""
    watch = None
    if is_watched and isinstance(op, CircularConv):
        watched = math.prod(_watched_half(op, kernel_shape)[0])
        watch = watched, op.feature_group_count, _fourier.site_shape(op, kernel_shape)[1]
    elif is_watched:
        watch = _RUNNERS_UP, *op.in_shape(kernel_shape)
    return Track(pair_shapes(op, kernel_shape), watch)


def follow(kernel: Float[Array, "..."], op: Operator, track: Track) -> Track:
    """One step closer to the leading pair of `T(kernel)`: the value `<u, T v>` does not decrease."""
    if track.watch is None:
        return Track(power_step(kernel, op, track.pair), None)
    if isinstance(op, CircularConv):
        return _follow_circular(kernel, op, track)
    return _follow_images(kernel, op, track)


def has_turned(before: Pair, after: Pair) -> Bool[Array, ""]:
    """Whether another pair has taken over, at another frequency or with other vectors."""
    overlap = jnp.abs(jnp.vdot(before.right, after.right))
    return (before.site != after.site) | (overlap < _SAME_OVERLAP)


def power_step(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Pair:
    """One vector from the other by the adjoint, that one back by the map, both normalised; circular: at their site."""
    if isinstance(op, CircularConv):
        symbol = _fourier.site_symbol(kernel, op, pair.site)
        left = unit(einsum("rc,r->c", jnp.conj(symbol), pair.right))
        return Pair(pair.site, unit(einsum("rc,c->r", symbol, left)), left)
    highest = lax.Precision.HIGHEST
    right = unit(op.transpose(kernel, pair.left, precision=highest))
    return Pair(pair.site, right, unit(op.apply(kernel, right, precision=highest)))


def _follow_images(kernel: Float[Array, "..."], op: Operator, track: Track) -> Track:
    """The best pairs in the space of the leading vectors and power steps of the first two of them.

    Singular values of images lie close together, and cross. One vector alone, however many steps it takes, is late to
    turn into another; here the next ones are at hand.
    """
    shape, highest = track.pair.right.shape, lax.Precision.HIGHEST

    def forward(vectors):
        # Outputs stay images: where a kernel is split over its output channels so are they, flat ones could not be.
        return op.apply(kernel, vectors.reshape((-1, *shape)), precision=highest)

    def backward(images):
        return op.transpose(kernel, images, precision=highest).reshape((len(images), -1))

    # Orthonormal but for rounding, which the choice of the largest below would amplify from step to step.
    kept = _orthonormal(track.watch.reshape((_RUNNERS_UP, -1)), unit(track.pair.right.reshape((1, -1))))
    images = forward(kept)
    basis = _orthonormal(backward(images[:_EXPANDED]), kept)
    images = jnp.concatenate([images, forward(basis[len(kept) :])])
    axes = tuple(range(1, images.ndim))
    gram = jnp.tensordot(images, images, axes=(axes, axes), precision=highest)
    weights = jnp.linalg.svd(gram)[0].T[: len(kept)]
    rights = einsum("kj,jn->kn", weights, basis)
    left = unit(jnp.tensordot(weights[0], images, axes=1, precision=highest))
    pair = Pair(track.pair.site, unit(rights[0]).reshape(shape), left)
    return Track(pair, rights[1:].reshape(track.watch.shape))


def _orthonormal(vectors: Float[Array, "k n"], basis: Float[Array, "j n"]) -> Float[Array, "j+k n"]:
    """The basis, and what each of the vectors adds to it (0 where nothing)."""
    for vector in vectors:
        basis = jnp.concatenate([basis, _orthogonal_part(vector[None], basis[None])])
    return basis


def _krylov_step(matvec, rmatvec, start: Inexact[Array, "k n"]):
    """Best pairs in the spaces of `v` and its power steps: in a cluster far closer than the last of those alone.

    `k` maps side by side, in the rows. Returns the right and the left vectors.
    """
    basis, images = [_unit_rows(start)], []
    for _ in range(_KRYLOV_STEPS):
        images.append(matvec(basis[-1]))
        basis.append(_orthogonal_part(rmatvec(images[-1]), jnp.stack(basis, axis=1)))
    basis, images = jnp.stack(basis, axis=1), jnp.stack([*images, matvec(basis[-1])], axis=1)
    # Largest |T V y| over unit y; the SVD of a Hermitian matrix, as batched eigh is not safe on every CPU.
    weights = jnp.linalg.svd(einsum("kim,kjm->kij", images.conj(), images))[0][..., 0]
    return tuple(_unit_rows(einsum("kj,kjn->kn", weights, vectors)) for vectors in (basis, images))


def _orthogonal_part(vector, basis):
    """The unit vector along what the basis lacks; 0 where that is rounding alone, and the space exhausted."""
    before = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    # Twice is enough (Giraud et al. 2005).
    for _ in range(2):
        vector = vector - einsum("kj,kjn->kn", einsum("kjn,kn->kj", basis.conj(), vector), basis)
    norm = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    nothing = norm <= 100 * jnp.finfo(norm.dtype).eps * before
    return jnp.where(nothing, 0, vector / jnp.where(nothing, 1, norm).astype(vector.dtype))


# Circular convolutions


def _follow_circular(kernel, op: CircularConv, track: Track) -> Track:
    coefficients, exponents = _fourier.polynomial(kernel, op)
    waves = _watched_waves(op, kernel.shape, exponents, coefficients.dtype)
    left, watch = _watch_step(coefficients, waves, track.watch)
    group = _fourier.locate(op, track.pair.site)[1]
    best = _best_watched(left, watch)
    incumbent = _Candidates(group, track.pair.right, track.pair.left)
    # The incumbent goes first: of equal values argmax takes the first, and nothing moves without need.
    candidates = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many.astype(one.dtype)]), incumbent, best)
    for _ in range(_CLIMBS):
        sites, values, candidates = _climb(coefficients, op, kernel.shape, candidates)
    winner = jnp.argmax(values)
    left, right = (_unit_rows(vectors)[winner] for vectors in (candidates.left, candidates.right))
    return Track(Pair(sites[winner].astype(track.pair.site.dtype), left, right), watch)


def _unit_rows(vectors):
    """Every vector along the last axis with norm 1 (the first basis vector in place of zero)."""
    flat = jax.vmap(unit)(vectors.reshape((-1, vectors.shape[-1])))
    return flat.reshape(vectors.shape)


def _watched_half(op: CircularConv, kernel_shape) -> tuple[tuple[int, ...], list[int]]:
    """Watched frequencies per axis, half of the last as the kernel is real; and how many make a full turn."""
    enough = [max(_WATCH_ALL, _WATCHED_PER_DEGREE * d) if d else 1 for d in _fourier.degrees(op, kernel_shape)]
    counts = [min(n, m) for n, m in zip(op.grid, enough, strict=True)]
    return (*counts[:-1], counts[-1] // 2 + 1), counts


def _watched_waves(op: CircularConv, kernel_shape, exponents: np.ndarray, dtype) -> Complex[Array, "points terms"]:
    """`exp(-i <w, t>)` at the watched frequencies."""
    half, counts = _watched_half(op, kernel_shape)
    turns = np.array(list(itertools.product(*map(np.arange, half)))) / counts
    return jnp.asarray(np.exp(-2j * np.pi * (turns @ exponents.T)), _fourier.complex_dtype(dtype))


def _watch_step(coefficients, waves, vectors):
    """A power step at every watched frequency: `(S v, S^H S v / |S^H S v|)`; the symbols are never formed."""
    left = einsum("pt,pgtr->pgr", waves, real_times("gtrc,pgc->pgtr", coefficients, vectors))
    back = einsum("pt,pgtc->pgc", waves.conj(), real_times("gtrc,pgr->pgtc", coefficients, left))
    return left, _unit_rows(back)


def _best_watched(left, watch) -> _Candidates:
    """The best watched pair of each of several contiguous parts of the grid: neighbours climb to the same peak."""
    values = jnp.linalg.norm(left, axis=-1).reshape(-1)
    num_parts = min(_NUM_CLIMBERS, values.size)
    size = -(-values.size // num_parts)
    padded = jnp.pad(values, (0, num_parts * size - values.size), constant_values=-1.0).reshape((num_parts, size))
    chosen = jnp.argmax(padded, axis=-1) + size * jnp.arange(num_parts)
    # A part that is padding alone repeats the last frequency.
    chosen = jnp.minimum(chosen, values.size - 1)
    groups = watch.shape[1]
    flat = (_unit_rows(vectors).reshape((-1, vectors.shape[-1]))[chosen] for vectors in (left, watch))
    return _Candidates(chosen % groups, *flat)


def _climb(coefficients, op: CircularConv, kernel_shape, candidates: _Candidates):
    """Vectors fixed, the best frequency of the half grid; there, better vectors: `(sites, values, candidates)`."""
    group, left, right = candidates
    # One group: the same coefficients for all, and no copies of them.
    own, k = (coefficients[0], "") if len(coefficients) == 1 else (coefficients[group], "k")
    reached = real_times(f"{k}trc,kc->ktr", own, right)
    index, waves = _best_frequency(op, kernel_shape, einsum("kr,ktr->kt", left.conj(), reached))

    def matvec(right):
        return einsum("kt,ktr->kr", waves, real_times(f"{k}trc,kc->ktr", own, right))

    def rmatvec(left):
        return einsum("kt,ktc->kc", waves.conj(), real_times(f"{k}trc,kr->ktc", own, left))

    right, left = _krylov_step(matvec, rmatvec, right)
    values = jnp.linalg.norm(matvec(right), axis=-1)
    sites = _fourier.site_at(op, index, group.astype(index[0].dtype))
    return sites, values, _Candidates(group, left, right)


def _best_frequency(op: CircularConv, kernel_shape, filters: Complex[Array, "k terms"]):
    """Where on the half grid each scalar filter is largest: the indices per axis, and the waves there."""
    rows = _term_rows(op, kernel_shape, filters.dtype)
    values = filters.reshape((len(filters), *(row.shape[1] for row in rows)))
    for row in rows:
        # Each contraction takes the foremost axis of terms and puts its frequencies last.
        values = jnp.tensordot(values, row, axes=((1,), (1,)), precision=lax.Precision.HIGHEST)
    half = _fourier.half_grid(op)
    index = jnp.unravel_index(jnp.argmax(jnp.abs(values).reshape((len(filters), -1)), axis=-1), half)
    waves = jnp.ones((len(filters), 1), filters.dtype)
    for row, i in zip(rows, index, strict=True):
        waves = (waves[:, :, None] * row[i][:, None, :]).reshape((len(filters), -1))
    return index, waves


def _term_rows(op: CircularConv, kernel_shape, dtype) -> list[Complex[Array, "points terms"]]:
    """Per axis `exp(-i w t)` on the half grid, for the exponents of `polynomial`."""
    axes = zip(op.grid, _fourier.half_grid(op), _fourier.axis_exponents(op, kernel_shape), strict=True)
    return [jnp.asarray(_fourier.axis_waves(n, exponents)[:m], dtype) for n, m, exponents in axes]

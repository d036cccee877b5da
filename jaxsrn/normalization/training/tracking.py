"""Leading singular pairs that follow a kernel while it changes: one cheap warm step after the other.

A power step where no more is wanted. Zero padding and dense layers: the best pair in a small space of images.
Circular convolutions: frequency power iteration, for fixed vectors the best frequency, for a fixed frequency better
vectors. That follows one frequency's vectors, and would not see another frequency with other vectors overtake. So a
coarse grid of frequencies is watched: one vector at each, with a power step of its own each time, and the best of every
part of the grid climb along.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.subspaces import orthogonal_part, random_start
from jaxsrn.normalization.training.watching import (
    CLIMBS,
    Climbers,
    best_watched,
    climb_once,
    unit_rows,
    watch_step,
    watched_half,
    watched_waves,
)
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import polynomial, site_shape, site_symbol
from jaxsrn.spectra.circular.sites import locate
from jaxsrn.spectra.pair import Pair
from jaxsrn.spectra.pairs import pair_shapes

__all__ = [
    "Track",
    "follow",
    "has_turned",
    "power_step",
    "start_track",
    "track_shapes",
]

# Of the right vectors of one pair before and after a step; those of different pairs are orthogonal.
_SAME_OVERLAP = 0.9
# Images: vectors kept beside the leading one, and of how many a power step is taken.
_RUNNERS_UP = 2
_EXPANDED = 2
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


def start_track(kernel: Float[Array, "..."], op: Operator, pair: Pair, is_watched: bool) -> Track:
    """The track of a kernel whose leading pair is known. The kernel's scale must not be extreme."""
    if not is_watched:
        return Track(pair, None)
    if not isinstance(op, CircularConv):
        others = random_start((_RUNNERS_UP, pair.right.size), kernel.dtype)
        others = _orthonormal(others, pair.right.reshape((1, -1)))[1:]
        track = Track(pair, others.reshape((-1, *pair.right.shape)))
        return lax.fori_loop(0, _COLD_STEPS, lambda _, track: _follow_images(kernel, op, track), track)
    coefficients, exponents = polynomial(kernel, op)
    waves = watched_waves(op, kernel.shape, exponents, coefficients.dtype)
    shape = (len(waves), len(coefficients), coefficients.shape[-1])
    vectors = unit_rows(random_start(shape, coefficients.dtype).astype(waves.dtype))
    step = functools.partial(watch_step, coefficients, waves)
    return Track(pair, lax.fori_loop(0, _COLD_STEPS, lambda _, v: step(v)[1], vectors))


def track_shapes(op: Operator, kernel_shape: tuple[int, ...], is_watched: bool) -> Track:
    """The shapes of a track's arrays, in their places (static)."""
    watch = None
    if is_watched and isinstance(op, CircularConv):
        watched = math.prod(watched_half(op, kernel_shape)[0])
        watch = watched, op.feature_group_count, site_shape(op, kernel_shape)[1]
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
        symbol = site_symbol(kernel, op, pair.site)
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
        basis = jnp.concatenate([basis, orthogonal_part(vector[None], basis[None])])
    return basis


# Circular convolutions


def _follow_circular(kernel, op: CircularConv, track: Track) -> Track:
    coefficients, exponents = polynomial(kernel, op)
    waves = watched_waves(op, kernel.shape, exponents, coefficients.dtype)
    left, watch = watch_step(coefficients, waves, track.watch)
    group = locate(op, track.pair.site)[1]
    best = best_watched(left, watch)
    incumbent = Climbers(group, track.pair.right, track.pair.left)
    # The incumbent goes first: of equal values argmax takes the first, and nothing moves without need.
    candidates = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many.astype(one.dtype)]), incumbent, best)
    for _ in range(CLIMBS):
        sites, values, candidates = climb_once(coefficients, op, kernel.shape, candidates)
    winner = jnp.argmax(values)
    left, right = (unit_rows(vectors)[winner] for vectors in (candidates.left, candidates.right))
    return Track(Pair(sites[winner].astype(track.pair.site.dtype), left, right), watch)

"""Leading singular pairs that follow a kernel while it changes: one cheap warm step after the other.

A pair that is not watched takes power steps alone. Otherwise what may overtake it is kept beside it, and the best of
all takes its place: other frequencies of a circular layer, the next singular vectors of any other one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from jaxsrn.normalization.training import watched_images, watched_torus
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.pair import Pair
from jaxsrn.spectra.pairs import pair_shapes, power_step

__all__ = ["Track", "follow", "has_turned", "start_track", "track_shapes"]

# Overlap of the inputs of one pair before and after a step; those of different pairs are orthogonal.
_SAME_OVERLAP = 0.9


class Track(NamedTuple):
    """What is known of a kernel's leading pair from one step to the next.

    Attributes:
      pair: the leading pair.
      watch: what may overtake it. Circular: unit outputs of the symbol, `(watched frequencies, groups, c_out //
        groups)`. Others: inputs of the runners-up, `(2, *in_shape)`. `None`: the pair takes power steps alone.
    """

    pair: Pair
    watch: Inexact[Array, "..."] | None


def _watched(op: Operator):
    """The room that knows what may overtake a pair of this kind of operator."""
    return watched_torus if isinstance(op, CircularConv) else watched_images


def start_track(kernel: Float[Array, "..."], op: Operator, pair: Pair, is_watched: bool) -> Track:
    """The track of a kernel whose leading pair is known. The kernel's scale must not be extreme."""
    return Track(pair, _watched(op).begin(kernel, op, pair) if is_watched else None)


def track_shapes(op: Operator, kernel_shape: tuple[int, ...], is_watched: bool) -> Track:
    """The shapes of a track's arrays, in their places (static)."""
    return Track(pair_shapes(op, kernel_shape), _watched(op).watch_shape(op, kernel_shape) if is_watched else None)


def follow(kernel: Float[Array, "..."], op: Operator, track: Track) -> Track:
    """One step closer to the leading pair of `T(kernel)`: its value does not decrease."""
    if track.watch is None:
        return Track(power_step(kernel, op, track.pair), None)
    return Track(*_watched(op).follow(kernel, op, *track))


def has_turned(before: Pair, after: Pair) -> Bool[Array, ""]:
    """Whether another pair has taken over, at another frequency or with other vectors."""
    overlap = jnp.abs(jnp.vdot(before.input, after.input))
    return (before.site != after.site) | (overlap < _SAME_OVERLAP)

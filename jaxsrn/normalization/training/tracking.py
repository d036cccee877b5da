"""Tracks: leading singular pairs that follow a kernel while it changes, by one cheap warm step after the other.

A **track** is a pair and, where it has one, its **watch**: the vectors that may overtake the pair. Without a watch the
pair takes power steps alone, as in spectral normalization (Miyato et al. 2018; `flax.nnx.SpectralNorm`), and is late
where another singular value becomes the largest. With a watch, the best of the pair and the watched vectors takes its
place. A circular layer is watched at other frequencies of the torus (`tracked_torus.py`), any other layer in its next
singular vectors (`tracked_images.py`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from jaxsrn.normalization.training import tracked_images, tracked_torus
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.pairs_by_kind import pair_shapes, power_step
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["Track", "follow", "has_turned", "start_track", "track_shapes"]

# Overlap above which the inputs before and after a step are taken for those of one pair. Different pairs have
# orthogonal inputs, with overlap 0; a pair that moves with its kernel stays near 1.
_SAME_OVERLAP = 0.9


class Track(NamedTuple):
    """What is known of a kernel's leading pair from one step to the next.

    Attributes:
      pair: the leading pair.
      watch: what may overtake it. Circular layers have unit outputs of the symbol, of shape `(watched frequencies,
        groups, c_out // groups)`; others have the inputs of the runners-up, `(2, *in_shape)`. `None` has the pair take
        power steps alone.
    """

    pair: Pair
    watch: Inexact[Array, "..."] | None


def _watched(op: Operator):
    """The file for what may overtake a pair of this kind of operator."""
    return tracked_torus if isinstance(op, CircularConv) else tracked_images


def start_track(kernel: Float[Array, "..."], op: Operator, pair: Pair, is_watched: bool) -> Track:
    """The track of a kernel whose leading pair is known. The kernel's scale must not be extreme."""
    return Track(pair, _watched(op).begin(kernel, op, pair) if is_watched else None)


def track_shapes(op: Operator, kernel_shape: tuple[int, ...], is_watched: bool) -> Track:
    """A track with the shapes of its arrays in their places (static)."""
    return Track(pair_shapes(op, kernel_shape), _watched(op).watch_shape(op, kernel_shape) if is_watched else None)


def follow(kernel: Float[Array, "..."], op: Operator, track: Track) -> Track:
    """The track one step closer to the leading pair of `T(kernel)`; the value of its pair does not decrease."""
    if track.watch is None:
        return Track(power_step(kernel, op, track.pair), None)
    return Track(*_watched(op).follow(kernel, op, *track))


def has_turned(before: Pair, after: Pair) -> Bool[Array, ""]:
    """Whether another pair has taken over, at another frequency or with other vectors."""
    overlap = jnp.abs(jnp.vdot(before.input, after.input))
    moved = jax.tree.map(lambda a, b: jnp.any(a != b), before.site, after.site)
    return functools.reduce(jnp.logical_or, jax.tree.leaves(moved), overlap < _SAME_OVERLAP)

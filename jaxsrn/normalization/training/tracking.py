"""Tracks: leading singular pairs that follow a kernel while it changes, by one cheap warm step after the other.

A **track** is a pair and, where it has one, its **watch**: the vectors that may overtake the pair. Without a watch the
pair takes power steps alone, as in spectral normalization (Miyato et al. 2018; `flax.nnx.SpectralNorm`), and is late
where another singular value becomes the largest. With a watch, the best of the pair and the watched vectors takes its
place. A circular or unbounded layer is watched at other frequencies of the torus (`watched_torus.py`), any other layer
in its next singular vectors (`watched_images.py`).

Singular values lie **close** to the leading one where the norm alone is asked for; where the stable rank is lowered as
well, the leading one stands out. `is_close` says which, and is static.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from jaxsrn._tools.linalg import unit, zero_for_nan
from jaxsrn.normalization.training import watched_images, watched_torus
from jaxsrn.normalization.training.watched_images import Step
from jaxsrn.normalization.training.watched_torus import Climbers
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.pairs_by_kind import pair_as_floats, pair_of_floats, pair_shapes, power_step
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["Track", "follow", "start_track", "track_as_floats", "track_of_floats", "track_shapes"]


class Track(NamedTuple):
    """What is known of a kernel's leading pair from one step to the next.

    Attributes:
      pair: the leading pair.
      watch: what may overtake it. Circular and unbounded layers have pairs that climb in other parts of the torus,
        other layers the inputs of the leading pair and of two runners-up, `(3, *in_shape)`. `None` has the pair take
        power steps alone.
    """

    pair: Pair
    watch: Climbers | Inexact[Array, "..."] | None


def _watched(op: Operator):
    """The file for what may overtake a pair of this kind of operator."""
    return watched_torus if isinstance(op, (CircularConv, UnboundedConv)) else watched_images


def start_track(kernel: Float[Array, "..."], op: Operator, pair: Pair, is_close: bool) -> Track:
    """The track of a pair, with a watch that knows nothing of the kernel yet."""
    return Track(pair, _watched(op).begin(kernel, op) if _has_watch(op, is_close) else None)


def track_shapes(op: Operator, kernel_shape: tuple[int, ...], is_close: bool) -> Track:
    """A track with the shapes of its arrays in floats in their places (static)."""
    watch = _watched(op).watch_shapes(op, kernel_shape) if _has_watch(op, is_close) else None
    return Track(pair_shapes(op, kernel_shape), watch)


def track_as_floats(track: Track, op: Operator, kernel_shape: tuple[int, ...]) -> Track:
    """The track in real floats throughout, the form in which it is kept between steps."""
    watch = None if track.watch is None else _watched(op).as_floats(track.watch, op, kernel_shape)
    return Track(pair_as_floats(track.pair, op, kernel_shape), watch)


def track_of_floats(track: Track, op: Operator, kernel_shape: tuple[int, ...], dtype) -> Track:
    """The track of `track_as_floats` for computations in a dtype; averages and casts of tracks are taken too."""
    watch = None if track.watch is None else _watched(op).of_floats(track.watch, op, kernel_shape, dtype)
    return Track(pair_of_floats(jax.tree.map(zero_for_nan, track.pair), op, kernel_shape, dtype), watch)


def follow(kernel: Float[Array, "..."], op: Operator, track: Track, turn: Int[Array, ""] | None) -> tuple[Track, Step]:
    """The track one step closer to the leading pair of `T(kernel)`, and what the step says of the kernel.

    The value of the track's pair does not decrease. The kernel's scale must not be extreme. `turn` counts steps that
    follow one another, in which parts of a watch may move in turn; with `None` all of it moves.
    """
    if track.watch is None:
        pair = power_step(kernel, op, track.pair)
        # The value of the first product of a power step is this share of the value of the second, which stands as 1.
        share = jnp.abs(jnp.vdot(unit(track.pair.output), pair.output, precision=lax.Precision.HIGHEST))
        return Track(pair, None), Step(share, jnp.ones_like(share), jnp.asarray(False))
    pair, watch, step = _watched(op).follow(kernel, op, *track, turn)
    return Track(pair, watch), step


def _has_watch(op: Operator, is_close: bool) -> bool:
    """Whether a track has a watch (static).

    Only a matrix with a target has none: Algorithm 2 of Sanyal et al. 2020 carries one pair.
    """
    return is_close or not op._normalization_keeps_pairs

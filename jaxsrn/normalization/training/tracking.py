"""Tracks: leading singular pairs that follow a kernel while it changes, by one cheap warm step after the other.

A **track** is a pair and, where it has one, its **watch**: the vectors that may overtake the pair. Without a watch the
pair takes power steps alone, as in spectral normalization (Miyato et al. 2018; `flax.nnx.SpectralNorm`), and is late
where another singular value becomes the largest. With a watch, the best of the pair and the watched vectors takes its
place. A circular or unbounded layer is watched at other frequencies of the torus (`tracked_torus.py`), any other layer
in its next singular vectors (`tracked_images.py`).

Singular values lie **close** to the leading one where the norm alone is asked for; where the stable rank is lowered as
well, the leading one stands out. `is_close` says which, and is static.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from jaxsrn.normalization.training import tracked_images, tracked_torus
from jaxsrn.normalization.training.tracked_torus import Climbers
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv, UnboundedConv
from jaxsrn.spectra.pairs_by_kind import pair_shapes, power_step
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["Track", "follow", "start_track", "track_shapes"]


class Track(NamedTuple):
    """What is known of a kernel's leading pair from one step to the next.

    Attributes:
      pair: the leading pair.
      watch: what may overtake it. Circular and unbounded layers have pairs that climb in other parts of the torus,
        other layers the inputs of the runners-up, `(2, *in_shape)`. `None` has the pair take power steps alone.
    """

    pair: Pair
    watch: Climbers | Inexact[Array, "..."] | None


def _watched(op: Operator):
    """The file for what may overtake a pair of this kind of operator."""
    return tracked_torus if isinstance(op, (CircularConv, UnboundedConv)) else tracked_images


def start_track(kernel: Float[Array, "..."], op: Operator, pair: Pair, is_close: bool) -> Track:
    """The track of a pair, with a watch that knows nothing of the kernel yet, except that a NaN reaches it."""
    if not _has_watch(op, is_close):
        return Track(pair, None)
    nothing = 0.0 * jnp.sum(kernel)

    def reached(leaf):
        return leaf + nothing.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return Track(pair, jax.tree.map(reached, _watched(op).begin(kernel, op)))


def track_shapes(op: Operator, kernel_shape: tuple[int, ...], is_close: bool) -> Track:
    """A track with the shapes of its arrays in their places (static)."""
    watch = _watched(op).watch_shapes(op, kernel_shape) if _has_watch(op, is_close) else None
    return Track(pair_shapes(op, kernel_shape), watch)


def follow(kernel: Float[Array, "..."], op: Operator, track: Track, is_close: bool) -> tuple[Track, Bool[Array, ""]]:
    """The track one step closer to the leading pair of `T(kernel)`, and whether another pair has taken over.

    The value of the track's pair does not decrease. The kernel's scale must not be extreme.
    """
    if track.watch is None:
        return Track(power_step(kernel, op, track.pair), None), jnp.asarray(False)
    pair, watch, turned = _watched(op).follow(kernel, op, *track)
    return Track(pair, watch), turned


def _has_watch(op: Operator, is_close: bool) -> bool:
    """Sanyal's algorithm for matrices carries one vector alone."""
    return is_close or not op._normalization_keeps_pairs

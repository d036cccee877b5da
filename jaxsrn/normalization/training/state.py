"""`SRNCState`, what a training step carries to the next one, as the caller keeps it and as computations take it.

The closed form (`closed_form.py`) needs the leading pair of the kernel that it returns. A state holds that pair, and
what may overtake it, as a track (`tracking.py`). `start.py` makes the first one, `step.py` the next.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn.normalization.training.tracking import Track, track_as_floats, track_of_floats
from jaxsrn.operators.base import Operator

__all__ = ["SRNCState", "as_floats", "of_floats", "without_pair_of_zero"]


class SRNCState(NamedTuple):
    """What `srnc_step` carries: a pytree of small arrays (with zero padding five images, or ten where `own` is kept).

    All of them are real floats: frequencies as shares of a full turn, amplitudes as real and imaginary parts. So a
    state may be averaged, cast to any floating dtype, or stored in any file, with the rest of a model. The next step
    puts right what that changed, and returns a state in float32 or wider: a state that was cast takes a step before
    `jax.lax.scan` carries it. A kernel with NaN in it leaves NaN, from which the next kernel without NaN starts anew.

    Attributes:
      normalized: the track (`tracking.py`) of the normalized kernel's leading pair. A dense kernel has the same pair.
      own: the track of the kernel's own leading pair, where the kernel's norm is asked for; else `None`.
    """

    normalized: Track
    own: Track | None


def as_floats(state: SRNCState, op: Operator, a: Float[Array, "..."]) -> SRNCState:
    """The state in real floats throughout, as the caller keeps it: all of it NaN for a kernel with NaN in it."""
    nothing = 0.0 * jnp.sum(a)
    floats = SRNCState(*(track and track_as_floats(track, op, a.shape) for track in state))
    return jax.tree.map(lambda leaf: leaf + nothing, floats)


def of_floats(state: SRNCState, op: Operator, kernel_shape, dtype) -> SRNCState:
    """The state for computations in a dtype, whatever the caller did to its floats.

    Where a kernel with NaN in it has left NaN, the state is one that knows nothing of a kernel.
    """
    return SRNCState(*(track and track_of_floats(track, op, kernel_shape, dtype) for track in state))


def without_pair_of_zero(a: Float[Array, "..."], track: Track) -> Track:
    """The track with a pair whose output is 0 where the kernel is zero.

    A zero kernel has no leading pair, and an arbitrary one would lead the next kernel to a poor local solution. With an
    output of 0 the closed form is the next kernel itself, up to its scale, so the pair starts as that kernel's own.
    """
    # In the scale of `rescaled` it is 1, or 0 for a zero kernel.
    largest = jnp.sign(jnp.max(jnp.abs(a)))
    output = track.pair.output * largest.astype(track.pair.output.dtype)
    return track._replace(pair=track.pair._replace(output=output))

"""The search with zero padding from given waves: the Lanczos method with the real operator, without a proof.

Each wave is searched as long as its limit exceeds the best value found. A wave has two phases, which only the edges of
the image tell apart, so that a search may have to be repeated from both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.image_pairs import matrix_free
from jaxsrn.spectra.padded.starts import Starts
from jaxsrn.spectra.singular_pair import Found, Pair

__all__ = [
    "NOISE",
    "from_waves",
]

# The norm of the random part of a cold start, relative to the wave. Other waves may be as large, and all of them have
# to take part; a larger part wastes the wave.
NOISE = 0.1
# The share of the second phase in what is found, relative to the first, below which the search is repeated from both:
# with less of it in the start the search may have ended at the wrong phase. A larger share costs more second searches.
_SHARE = 0.35
# The relative difference of two phases' norms beyond which they are no rivals, as the noise then has enough of both.
_RIVALS = 0.05
# Phases of images of at most so many samples are always told apart, those of larger images if their norms differ by
# more than this share of the tolerance. The norms differ as the window's Fourier coefficients at the doubled frequency
# do, by about `samples ** -3`.
_FEW_SAMPLES, _SAME = 512, 0.05
# A cold start takes so many Lanczos steps at least: with that much noise it is not near a singular vector before.
_COLD_STEPS = 10


class _Search(NamedTuple):
    """A search: its start, what it found, how many were made so far, and whether another has to follow."""

    start: Float[Array, "..."]
    found: Found
    count: Int[Array, ""]
    again: Bool[Array, ""]


def _from_wave(kernel, op: ZeroPaddedConv, waves: Float[Array, "2 ..."], noise, tolerance, floor) -> Found:
    """What the Lanczos method finds from one wave; it is given up where it seems to end below `floor`.

    Two phases of the wave have nearly equal norms, as only the edges tell them apart. A start with next to nothing of
    one of them ends at the other, and the search is repeated from both.
    """
    images = op.apply(kernel, waves, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.linalg.norm(images.reshape((2, -1)), axis=1)
    apart = jnp.abs(norms[1] - norms[0]) / jnp.where(norms[0] == 0, 1, norms[0])
    few = math.prod(op.input_shape) <= _FEW_SAMPLES
    rivals = (apart < _RIVALS) & (few | (apart > _SAME * tolerance))

    def attempt(state: _Search) -> _Search:
        found = matrix_free(kernel, op, state.start + NOISE * noise, tolerance, first_check=_COLD_STEPS, floor=floor)
        image = found.pair.input
        shares = jnp.abs(jnp.tensordot(waves, image, image.ndim, precision=jax.lax.Precision.HIGHEST))
        again = (state.count == 0) & rivals & (shares[1] < _SHARE * shares[0])
        return _Search(image + waves[1], found, state.count + 1, again)

    start = _Search(waves[0], _nothing(kernel, op), jnp.asarray(0), jnp.asarray(True))
    return jax.lax.while_loop(lambda state: state.again, attempt, start).found


def _nothing(kernel: Float[Array, "..."], op: ZeroPaddedConv) -> Found:
    """A zero pair of value 0, the state of a search before it has found anything."""
    shapes = op.in_shape(kernel.shape), op.out_shape(kernel.shape)
    pair = Pair(jnp.asarray(0), *(jnp.zeros(shape, kernel.dtype) for shape in shapes))
    return Found(jnp.zeros((), kernel.dtype), pair)


def from_waves(kernel, op: ZeroPaddedConv, starts: Starts, noise, tolerance) -> Found:
    """The best that is found from the waves, the largest first, until no limit exceeds it."""

    def unfinished(state):
        k, best = state
        limit = starts.limits[jnp.minimum(k, len(starts.limits) - 1)]
        return (k < len(starts.limits)) & ((k == 0) | (limit > best.value))

    def look(state):
        k, best = state
        found = _from_wave(kernel, op, starts.waves[k], noise, tolerance, best.value)
        is_lower = (found.value <= best.value) & (k > 0)
        return k + 1, jax.tree.map(lambda new, old: jnp.where(is_lower, old, new), found, best)

    return jax.lax.while_loop(unfinished, look, (jnp.asarray(0), _nothing(kernel, op)))[1]

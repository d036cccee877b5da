"""The search with zero padding from given waves: Lanczos with the real operator. No proof."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.images import matrix_free
from jaxsrn.spectra.padded.starts import Starts
from jaxsrn.spectra.pair import Found, Pair

__all__ = [
    "NOISE",
    "from_waves",
]

# Norm of the random part of a cold start, relative to the wave: other waves may be as large, and all take part.
NOISE = 0.1
# Share of the second phase of a wave in what is found, relative to the first, below which the search is repeated from
# both: with less in the start it may have ended at the wrong one.
_SHARE = 0.35
# Relative difference of the norms of two phases beyond which they are no rivals: the noise has enough of both.
_RIVALS = 0.05
# Samples up to which phases are told apart (their norms differ as the window's coefficients at the doubled frequency
# do, by about `samples ** -3`), and the difference, as a share of the tolerance, beyond which they are on more samples.
_FEW_SAMPLES, _SAME = 512, 0.05
# Lanczos steps that a cold start takes at least: with that much noise it is not near a singular vector.
_COLD_STEPS = 10


class _Search(NamedTuple):
    """Where a search starts, what it found, how often there was one, and whether there has to be another."""

    start: Float[Array, "..."]
    found: Found
    count: Int[Array, ""]
    again: Bool[Array, ""]


def _from_wave(kernel, op: ZeroPaddedConv, waves: Float[Array, "2 ..."], noise, tolerance, floor) -> Found:
    """Lanczos with the real operator from a wave of the circular layer; given up where it seems to end below `floor`.

    The edges tell two phases of the wave apart, but often by less than 1e-4 of their norms. A start with next to
    nothing of one of them ends at the other: the search is repeated from both.
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
    """In place of what is not yet found."""
    shapes = op.in_shape(kernel.shape), op.out_shape(kernel.shape)
    pair = Pair(jnp.asarray(0), *(jnp.zeros(shape, kernel.dtype) for shape in shapes))
    return Found(jnp.zeros((), kernel.dtype), pair)


def from_waves(kernel, op: ZeroPaddedConv, starts: Starts, noise, tolerance) -> Found:
    """The best that is found from several waves, the largest first, as long as one might exceed what is found."""

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

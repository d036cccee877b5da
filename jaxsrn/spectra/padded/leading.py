"""The leading pair of a layer with zero padding: proven by its matrix where that is small, else a search.

The search is the Lanczos method (`_tools/lanczos.py`) from waves of a circular layer with the same taps. It ends at a
small residual, which proves a singular value but not that none is larger. It is repeated where it may have missed one.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import chosen
from jaxsrn._tools.linalg import unit
from jaxsrn._tools.loops import one_by_one
from jaxsrn._tools.programs import program
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn._tools.tolerances import PROVEN_SIZE
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.circular.peaks import Climbed
from jaxsrn.spectra.dense import leading_of_matrix
from jaxsrn.spectra.image_pairs import matrix_free, of_flat_vectors, shapes
from jaxsrn.spectra.padded.idle_axes import at_first_contact, without_idle_axes
from jaxsrn.spectra.padded.idle_channels import Channels, all_channels, may_hold_more, start_in, without_channels_of
from jaxsrn.spectra.padded.starts import circular_peaks, circular_waves, cold_start, missed_phase
from jaxsrn.spectra.singular_pair import Found, Pair, is_small, matrix_size, rescaled, without_idle_taps

__all__ = ["is_proven", "is_searched", "leading_of_padded", "search"]

# A fixed part of this relative norm is mixed into a given start. Without it a start that happens to be another
# singular vector would trap the search; a larger part would cost the steps that the start saves.
_WARM_NOISE = 1e-3
# The search goes on to so small a share of the tolerance. It may end at a mixture of vectors of nearly equal values,
# and the value of an even mixture of two is too low by half the residual, that of an uneven one by more.
_SHARPER = 0.5
# The most attempts of a search: the first, one for the other phase, and the others in idle channels.
_MOST_ATTEMPTS = 4


def leading_of_padded(kernel: Float[Array, "..."], op: ZeroPaddedConv, tolerance, start, proven: bool) -> Pair:
    """The leading pair of a layer with zero padding; the arguments are those of `leading_pair` (`pairs_by_kind.py`).

    Called eagerly, it shares the program of its first stage, the peaks of a circular layer, with other layers.
    """
    small = without_idle_axes(op, kernel.shape)
    # The images of a start are those of the larger layer.
    start = start if small == op else None
    if is_proven(op, kernel.shape, proven):
        return _of_matrix(kernel, op)
    if start is None:
        return _cold(kernel, op, tolerance, circular_peaks(without_idle_taps(kernel, op), small))
    return _warm(kernel, op, tolerance, start)


def is_proven(op: ZeroPaddedConv, kernel_shape: tuple[int, ...], proven: bool = True) -> bool:
    """Whether the pair of `leading_of_padded` is that of an explicit matrix, for its argument `proven` (static)."""
    one_sample = math.prod(without_idle_axes(op, kernel_shape).input_shape) == 1
    return one_sample or (proven and not is_searched(op, kernel_shape))


def is_searched(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> bool:
    """Whether the layer's matrix is too large for a proof by its singular values (static)."""
    return matrix_size(without_idle_axes(op, kernel_shape), kernel_shape) > PROVEN_SIZE


@functools.partial(program, brief=True)
def _of_matrix(kernel, op) -> Pair:
    kernel, small = rescaled(kernel, op)[0], without_idle_axes(op, kernel.shape)
    pair = leading_of_matrix(small.to_dense(kernel).T)
    return _in_whole(of_flat_vectors(pair.input, pair.output, small, kernel.shape), op, kernel.shape)


@functools.partial(program, brief=is_small)
@one_by_one
def _cold(kernel, op, tolerance, peaks: Climbed) -> Pair:
    kernel, small = rescaled(kernel, op)[0], without_idle_axes(op, kernel.shape)
    return _in_whole(search(kernel, small, tolerance, peaks), op, kernel.shape)


@program
@one_by_one
def _warm(kernel, op, tolerance, start) -> Pair:
    kernel, _ = rescaled(kernel, op)
    noise = unit(fixed_start(op.in_shape(kernel.shape), kernel.dtype))
    return matrix_free(kernel, op, unit(start) + _WARM_NOISE * noise, tolerance).pair


def _in_whole(pair: Pair, op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> Pair:
    """A pair of the layer without idle axes in images of the whole layer."""
    return pair if without_idle_axes(op, kernel_shape) == op else at_first_contact(pair, op, kernel_shape)


class _Search(NamedTuple):
    """A search between two attempts.

    Attributes:
      again: whether there is another attempt.
      start: the image that it starts from.
      best: the best pair so far.
      channels: those that no pair has used.
      count: the attempts so far.
    """

    again: Bool[Array, ""]
    start: Float[Array, "..."]
    best: Found
    channels: Channels
    count: Int[Array, ""]


def search(kernel: Float[Array, "..."], op: ZeroPaddedConv, tolerance, peaks: Climbed) -> Pair:
    """The leading pair from a cold start, to a relative residual, without a proof that no singular value is larger.

    It is repeated once where the start may have missed the other phase of what is found, and from channels that the
    found pairs leave idle, where these may hold a larger value.
    """
    waves, tolerance = circular_waves(peaks, kernel, op), _SHARPER * tolerance

    def attempt(state: _Search) -> _Search:
        found = matrix_free(kernel, op, state.start, tolerance)
        # A comparison with NaN is false, so that NaN is kept.
        best = chosen(found.value <= state.best.value, state.best, found)
        has_missed, other = missed_phase(kernel, op, waves, state.start, found.pair.input)
        has_missed = has_missed & (state.count == 0)
        channels = without_channels_of(found.pair, state.channels)
        start = jnp.where(has_missed, found.pair.input + other, start_in(channels, kernel, op))
        again = has_missed | may_hold_more(channels, kernel, op, best.value)
        return _Search(again, start, best, channels, state.count + 1)

    zeros = Pair(None, *(jnp.zeros(shape, kernel.dtype) for shape in shapes(op, kernel.shape)[1:]))
    nothing = Found(jnp.asarray(-1, kernel.dtype), zeros)
    channels = all_channels(op, kernel.shape)
    state = _Search(jnp.asarray(True), cold_start(waves), nothing, channels, jnp.asarray(0))
    return lax.while_loop(lambda state: state.again & (state.count < _MOST_ATTEMPTS), attempt, state).best.pair

"""Peaks of the symbol: the highest one, with a proof, and several as far as climbing finds them.

A peak is a frequency where the largest singular value of the symbol has a local maximum (`climbing.py`). The search
with zero padding starts from several of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import picked, place_of_largest
from jaxsrn._tools.linalg import by_largest
from jaxsrn._tools.loops import one_by_one
from jaxsrn._tools.programs import program
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.boxes import Grid, coarse_boxes
from jaxsrn.spectra.circular.branch_and_bound import proven_peak, unproven_peak
from jaxsrn.spectra.circular.climbing import Estimates, Peak, climbs, estimates, most_promising
from jaxsrn.spectra.circular.grams import GramPolynomial, gram_polynomial, is_transposed
from jaxsrn.spectra.circular.newton import at_maximum
from jaxsrn.spectra.circular.sites import Site
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "Climbed",
    "climbed",
    "proven_pair",
    "several",
    "unproven_pair",
]


class Climbed(NamedTuple):
    """What climbing has found, for the kernel of `by_largest`.

    Attributes:
      peaks: a stack of peaks.
      poly: the symbol that they are of.
      corners, exists: the coarsest boxes of the grid (`coarse_boxes`).
    """

    peaks: Peak
    poly: GramPolynomial
    corners: Int[Array, "boxes axes"]
    exists: Bool[Array, " boxes"]


# A program of its own: the search with zero padding and the proof of its upper bound start from the same peaks.
@functools.partial(program, static_argnums=(1, 3, 4, 5), brief=True)
@functools.partial(one_by_one, static_argnums=(1, 3, 4, 5))
def climbed(kernel: Float[Array, "..."], op, grid: Grid, counts: tuple[int, ...], reduced: bool, count: int) -> Climbed:
    """Where climbing ends from the `count` most promising frequencies, for a kernel of any scale."""
    poly, (corners, exists) = gram_polynomial(by_largest(kernel)[0], op, reduced), coarse_boxes(grid, counts)
    known = estimates(poly, grid, corners, exists)
    # Where every frequency was estimated, the largest estimates are neighbours of one peak.
    chosen = _estimates_apart(known, grid, count) if reduced else most_promising(known, count)
    return Climbed(climbs(poly, grid, known, chosen), poly, corners, exists)


@functools.partial(program, static_argnums=(1, 2, 5), brief=True)
@functools.partial(one_by_one, static_argnums=(1, 2, 5))
def proven_pair(found: Climbed, op, kernel_shape: tuple[int, ...], grid: Grid, excess, between: bool) -> Pair:
    """The pair of the largest singular value of the whole grid, up to rounding.

    No other singular value exceeds that of the pair by more than the share `excess`. With `between` the grid stands for
    the whole torus, and the frequency is exact.
    """
    peaks, poly, corners, exists = _all_of(found)
    peak = proven_peak(poly, grid, corners, exists, peaks, excess)
    return _at_site(at_maximum(poly, grid, peak) if between else peak, op, kernel_shape)


@functools.partial(program, static_argnums=(1, 2), brief=True)
def unproven_pair(found: Climbed, op, kernel_shape: tuple[int, ...], grid: Grid) -> Pair:
    """The pair of the highest peak that climbing has found, without a proof that none is higher."""
    peaks, poly, *_ = _all_of(found)
    return _at_site(unproven_peak(poly, grid, peaks), op, kernel_shape)


def several(
    found: Climbed, op, kernel_shape: tuple[int, ...], grid: Grid, count: int
) -> tuple[Float[Array, " peaks"], Pair]:
    """The highest of the peaks that climbing has found, without a proof that none is higher.

    A frequency next to that of a higher one, or to its opposite, is no peak of its own.

    Returns:
      `(values, pairs)`, stacks of at most `count`, the largest first; values are 0 where fewer were found.
    """
    peaks = _all_of(found).peaks
    chosen, values = _largest_apart(peaks.value, peaks.index, peaks.group, grid, count)
    return values, _at_site(picked(peaks, chosen), op, kernel_shape)


def _all_of(found: Climbed) -> Climbed:
    """`found` behind an optimization barrier, so that every program holds the same version of `climbed`, once.

    JAX removes what a place does not use, and would then keep a version for each place.
    """
    return lax.optimization_barrier(found)


def _at_site(peak: Peak, op: CircularConv, kernel_shape: tuple[int, ...]) -> Pair:
    """The peak as a pair; the rows of a transposed symbol are its outputs, and the columns its inputs."""
    sides = (peak.column.conj(), peak.row.conj()) if is_transposed(op, kernel_shape) else (peak.row, peak.column)
    return Pair(Site(peak.index, peak.group), *sides)


def _estimates_apart(known: Estimates, grid: Grid, count: int):
    """The places of the largest estimates, none next to a larger one of its group."""
    which, groups = np.indices(known.values.shape, np.int32).reshape((2, -1))
    return _largest_apart(known.values.reshape(-1), picked(known.index, jnp.asarray(which)), groups, grid, count)[0]


def _largest_apart(values: Float[Array, " n"], indices, groups, grid: Grid, count: int):
    """The indices of the largest values, and the values; none is next to a larger one of its group, or its opposite.

    Where fewer than `count` are left, the rest of the values are 0.
    """
    samples, groups = jnp.asarray(grid.samples)[None], jnp.asarray(groups)

    def near(other):
        # The indices are in the half grid, and the others in it or opposite to it.
        steps = lax.rem(indices - other[None] + samples, samples)
        return jnp.max(jnp.minimum(steps, samples - steps), axis=-1) <= 1

    def pick(k, state):
        left, chosen, found = state
        best = place_of_largest(left)
        index, group, value = picked((indices, groups, left), best)
        taken = (near(index) | near(-index)) & (groups == group)
        here = jnp.arange(count) == k
        chosen, found = jnp.where(here, best, chosen), jnp.where(here, jnp.maximum(value, 0), found)
        return jnp.where(taken, -1, left), chosen, found

    count = min(count, values.size)
    return lax.fori_loop(0, count, pick, (values, jnp.zeros(count, jnp.int32), jnp.zeros(count, values.dtype)))[1:]

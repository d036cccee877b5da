"""Peaks of the symbol: the highest one, with a proof, and several as far as climbing finds them.

A peak is a frequency where the largest singular value of the symbol has a local maximum (`climbing.py`). The search
with zero padding starts from several of them.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.indexing import picked
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.boxes import Grid, coarse_boxes
from jaxsrn.spectra.circular.branch_and_bound import highest_peak
from jaxsrn.spectra.circular.climbing import (
    MOST_CLIMBERS,
    Estimates,
    Peak,
    climbs,
    estimates,
    most_promising,
    num_climbers,
)
from jaxsrn.spectra.circular.grams import gram_polynomial, is_transposed
from jaxsrn.spectra.circular.newton import at_maximum
from jaxsrn.spectra.circular.sites import Site
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "highest",
    "several",
]


def highest(
    kernel: Float[Array, "..."],
    op,
    grid: Grid,
    counts: tuple[int, ...],
    is_reduced: bool,
    allowed,
    between: bool = False,
) -> Pair:
    """The pair of the largest singular value of the whole grid, up to a relative `2 sqrt(channels) eps`.

    With `allowed` no other singular value exceeds that of the pair by more than this share. With `between` the grid
    stands for the whole torus, and the frequency is exact. The kernel's scale must not be extreme (`rescaled` in
    `singular_pair.py`).
    """
    poly, (corners, exists) = gram_polynomial(kernel, op, is_reduced), coarse_boxes(grid, counts)
    known = estimates(poly, grid, corners, exists)
    found = climbs(poly, grid, known, most_promising(known, num_climbers(poly)))
    peak = highest_peak(poly, grid, corners, exists, found, allowed)
    return at_site(at_maximum(poly, grid, peak) if between else peak, op, kernel.shape)


def several(
    kernel: Float[Array, "..."], op, grid: Grid, counts: tuple[int, ...], is_reduced: bool, count: int, radius
) -> tuple[Float[Array, " peaks"], Pair]:
    """The highest peaks as far as climbing finds them, without a proof that none is higher.

    A frequency within `radius` indices of a higher one, or of its opposite, is no peak of its own.

    Returns:
      `(values, pairs)`, stacks of at most `count`, the largest first; values are 0 where fewer were found.
    """
    poly, (corners, exists) = gram_polynomial(kernel, op, is_reduced), coarse_boxes(grid, counts)
    known = estimates(poly, grid, corners, exists)
    # Where every frequency was estimated, the largest estimates are neighbours of one peak.
    chosen = _estimates_apart(known, grid, count, radius) if is_reduced else most_promising(known, MOST_CLIMBERS)
    found = climbs(poly, grid, known, chosen)
    chosen, values = _largest_apart(found.value, found.index, found.group, grid, count, radius)
    return values, at_site(picked(found, chosen), op, kernel.shape)


def at_site(peak: Peak, op: CircularConv, kernel_shape: tuple[int, ...]) -> Pair:
    """The peak as a pair; the rows of a transposed symbol are its outputs, and the columns its inputs."""
    sides = (peak.column.conj(), peak.row.conj()) if is_transposed(op, kernel_shape) else (peak.row, peak.column)
    return Pair(Site(peak.index, peak.group), *sides)


def _estimates_apart(known: Estimates, grid: Grid, count: int, radius):
    """The places of the largest estimates, none near a larger one of its group."""
    which, groups = np.indices(known.values.shape, np.int32).reshape((2, -1))
    return _largest_apart(
        known.values.reshape(-1), picked(known.index, jnp.asarray(which)), groups, grid, count, radius
    )[0]


def _largest_apart(values: Float[Array, " n"], indices, groups, grid: Grid, count: int, radius):
    """The indices of the largest values, and the values; none is near a larger one of its group, or its opposite.

    Where fewer than `count` are left, the rest of the values are 0.
    """
    samples, groups = jnp.asarray(grid.samples)[None], jnp.asarray(groups)

    def near(other):
        # The indices are in the half grid, and the others in it or opposite to it.
        steps = lax.rem(indices - other[None] + samples, samples)
        return jnp.max(jnp.minimum(steps, samples - steps), axis=-1) <= radius

    def pick(k, state):
        left, chosen, found = state
        best = lax.argmax(left, 0, jnp.int32)
        index, group, value = picked((indices, groups, left), best)
        taken = (near(index) | near(-index)) & (groups == group)
        here = jnp.arange(count) == k
        chosen, found = jnp.where(here, best, chosen), jnp.where(here, jnp.maximum(value, 0), found)
        return jnp.where(taken, -1, left), chosen, found

    count = min(count, values.size)
    return lax.fori_loop(0, count, pick, (values, jnp.zeros(count, jnp.int32), jnp.zeros(count, values.dtype)))[1:]

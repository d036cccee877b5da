"""Boxes of frequencies, from coarse to fine, which branch and bound discards or splits.

A **box** is a product of index ranges of the half grid. Its centre may lie between two frequencies, so that centres are
kept doubled, as integers. `branch_and_bound.py` derives the factor that a box's value may fall by.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.grams import is_reduced
from jaxsrn.spectra.circular.grid_certificate import degrees, overshoot
from jaxsrn.spectra.circular.sites import half_grid

__all__ = [
    "Boxes",
    "boxes_of",
    "doubled_centres",
]

# The widest boxes have at most this phi (`branch_and_bound.py`). Wider ones are discarded too rarely in a flat
# spectrum, and narrower ones are too many.
_WIDEST = 0.6


class Boxes(NamedTuple):
    """Boxes of indices of the half grid on several levels, from coarse to fine (static).

    Attributes:
      sizes: `(levels, axes)`, the edges of boxes; on the last level they are 1.
      corners: `(boxes, axes)`, the lowest indices of the coarsest boxes.
      ends: `(axes,)`, the shape of the half grid.
      factors: `(levels,)`; a box with a frequency of value `L`, the grid's maximum, has at least `L` times this at its
        centre.
    """

    sizes: np.ndarray
    corners: np.ndarray
    ends: np.ndarray
    factors: np.ndarray


def boxes_of(op: CircularConv, kernel_shape: tuple[int, ...]) -> Boxes:
    """Boxes that start at `_WIDEST`; single frequencies where no width is certified, or the kernel is reduced."""
    per_axis, ends = np.array(degrees(op, kernel_shape)), np.array(half_grid(op))
    # This is half the step between neighbouring frequencies, in the measure of phi.
    rate = np.pi * per_axis / (2 * np.array(op.grid))
    beyond = overshoot(op, kernel_shape)
    certified = math.isfinite(beyond)
    excess = math.sqrt(beyond**2 - 1) if certified else 0.0
    share = _WIDEST / max(1, np.count_nonzero(per_axis))
    sizes = [np.ones_like(ends)]
    # The Gram matrices of reduced kernels are for single frequencies.
    while certified and not is_reduced(op, kernel_shape):
        wider = np.where((sizes[0] < ends) & (rate * (2 * sizes[0] - 1) <= share), 2 * sizes[0], sizes[0])
        if np.all(wider == sizes[0]):
            break
        sizes.insert(0, wider)
    phi = np.sum(rate * (np.array(sizes) - 1), axis=-1)
    corners = np.array(list(itertools.product(*(range(0, e, s) for e, s in zip(ends, sizes[0], strict=True)))))
    if len(sizes) == 1:
        corners = _without_mirrored(corners, op.grid)
    return Boxes(np.array(sizes), corners, ends, np.cos(phi) - excess * np.sin(phi))


def _without_mirrored(indices: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """The indices without one of each opposite pair, as the ends of the half grid's last axis have both.

    The ranks order indices by the last axis first.
    """

    def rank(indices):
        return np.ravel_multi_index(indices[:, ::-1].T, grid[::-1])

    return indices[rank(indices) <= rank(-indices % np.array(grid))]


def doubled_centres(corners, sizes, ends):
    """Twice the central indices of boxes, of which the last ones are cut off at the end of the half grid."""
    return corners + (corners + sizes).clip(max=ends[None]) - 1

"""Grids cut into boxes of frequencies, from coarse to fine, which branch and bound discards or splits.

A **box** is a product of index ranges of the half grid. Its centre may lie between two frequencies, so that centres are
kept doubled, as integers. Boxes of level `l` have edges of `ceil(size / 2**l)` indices; on the last level they are
single frequencies. How far apart the frequencies of a box are is measured by `phi` (`branch_and_bound.py`).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.angles import Angles, angles_of
from jaxsrn.spectra.circular.grid_certificate import degrees, overshoot
from jaxsrn.spectra.circular.sites import half_grid

__all__ = [
    "Grid",
    "centres",
    "coarse_boxes",
    "grid_of",
    "num_boxes",
    "on_half_grid",
    "spans",
    "split",
]

# The widest boxes have at most this phi. Wider ones are discarded too rarely in a flat spectrum, and narrower ones are
# too many.
_WIDEST = 0.6


class Grid(NamedTuple):
    """All that a search needs to know of a grid: numbers alone, so that one program serves every image size.

    Attributes:
      angles: the angles of its frequencies.
      samples: the number of frequencies on each axis.
      ends: the shape of the half grid.
      sizes: the edges of the coarsest boxes.
      last_level: the level of single frequencies.
      finest: the steps between frequencies whose singular values differ by less than rounding at a maximum.
      rates: what a half step between neighbouring frequencies adds to phi.
      tangent: `sqrt(U^2 / L^2 - 1)` with the bound `U / L` of `overshoot`, the tangent of `arccos(L / U)`.
    """

    angles: Angles
    samples: Int[Array, " axes"]
    ends: Int[Array, " axes"]
    sizes: Int[Array, " axes"]
    last_level: Int[Array, ""]
    finest: Int[Array, " axes"]
    rates: Float[Array, " axes"]
    tangent: Float[Array, ""]


def _share(op: CircularConv, kernel_shape: tuple[int, ...]) -> np.ndarray:
    """The largest boxes as a share of the whole axis (static)."""
    per_axis = np.array(degrees(op, kernel_shape))
    share = _WIDEST / max(1, np.count_nonzero(per_axis))
    return np.minimum(1.0, 2 * share / (np.pi * np.maximum(per_axis, 1)))


def _takes_single_frequencies(op: CircularConv, kernel_shape, reduced: bool) -> bool:
    # The Gram matrices of reduced kernels (`grams.py`) are for single frequencies.
    return reduced or not math.isfinite(overshoot(op, kernel_shape))


def grid_of(op: CircularConv, kernel_shape: tuple[int, ...], dtype, reduced: bool = False) -> Grid:
    """The grid of a layer; its boxes are single frequencies where no width is certified, or the kernel is reduced."""
    samples, ends = np.array(op.grid), np.array(half_grid(op))
    per_axis = np.array(degrees(op, kernel_shape))
    tangent, sizes = 0.0, np.ones_like(ends)
    if not _takes_single_frequencies(op, kernel_shape, reduced):
        tangent = math.sqrt(overshoot(op, kernel_shape) ** 2 - 1)
        wide = 1 + np.floor(_share(op, kernel_shape) * samples).astype(int)
        sizes = np.minimum(ends, np.where(per_axis == 0, ends, wide))
    return Grid(
        angles_of(op.grid, dtype),
        samples.astype(np.int32),
        ends.astype(np.int32),
        sizes.astype(np.int32),
        np.asarray(int(np.max(sizes) - 1).bit_length(), np.int32),
        (samples * math.sqrt(jnp.finfo(dtype).eps) / (2 * np.pi * np.maximum(per_axis, 1))).astype(np.int32),
        (np.pi * per_axis / (2 * samples)).astype(dtype),
        np.asarray(tangent, dtype),
    )


def num_boxes(op: CircularConv, kernel_shape: tuple[int, ...], reduced: bool = False) -> tuple[int, ...]:
    """How many coarse boxes an axis has at most (static): the same for all image sizes, but for the smallest."""
    if _takes_single_frequencies(op, kernel_shape, reduced):
        return half_grid(op)
    share, axes = _share(op, kernel_shape), len(op.grid)
    whole = [1 if d == 0 else math.ceil(1 / s) for d, s in zip(degrees(op, kernel_shape), share, strict=True)]
    if whole[-1] > 1:
        whole[axes - 1] = math.ceil(1 / (2 * share[-1])) + 1
    return tuple(whole)


def coarse_boxes(grid: Grid, counts: tuple[int, ...]) -> tuple[Int[Array, "boxes axes"], Bool[Array, " boxes"]]:
    """The corners of the coarsest boxes, which cover the half grid, and which of them exist."""
    which = np.array(list(itertools.product(*map(range, counts))), np.int32)
    corners = which * jnp.asarray(grid.sizes)[None]
    exists = jnp.all(corners < grid.ends[None], axis=-1)
    return jnp.minimum(corners, jnp.asarray(grid.ends - grid.sizes)[None]), exists


def spans(grid: Grid, levels: Int[Array, " boxes"]) -> Int[Array, "boxes axes"]:
    """How far the last index of a box of the given level is from its corner, on each axis."""
    return jnp.right_shift(jnp.asarray(grid.sizes - 1)[None], levels[:, None])


def centres(corners: Int[Array, "boxes axes"], reach: Int[Array, "#boxes axes"]) -> Int[Array, "boxes axes"]:
    """Twice the central indices of boxes of the given `spans`."""
    return 2 * corners + reach


def split(grid: Grid, corners, reach, levels):
    """The corners of the halves of each box on the next level, `(boxes, halves, axes)`, and which of them exist.

    The boxes are given by their corners, their `spans` and their levels. A single frequency is its own and only half.
    """
    upper = np.array(list(itertools.product((0, 1), repeat=corners.shape[-1])), np.int32)
    steps = (reach - spans(grid, levels + 1))[:, None]
    exists = jnp.all((upper[None] == 0) | (steps > 0), axis=-1)
    return corners[:, None] + upper[None] * steps, exists


def on_half_grid(grid: Grid, index: Int[Array, "n axes"]) -> tuple[Int[Array, "n axes"], Bool[Array, "n 1"]]:
    """The indices in the half grid, and which of them are those of the opposite frequency."""
    samples = jnp.asarray(grid.samples)[None]
    # Steps lead at most one turn beyond the grid, on either side.
    index = lax.rem(index + samples, samples)
    mirrored = index[:, -1:] >= grid.ends[-1]
    return jnp.where(mirrored, lax.rem(samples - index, samples), index), mirrored

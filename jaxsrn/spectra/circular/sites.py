"""The torus of frequencies, its grids, and the sites of a grid: the frequencies that determine all others.

The **torus** is the set of all frequencies, one angle for each spatial axis. A circular layer with `n` output samples
on an axis sees `n` equidistant angles of it; these frequencies are its **grid**. A layer on an unbounded image sees the
whole torus, for which a grid of `2**24` angles stands (`on_grid`). The kernel is real, so the symbol has
`S(-w) = conj(S(w))`, and half of the last axis determines the rest: the **half grid**. A **site** is one frequency of
the half grid and one group.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.unbounded import UnboundedConv

__all__ = [
    "ShiftedSite",
    "Site",
    "among",
    "distinct_sites",
    "half_grid",
    "multiplicity",
    "on_grid",
    "repetitions",
    "sites_at",
    "stands_for_torus",
    "without_constant_axes",
    "without_edges",
]

# Angles per axis that stand for a whole axis of the torus. By the grid certificate (`grid_certificate.py`) the supremum
# exceeds the maximum over them by less than 1e-13 with taps of degree 2, and by 4e-11 with degree 100.
_FINE = 2**24


class Site(NamedTuple):
    """One frequency and one group.

    Attributes:
      index: the index of the frequency on each axis of the grid.
      group: the index of the group.
    """

    index: Int[Array, "... axes"]
    group: Int[Array, "..."]


class ShiftedSite(NamedTuple):
    """A site whose frequency has radians added to it, for derivatives in the frequency; their number is 0."""

    index: Int[Array, " axes"]
    group: Int[Array, ""]
    shift: Float[Array, " axes"]


def without_edges(op: CircularConv | UnboundedConv | ZeroPaddedConv) -> UnboundedConv:
    """The convolution of the same taps on an image without edges; an input dilation is left out."""
    return UnboundedConv(
        strides=op.strides, kernel_dilation=op.kernel_dilation, feature_group_count=op.feature_group_count
    )


def on_grid(op: CircularConv | UnboundedConv, kernel_shape: tuple[int, ...]) -> CircularConv:
    """The circular layer whose grid stands for the frequencies that the operator sees.

    That is the layer itself, or for an unbounded one a layer with `_FINE` angles on each axis.
    """
    if isinstance(op, CircularConv):
        return op
    strides, dilations = op._axis_strides(kernel_shape), op._per_axis("kernel_dilation", kernel_shape)
    return CircularConv(
        tuple(_FINE * s for s in strides),
        strides=strides,
        # Without a stride the dilation only repeats the spectrum.
        kernel_dilation=tuple(1 if s == 1 else e for s, e in zip(strides, dilations, strict=True)),
        feature_group_count=op.feature_group_count,
    )


def stands_for_torus(op: CircularConv) -> bool:
    """Whether the grid is one that stands for the whole torus."""
    return max(op.grid) >= _FINE


def among(site: Site, coarse: CircularConv, fine: CircularConv) -> Site:
    """A site of a coarse grid as that of a fine one, which has a multiple of its angles on each axis."""
    finer = (np.array(fine.grid) // np.array(coarse.grid)).astype(np.int32)
    return site._replace(index=site.index * finer.reshape((1,) * (site.index.ndim - 1) + finer.shape))


def half_grid(op: CircularConv) -> tuple[int, ...]:
    """The shape of the half grid."""
    return (*op.grid[:-1], op.grid[-1] // 2 + 1)


def without_constant_axes(op: CircularConv, kernel_shape: tuple[int, ...]) -> CircularConv:
    """The layer on a smaller image: all frequencies along an axis of one tap have the same singular values."""
    axes = zip(op.input_shape, op.strides, kernel_shape, strict=False)
    return dataclasses.replace(op, input_shape=tuple(s if taps == 1 else n for n, s, taps in axes))


def repetitions(op: CircularConv, layer: CircularConv) -> int:
    """How many times the whole layer has each singular value of `layer`, the one without constant axes."""
    return math.prod(op.grid) // math.prod(layer.grid)


def multiplicity(op: CircularConv) -> np.ndarray:
    """The number of frequencies of the full grid that each site stands for, 1 or 2."""
    last = np.arange(half_grid(op)[-1])
    # The columns 0 and n/2 of the half grid hold both frequencies of each opposite pair.
    counts = np.where((last == 0) | (2 * last == op.grid[-1]), 1, 2)
    return np.repeat(np.broadcast_to(counts, half_grid(op)), op.feature_group_count)


def sites_at(op: CircularConv, flat: np.ndarray) -> Site:
    """The sites that have the given places in the order of the half grid, with groups last (static)."""
    *index, group = np.unravel_index(flat, (*half_grid(op), op.feature_group_count))
    return Site(np.stack(index, axis=-1).astype(np.int32), group.astype(np.int32))


def distinct_sites(op: CircularConv) -> tuple[np.ndarray, np.ndarray]:
    """Places of sites at no two opposite frequencies, and how many frequencies each stands for, 1 or 2."""
    index = np.indices(half_grid(op)).reshape((op.num_axes, -1))
    shape = np.array(op.grid)[:, None]
    own, conjugate = (np.ravel_multi_index(tuple(i), op.grid) for i in (index, -index % shape))
    # The opposite frequency has another last index, and lies outside the half grid, except in the columns 0 and n/2.
    kept = (own <= conjugate) | (2 * index[-1] % op.grid[-1] != 0)
    sites = np.flatnonzero(np.repeat(kept, op.feature_group_count))
    return sites, np.where(_is_self_conjugate(op)[sites], 1, 2)


def _is_self_conjugate(op: CircularConv) -> np.ndarray:
    """Which sites are at a self-opposite frequency, `w = -w` modulo 2 pi on every axis, where `S(w)` is real."""
    axes = [2 * np.arange(m) % n == 0 for m, n in zip(half_grid(op), op.grid, strict=True)]
    return np.repeat(functools.reduce(np.logical_and.outer, axes), op.feature_group_count)

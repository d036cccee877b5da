"""The torus of frequencies, its grids, and the sites of a grid: the frequencies that determine all others.

The **torus** is the set of all frequencies, one angle for each spatial axis. A circular layer with `n` output samples
on an axis sees `n` equidistant angles of it; these frequencies are its **grid**. The kernel is real, so the symbol has
`S(-w) = conj(S(w))`, and half of the last axis determines the rest: the **half grid**. A **site** is the flat index of
one (frequency, group) of the half grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsrn.operators.convolutions import CircularConv

__all__ = [
    "distinct_sites",
    "half_grid",
    "is_self_conjugate",
    "locate",
    "multiplicity",
    "repetitions",
    "same_site",
    "site_at",
    "times_modulo",
    "without_constant_axes",
]


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


def distinct_sites(op: CircularConv) -> tuple[np.ndarray, np.ndarray]:
    """Sites at no two opposite frequencies, and how many frequencies of the full grid each stands for, 1 or 2."""
    index = np.indices(half_grid(op)).reshape((op.num_axes, -1))
    shape = np.array(op.grid)[:, None]
    own, conjugate = (np.ravel_multi_index(tuple(i), op.grid) for i in (index, -index % shape))
    # The opposite frequency has another last index, and lies outside the half grid, except in the columns 0 and n/2.
    kept = (own <= conjugate) | (2 * index[-1] % op.grid[-1] != 0)
    sites = np.flatnonzero(np.repeat(kept, op.feature_group_count))
    return sites, np.where(is_self_conjugate(op)[sites], 1, 2)


def is_self_conjugate(op: CircularConv) -> np.ndarray:
    """Which sites are at a self-opposite frequency, `w = -w` modulo 2 pi on every axis, where `S(w)` is real."""
    axes = [2 * np.arange(m) % n == 0 for m, n in zip(half_grid(op), op.grid, strict=True)]
    return np.repeat(functools.reduce(np.logical_and.outer, axes), op.feature_group_count)


def locate(op: CircularConv, site: Int[Array, ""]) -> tuple[tuple[Int[Array, ""], ...], Int[Array, ""]]:
    """The index of the frequency on each axis, and the group, of a site."""
    *index, group = jnp.unravel_index(site, (*half_grid(op), op.feature_group_count))
    return tuple(index), group


def site_at(op: CircularConv, index, group: Int[Array, "..."]) -> Int[Array, "..."]:
    """The site at an index of the frequency on each axis and a group."""
    return jnp.ravel_multi_index((*index, group), (*half_grid(op), op.feature_group_count), mode="clip")


def same_site(op: CircularConv, smaller: CircularConv, site: Int[Array, ""]) -> Int[Array, ""]:
    """The site of `op` that has the same indices and group as a site of a layer on a smaller grid."""
    return site_at(op, *locate(smaller, site))


def times_modulo(index: Int[Array, "..."], factor: np.ndarray, n: int) -> Int[Array, "..."]:
    """`index * factor % n` for indices in `[0, n)`, by bits of the static factor where 32 bits might be too few."""
    if n * int(np.max(np.abs(factor), initial=0)) < 2**31:
        return index * factor % n
    factor, total = factor % n, jnp.zeros_like(index * factor)
    for bit in range(n.bit_length()):
        total = (total + (factor >> bit & 1) * index) % n
        index = 2 * index % n
    return total

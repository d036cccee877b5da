"""The grid certificate: how much larger than on a grid the symbol can be between its frequencies, and coarse grids.

For a unit vector `x`, `||S(w) x||^2` is a non-negative trigonometric polynomial of degree `d_j` in the angle of axis
`j`. An inequality of M. Riesz bounds how fast such a polynomial can fall from its maximum, and so what a grid of `n_j`
angles can miss of it, wherever it begins:

    sup_w sigma_max(S(w))  <=  max_grid sigma_max(S) / prod_j cos(pi d_j / (2 n_j)),      n_j > d_j.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.fourier import polyphase
from jaxsrn.spectra.circular.sites import on_grid, without_edges

__all__ = ["degrees", "on_coarse_grid", "on_dividing_grid", "overshoot"]


def degrees(op: CircularConv, kernel_shape: tuple[int, ...]) -> list[int]:
    """The degree of `||S(w) x||^2` as a trigonometric polynomial in the angle of each axis."""
    return [int(np.ptp(exponent)) for exponent, _ in polyphase(op, kernel_shape)]


def overshoot(op: CircularConv, kernel_shape: tuple[int, ...]) -> float:
    """A factor: the supremum of the singular values over the torus is at most this times their maximum on the grid.

    It is `1 / prod_j cos(pi d_j / (2 n_j))`, with degree `d_j` and `n_j` angles on axis `j`. It is infinite where the
    grid has too few angles for the inequality.
    """
    ratios = [d / n for d, n in zip(degrees(op, kernel_shape), op.grid, strict=True)]
    return 1 / math.prod(math.cos(math.pi * r / 2) for r in ratios) if max(ratios) < 1 else math.inf


def on_coarse_grid(op: CircularConv | UnboundedConv, kernel_shape: tuple[int, ...], per_degree: int) -> CircularConv:
    """The layer of the same taps on a grid of `per_degree` angles per degree of its symbol on each axis."""
    layer = on_grid(without_edges(op), kernel_shape)
    return _with_angles(layer, [per_degree * d for d in degrees(layer, kernel_shape)])


def on_dividing_grid(
    op: CircularConv | UnboundedConv | ZeroPaddedConv,
    kernel_shape: tuple[int, ...],
    per_degree: int,
    log2_most=math.inf,
) -> CircularConv:
    """The layer of the same taps on a grid of at least `per_degree` angles per degree, at most `2**log2_most`.

    The numbers of angles are powers of two. They divide the angles of the grid that stands for the torus, so that their
    frequencies are some of that grid's.
    """
    layer = on_grid(without_edges(op), kernel_shape)
    powers = [(d, min(math.ceil(math.log2(per_degree * max(d, 1))), log2_most)) for d in degrees(layer, kernel_shape)]
    return _with_angles(layer, [2**power if d else 0 for d, power in powers])


def _with_angles(layer: CircularConv, angles: list[int]) -> CircularConv:
    """The layer with these numbers of angles on its axes; one angle where the symbol is constant."""
    return dataclasses.replace(
        layer, input_shape=tuple(max(m, 1) * s for m, s in zip(angles, layer.strides, strict=True))
    )

"""The grid certificate: an upper bound of the singular values between the frequencies of a grid.

For a unit vector `x`, `||S(w) x||^2` is a non-negative trigonometric polynomial in the angle of each axis. An
inequality of M. Riesz bounds how fast such a polynomial can fall from its maximum, and so what a grid can miss of it.
Only the maximum over the grid is needed. A bound over the torus holds for every image size.
"""

from __future__ import annotations

import math

import numpy as np

from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import polyphase

__all__ = [
    "degrees",
    "overshoot",
]


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

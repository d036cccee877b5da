"""The grid certificate: how far the symbol can rise between the frequencies of a grid."""

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
    """The degree of `||S(w) x||^2` in the angle of each axis."""
    return [int(np.ptp(exponent)) for exponent, _ in polyphase(op, kernel_shape)]


def overshoot(op: CircularConv, kernel_shape: tuple[int, ...]) -> float:
    """The supremum of the singular values over all frequencies is at most this times their maximum on the grid.

    `1 / prod_j cos(pi d_j / (2 n_j))` (M. Riesz); infinite where the grid is too coarse to say anything.
    """
    ratios = [d / n for d, n in zip(degrees(op, kernel_shape), op.grid, strict=True)]
    return 1 / math.prod(math.cos(math.pi * r / 2) for r in ratios) if max(ratios) < 1 else math.inf

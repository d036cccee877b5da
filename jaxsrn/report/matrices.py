"""Norms of matrices by LAPACK in float64, for numbers that no program is compiled for.

A report asks once for each of many shapes. Up to a thousand rows or columns the largest eigenvalue of the smaller Gram
matrix takes less time than the search of `jaxsrn.spectral_norm` together with the compilation of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.linalg

from jaxsrn.bounds import NormInterval

__all__ = ["Numbers", "numbers_of_matrix", "relative_distance", "singular_values_of_matrix"]

# The most entries of a block of rows: the Gram matrix is a sum over such blocks, so that only one is held in float64.
_BLOCK = 2**22


class Numbers(NamedTuple):
    """The spectral norm of a layer, an interval that holds it, and the stable rank."""

    spectral_norm: float
    norm_interval: NormInterval
    stable_rank: float


def numbers_of_matrix(matrix: np.ndarray) -> Numbers:
    """The numbers of a matrix of any scale; NaN where an entry is not finite.

    The interval has room for rounding. A Gram matrix of sums over `m` rows is off by at most `m eps ||A||_F^2` (Higham
    2002, Accuracy and stability of numerical algorithms, section 3.5), and LAPACK's eigenvalues by a few `n eps` times
    the largest one.
    """
    scale = float(np.max(np.abs(matrix), initial=0))
    if scale == 0 or not math.isfinite(scale):
        number = scale if scale == 0 else math.nan
        return Numbers(number, NormInterval(number, number), number)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = _gram(tall, scale)
    last = len(gram) - 1
    largest = scipy.linalg.eigvalsh(gram, subset_by_index=(last, last)).item()
    norm, rank = scale * math.sqrt(largest), float(np.trace(gram)) / largest
    slack = np.finfo(np.float64).eps * (len(tall) * rank + 10 * len(gram))
    return Numbers(norm, NormInterval(norm * (1 - slack), norm * (1 + slack)), rank)


def _gram(tall: np.ndarray, scale: float) -> np.ndarray:
    """`A^T A / scale^2` in float64."""
    rows = max(1, _BLOCK // tall.shape[1])
    gram = np.zeros((tall.shape[1],) * 2)
    for start in range(0, len(tall), rows):
        block = tall[start : start + rows].astype(np.float64) / scale
        gram += block.T @ block
    return gram


def relative_distance(first: np.ndarray, second: np.ndarray) -> float:
    """`||B - A||_F / ||A||_F` in float64: infinite from zeros to anything else, NaN where the shapes differ."""
    if first.shape != second.shape:
        return math.nan
    a, b = first.astype(np.float64), second.astype(np.float64)
    size, moved = np.linalg.norm(a), np.linalg.norm(b - a)
    return float(moved / size) if size else math.inf if moved else 0.0


def singular_values_of_matrix(matrix: np.ndarray) -> np.ndarray:
    """All singular values in float64, the largest first; NaN where an entry is not finite."""
    if not np.all(np.isfinite(matrix)):
        return np.full(min(matrix.shape), np.nan)
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)

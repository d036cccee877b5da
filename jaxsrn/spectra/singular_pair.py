"""The record of a singular pair, the same for every operator, and the scale in which pairs are looked for."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Shaped

from jaxsrn._tools.checks import float_dtype
from jaxsrn._tools.linalg import by_largest, unit
from jaxsrn._tools.tolerances import DENSE_SIZE
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import ZeroPaddedConv

__all__ = [
    "Found",
    "Pair",
    "ensure_formable",
    "has_small_matrices",
    "idle_taps",
    "is_small",
    "matrix_size",
    "of_unit_vectors",
    "rescaled",
    "without_idle_taps",
]

# The most entries of small kernels, and of small images. With larger ones a run takes longer than the optimization of
# its program (`python benchmarks/compilation --only generators`).
_SMALL_KERNEL, _SMALL_IMAGE = 2**18, 2**15


class Pair(NamedTuple):
    """Unit vectors on the two sides of a map: `u` among its inputs and `v` among its outputs.

    They stand for the singular value `<v, T(K) u>`. A pair of a circular or unbounded layer is a plane wave, stored as
    its complex amplitudes at one `Site`, a frequency and a group (`circular/sites.py`). A pair of any other layer is
    the two vectors themselves, without a site.

    Attributes:
      site: where the pair is: a `Site`, or `None`.
      input: the amplitudes of the input channels (times phases), or a vector of `in_shape`.
      output: the amplitudes of the output channels, or a vector of `out_shape`.
    """

    site: Any
    input: Inexact[Array, "..."]
    output: Inexact[Array, "..."]


def of_unit_vectors(pair: Pair) -> Pair:
    """The pair with both vectors of norm 1."""
    return pair._replace(input=unit(pair.input), output=unit(pair.output))


class Found(NamedTuple):
    """A pair and its singular value."""

    value: Float[Array, ""]
    pair: Pair


def matrix_size(op: Operator, kernel_shape: tuple[int, ...]) -> int:
    """The number of entries of the explicit matrix (static)."""
    return math.prod(op.in_shape(kernel_shape)) * math.prod(op.out_shape(kernel_shape))


def has_small_matrices(op: Operator, kernel_shape: tuple[int, ...], most: int) -> bool:
    """Whether all singular values are those of the kernel, of a symbol, or of `most` entries at most (static)."""
    return not op._needs_explicit_matrix or matrix_size(op, kernel_shape) <= most


def ensure_formable(op: Operator, kernel_shape: tuple[int, ...], instead: str) -> None:
    """Raises `ValueError` where an explicit matrix is needed and too large; `instead` is a call that never forms it."""
    if not has_small_matrices(op, kernel_shape, DENSE_SIZE):
        raise ValueError(
            f"kernel: the explicit matrix of {op} has {matrix_size(op, kernel_shape)} entries, expected at most "
            f"{DENSE_SIZE}; use {instead}, which never forms it."
        )


def is_small(kernel: Float[Array, "..."], op: Operator, *_) -> bool:
    """Whether the layer is so small that many products with its map are brief (static; `_tools/programs.py`)."""
    image = math.prod(op.in_shape(kernel.shape)) if isinstance(op, ZeroPaddedConv) else 0
    return kernel.size <= _SMALL_KERNEL and image <= _SMALL_IMAGE


def rescaled(kernel: Shaped[Array, "..."], op: Operator) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """The same map up to its scale: `(kernel / scale, scale)` in float32 or wider, with the scale of `by_largest`.

    Squares of very small or large kernels leave the range of the dtype, and pairs and stable ranks have no scale.
    """
    return by_largest(without_idle_taps(kernel.astype(float_dtype(kernel.dtype)), op))


def without_idle_taps(kernel: Float[Array, "..."], op: Operator) -> Float[Array, "..."]:
    """The kernel with 0 in place of taps that meet no sample, which have no part in the map; NaN stays NaN."""
    idle = idle_taps(op, kernel.shape)
    return kernel * jnp.asarray(~idle, kernel.dtype) if idle.any() else kernel


# It takes up to 1 ms, which every eager call would pay.
@functools.lru_cache(maxsize=1024)
def idle_taps(op: Operator, kernel_shape: tuple[int, ...]) -> np.ndarray:
    """Which taps meet no sample (static)."""
    return op._tap_counts(kernel_shape) == 0

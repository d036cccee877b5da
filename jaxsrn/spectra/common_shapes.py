"""Common shapes: matrices of many sizes that share few compiled programs.

Rows and columns of zeros change neither norms nor stable ranks. So a matrix whose numbers are asked for eagerly is
filled up with them, and a network of many dense and 1x1 layers compiles a handful of programs. A traced kernel is
compiled together with what surrounds it, and stays as it is.
"""

from __future__ import annotations

import math

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import UnboundedConv

__all__ = ["as_matrix", "common_shape", "filled_up", "in_common_shape", "is_matrix"]

# The sides of common shapes: few, so that few programs are compiled.
_SIDES = (32, 128, 512, 2048)
# The most entries of the filled matrix for one of the matrix: more would cost more in every call than a compilation.
_MOST_FILLING = 4


def in_common_shape(kernel: Shaped[Array, "..."], op: Operator) -> tuple[Shaped[Array, "..."], Operator]:
    """The kernel and operator of a layer with the same norm and stable rank, for calls that are not traced.

    Dense layers, and convolutions without edges whose kernel has one tap, become matrices of a common shape. All other
    layers are returned as they are.
    """
    if isinstance(kernel, jax.core.Tracer) or not is_matrix(kernel.shape, op) or len(kernel.devices()) > 1:
        return kernel, op
    shape = common_shape(*kernel.shape[-2:])
    # A shape that is not common is the matrix's own, and it is not worth a copy to exchange its sides.
    if shape == kernel.shape or not set(shape) <= set(_SIDES):
        return kernel, op
    filled = filled_up(np.asarray(kernel).reshape(kernel.shape[-2:]), shape)
    # Where nobody chose a device, choosing one would be another program.
    return (jax.device_put(filled, kernel.sharding) if kernel.committed else jnp.asarray(filled)), Dense()


def as_matrix(kernel: Shaped[Array, "..."], op: Operator) -> tuple[Shaped[Array, "..."], Operator]:
    """The kernel and operator in which the layer is computed, a matrix where it is one (`is_matrix`)."""
    kernel, op = op._flattened(kernel)
    return (kernel.reshape(kernel.shape[-2:]), Dense()) if is_matrix(kernel.shape, op) else (kernel, op)


def is_matrix(kernel_shape: tuple[int, ...], op: Operator) -> bool:
    """Whether the layer does the same to every sample, and no image size is named (static)."""
    is_one_tap = isinstance(op, UnboundedConv) and math.prod(kernel_shape[:-2]) == 1 == op.feature_group_count
    return isinstance(op, Dense) or is_one_tap


def common_shape(rows: int, columns: int) -> tuple[int, int]:
    """The common shape of a matrix or of its transpose; its own shape, the smaller side first, where none is close."""
    own = min(rows, columns), max(rows, columns)
    common = _common(own[0]), _common(own[1])
    return common if math.prod(common) <= _MOST_FILLING * math.prod(own) else own


def filled_up(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The matrix, or its transpose if it is tall, with rows and columns of zeros; by NumPy, which compiles nothing."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    filled = np.zeros(shape, matrix.dtype)
    filled[: wide.shape[0], : wide.shape[1]] = wide
    return filled


def _common(side: int) -> int:
    """The smallest common side that holds this one; larger sides stay."""
    return next((common for common in _SIDES if side <= common), side)

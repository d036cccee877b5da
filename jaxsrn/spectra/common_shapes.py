"""Common shapes: matrices of many sizes that share few compiled programs.

Rows and columns of zeros change neither norms nor stable ranks, and a convolution of one tap has the norm of a matrix,
whatever its image and its padding. So where numbers are asked for eagerly, such a kernel is filled up with zeros, and a
network of many dense and 1x1 layers compiles a handful of programs. A traced kernel is compiled together with what
surrounds it, and stays as it is.
"""

from __future__ import annotations

import math

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.unbounded import UnboundedConv

__all__ = ["as_matrix", "in_common_shape", "is_matrix", "num_copies"]

# The sides of common shapes: few, so that few programs are compiled.
_SIDES = (32, 128, 512, 2048)
# The most entries of the filled matrix for one of the matrix: more would cost more in every call than a compilation.
_MOST_FILLING = 4


def in_common_shape(kernel: Shaped[Array, "..."], op: Operator) -> tuple[Shaped[Array, "..."], Operator, int]:
    """A kernel and an operator with the norm of this layer, for calls that are not traced.

    Dense layers, and convolutions whose kernel has one tap, become matrices of a common shape. All other layers are
    returned as they are.

    Returns:
      `(kernel, op, copies)`: the stable rank of the layer is `copies` times that of the kernel and operator.
    """
    copies = 0 if isinstance(kernel, jax.core.Tracer) else num_copies(kernel.shape, op)
    if not copies or len(kernel.devices()) > 1:
        return kernel, op, 1
    shape = _common_shape(*kernel.shape[-2:])
    # A shape that is not common is the matrix's own, and it is not worth a copy to exchange its sides.
    if shape == kernel.shape or not set(shape) <= set(_SIDES):
        return kernel, op, 1
    filled = _filled_up(np.asarray(kernel).reshape(kernel.shape[-2:]), shape)
    # Where nobody chose a device, choosing one would be another program.
    return (jax.device_put(filled, kernel.sharding) if kernel.committed else jnp.asarray(filled)), Dense(), copies


def as_matrix(kernel: Shaped[Array, "..."], op: Operator) -> tuple[Shaped[Array, "..."], Operator]:
    """The kernel and operator in which the layer is computed, a matrix where it is one (`is_matrix`)."""
    kernel, op = op._flattened(kernel)
    return (kernel.reshape(kernel.shape[-2:]), Dense()) if is_matrix(kernel.shape, op) else (kernel, op)


def is_matrix(kernel_shape: tuple[int, ...], op: Operator) -> bool:
    """Whether the layer does the same to every sample, and no image size is named (static)."""
    return isinstance(op, (Dense, UnboundedConv)) and num_copies(kernel_shape, op) == 1


def num_copies(kernel_shape: tuple[int, ...], op: Operator) -> int:
    """How many times the layer applies one matrix, each time to other samples; 0 where it does something else (static).

    Of an unbounded convolution it is one, as its stable rank is that per output sample.
    """
    if isinstance(op, Dense):
        return 1
    is_one_tap = math.prod(kernel_shape[:-2]) == 1 == op._groups
    # A tap that never meets the image makes the layer zero.
    return int(op._tap_counts(kernel_shape).item()) if is_one_tap else 0


def _common_shape(rows: int, columns: int) -> tuple[int, int]:
    """The common shape of a matrix or of its transpose; its own shape, the smaller side first, where none is close."""
    own = min(rows, columns), max(rows, columns)
    common = _common(own[0]), _common(own[1])
    return common if math.prod(common) <= _MOST_FILLING * math.prod(own) else own


def _filled_up(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The matrix, or its transpose if it is tall, with rows and columns of zeros; by NumPy, which compiles nothing."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    filled = np.zeros(shape, matrix.dtype)
    filled[: wide.shape[0], : wide.shape[1]] = wide
    return filled


def _common(side: int) -> int:
    """The smallest common side that holds this one; larger sides stay."""
    return next((common for common in _SIDES if side <= common), side)

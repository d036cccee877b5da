"""Common shapes: matrices of many sizes that share few compiled programs.

Rows and columns of zeros change neither norms nor stable ranks. So a matrix whose numbers are asked for eagerly is
filled up with them, and a network of many dense and 1x1 layers compiles a handful of programs. A traced kernel is
compiled together with what surrounds it, and stays as it is.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import UnboundedConv

__all__ = ["in_common_shape"]

# The sides of common shapes: few, so that few programs are compiled.
_SIDES = (32, 128, 512, 2048)
# The most entries of the filled matrix for one of the matrix: more would cost more in every call than a compilation.
_MOST_FILLING = 4


def in_common_shape(kernel: Shaped[Array, "..."], op: Operator) -> tuple[Shaped[Array, "..."], Operator]:
    """The kernel and operator of a layer with the same norm and stable rank, for calls that are not traced.

    Dense layers, and convolutions without edges whose kernel has one tap, become matrices of a common shape. All other
    layers are returned as they are.
    """
    if isinstance(kernel, jax.core.Tracer) or not _is_matrix(kernel.shape, op) or len(kernel.devices()) > 1:
        return kernel, op
    rows, columns = sorted(kernel.shape[-2:])
    shape = _common(rows), _common(columns)
    if math.prod(shape) > _MOST_FILLING * kernel.size or shape == kernel.shape:
        return kernel, op
    # NumPy needs no compilation.
    matrix = np.asarray(kernel).reshape(kernel.shape[-2:])
    filled = np.zeros(shape, matrix.dtype)
    filled[:rows, :columns] = matrix if matrix.shape == (rows, columns) else matrix.T
    # Where nobody chose a device, choosing one would be another program.
    return (jax.device_put(filled, kernel.sharding) if kernel.committed else jnp.asarray(filled)), Dense()


def _is_matrix(kernel_shape: tuple[int, ...], op: Operator) -> bool:
    is_one_tap = isinstance(op, UnboundedConv) and math.prod(kernel_shape[:-2]) == 1 == op.feature_group_count
    return isinstance(op, Dense) or is_one_tap


def _common(side: int) -> int:
    """The smallest common side that holds this one; larger sides stay."""
    return next((common for common in _SIDES if side <= common), side)

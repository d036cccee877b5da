"""Every tolerance and every limit of size that the library has, each with its reason."""

from __future__ import annotations

import jax.numpy as jnp

__all__ = [
    "BOTH_ENDS_SIZE",
    "PROVEN_SIZE",
    "SPLIT_SIZE",
    "search_tolerance",
    "svds_are_dear",
    "vector_tolerance",
]


def vector_tolerance(dtype) -> float:
    """Relative residual of singular vectors that is asked for: the value's error is of the order of its square."""
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


def search_tolerance(dtype) -> float:
    """The same where the leading pair of all is searched for: in float32 below the error that a norm may have, 1e-5.

    The residual bounds the error of the value also where others are so near that its square says nothing.
    """
    return float(jnp.finfo(dtype).eps) ** 0.75


# The SVDs of so much work take as long as branch and bound at its least, each counted with its overhead.
_SVD_WORK, _SVD_OVERHEAD = 2e6, 400


def svds_are_dear(count: int, shape: tuple[int, int]) -> bool:
    """Whether SVDs of so many matrices take longer than proofs that none has a larger singular value; static."""
    return min(shape) > 1 and count * (min(shape) ** 3 + _SVD_OVERHEAD) > _SVD_WORK


# Entries of an explicit matrix up to which a zero-padded layer's norm is proven: 512 x 512.
PROVEN_SIZE = 2**18
# Entries of the explicit matrix of a zero-padded layer that is still split in every step.
SPLIT_SIZE = 2**16
# Entries of an explicit matrix that is formed for both its ends: an SVD of it takes about a second.
BOTH_ENDS_SIZE = 2**20
# Entries of an explicit matrix that is still formed for a full SVD: 128 MiB in float64.
DENSE_SIZE = 2**24

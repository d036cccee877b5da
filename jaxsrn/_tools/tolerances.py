"""The tolerances and the limits of size and of work that several folders share; those of one file stand in that file.

Tolerances are powers of the machine epsilon, so that one rule serves float32 and float64. Sizes are static: they choose
between methods while a program is traced.
"""

from __future__ import annotations

import jax.numpy as jnp

__all__ = [
    "BOTH_ENDS_SIZE",
    "DENSE_SIZE",
    "MAX_PASSES",
    "PROVEN_SIZE",
    "SPLIT_SIZE",
    "gap_tolerance",
    "kernel_tolerance",
    "largest_penalty",
    "largest_scaling",
    "search_tolerance",
    "svds_are_dear",
    "system_tolerance",
    "torus_excess",
    "vector_tolerance",
]


def _power_of_epsilon(exponent: float, dtype) -> float:
    return float(jnp.finfo(dtype).eps) ** exponent


# Tolerances


def vector_tolerance(dtype) -> float:
    """Relative residual of singular vectors near a known pair: the error of the value is of the order of its square."""
    return _power_of_epsilon(2 / 3, dtype)


def search_tolerance(dtype) -> float:
    """Relative residual of singular vectors that are searched for among all: in float32 6.4e-6.

    A norm may be off by 1e-5 in float32. Where other singular values are so near that the square of the residual says
    nothing, the residual itself bounds the error of the value.
    """
    return _power_of_epsilon(0.75, dtype)


def kernel_tolerance(dtype) -> float:
    """Relative change of a kernel at which an iteration is at rest; constraints are met to about its square."""
    return _power_of_epsilon(0.6, dtype)


def system_tolerance(dtype) -> float:
    """Relative residual at which a linear system for a derivative is solved: the relative error of the derivative."""
    return _power_of_epsilon(0.6, dtype)


def gap_tolerance(dtype) -> float:
    """Relative duality gap at which a projection stops.

    Rounding is near in float32: at `eps ** 0.6` some kernels do not get there, and others take up to four times the
    steps.
    """
    return _power_of_epsilon(0.55, dtype)


def largest_penalty(dtype) -> float:
    """Penalty of an augmented Lagrangian, relative to the kernel's own: beyond it multipliers drown in rounding.

    Beyond 1e6 conjugate gradients take too many steps.
    """
    return min(_power_of_epsilon(-0.45, dtype), 1e6)


def largest_scaling(dtype) -> float:
    """The factor that stands for infinity where a kernel is scaled up before it is projected.

    The projection knows a kernel to rounding relative to the scaled one, so that a larger factor loses digits while it
    comes nearer to the limit.
    """
    return _power_of_epsilon(-0.25, dtype)


def torus_excess(dtype) -> float:
    """The share by which the supremum over the torus may exceed the norm that is found, as far as is proven.

    It rules out other peaks; the value of the peak itself is exact to rounding. A proof of a smaller excess looks at
    boxes of frequencies as small as its root, of which a flat spectrum has very many.
    """
    return max(_power_of_epsilon(0.5, dtype) / 100, 1e-6)


# Sizes

# Passes after which an iteration over singular pairs ends, at rest or not.
MAX_PASSES = 500
# The SVDs of so much work take as long as branch and bound at its least, each counted with its overhead.
_SVD_WORK, _SVD_OVERHEAD = 2e6, 400
# Entries of an explicit matrix whose singular values are clipped in every step of a projection: 256 x 256. Larger
# layers take an inner and an outer ball in its place.
SPLIT_SIZE = 2**16
# Entries of an explicit matrix up to which a zero-padded layer's norm is proven: 512 x 512. A proof costs up to five
# times the search there.
PROVEN_SIZE = 2**18
# Entries of an explicit matrix whose smallest singular value is taken from an SVD: about a second.
BOTH_ENDS_SIZE = 2**20
# Entries of an explicit matrix that is still formed where all singular values are asked for: 128 MiB in float64.
DENSE_SIZE = 2**24


def svds_are_dear(count: int, shape: tuple[int, int]) -> bool:
    """Whether SVDs of so many matrices take longer than proofs that none has a larger singular value; static."""
    return min(shape) > 1 and count * (min(shape) ** 3 + _SVD_OVERHEAD) > _SVD_WORK

"""The penalised problem of the log-sum-exp surrogate on the unit sphere (Zheng et al. 2025, section 3).

On the unit sphere of kernels the stable rank of a circular convolution is `N / max_l g_l(x)`, with `g_l` the squared
norm of the symbol at frequency `l` and `N` the number of frequencies. The paper smooths the maximum by log-sum-exp,
penalises the deviation from the two constraints, and descends on the sphere. The surrogate only approximates the
problem that `jaxsrn.srnc` solves by a closed form. It is the only tool that raises the stable rank of a convolution
beyond the convex range of `srnc(..., raise_rank=True)`.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar
from jaxsrn._tools.programs import program
from jaxsrn.normalization.closed_form import Problem, problem_of
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.norms import norm_of
from jaxsrn.surrogate.smoothed_maximum import check_circular, smoothed_maximum

__all__ = [
    "checked",
    "kernel_at",
    "num_frequencies",
    "objective",
    "objective_at",
    "point_like",
]


def objective(
    x: Kernel, kernel: Kernel, op: Operator, target, *, alpha, penalty, smooth: bool = False
) -> Float[Array, ""]:
    """`h(x) = (g_lse(x) - N / r)^2 + penalty ||T(K) - T(A)||_F^2` with `K = sqrt(r M^2 / N) x`.

    Zheng et al. 2025, eq. 16. With `||x|| = 1` the kernel `K` has the Frobenius norm that stable rank `r = target` and
    the spectral norm `M` of `A = kernel` imply together. The first term asks for the spectral norm, the second for
    nearness to `A`. `N` is the number of frequencies, so `||T(K)||_F^2 = N ||K||^2`.

    Args:
      x: a point of the unit sphere, of the kernel's shape.
      kernel: `(*taps, c_in // groups, c_out)`.
      op: a `CircularConv`.
      target: the stable rank wanted; traced.
      alpha: sharpness of `log_sum_exp`; traced.
      penalty: the paper's lambda, at least 0; traced.
      smooth: static; see `log_sum_exp`.

    Returns:
      A scalar in float32 or wider, differentiable in `x`, the kernel and all numbers.

    Raises:
      ValueError: a kernel or point that does not fit, aliased taps, an operator that is not circular, bad numbers.
    """
    kernel, target = checked(kernel, op, target)
    x = point_like(x, "x", kernel, op)
    dtype = float_dtype(kernel.dtype)
    alpha = positive_scalar(alpha, "alpha", dtype)
    penalty = positive_scalar(penalty, "penalty", dtype, or_zero=True)
    return _objective_of_kernel(x.astype(dtype), kernel.astype(dtype), op, target, alpha, penalty, bool(smooth))


@functools.partial(program, static_argnums=(2, 6))
def _objective_of_kernel(x, kernel, op, target, alpha, penalty, smooth):
    problem = problem_of(kernel, op, target, norm_of(kernel, op))
    return objective_at(x, problem, op, alpha, penalty, smooth)


def objective_at(x, problem: Problem, op: CircularConv, alpha, penalty, smooth: bool):
    """`objective` for a problem whose norm is known."""
    change = kernel_at(x, problem, op) - problem.kernel
    constraint = smoothed_maximum(x, op, alpha, smooth) - num_frequencies(op) / problem.target
    return constraint**2 + penalty * problem.inner(change, change)


def kernel_at(x, problem: Problem, op: CircularConv):
    """The kernel `sqrt(r M^2 / N) x`, which has stable rank `r` and norm `M` where `max_l g_l(x) = N / r`."""
    return jnp.sqrt(problem.target / num_frequencies(op)) * problem.norm * x


def num_frequencies(op: CircularConv) -> float:
    """`N`, the size of the grid."""
    return float(math.prod(op.grid))


def checked(kernel, op, target):
    """The kernel and the target as arrays, with `ValueError` where they do not fit the surrogate."""
    check_circular(op)
    kernel = kernel_array(kernel, op)
    op._check_not_aliased(kernel.shape)
    return kernel, positive_scalar(target, "target", float_dtype(kernel.dtype))


def point_like(x, name: str, kernel, op):
    """The array `x`, which must have the shape of the kernel."""
    x = kernel_array(x, op)
    ensure(x.shape == kernel.shape, f"{name}: got shape {x.shape}, expected that of the kernel, {kernel.shape}.")
    return x

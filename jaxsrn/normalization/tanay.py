"""The original SRN-C (Tanay et al. 2022), kept to show what it misses."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jaxsrn._tools.checks import Kernel, float_dtype, kernel_array, positive_scalar
from jaxsrn._tools.held import held
from jaxsrn._tools.linalg import ratio, safe_sqrt
from jaxsrn._tools.programs import program
from jaxsrn.normalization.assessment import assessed
from jaxsrn.normalization.closed_form import Problem, scaled_problem
from jaxsrn.normalization.result import SRNResult, in_own_scale, in_shape
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.moving_pairs import moving_with_kernel, with_free_frequency
from jaxsrn.spectra.pairs_by_kind import leading_pair, value_gradient
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "srnc_tanay",
]


def srnc_tanay(kernel: Kernel, op: Operator, target) -> SRNResult:
    """The original SRN-C (Tanay et al. 2022; Zheng et al. 2025, eq. 5-6), kept to show what it misses.

    The result is `a1 + gamma (a - a1)` with `a1 = sigma grad_K <v, T(K) u>` of the leading pair `(u, v)` and
    `gamma = sqrt(target - 1) sigma / ||T(a - a1)||_F`, by analogy with the dense case, where `T(a1)` is the leading
    rank-one term. For a convolution the direction of `a1` is right and its length is wrong, so that both the stable
    rank and the norm are missed; `residual` says by how much. The papers divide by the norm first, so that their
    `sigma` is 1.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: the operator of the layer, with an image size.
      target: the stable rank. A kernel with `stable_rank <= target` is returned unchanged.

    Returns:
      An `SRNResult`. Its `distance - gap` is the proven bound that `srnc` has for the true problem, so `gap` is
      negative where a kernel that misses the constraints is closer than any that meets them. `feasible` says whether
      the target is in `stable_rank_range`, not that it was met.

    Raises:
      ValueError: a kernel that does not fit, an `UnboundedConv`, aliased taps, or a target that is not a positive
        number.
    """
    kernel = kernel_array(kernel, op)
    shape = kernel.shape
    kernel, op = op._flattened(kernel)
    op._check_not_aliased(kernel.shape)
    # The direction is that of images, and an image without edges has none.
    op.in_shape(kernel.shape)
    target = positive_scalar(target, "target", float_dtype(kernel.dtype))
    return in_shape(_srnc_tanay(kernel, op, leading_pair(kernel, op), target), shape)


@functools.partial(program, brief=True)
def _srnc_tanay(kernel, op, own, target):
    problem, scale = scaled_problem(kernel, op, target, own)
    a = problem.kernel
    pair = with_free_frequency(own, op, a.dtype)
    first = held(functools.partial(_leading_part, op), functools.partial(_moved_pair, op), problem, pair)
    rest = a - first
    gamma = ratio(safe_sqrt(target - 1) * problem.norm, safe_sqrt(problem.inner(rest, rest)))
    unchanged = target >= problem.stable_rank
    result = assessed(jnp.where(unchanged, a, first + gamma * rest), problem, own, op, jnp.asarray(0, jnp.int32))
    return in_own_scale(result._replace(gap=jnp.where(unchanged, 0.0, result.gap)), scale, kernel, op, unchanged)


def _leading_part(op: Operator, problem: Problem, pair: Pair):
    """`a1`."""
    return problem.norm * value_gradient(pair, op, problem.kernel.shape)


def _moved_pair(op: Operator, problem: Problem, pair: Pair) -> Pair:
    return moving_with_kernel(op)(problem.kernel, pair)

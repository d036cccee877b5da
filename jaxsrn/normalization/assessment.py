"""What is known about a kernel that is proposed as a solution of Zheng et al. 2025, eq. 7, whoever found it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from jaxsrn._tools.linalg import ratio, safe_sqrt
from jaxsrn.normalization.closed_form import Problem
from jaxsrn.normalization.result import SRNResult, measured
from jaxsrn.normalization.starts import survey
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.ranks import stable_rank_range
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["assessed"]


def assessed(candidate, problem: Problem, own: Pair, op: Operator, num_steps) -> SRNResult:
    """The result for a candidate, by its own norm and the bound of the survey; `own` is the leading pair of `A`."""
    leading = leading_pair(lax.stop_gradient(candidate), op)
    distance = problem.distance(candidate)
    low, high = stable_rank_range(candidate.shape, op)
    feasible = (problem.target >= low) & (problem.target <= high) & jnp.isfinite(distance)
    bound = ratio(safe_sqrt(survey(lax.stop_gradient(problem), op, own).bound), safe_sqrt(problem.squared))
    # The bound is proven for targets below the stable rank of the original alone.
    proves = jnp.isfinite(bound) & (problem.target < problem.stable_rank)
    gap = lax.stop_gradient(jnp.where(proves, distance - bound, distance))
    norm = pair_value(candidate, op, leading)
    return measured(candidate, problem, norm, distance, gap, num_steps, True, feasible)

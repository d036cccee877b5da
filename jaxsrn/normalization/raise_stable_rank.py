"""Raising the stable rank of a convolution, as far as that is a convex problem: projections of multiples of the kernel.

Let `C` be the kernels of the same support with `||T(K)||_2 <= M`. Among those with `||T(K)||_F^2 <= r M^2`, the one
with the largest `<K, A>_d` is the projection of `tau A` on `C`, at the `tau >= 1` where the second constraint is met.
These projections all have norm `M`, so this one solves Zheng et al. 2025, eq. 7, for a target `r` above the stable
rank. The stable rank grows with `tau` up to a limit `r_inf`; beyond it the problem is not convex, and `surrogate/` is
the tool.

The `tau` is found by false position in its logarithm (the Illinois rule), for which JAX has no routine. A projection is
far dearer than all else here, so every trial counts.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import chosen
from jaxsrn._tools.linalg import divisor, safe_sqrt
from jaxsrn._tools.tolerances import kernel_tolerance, largest_scaling
from jaxsrn.normalization.closed_form import Problem
from jaxsrn.operators.base import Operator
from jaxsrn.projections.nearest import Nearest, SolvedBall, nearest, with_derivative, without_a_step
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "Raised",
    "raised",
]

# Growth of `tau` until the target is passed: a larger factor leaves a wider bracket, a smaller one takes more trials.
_FACTOR = 4.0
# A guard of the loop: false position in a bracket that rounding has spoilt need not end.
_MAX_TRIALS = 60
# The error of the projections relative to the tolerance of the stable rank: a larger one makes the stable rank jump
# from trial to trial, a smaller one takes more SVDs.
_EXACTNESS = 0.1


class Raised(NamedTuple):
    """The kernel, its leading pair, a proven bound of the squared distance, the steps, and whether it is feasible."""

    kernel: Float[Array, "..."]
    leading: Pair
    squared_bound: Float[Array, ""]
    num_steps: Int[Array, ""]
    feasible: Bool[Array, ""]


class _Trial(NamedTuple):
    """The projection at one `tau`, its kernel scaled to the norm exactly, and that kernel's stable rank."""

    tau: Float[Array, ""]
    solution: SolvedBall
    found: Nearest
    kernel: Float[Array, "..."]
    rank: Float[Array, ""]


class _State(NamedTuple):
    """The search for `tau`.

    `next`, `low` and `high` are logarithms: of the next `tau`, and of the two ends of its bracket. `low_miss` and
    `high_miss` are how far the stable ranks at the ends lie above the target; one of them is halved where the other end
    moves twice in a row (the Illinois rule). `best` is the best trial so far.
    """

    next: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    low_miss: Float[Array, ""]
    high_miss: Float[Array, ""]
    moved_low: Bool[Array, ""]
    best: _Trial
    num_steps: Int[Array, ""]
    count: Int[Array, ""]


def raised(problem: Problem, op: Operator, own: Pair, max_steps: int, tolerance: Float[Array, ""]) -> Raised:
    """The projection of `tau A` whose stable rank is the target, to a relative error of `tolerance`.

    `own` is the leading pair of `A`. The derivative of the kernel is that of the projection, where `tau` moves so that
    the stable rank stays at the target.
    """
    fixed, tolerance = lax.stop_gradient((problem, tolerance))
    # All trials are equally far from an infinite target.
    rank_of_layer = min(op._sizes(problem.kernel.shape))
    sought = fixed._replace(target=jnp.minimum(fixed.target, rank_of_layer))
    state = lax.stop_gradient(_search(sought, op, own, max_steps, tolerance))
    best = state.best
    kernel = _differentiable(problem, op, best)
    miss = jnp.abs(best.rank / fixed.target - 1)
    feasible = jnp.isfinite(state.high) | (miss <= tolerance)
    return Raised(kernel, best.found.leading, _squared_bound(fixed, best), state.num_steps, feasible)


def _search(problem: Problem, op: Operator, own: Pair, max_steps: int, tolerance) -> _State:
    size = safe_sqrt(problem.squared)
    # The stable rank is as smooth in tau as the projections are exact, and not more.
    largest_excess = jnp.maximum(_EXACTNESS * tolerance, 100 * jnp.finfo(size.dtype).eps) * size

    def step(state: _State) -> _State:
        tau = jnp.exp(state.next)
        trial = _try(problem, op, own, tau, max_steps, largest_excess)
        # A comparison with NaN is false, so that NaN is kept.
        closer = ~(jnp.abs(trial.rank - problem.target) >= jnp.abs(state.best.rank - problem.target))
        best = chosen(closer, trial, state.best)
        bracket = _narrowed(state, trial.rank - problem.target)
        num_steps = state.num_steps + trial.found.num_steps
        return bracket._replace(best=best, num_steps=num_steps, count=state.count + 1)

    def unfinished(state: _State) -> Bool[Array, ""]:
        missed = jnp.abs(state.best.rank - problem.target) > tolerance * problem.target
        rounding = jnp.finfo(size.dtype).eps
        within = jnp.where(
            jnp.isfinite(state.high),
            state.high - state.low > 4 * rounding,
            state.next <= math.log(_FACTOR * largest_scaling(size.dtype)),
        )
        return (state.count == 0) | (missed & within & (state.count < _MAX_TRIALS))

    return lax.while_loop(unfinished, step, _begin(problem, op, own))


def _begin(problem: Problem, op: Operator, own: Pair) -> _State:
    """The state before the first trial: the bracket is open above and starts at `tau = 1`, the kernel itself."""
    zero = jnp.zeros_like(problem.norm)
    rank = problem.squared / problem.norm**2
    infinite = zero + jnp.inf
    solution, found = without_a_step(problem.kernel, op, problem.norm, own)
    return _State(
        next=jnp.log(_FACTOR) + zero,
        low=zero,
        high=infinite,
        low_miss=rank - problem.target,
        high_miss=infinite,
        moved_low=jnp.asarray(True),
        best=_Trial(zero, solution, found, problem.kernel, infinite),
        num_steps=jnp.asarray(0, jnp.int32),
        count=jnp.asarray(0, jnp.int32),
    )


def _try(problem: Problem, op: Operator, own: Pair, tau, max_steps: int, largest_excess) -> _Trial:
    solution, found = nearest(tau * problem.kernel, op, problem.norm, own, max_steps, largest_excess)
    norm = pair_value(found.kernel, op, found.leading)
    kernel = found.kernel * (problem.norm / divisor(norm))
    return _Trial(tau, solution, found, kernel, problem.inner(kernel, kernel) / problem.norm**2)


def _narrowed(state: _State, miss: Float[Array, ""]) -> _State:
    """The bracket after a trial at `next`, and the next `tau`: larger while the bracket is open, then a secant's."""
    below = miss < 0
    first = jnp.isinf(state.high)
    low, low_miss = jnp.where(below, state.next, state.low), jnp.where(below, miss, state.low_miss)
    high, high_miss = jnp.where(below, state.high, state.next), jnp.where(below, state.high_miss, miss)
    again = (below == state.moved_low) & ~first
    low_miss = jnp.where(again & ~below, low_miss / 2, low_miss)
    high_miss = jnp.where(again & below, high_miss / 2, high_miss)
    open_end = jnp.isinf(high)
    drop = jnp.where(open_end, 1.0, high_miss - low_miss)
    # A trial at an end of the bracket would not narrow it.
    secant = jnp.clip(-low_miss / divisor(drop), 0.02, 0.98)
    inside = low + secant * (jnp.where(open_end, low, high) - low)
    following = jnp.where(open_end, state.next + jnp.log(_FACTOR), inside)
    return state._replace(next=following, low=low, high=high, low_miss=low_miss, high_miss=high_miss, moved_low=below)


def _squared_bound(problem: Problem, trial: _Trial) -> Float[Array, ""]:
    """A squared distance from `A` that no kernel beats which meets both constraints.

    For every `K` of the ball, `1/2 ||K - tau A||^2` is at least that of the trial less the trial's gap. The constraints
    say what `||K||_d^2` is, so this bounds `<K, A>_d` from above.
    """
    kernel, norm = trial.found.kernel, problem.norm
    change = kernel - problem.kernel
    missing = problem.target * norm**2 - problem.inner(kernel, kernel)
    twice_gap = trial.found.excess * (2 * trial.found.distance - trial.found.excess)
    by_gap = problem.inner(change, change) + missing - (missing + twice_gap) / trial.tau
    by_size = safe_sqrt(problem.target) * norm - safe_sqrt(problem.squared)
    return jnp.maximum(by_gap, by_size**2)


def _differentiable(problem: Problem, op: Operator, trial: _Trial) -> Float[Array, "..."]:
    """The trial's kernel as a function of the problem."""

    def kernel_at(tau, problem):
        solution, leading = trial.solution, trial.found.leading
        return with_derivative(op, tau * problem.kernel, problem.norm, trial.kernel, solution, leading)

    def miss_at(tau, problem):
        kernel = kernel_at(tau, problem)
        return problem.inner(kernel, kernel) / problem.norm**2 - problem.target

    fixed = lax.stop_gradient(problem)
    miss, slope = jax.jvp(functools.partial(miss_at, problem=fixed), (trial.tau,), (jnp.ones_like(trial.tau),))
    # Close to the limit no change of `tau` moves the stable rank, and it cannot be held by one.
    moves = slope * trial.tau > kernel_tolerance(slope.dtype) * fixed.target
    shift = (miss_at(trial.tau, problem) - miss) / jnp.where(moves, slope, 1.0)
    return kernel_at(trial.tau - jnp.where(moves, shift, 0.0), problem)

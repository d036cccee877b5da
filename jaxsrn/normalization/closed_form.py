"""Exact stable rank normalization of any linear layer (Zheng et al. 2025, eq. 7): the closed form and its iteration.

    minimise ||T(K) - T(A)||_F   subject to   srank(T(K)) = r,   ||T(K)||_2 = M.

In `<A, B>_d = sum_p d_p <A_p, B_p>`, the inner product of `T(A)` and `T(B)`, the constraints are `||K||_d^2 = r M^2`
and `max <K, E>_d = M` over the functionals `E = grad_K <u, T(K) v> / d` of unit pairs. For one pair the constraint
is linear and the optimum has a closed form; taking the leading pair of that optimum and repeating is a
minorise-maximise iteration, so the distance never grows. It stops at `||T(K)||_2 = M`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.linalg import matmul, safe_sqrt
from jaxsrn._tools.subspaces import default_tolerance
from jaxsrn.operators.maps import Operator
from jaxsrn.spectra import leading as _leading
from jaxsrn.spectra import pairs as _pairs
from jaxsrn.spectra.norms import frozen_value
from jaxsrn.spectra.pairs import Pair

__all__ = [
    "Problem",
    "Solution",
    "closed_form",
    "functional",
    "is_feasible",
    "merit",
    "solve",
    "squared_distance",
]

_ANDERSON_DEPTH = 3
_MAX_ROUNDS = 10


class Problem(NamedTuple):
    """Data of (7): the kernel `A`, the Frobenius weights `d`, the target `r`, the norm `M`."""

    kernel: Float[Array, "..."]
    weights: Float[Array, "..."]
    target: Float[Array, ""]
    norm: Float[Array, ""]

    def inner(self, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, ""]:
        """`<a, b>_d`."""
        return jnp.sum(self.weights * a * b)


class Candidate(NamedTuple):
    """The optimum for one pair: `squared_distance` to `A` where feasible, and the functional's `e = <E, E>_d`."""

    kernel: Float[Array, "..."]
    feasible: Bool[Array, "..."]
    squared_distance: Float[Array, "..."]
    functional_norm: Float[Array, "..."]


class Solution(NamedTuple):
    """The best kernel found, with the pair that made it, its own leading pair, and the passes that it took."""

    candidate: Candidate
    pair: Pair
    leading: Pair
    norm: Float[Array, ""]
    num_steps: Int[Array, ""]


def functional(pair: Pair, op: Operator, weights: Float[Array, "..."], kernel_shape) -> Float[Array, "..."]:
    """`E`: `<K, E>_d = <u, T(K) v>` for every kernel; 0 at taps that meet no sample."""
    plain = _pairs.plain_gradient(pair, op, kernel_shape)
    return jnp.where(weights == 0, 0.0, plain / jnp.where(weights == 0, 1.0, weights))


def squared_distance(e, m, target, norm, squared_frobenius):
    """Squared distance of the closed form from `A`, by `e = <E, E>_d` and `m = <A, E>_d`.

    `(rho - |A_perp|)^2 + (M - m)^2 / e` with `A_perp` the part of `A` orthogonal to `E`, and `rho` its new length.
    Free of the cancellation in `r M^2 + a - 2 <K, A>_d`. Decreasing in `e` and in `m` wherever `r <= srank(A)`.
    """
    radius = norm * safe_sqrt(target - 1 / e)
    return (radius - safe_sqrt(squared_frobenius - m**2 / e)) ** 2 + (norm - m) ** 2 / e


def is_feasible(e, target):
    """`e >= 1 / r`, up to rounding: only then `||K||_d^2 = r M^2` and `<K, E>_d = M` can hold together."""
    return e * target >= 1 - 16 * jnp.finfo(target.dtype).eps


def closed_form(problem: Problem, direction: Float[Array, "..."]) -> Candidate:
    """The kernel closest to `A` with `||K||_d^2 = r M^2` and `<K, E>_d = M`, `E = direction`.

    `K = (M / e) E + rho A_perp / |A_perp|`, `rho = M sqrt(r - 1/e)`: the same point of `span(A, E)` as
    `alpha A + beta E`, written so that both constraints hold to rounding also where `A` is nearly parallel to `E`.
    Infeasible: the part along `A_perp` vanishes, which leaves the smallest stable rank that this pair allows.
    """
    e = problem.inner(direction, direction)
    e = jnp.where(e == 0, 1.0, e)
    m = problem.inner(problem.kernel, direction)
    rest = problem.kernel - (m / e) * direction
    rest_norm = safe_sqrt(problem.inner(rest, rest))
    radius = problem.norm * safe_sqrt(problem.target - 1 / e)
    kernel = (problem.norm / e) * direction + radius / jnp.where(rest_norm == 0, 1.0, rest_norm) * rest
    distance = (radius - rest_norm) ** 2 + (problem.norm - m) ** 2 / e
    return Candidate(kernel, is_feasible(e, problem.target), distance, e)


def merit(candidate: Candidate):
    """Sort key, smaller is better: feasible ones by distance, before infeasible ones by stable rank `1 / e`."""
    return jnp.where(candidate.feasible, 0, 1), jnp.where(
        candidate.feasible, candidate.squared_distance, 1 / candidate.functional_norm
    )


def _gains(new: Candidate, old: Candidate, scale) -> Bool[Array, ""]:
    """Whether `new` is better than `old` by more than rounding, `scale` that of the squared distances."""
    (new_class, new_value), (old_class, old_value) = merit(new), merit(old)
    rounding = 4 * jnp.finfo(scale.dtype).eps * jnp.where(old.feasible, scale, old_value)
    return (new_class < old_class) | ((new_class == old_class) & (new_value < old_value - rounding))


class _Anderson(NamedTuple):
    """Differences of the last iterates and of their residuals (rows), and the last of each."""

    steps: Float[Array, "depth ..."]
    residuals: Float[Array, "depth ..."]
    point: Float[Array, "..."]
    residual: Float[Array, "..."]
    count: Int[Array, ""]


def _anderson_start(kernel: Float[Array, "..."]) -> _Anderson:
    rows = jnp.zeros((_ANDERSON_DEPTH, *kernel.shape), kernel.dtype)
    return _Anderson(rows, rows, jnp.zeros_like(kernel), jnp.zeros_like(kernel), jnp.asarray(0))


def _anderson(memory: _Anderson, weights, point, residual) -> tuple[_Anderson, Float[Array, "..."]]:
    """The next point of the fixed-point iteration `x -> x + residual(x)` (Walker, Ni 2011)."""
    # Shifting the rows costs less under vmap than writing one of them.
    first = memory.count == 0
    steps, residuals = (
        jnp.concatenate([jnp.where(first, 0.0, new - last)[None], rows[:-1]])
        for new, last, rows in ((point, memory.point, memory.steps), (residual, memory.residual, memory.residuals))
    )
    flat = residuals.reshape((_ANDERSON_DEPTH, -1))
    weighted = (residuals * weights[None]).reshape((_ANDERSON_DEPTH, -1))
    gram = matmul(weighted, flat.T)
    # Empty rows, and differences that no longer carry information, must not blow up the coefficients.
    ridge = 10 * jnp.finfo(point.dtype).eps * jnp.trace(gram)
    gram = gram + jnp.where(ridge == 0, 1.0, ridge) * jnp.eye(_ANDERSON_DEPTH, dtype=point.dtype)
    coefficients = jnp.linalg.solve(gram, matmul(weighted, residual.reshape(-1)))
    correction = matmul(coefficients, (steps + residuals).reshape(flat.shape)).reshape(point.shape)
    return _Anderson(steps, residuals, point, residual, memory.count + 1), point + residual - correction


class _Ascent(NamedTuple):
    """Where the next pass starts, the best candidate so far with its pair, and the memory of the acceleration."""

    point: Float[Array, "..."]
    best: Candidate
    pair: Pair
    memory: _Anderson
    finished: Bool[Array, ""]
    num_steps: Int[Array, ""]


def _ascend(problem: Problem, op: Operator, start: Pair, max_steps: int | Int[Array, ""], tolerance) -> _Ascent:
    """Minorise-maximise passes from one pair, Anderson accelerated, to a relative change of the kernel.

    Every candidate is the closed form of a true unit pair, whatever point that pair was taken from: both guarantees
    of the plain iteration hold for accelerated ones. A pass that gains nothing is undone and repeated plainly from
    the best kernel; a plain one can fail to gain only at the end.
    """
    shape, weights = problem.kernel.shape, problem.weights
    vector_tolerance = default_tolerance(weights.dtype)
    scale = problem.inner(problem.kernel, problem.kernel)

    def step(state: _Ascent) -> _Ascent:
        pair = _leading.nearby(state.point, op, state.pair, vector_tolerance)
        new = closed_form(problem, functional(pair, op, weights, shape))
        residual = new.kernel - state.point
        size = safe_sqrt(problem.inner(new.kernel, new.kernel))
        change = safe_sqrt(problem.inner(residual, residual)) / jnp.where(size == 0, 1.0, size)
        memory, mixed = _anderson(state.memory, jnp.broadcast_to(weights, shape), state.point, residual)
        gained = _gains(new, state.best, scale)
        finished = (change <= tolerance) | (~gained & (state.memory.count == 0))
        go_on = (mixed, memory, new, pair)
        retry = (state.best.kernel, _anderson_start(new.kernel), state.best, state.pair)
        point, memory, best, pair = jax.tree.map(lambda a, b: jnp.where(gained, a, b), go_on, retry)
        return _Ascent(point, best, pair, memory, finished, state.num_steps + 1)

    first = closed_form(problem, functional(start, op, weights, shape))
    state = _Ascent(first.kernel, first, start, _anderson_start(first.kernel), jnp.asarray(False), jnp.asarray(0))
    return lax.while_loop(lambda s: ~s.finished & (s.num_steps < max_steps), step, state)


class _Rounds(NamedTuple):
    """Starts of the next round, and what the last one found."""

    starts: Pair
    solution: Solution
    count: Int[Array, ""]


def solve(problem: Problem, op: Operator, starts: Pair, max_steps: int, tolerance) -> Solution:
    """The best of the iterations from several starts, checked against the leading pair of the whole operator.

    The passes follow one pair (one frequency, one Krylov space). Where the kernel they end at is larger elsewhere
    than `M`, its leading pair is a better start and the passes go on from there.
    """
    norm_tolerance = default_tolerance(problem.weights.dtype)

    def round_(state: _Rounds) -> _Rounds:
        steps_left = max_steps - state.solution.num_steps
        ends = jax.vmap(lambda start: _ascend(problem, op, start, steps_left, tolerance))(state.starts)
        best = jnp.lexsort(merit(ends.best)[::-1])[0]
        end = jax.tree.map(lambda leaf: leaf[best], ends)
        leading = _larger(end.best.kernel, op, end.pair, _leading.leading(end.best.kernel, op))
        norm = frozen_value(end.best.kernel, op, leading)
        solution = Solution(end.best, end.pair, leading, norm, state.solution.num_steps + end.num_steps)
        # All starts alike: a second copy of the passes for one start would double the compilation.
        starts = jax.tree.map(lambda many, one: jnp.broadcast_to(one, many.shape), state.starts, leading)
        return _Rounds(starts, solution, state.count + 1)

    def unfinished(state: _Rounds) -> Bool[Array, ""]:
        exceeds = state.solution.norm > problem.norm * (1 + norm_tolerance)
        more = exceeds & (state.solution.num_steps < max_steps) & (state.count < _MAX_ROUNDS)
        return (state.count == 0) | more

    return lax.while_loop(unfinished, round_, _Rounds(starts, _nothing(problem, starts), jnp.asarray(0))).solution


def _larger(kernel: Float[Array, "..."], op: Operator, known: Pair, found: Pair) -> Pair:
    """Of two pairs the one with the larger value: a search without a proof may miss what is known."""
    is_larger = frozen_value(kernel, op, found) >= frozen_value(kernel, op, known)
    return jax.tree.map(lambda a, b: jnp.where(is_larger, a, b), found, known)


def _nothing(problem: Problem, starts: Pair) -> Solution:
    """The state before the first round: placeholders of the right shapes."""
    zero, pair = jnp.zeros_like(problem.norm), jax.tree.map(lambda leaf: leaf[0], starts)
    candidate = Candidate(problem.kernel, jnp.asarray(False), zero, zero)
    return Solution(candidate, pair, pair, zero, jnp.asarray(0))

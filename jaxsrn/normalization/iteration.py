"""The minorise-maximise iteration of the closed form, and its acceleration.

For one pair the constraint is linear and the optimum has a closed form (`closed_form.py`); taking the leading pair of
that optimum and repeating never lets the distance grow. It stops at `||T(K)||_2 = M`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.limits import vector_tolerance
from jaxsrn._tools.linalg import matmul, safe_sqrt
from jaxsrn.normalization.closed_form import Candidate, Problem, closed_form, functional, merit
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.norms import frozen_value
from jaxsrn.spectra.pair import Pair
from jaxsrn.spectra.pairs import leading_pair, nearby

__all__ = [
    "Fixpoint",
    "minorise_maximise",
]

_ANDERSON_DEPTH = 3
_MAX_ROUNDS = 10


class Fixpoint(NamedTuple):
    """The best kernel found, with the pair that made it, its own leading pair, and the passes that it took."""

    candidate: Candidate
    pair: Pair
    leading: Pair
    norm: Float[Array, ""]
    num_steps: Int[Array, ""]


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
    scale = problem.inner(problem.kernel, problem.kernel)

    def step(state: _Ascent) -> _Ascent:
        pair = nearby(state.point, op, state.pair, vector_tolerance(weights.dtype))
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


def _gains(new: Candidate, old: Candidate, scale) -> Bool[Array, ""]:
    """Whether `new` is better than `old` by more than rounding, `scale` that of the squared distances."""
    (new_class, new_value), (old_class, old_value) = merit(new), merit(old)
    rounding = 4 * jnp.finfo(scale.dtype).eps * jnp.where(old.feasible, scale, old_value)
    return (new_class < old_class) | ((new_class == old_class) & (new_value < old_value - rounding))


class _Rounds(NamedTuple):
    """Starts of the next round, and what the last one found."""

    starts: Pair
    solution: Fixpoint
    count: Int[Array, ""]


def minorise_maximise(problem: Problem, op: Operator, starts: Pair, max_steps: int, tolerance) -> Fixpoint:
    """The best of the iterations from several starts, checked against the leading pair of the whole operator.

    The passes follow one pair (one frequency, one Krylov space). Where the kernel they end at is larger elsewhere
    than `M`, its leading pair is a better start and the passes go on from there.
    """
    norm_tolerance = vector_tolerance(problem.weights.dtype)

    def round_(state: _Rounds) -> _Rounds:
        steps_left = max_steps - state.solution.num_steps
        ends = jax.vmap(lambda start: _ascend(problem, op, start, steps_left, tolerance))(state.starts)
        best = jnp.lexsort(merit(ends.best)[::-1])[0]
        end = jax.tree.map(lambda leaf: leaf[best], ends)
        leading = _larger(end.best.kernel, op, end.pair, leading_pair(end.best.kernel, op))
        norm = frozen_value(end.best.kernel, op, leading)
        solution = Fixpoint(end.best, end.pair, leading, norm, state.solution.num_steps + end.num_steps)
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


def _nothing(problem: Problem, starts: Pair) -> Fixpoint:
    """The state before the first round: placeholders of the right shapes."""
    zero, pair = jnp.zeros_like(problem.norm), jax.tree.map(lambda leaf: leaf[0], starts)
    candidate = Candidate(problem.kernel, jnp.asarray(False), zero, zero)
    return Fixpoint(candidate, pair, pair, zero, jnp.asarray(0))

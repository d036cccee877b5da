"""The minorise-maximise iteration that solves Zheng et al. 2025, eq. 7, by closed forms, and its acceleration.

A pass takes the closed form of one pair (`closed_form.py`), and then the leading pair of the kernel that this gives.
The functional of a pair minorises the norm, and equals it at the kernel whose leading pair it is. So no pass lets the
distance grow, and the passes stop where `||T(K)||_2 = M`. Zheng et al. descend on a surrogate instead (`surrogate/`).

The passes converge linearly, and Anderson's method accelerates them (Walker, Ni 2011). JAX has no routine for it. This
one measures residuals in `<., .>_d`, adds a ridge to the small system, and starts anew where a pass gains nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import chosen, picked
from jaxsrn._tools.linalg import matmul, safe_sqrt
from jaxsrn._tools.tolerances import vector_tolerance
from jaxsrn.normalization.closed_form import Candidate, Problem, closed_form, functional, merit
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.norms import frozen_value
from jaxsrn.spectra.pairs_by_kind import leading_pair, nearby
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "Fixpoint",
    "minorise_maximise",
]

# Earlier passes that the acceleration remembers: more save passes, and make each of them dearer.
_ANDERSON_DEPTH = 3
# A guard of the loop: every round but the last has found a larger singular value somewhere else.
_MAX_ROUNDS = 10


class Fixpoint(NamedTuple):
    """The best kernel found, with the pair that made it, its own leading pair and norm, and the passes taken."""

    candidate: Candidate
    pair: Pair
    leading: Pair
    norm: Float[Array, ""]
    num_steps: Int[Array, ""]


class _Anderson(NamedTuple):
    """Differences of the last iterates and of their residuals, one a row; the last iterate and its residual."""

    steps: Float[Array, "depth ..."]
    residuals: Float[Array, "depth ..."]
    point: Float[Array, "..."]
    residual: Float[Array, "..."]
    count: Int[Array, ""]


def _anderson_start(kernel: Float[Array, "..."]) -> _Anderson:
    rows = jnp.zeros((_ANDERSON_DEPTH, *kernel.shape), kernel.dtype)
    return _Anderson(rows, rows, jnp.zeros_like(kernel), jnp.zeros_like(kernel), jnp.asarray(0))


def _anderson(memory: _Anderson, weights, point, residual) -> tuple[_Anderson, Float[Array, "..."]]:
    """The memory with one more iterate, and the next point of the iteration `x -> x + residual(x)`.

    Walker, Ni 2011: the step is that of the combination of the remembered residuals which is smallest.
    """
    # Shifting the rows costs less under vmap than writing one of them.
    first = memory.count == 0
    steps, residuals = (
        jnp.concatenate([jnp.where(first, 0.0, new - last)[None], rows[:-1]])
        for new, last, rows in ((point, memory.point, memory.steps), (residual, memory.residual, memory.residuals))
    )
    flat = residuals.reshape((_ANDERSON_DEPTH, -1))
    weighted = (residuals * weights[None]).reshape((_ANDERSON_DEPTH, -1))
    gram = matmul(weighted, flat.T)
    # Without the ridge, rows that are empty or that hold only rounding errors would blow up the coefficients.
    ridge = 10 * jnp.finfo(point.dtype).eps * jnp.trace(gram)
    gram = gram + jnp.where(ridge == 0, 1.0, ridge) * jnp.eye(_ANDERSON_DEPTH, dtype=point.dtype)
    coefficients = jnp.linalg.solve(gram, matmul(weighted, residual.reshape(-1)))
    correction = matmul(coefficients, (steps + residuals).reshape(flat.shape)).reshape(point.shape)
    return _Anderson(steps, residuals, point, residual, memory.count + 1), point + residual - correction


class _Ascent(NamedTuple):
    """The kernel where the next pass starts, the best candidate so far with its pair, and the memory."""

    point: Float[Array, "..."]
    best: Candidate
    pair: Pair
    memory: _Anderson
    finished: Bool[Array, ""]
    num_steps: Int[Array, ""]


def _ascend(problem: Problem, op: Operator, start: Pair, max_steps: int | Int[Array, ""], tolerance) -> _Ascent:
    """Accelerated passes from one pair, until the kernel changes by no more than `tolerance`, relative to its size.

    Every candidate is the closed form of a true unit pair, whatever point that pair was taken from. So a feasible one
    has `||K||_d^2 = r M^2` and `||T(K)||_2 >= M`, with or without acceleration. A pass that gains nothing is undone and
    repeated plainly from the best kernel. A plain pass fails to gain only at the end.
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
        point, memory, best, pair = chosen(gained, go_on, retry)
        return _Ascent(point, best, pair, memory, finished, state.num_steps + 1)

    first = closed_form(problem, functional(start, op, weights, shape))
    state = _Ascent(first.kernel, first, start, _anderson_start(first.kernel), jnp.asarray(False), jnp.asarray(0))
    return lax.while_loop(lambda s: ~s.finished & (s.num_steps < max_steps), step, state)


def _gains(new: Candidate, old: Candidate, scale) -> Bool[Array, ""]:
    """Whether `new` is better than `old` by more than rounding; `scale` is the size of squared distances."""
    old_value = merit(old)
    return merit(new) < old_value - 4 * jnp.finfo(scale.dtype).eps * jnp.where(old.feasible, scale, old_value)


class _Rounds(NamedTuple):
    """The starts of the next round, and what the last round found."""

    starts: Pair
    solution: Fixpoint
    count: Int[Array, ""]


def minorise_maximise(problem: Problem, op: Operator, starts: Pair, max_steps: int, tolerance) -> Fixpoint:
    """The best kernel that the passes from several starts end at, its norm checked over the whole operator.

    Passes follow one pair, and see one frequency or one Krylov space. Where another pair of the kernel at their end has
    a value above `M`, a new round of passes starts from the kernel's leading pair.
    """
    norm_tolerance = vector_tolerance(problem.weights.dtype)

    def round_(state: _Rounds) -> _Rounds:
        steps_left = max_steps - state.solution.num_steps
        ends = jax.vmap(lambda start: _ascend(problem, op, start, steps_left, tolerance))(state.starts)
        end = picked(ends, lax.argmin(merit(ends.best), 0, jnp.int32))
        leading = _larger(end.best.kernel, op, end.pair, leading_pair(end.best.kernel, op))
        norm = frozen_value(end.best.kernel, op, leading)
        solution = Fixpoint(end.best, end.pair, leading, norm, state.solution.num_steps + end.num_steps)
        # All starts are the same from here on: passes from a single start would be compiled a second time.
        starts = jax.tree.map(lambda many, one: jnp.broadcast_to(one, many.shape), state.starts, leading)
        return _Rounds(starts, solution, state.count + 1)

    def unfinished(state: _Rounds) -> Bool[Array, ""]:
        exceeds = state.solution.norm > problem.norm * (1 + norm_tolerance)
        more = exceeds & (state.solution.num_steps < max_steps) & (state.count < _MAX_ROUNDS)
        return (state.count == 0) | more

    return lax.while_loop(unfinished, round_, _Rounds(starts, _nothing(problem, starts), jnp.asarray(0))).solution


def _larger(kernel: Float[Array, "..."], op: Operator, known: Pair, found: Pair) -> Pair:
    """The pair with the larger value: a search without a proof may miss the pair that is known."""
    is_larger = frozen_value(kernel, op, found) >= frozen_value(kernel, op, known)
    return chosen(is_larger, found, known)


def _nothing(problem: Problem, starts: Pair) -> Fixpoint:
    """The state before the first round: placeholders of the right shapes."""
    zero, pair = jnp.zeros_like(problem.norm), jax.tree.map(lambda leaf: leaf[0], starts)
    candidate = Candidate(problem.kernel, jnp.asarray(False), zero, zero)
    return Fixpoint(candidate, pair, pair, zero, jnp.asarray(0))

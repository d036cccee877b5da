"""The minorise-maximise iteration that solves Zheng et al. 2025, eq. 7, by closed forms, and its acceleration.

A pass takes the closed form of one pair (`closed_form.py`), and then the leading pair of the kernel that this gives.
The functional of a pair minorises the norm, and equals it at the kernel whose leading pair it is. So no pass lets the
distance grow, and the passes stop where `||T(K)||_2 = M`. Zheng et al. descend on a surrogate instead (`surrogate/`).

The passes converge linearly, and Anderson's method accelerates them (Walker, Ni 2011). JAX has no routine for it. This
one measures residuals in `<., .>_d`, adds a ridge to the small system, and starts anew where a pass gains nothing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import chosen, first_of, picked, repeated, stack_of_one
from jaxsrn._tools.linalg import divisor, matmul, safe_sqrt
from jaxsrn._tools.loops import one_by_one, while_loop
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import vector_tolerance
from jaxsrn.normalization.closed_form import INFEASIBLE, Candidate, Problem, closed_form, functional, problem_of
from jaxsrn.normalization.scan import Survey
from jaxsrn.normalization.starts import survey
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair, nearby, no_pair
from jaxsrn.spectra.singular_pair import Pair, is_small, rescaled

__all__ = [
    "Fixpoint",
    "minorise_maximise",
]

# Earlier passes that the acceleration remembers: more save passes, and make each of them dearer.
_ANDERSON_DEPTH = 3
# A guard of the loop: every round but the last has found a larger singular value somewhere else.
_MAX_ROUNDS = 10
# Starts are followed until a pass changes the kernel by no more than this share; the best of them is followed further.
_COMPARED_AT = 0.01


class Fixpoint(NamedTuple):
    """What the rounds end with, in the scale of `rescaled`.

    Attributes:
      candidate: the best kernel found.
      pair: the pair that made it; the leading pair of `A` where nothing is to be done.
      leading: its own leading pair.
      norm: the value of that pair.
      own: the leading pair of `A`.
      own_norm: the value of that pair, `M`.
      bound: a squared distance that no feasible kernel beats.
      unchanged: whether the target is at the stable rank of `A` or above it, so that nothing is to be done.
      num_steps: the passes taken.
      count: the rounds taken.
      unfinished: whether another round follows.
    """

    candidate: Candidate
    pair: Pair
    leading: Pair
    norm: Float[Array, ""]
    own: Pair
    own_norm: Float[Array, ""]
    bound: Float[Array, ""]
    unchanged: Bool[Array, ""]
    num_steps: Int[Array, ""]
    count: Int[Array, ""]
    unfinished: Bool[Array, ""]


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
    ridge = 10 * jnp.finfo(point.dtype).eps * jnp.sum(weighted * flat)
    gram = gram + jnp.where(ridge == 0, 1.0, ridge) * jnp.eye(_ANDERSON_DEPTH, dtype=point.dtype)
    factor = lax.linalg.cholesky(gram, symmetrize_input=False)
    half = lax.linalg.triangular_solve(factor, matmul(weighted, residual.reshape(-1, 1)), left_side=True, lower=True)
    coefficients = lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)[:, 0]
    correction = matmul(coefficients, (steps + residuals).reshape(flat.shape)).reshape(point.shape)
    return _Anderson(steps, residuals, point, residual, memory.count + 1), point + residual - correction


class _Ascent(NamedTuple):
    """The kernel where the next pass starts, the memory, and the best candidate so far with its pair.

    Before the first pass `num_steps` is -1.
    """

    point: Float[Array, "..."]
    memory: _Anderson
    best: Candidate
    pair: Pair
    finished: Bool[Array, ""]
    num_steps: Int[Array, ""]


def _ascend(problem: Problem, op: Operator, start: _Ascent, max_steps: int | Int[Array, ""], tolerance) -> _Ascent:
    """Accelerated passes, until the kernel changes by no more than `tolerance`, relative to its size.

    Every candidate is the closed form of a true unit pair, whatever point that pair was taken from. So a feasible one
    has `||K||_d^2 = r M^2` and `||T(K)||_2 >= M`, with or without acceleration. A pass that gains nothing is undone and
    repeated plainly from the best kernel. A plain pass fails to gain only at the end.
    """
    shape, weights = problem.kernel.shape, problem.weights

    def step(state: _Ascent) -> _Ascent:
        # The closed form of the start itself is no pass; it stands here so that the program holds it once.
        first = state.num_steps < 0
        tolerance_here = jnp.where(first, jnp.inf, vector_tolerance(weights.dtype))
        pair = chosen(first, state.pair, nearby(state.point, op, state.pair, tolerance_here))
        new = closed_form(problem, functional(pair, op, shape))
        residual = new.kernel - state.point
        size = safe_sqrt(problem.inner(new.kernel, new.kernel))
        change = safe_sqrt(problem.inner(residual, residual)) / divisor(size)
        memory, mixed = _anderson(state.memory, jnp.broadcast_to(weights, shape), state.point, residual)
        gained = first | _gains(new, state.best, problem.squared)
        finished = ~first & ((change <= tolerance) | (~gained & (state.memory.count == 0)))
        best, pair = chosen(gained, (new, pair), (state.best, state.pair))
        plain = best.kernel, _anderson_start(best.kernel)
        point, memory = chosen(gained & ~first, (mixed, memory), plain)
        return _Ascent(point, memory, best, pair, finished, state.num_steps + 1)

    return lax.while_loop(lambda s: ~s.finished & (s.num_steps < max_steps), step, start)


def _best_end(
    problem: Problem, op: Operator, starts: Pair, count: Int[Array, ""], max_steps: Int[Array, ""], tolerance
) -> _Ascent:
    """Where the passes from the best of the first `count` starts end.

    All of these are followed for a while, and the best one until it is at rest. Starts follow one another. Side by side
    under `vmap` they would be convolutions with a kernel each, for which XLA has no fast code on a CPU, and all would
    take the passes of the slowest.
    """
    nothing = Candidate(problem.kernel, jnp.full_like(problem.squared, jnp.inf))
    begin = _Ascent(
        problem.kernel,
        _anderson_start(problem.kernel),
        nothing,
        first_of(starts),
        jnp.asarray(False),
        jnp.asarray(-1, jnp.int32),
    )

    def follow(i, best: _Ascent) -> _Ascent:
        again = i == count
        fresh = begin._replace(pair=picked(starts, jnp.minimum(i, count - 1)))
        start = chosen(again, best._replace(finished=begin.finished), fresh)
        end = _ascend(problem, op, start, max_steps, jnp.where(again, tolerance, jnp.maximum(tolerance, _COMPARED_AT)))
        return chosen(again | (end.best.merit < best.best.merit), end, best)

    return lax.fori_loop(0, count + 1, follow, begin)


def _gains(new: Candidate, old: Candidate, scale) -> Bool[Array, ""]:
    """Whether `new` is better than `old` by more than rounding; `scale` is the size of squared distances."""
    return new.merit < old.merit - 4 * jnp.finfo(scale.dtype).eps * jnp.where(old.feasible, scale, old.merit)


@functools.partial(one_by_one, static_argnums=(4,))
def minorise_maximise(
    kernel: Float[Array, "..."], op: Operator, target, initial: Pair | None, max_steps: int, tolerance
) -> Fixpoint:
    """The best kernel that the passes from several starts end at, its norm checked over the whole operator.

    A round takes the leading pair of the kernel that it is given, and passes from there. The first round is given `A`:
    its pair tells `M`, and the starts are `initial` or those of the survey. Passes follow one pair, and see one
    frequency or one Krylov space. So each further round is given the kernel at their end. Where a pair of that kernel
    has a value above `M`, passes start from it; otherwise the rounds are finished.

    Passes from an infeasible start may end at a local minimum of the stable rank that is above the target. So where the
    first round ends infeasible, the second one starts from the pairs that allow the lowest stable ranks of all.

    The program holds the search for a leading pair once, and eager calls share it with all other functions.
    """

    start = _begin(kernel, op)

    def step(state: Fixpoint) -> Fixpoint:
        leading = leading_pair(state.candidate.kernel, op)
        return _round(start.candidate.kernel, op, target, initial, max_steps, tolerance, state, leading)

    return while_loop(lambda state: state.unfinished, step, start)


@functools.partial(program, brief=True)
def _begin(kernel, op) -> Fixpoint:
    """The state before the first round: the kernel itself, and placeholders."""
    a = rescaled(kernel, op)[0]
    zero, nothing, no = jnp.zeros((), a.dtype), no_pair(op, a.shape, a.dtype), jnp.asarray(False)
    candidate = Candidate(a, jnp.full_like(zero, INFEASIBLE))
    count = jnp.asarray(0, jnp.int32)
    return Fixpoint(
        candidate=candidate,
        pair=nothing,
        leading=nothing,
        norm=zero,
        own=nothing,
        own_norm=zero,
        bound=zero,
        unchanged=no,
        num_steps=count,
        count=count,
        unfinished=~no,
    )


@functools.partial(program, brief=is_small)
def _round(a, op, target, initial, max_steps, tolerance, state: Fixpoint, found: Pair) -> Fixpoint:
    """The state after one round; `found` is what a search for the leading pair of its kernel found, and `a` is `A`."""
    first = state.count == 0
    # The pair that made a kernel has the value `M` there. A search without a proof may miss it; there is none at first.
    known, value = jnp.where(first, 0.0, state.own_norm), pair_value(state.candidate.kernel, op, found)
    reached, leading = chosen(value < known, (known, state.pair), (value, found))
    own, norm = chosen(first, (leading, reached), (state.own, state.own_norm))
    problem = problem_of(a, op, target, norm)
    unchanged = target >= problem.stable_rank
    exceeds = reached > norm * (1 + vector_tolerance(a.dtype))
    steps_left = max_steps - state.num_steps
    # An infinite bound proves that no kernel is feasible.
    lower = (state.count == 1) & ~state.candidate.feasible & jnp.isfinite(state.bound) & (initial is None)
    more = (exceeds | lower) & (steps_left > 0) & (state.count < _MAX_ROUNDS)
    unfinished, has_survey = ~unchanged & (first | more), first | lower
    surveyed = problem._replace(target=jnp.where(lower, 0.0, target))
    starts, bound = _starts(surveyed, op, initial, leading, has_survey & unfinished, state.bound)
    bound = jnp.where(first, bound, state.bound)
    most = jnp.where(unfinished, steps_left, -1)
    # Where one pair is followed all starts are the same.
    num_starts = jnp.where(has_survey, len(starts.input), 1)
    end = _best_end(problem, op, starts, num_starts, most, tolerance)
    made = chosen(first, leading, state.pair)
    taken = unfinished & (~lower | (end.best.merit < state.candidate.merit))
    candidate, pair = chosen(taken, (end.best, end.pair), (state.candidate, made))
    num_steps = state.num_steps + jnp.maximum(end.num_steps, 0)
    count = state.count + 1
    return Fixpoint(
        candidate=candidate,
        pair=pair,
        leading=leading,
        norm=reached,
        own=own,
        own_norm=norm,
        bound=bound,
        unchanged=unchanged,
        num_steps=num_steps,
        count=count,
        unfinished=unfinished,
    )


def _starts(problem: Problem, op: Operator, initial: Pair | None, leading: Pair, wanted, bound) -> Survey:
    """The starts of a round and the bound: those of the survey where it is `wanted`, else all at the leading pair."""

    def surveyed() -> Survey:
        found = survey(problem, op, leading, wanted)
        return found if initial is None else found._replace(starts=stack_of_one(initial))

    def followed() -> Survey:
        # As many as the survey's, so that the passes stand in the program once.
        count = len(jax.tree.leaves(jax.eval_shape(surveyed).starts)[0])
        return Survey(repeated(leading, count), bound)

    return lax.cond(wanted, surveyed, followed)

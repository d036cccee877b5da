"""The nearest kernel of the spectral ball, by an augmented Lagrangian with semismooth Newton steps.

The problem is convex. With `S(K)` the stack of matrices that carries the layer (`clipping.py`) and `c` the limit it is

    minimise  1/2 ||K - A||_d^2   subject to   ||S_b(K)||_2 <= c  for every matrix of the stack.

The method is that of Zhao, Sun, Toh 2010 for semidefinite programs, here on singular values. A round minimises

    1/2 ||K - A||_d^2 + rho/2 dist(S(K) + Y / rho, ball)^2

over the kernel, with multipliers `Y` and a penalty `rho`. A Newton step solves with the generalised Hessian
`I + rho S^* D S`, where `D` is a derivative of `Z - clip Z`, by conjugate gradients, which need no SVD. The round ends
with `Y = rho (Z - clip Z)` at `Z = S(K) + Y / rho`. Each step takes one SVD of the stack.

The dual of the problem has the value `1/2 ||A||^2 - 1/2 ||A - S^* Y||^2 - c ||Y||_*` at `Y`, with the kernel
`K = A - S^* Y`. It is computed in every step and bounds the distance from the optimum. Dykstra's algorithm is the
proximal gradient method of this dual. It is slow, because neighbouring frequencies are nearly the same constraint where
a kernel has few taps (`python benchmarks/projections.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, Int

from jaxsrn._tools.indexing import chosen
from jaxsrn._tools.linalg import divisor, safe_sqrt
from jaxsrn._tools.tolerances import largest_penalty, search_tolerance
from jaxsrn.projections.clipping import (
    Clipping,
    StackMap,
    clipped,
    curvature,
    excess_derivative,
    held_part,
    overshooting,
    split,
)

__all__ = [
    "DualPoint",
    "Iterate",
    "begin",
    "derivative",
    "distance_and_excess",
    "duality_gap",
    "minimise",
]

# The penalty of the first round and its growth per round. A larger penalty takes fewer rounds, each with a Hessian of
# larger condition number and so with more conjugate gradients.
_FIRST_PENALTY, _PENALTY_GROWTH = 10.0, 4.0
# The gradient that ends a round, relative to how far the matrices are from the ball. This distance is the change of the
# multipliers over the penalty. A smaller share takes more steps per round, a larger one more rounds.
_ROUND_ENDS = 0.5
# Steps without a better candidate after which rounding is taken to be reached. A new round needs some steps before it
# is better than the last one, and this number has to exceed them.
_PATIENCE = 60
# Conjugate gradients in one Newton step. A step that they cut short is still a descent direction.
_MAX_INNER = 200
# Steps of the method of multipliers in a derivative.
_MAX_REFINED = 30
# A step that has been halved to less than this is taken as it is, and ends the round: ten halvings, an SVD each.
_SHORTEST_STEP = 1e-3


class DualPoint(NamedTuple):
    """The kernel `A - S^* Y` of a multiplier `Y`, and the two parts of its duality gap.

    Attributes:
      kernel: `K = A - S^* Y`; it may lie outside the ball.
      slack: `c ||Y||_* - <S(K), Y>`.
      support: `<S(K), Y>`.
      bound: an upper bound of the largest norm in the stack `S(K)`.
    """

    kernel: Float[Array, "..."]
    slack: Float[Array, ""]
    support: Float[Array, ""]
    bound: Float[Array, ""]


class Iterate(NamedTuple):
    """Where the next step is tried, and the best dual point so far.

    Attributes:
      point: the kernel that the last accepted step led to.
      direction: the Newton direction from there.
      length: the share of `direction` to try next; 0 at the start of a round.
      slope: the derivative of the augmented Lagrangian along `direction`.
      value: the augmented Lagrangian at `point`; infinite at the start of a round, which accepts its first point.
      multiplier: `Y`.
      penalty: `rho`.
      largest_penalty: the limit of its growth.
      best: the dual point of the smallest excess.
      excess: how much farther from `A` than the projection the kernel of `best`, scaled into the ball, can be at most.
      stalled: steps since `best` was found.
      num_steps: steps taken, one SVD of the stack each.
    """

    point: Float[Array, "..."]
    direction: Float[Array, "..."]
    length: Float[Array, ""]
    slope: Float[Array, ""]
    value: Float[Array, ""]
    multiplier: Inexact[Array, "batch rows columns"]
    penalty: Float[Array, ""]
    largest_penalty: Float[Array, ""]
    best: DualPoint
    excess: Float[Array, ""]
    stalled: Int[Array, ""]
    num_steps: Int[Array, ""]


class _Pass(NamedTuple):
    """The augmented Lagrangian at a kernel, the multiplier that it leads to, and how far the stack is from the ball.

    `candidate` is the dual point of this multiplier.
    """

    value: Float[Array, ""]
    gradient: Float[Array, "..."]
    clipping: Clipping
    multiplier: Inexact[Array, "batch rows columns"]
    infeasibility: Float[Array, ""]
    candidate: DualPoint


def duality_gap(stack_map: StackMap, candidate: DualPoint, factor: Float[Array, ""]) -> Float[Array, ""]:
    """How far the objective of `K' = factor K` can be above the minimum, provided that `K'` is in the ball.

    The gap is written as `1/2 ||K' - K||^2 + c ||Y||_* - <S(K'), Y>`, whose terms do not cancel as the primal and the
    dual value do.
    """
    squared = stack_map.inner(candidate.kernel, candidate.kernel)
    return 0.5 * (1 - factor) ** 2 * squared + candidate.slack + (1 - factor) * candidate.support


def distance_and_excess(a: Float[Array, "..."], stack_map: StackMap, candidate: DualPoint, factor: Float[Array, ""]):
    """The distance of `factor K` from `A`, and how much larger than the distance of the projection it can be."""
    change = factor * candidate.kernel - a
    squared = stack_map.inner(change, change)
    twice_gap = 2 * duality_gap(stack_map, candidate, factor)
    distance = safe_sqrt(squared)
    total = distance + safe_sqrt(squared - twice_gap)
    return distance, jnp.clip(twice_gap / divisor(total), 0.0, distance)


def begin(kernel: Float[Array, "..."], stack_map: StackMap, limit: Float[Array, ""]) -> Iterate:
    """The state before the first step: the kernel itself, without multipliers."""
    stack = stack_map.stack(kernel)
    # The multipliers grow with the distance of the kernel from the ball, so the penalties grow with it too. The first
    # grows less. With one that grows as much, seven of forty kernels of one channel, 4,096 times too large, ended far
    # from the projection (`test_kernels_far_outside_the_ball`).
    mean_square = jnp.max(jnp.sum(jnp.real(jnp.conj(stack) * stack), axis=(-2, -1))) / min(stack.shape[-2:])
    ratio = jnp.maximum(safe_sqrt(mean_square) / limit, 1.0)
    zero = jnp.zeros((), kernel.dtype)
    nothing = DualPoint(kernel, zero, zero, zero + jnp.inf)
    return Iterate(
        point=kernel,
        direction=jnp.zeros_like(kernel),
        length=zero,
        slope=zero,
        value=zero + jnp.inf,
        multiplier=jnp.zeros_like(stack),
        penalty=_FIRST_PENALTY * jnp.sqrt(ratio),
        largest_penalty=largest_penalty(kernel.dtype) * ratio,
        best=nothing,
        excess=zero + jnp.inf,
        stalled=jnp.asarray(0, jnp.int32),
        num_steps=jnp.asarray(0, jnp.int32),
    )


def derivative(state: Iterate, stack_map: StackMap, limit, direction: Float[Array, "..."]) -> Float[Array, "..."]:
    """The derivative of the projection in `A` along `direction`, by the optimality conditions of the last round.

    With the curvature `M = I + S^* C S` of the multipliers it is the `x` that minimises `1/2 <x, M x> - <direction, x>`
    among those that keep the singular values at the limit there, `P S(x) = 0`. It is symmetric, with eigenvalues in
    [0, 1]. The method of multipliers finds it: with `H = M + rho S^* P S` each step takes `x` to `H^-1 M x`, from
    `H^-1 direction`. Where constraints are nearly the same, as at neighbouring frequencies, the first of these is off
    by several percent in float32.
    """
    rho = state.penalty.astype(state.multiplier.dtype)
    clipping = split(stack_map.stack(state.point) + state.multiplier / rho, limit)
    penalty = largest_penalty(direction.dtype)
    weights = divisor(stack_map.weights)
    tolerance = search_tolerance(direction.dtype)

    def product(x):
        return x + stack_map.pull_back(curvature(clipping, state.penalty, penalty, stack_map.stack(x)))

    def solution(_, right):
        def step(state):
            x, _, count = state
            # From the second step on it is `H^-1 M x - x`, without the difference of `M x` and `H x`.
            held = penalty * stack_map.pull_back(held_part(clipping, stack_map.stack(x)))
            wanted = jnp.where(count == 0, right / weights, -held)
            change = _newton_solve(product, stack_map, wanted, tolerance, 10 * _MAX_INNER)
            moves = stack_map.inner(change, change) > tolerance**2 * stack_map.inner(x, x)
            return x + change, moves, count + 1

        begin = jnp.zeros_like(right), jnp.asarray(True), jnp.asarray(0, jnp.int32)
        return lax.while_loop(lambda state: state[1] & (state[2] < _MAX_REFINED), step, begin)[0]

    # The weighted system is symmetric in the plain inner product, so both modes of differentiation solve the same one.
    return lax.custom_linear_solve(lambda x: weights * product(x), weights * direction, solution, symmetric=True)


def minimise(state: Iterate, a, stack_map: StackMap, limit, max_steps: int, largest_excess) -> Iterate:
    """Steps until the excess is at most `largest_excess`, progress ends, or `max_steps` are taken in all."""

    def unfinished(state: Iterate) -> Bool[Array, ""]:
        more = (state.num_steps < max_steps) & (state.stalled < _PATIENCE)
        return (state.excess > largest_excess) & more

    return lax.while_loop(unfinished, lambda state: _advance(state, a, stack_map, limit), state)


def _evaluate(kernel, a, stack_map: StackMap, limit, multiplier, penalty) -> _Pass:
    """The augmented Lagrangian at `kernel`, by one SVD of the stack."""
    rho = penalty.astype(multiplier.dtype)
    stack = stack_map.stack(kernel)
    clipping = split(stack + multiplier / rho, limit)
    beyond, inside = overshooting(clipping), clipped(clipping)
    new_multiplier = rho * beyond
    gradient = kernel - a + stack_map.pull_back(new_multiplier)
    value = 0.5 * stack_map.inner(kernel - a, kernel - a) + 0.5 * penalty * stack_map.stack_inner(beyond, beyond)
    off = stack - inside
    dual_kernel = kernel - gradient
    dual_stack = stack - stack_map.stack(gradient)
    candidate = DualPoint(
        kernel=dual_kernel,
        slack=stack_map.stack_inner(inside - dual_stack, new_multiplier),
        support=stack_map.stack_inner(dual_stack, new_multiplier),
        bound=limit + jnp.max(jnp.linalg.norm(dual_stack - inside, axis=(-2, -1))),
    )
    infeasibility = safe_sqrt(stack_map.stack_inner(off, off))
    return _Pass(value, gradient, clipping, new_multiplier, infeasibility, candidate)


def _hessian(stack_map: StackMap, clipping: Clipping, penalty) -> Callable:
    """The generalised Hessian of the augmented Lagrangian, as a map on kernels."""

    def product(direction):
        inner = excess_derivative(clipping, stack_map.stack(direction))
        return direction + penalty * stack_map.pull_back(inner)

    return product


def _newton_solve(product: Callable, stack_map: StackMap, right, tolerance, max_steps: int):
    """Solves `product(x) = right`, symmetric in `<., .>_d`, to a relative residual, by conjugate gradients."""
    # `jax.scipy`'s solver knows the plain inner product alone, so the system is scaled.
    root = jnp.sqrt(divisor(stack_map.weights))
    solution, _ = jax.scipy.sparse.linalg.cg(
        lambda x: root * product(x / root), root * right, tol=tolerance, maxiter=max_steps
    )
    return solution / root


def _advance(state: Iterate, a: Float[Array, "..."], stack_map: StackMap, limit: Float[Array, ""]) -> Iterate:
    """One step, with one SVD of the stack: a Newton step, a shorter step, or new multipliers."""
    point = state.point + state.length * state.direction
    found = _evaluate(point, a, stack_map, limit, state.multiplier, state.penalty)
    room = 100 * jnp.finfo(point.dtype).eps * jnp.abs(state.value)
    # Armijo's condition with its usual small share of the slope; `room` keeps rounding from refusing good steps.
    too_long = found.value > state.value + 1e-4 * state.length * state.slope + room
    accepted = ~too_long | (state.length < _SHORTEST_STEP)
    gradient_norm = safe_sqrt(stack_map.inner(found.gradient, found.gradient))
    # A step that was cut to the shortest length and still is too long ends the round too.
    ends = accepted & ((gradient_norm <= _ROUND_ENDS * found.infeasibility) | too_long)
    steps = accepted & ~ends
    # The Newton step is solved as exactly as the end of the round needs, with a margin of 0.3. The limits keep it near
    # the Newton direction (0.1), and keep conjugate gradients from refining a model that holds nearby alone (1e-3).
    wanted = 0.3 * _ROUND_ENDS * found.infeasibility / divisor(gradient_norm)
    direction = _newton_solve(
        _hessian(stack_map, found.clipping, state.penalty),
        stack_map,
        jnp.where(steps, -found.gradient, 0.0),
        jnp.clip(wanted, 1e-3, 0.1),
        _MAX_INNER,
    )
    grown = jnp.minimum(_PENALTY_GROWTH * state.penalty, state.largest_penalty)
    factor = jnp.minimum(limit / found.candidate.bound, 1.0)
    _, excess_found = distance_and_excess(a, stack_map, found.candidate, factor)
    # NaN compares as false, and must reach the result.
    better = ~(excess_found >= state.excess)
    return Iterate(
        point=jnp.where(accepted, point, state.point),
        direction=jnp.where(accepted, direction, state.direction),
        length=jnp.where(steps, 1.0, jnp.where(ends, 0.0, state.length / 2)),
        slope=jnp.where(accepted, stack_map.inner(direction, found.gradient), state.slope),
        value=jnp.where(ends, jnp.inf, jnp.where(accepted, found.value, state.value)),
        multiplier=jnp.where(ends, found.multiplier, state.multiplier),
        penalty=jnp.where(ends, grown, state.penalty),
        largest_penalty=state.largest_penalty,
        best=chosen(better, found.candidate, state.best),
        excess=jnp.where(better, excess_found, state.excess),
        stalled=jnp.where(better, 0, state.stalled + 1),
        num_steps=state.num_steps + 1,
    )

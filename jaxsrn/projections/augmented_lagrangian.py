"""The nearest kernel of the spectral ball, by an augmented Lagrangian with semismooth Newton steps.

    minimise  1/2 ||K - A||_d^2   subject to   ||S_b(K)||_2 <= c  for every matrix of the stack `S(K)`.

With `X` the stack clipped at `c` and multipliers `Y` the dual is smooth but for a nuclear norm: `K = A - S^* Y`, value
`1/2 ||A||^2 - 1/2 ||A - S^* Y||^2 - c ||Y||_*`. Dykstra's algorithm is its proximal gradient method, and slow: taps
that reach few samples make neighbouring frequencies nearly the same constraint. Here every round minimises

    1/2 ||K - A||_d^2 + rho/2 dist(S(K) + Y / rho, ball)^2

over the kernel alone, whose generalised Hessian `I + rho S^* D S` (Sun, Sun, Toh 2010 for the method) is solved by
conjugate gradients without any further SVD, and then takes `Y = rho (Z - clip Z)`, `Z = S(K) + Y / rho`. One SVD of the
stack a step; the duality gap is exact, so every step knows how far from optimal it can be at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, Int

from jaxsrn._tools.limits import largest_penalty, search_tolerance
from jaxsrn._tools.linalg import safe_sqrt
from jaxsrn.projections.clipping import Clipping, MatrixStack, clipped, excess_derivative, overshooting, split

__all__ = [
    "DualPoint",
    "Iterate",
    "begin",
    "derivative",
    "distance_and_excess",
    "duality_gap",
    "minimise",
]

_FIRST_PENALTY, _PENALTY_GROWTH = 10.0, 4.0
# The gradient that ends a round, relative to how far the matrices are from the ball.
_ROUND_ENDS = 0.5
# Steps without a better candidate: rounding is reached. A new round needs some to catch up.
_PATIENCE = 60
_MAX_INNER = 200
_SHORTEST_STEP = 1e-3


class DualPoint(NamedTuple):
    """The kernel `A - S^* Y` of a multiplier `Y`, and the two parts of its duality gap.

    Attributes:
      kernel: `K = A - S^* Y`; it may leave the ball.
      slack: `c ||Y||_* - <S(K), Y>`.
      support: `<S(K), Y>`.
      bound: of the norm of the whole stack, from above.
    """

    kernel: Float[Array, "..."]
    slack: Float[Array, ""]
    support: Float[Array, ""]
    bound: Float[Array, ""]


class Iterate(NamedTuple):
    """Where the next step is tried, and the best dual point so far.

    `excess`: how much farther from `A` than the projection its kernel, scaled into the ball, can be at most.
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
    """The augmented Lagrangian at a kernel, the multiplier that it leads to, and how far the stack is from the ball."""

    value: Float[Array, ""]
    gradient: Float[Array, "..."]
    clipping: Clipping
    multiplier: Inexact[Array, "batch rows columns"]
    infeasibility: Float[Array, ""]
    candidate: DualPoint


def duality_gap(blocks: MatrixStack, candidate: DualPoint, factor: Float[Array, ""]) -> Float[Array, ""]:
    """How far above the minimum the kernel times `factor` can be at most, if that is in the ball.

    `1/2 ||K' - K||^2 + c ||Y||_* - <S(K'), Y>` with `K' = factor K`: the duality gap without its cancellation.
    """
    squared = blocks.inner(candidate.kernel, candidate.kernel)
    return 0.5 * (1 - factor) ** 2 * squared + candidate.slack + (1 - factor) * candidate.support


def distance_and_excess(
    target: Float[Array, "..."], blocks: MatrixStack, candidate: DualPoint, factor: Float[Array, ""]
):
    """The distance from `A` of the kernel times `factor`, and how much farther than the projection that can be."""
    change = factor * candidate.kernel - target
    squared = blocks.inner(change, change)
    twice_gap = 2 * duality_gap(blocks, candidate, factor)
    distance = safe_sqrt(squared)
    total = distance + safe_sqrt(squared - twice_gap)
    return distance, jnp.clip(twice_gap / jnp.where(total == 0, 1.0, total), 0.0, distance)


def begin(kernel: Float[Array, "..."], blocks: MatrixStack, limit: Float[Array, ""]) -> Iterate:
    """From the kernel itself, without multipliers."""
    stack = blocks.stack(kernel)
    # Multipliers grow with how far the kernel is from the ball, and penalties have to.
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
        penalty=_FIRST_PENALTY * ratio,
        largest_penalty=largest_penalty(kernel.dtype) * ratio,
        best=nothing,
        excess=zero + jnp.inf,
        stalled=jnp.asarray(0),
        num_steps=jnp.asarray(0),
    )


def derivative(state: Iterate, blocks: MatrixStack, limit, direction: Float[Array, "..."]) -> Float[Array, "..."]:
    """The derivative of the last round's solution in `A` along `direction`, its multipliers and penalty held constant.

    The inverse of the generalised Hessian: the derivative of the projection up to `O(1 / rho)`, symmetric, with
    eigenvalues in (0, 1].
    """
    rho = state.penalty.astype(state.multiplier.dtype)
    clipping = split(blocks.stack(state.point) + state.multiplier / rho, limit)
    # The same multipliers at a larger penalty: their singular vectors stay, `(s - c) rho` stays.
    penalty = jnp.maximum(largest_penalty(direction.dtype), state.penalty)
    smaller = limit + (clipping.values - limit) * (state.penalty / penalty)
    clipping = clipping._replace(values=jnp.where(clipping.values > limit, smaller, clipping.values))
    product = _hessian(blocks, clipping, penalty)
    weights = jnp.where(blocks.weights == 0, 1.0, blocks.weights)
    tolerance = search_tolerance(direction.dtype)

    def solution(_, right):
        return _newton_solve(product, blocks, right / weights, tolerance, 10 * _MAX_INNER)

    # Symmetric in the plain inner product: both modes of differentiation solve the same system.
    return lax.custom_linear_solve(lambda x: weights * product(x), weights * direction, solution, symmetric=True)


def minimise(state: Iterate, target, blocks: MatrixStack, limit, max_steps: int, largest_excess) -> Iterate:
    """Steps until the excess is as small as asked, `max_steps` in all."""

    def unfinished(state: Iterate) -> Bool[Array, ""]:
        more = (state.num_steps < max_steps) & (state.stalled < _PATIENCE)
        return (state.excess > largest_excess) & more

    return lax.while_loop(unfinished, lambda state: _advance(state, target, blocks, limit), state)


def _evaluate(kernel, target, blocks: MatrixStack, limit, multiplier, penalty) -> _Pass:
    """One SVD of the stack at `kernel`; `target` is `A`."""
    rho = penalty.astype(multiplier.dtype)
    stack = blocks.stack(kernel)
    clipping = split(stack + multiplier / rho, limit)
    beyond, inside = overshooting(clipping), clipped(clipping)
    new_multiplier = rho * beyond
    gradient = kernel - target + blocks.pull_back(new_multiplier)
    value = 0.5 * blocks.inner(kernel - target, kernel - target) + 0.5 * penalty * blocks.stack_inner(beyond, beyond)
    off = stack - inside
    dual_kernel = kernel - gradient
    dual_stack = stack - blocks.stack(gradient)
    candidate = DualPoint(
        kernel=dual_kernel,
        slack=blocks.stack_inner(inside - dual_stack, new_multiplier),
        support=blocks.stack_inner(dual_stack, new_multiplier),
        bound=limit + jnp.max(jnp.linalg.norm(dual_stack - inside, axis=(-2, -1))),
    )
    infeasibility = safe_sqrt(blocks.stack_inner(off, off))
    return _Pass(value, gradient, clipping, new_multiplier, infeasibility, candidate)


def _hessian(blocks: MatrixStack, clipping: Clipping, penalty) -> Callable:
    def product(direction):
        inner = excess_derivative(clipping, blocks.stack(direction))
        return direction + penalty * blocks.pull_back(inner)

    return product


def _newton_solve(product: Callable, blocks: MatrixStack, right, tolerance, max_steps: int):
    """Solves `product(x) = right`, symmetric in `<., .>_d`, to a relative residual, by conjugate gradients."""
    # The kept solver knows the plain inner product alone.
    root = jnp.sqrt(jnp.where(blocks.weights == 0, 1.0, blocks.weights))
    solution, _ = jax.scipy.sparse.linalg.cg(
        lambda x: root * product(x / root), root * right, tol=tolerance, maxiter=max_steps
    )
    return solution / root


def _advance(state: Iterate, target: Float[Array, "..."], blocks: MatrixStack, limit: Float[Array, ""]) -> Iterate:
    """One SVD of the stack: a Newton step, a shorter one, or new multipliers."""
    point = state.point + state.length * state.direction
    found = _evaluate(point, target, blocks, limit, state.multiplier, state.penalty)
    room = 100 * jnp.finfo(point.dtype).eps * jnp.abs(state.value)
    too_long = found.value > state.value + 1e-4 * state.length * state.slope + room
    accepted = ~too_long | (state.length < _SHORTEST_STEP)
    gradient_norm = safe_sqrt(blocks.inner(found.gradient, found.gradient))
    # A step that had to be cut to nothing ends the round too.
    ends = accepted & ((gradient_norm <= _ROUND_ENDS * found.infeasibility) | too_long)
    steps = accepted & ~ends
    # Not more exact than the end of the round needs.
    wanted = 0.3 * _ROUND_ENDS * found.infeasibility / jnp.where(gradient_norm == 0, 1.0, gradient_norm)
    direction = _newton_solve(
        _hessian(blocks, found.clipping, state.penalty),
        blocks,
        jnp.where(steps, -found.gradient, 0.0),
        jnp.clip(wanted, 1e-3, 0.1),
        _MAX_INNER,
    )
    grown = jnp.minimum(_PENALTY_GROWTH * state.penalty, state.largest_penalty)
    factor = jnp.minimum(limit / found.candidate.bound, 1.0)
    _, excess_found = distance_and_excess(target, blocks, found.candidate, factor)
    better = ~(excess_found >= state.excess)  # NaN must get through
    return Iterate(
        point=jnp.where(accepted, point, state.point),
        direction=jnp.where(accepted, direction, state.direction),
        length=jnp.where(steps, 1.0, jnp.where(ends, 0.0, state.length / 2)),
        slope=jnp.where(accepted, blocks.inner(direction, found.gradient), state.slope),
        value=jnp.where(ends, jnp.inf, jnp.where(accepted, found.value, state.value)),
        multiplier=jnp.where(ends, found.multiplier, state.multiplier),
        penalty=jnp.where(ends, grown, state.penalty),
        largest_penalty=state.largest_penalty,
        best=jax.tree.map(lambda new, old: jnp.where(better, new, old), found.candidate, state.best),
        excess=jnp.where(better, excess_found, state.excess),
        stalled=jnp.where(better, 0, state.stalled + 1),
        num_steps=state.num_steps + 1,
    )

"""Steepest descent directions by passes that clip singular values and keep the taps.

The problem is `max <G, K>` over the kernels `K` of the support whose stack of matrices `S(K)` (`clipping.py`) has norms
of at most 1. Of a convolution the stack is its symbol on a grid of frequencies. Without the support the solution is the
polar factor `U V^H` of every matrix of `S(G)`. Cropping it to the taps loses much, and the passes get it back. They are
the alternating direction method of multipliers (Boyd et al. 2011, section 3.1.1, scaled form, over-relaxed by `r` as in
section 3.4.3), with the stack `W` clipped and the kernel `K` cropped:

    W = clip(X),   Y <- X - W,   K <- (S^* S)^-1 (S^*(W - Y) + h G),   X <- r S(K) + (1 - r) W + Y.

The step `h` is the inverse of the penalty there. Each pass takes one SVD of the stack. At rest `S(K) = W` is in the
ball, and `Y / h` solves the dual. On the way there both are candidates: `S^* W` divided by its norm, and `Y / h`
corrected to be feasible (`feasible_multiplier`). They bound the solution from both sides, so that `solved` stops by a
proof. The stack `X` is all that a pass needs of the last one, so that an optimizer can go on from it with its next
direction.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from jaxsrn._tools.linalg import divisor, matmul, ratio, svdvals, top_values
from jaxsrn.bounds.covers import covers
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.projections.clipping import StackMap, clipped, overshooting, split
from jaxsrn.spectra.circular.fourier import half_symbol
from jaxsrn.spectra.circular.grid_certificate import degrees, on_coarse_grid
from jaxsrn.spectra.circular.sites import multiplicity, without_edges

__all__ = [
    "Passed",
    "Solved",
    "feasible_multiplier",
    "few_frequencies",
    "first_stack",
    "nuclear_norm",
    "passes",
    "polar",
    "solved",
    "unit_direction",
]

# Angles per degree of the symbol. With fewer, frequencies between them exceed the grid's by more, and crops are worse;
# more take more SVDs and change little (m = 4, 8, 16 in `python benchmarks/steepest.py`).
_ANGLES = 4
# The length of the step along `G` in each pass; the root mean square of the singular values of `S(G)` is 1. Longer ones
# are slower to begin with, shorter ones to end.
_STEP = 0.1
# The over-relaxation. It has to be below 2, and halves the passes of 1.
_RELAXATION = 1.9
# Passes between two proofs of the gap, which take as long as one or two passes.
_PASSES_PER_PROOF = 20
# The ratio at which `_balance` holds two shares: that of the clipped stack which is cropped, and that of the
# multipliers which is not feasible. Fine grids need short steps in the end.
_PREFERENCE = 0.3


def few_frequencies(op: Operator, kernel_shape: tuple[int, ...], dtype, per_degree: int = _ANGLES) -> StackMap:
    """The symbol of a layer on a coarse grid, with weights that are all 1: `<G, K>` is the plain inner product.

    The grid of a circular layer is a part of its own, and that of an unbounded one a part of the torus. A layer with
    zero padding is taken for the one without edges, whose ball is a part of its own.
    """
    example, cover = covers(jnp.zeros(kernel_shape, dtype), op)[0]
    if isinstance(op, CircularConv):
        layer = _on_part_of_grid(op, kernel_shape, per_degree)
    else:
        layer = on_coarse_grid(without_edges(cover), example.shape, per_degree)
    counts = jnp.asarray(multiplicity(layer)[:, None, None] / math.prod(layer.grid), dtype)
    return StackMap(lambda kernel: half_symbol(covers(kernel, op)[0][0], layer), counts, jnp.ones(kernel_shape, dtype))


def _on_part_of_grid(op: CircularConv, kernel_shape: tuple[int, ...], per_degree: int) -> CircularConv:
    """The layer on the smallest image whose grid is a part of its own and has enough angles on each axis."""
    sizes = []
    for n, degree in zip(op.grid, degrees(op, kernel_shape), strict=True):
        # A grid of three quarters of the angles is still good enough, and images often have such divisors (28 has 7).
        sizes.append(next(m for m in range(1, n + 1) if n % m == 0 and (m >= 0.75 * per_degree * degree or m == n)))
    return dataclasses.replace(op, input_shape=tuple(m * s for m, s in zip(sizes, op.strides, strict=True)))


def polar(matrices: Inexact[Array, "batch rows columns"]) -> Inexact[Array, "batch rows columns"]:
    """`U V^H` of each matrix, without the directions whose singular values are 0 up to rounding.

    Nothing says along which of two opposite directions a singular value of 0 is to be raised.
    """
    clipping = split(matrices, jnp.ones((), matrices.real.dtype))
    room = max(matrices.shape[-2:]) * jnp.finfo(clipping.values.dtype).eps
    # "Not at most", so that NaN stays.
    kept = ~(clipping.values <= room * jnp.max(clipping.values))
    signs = jnp.where(kept, jnp.where(jnp.isnan(clipping.values), clipping.values, 1.0), 0.0)
    return matmul(clipping.rows * signs[:, None, :].astype(clipping.rows.dtype), clipping.columns)


def unit_direction(gradient: Float[Array, "..."], stack_map: StackMap) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """`(B, scale)` with `<G, K> = scale <B, K>_d` for all `K`; the mean square of the singular values of `S(B)` is 1.

    Taps that meet no sample, and a zero gradient, give zeros.
    """
    direction = ratio(gradient, stack_map.weights)
    stack = stack_map.stack(direction)
    count = jnp.sum(jnp.broadcast_to(stack_map.counts, (len(stack), 1, 1))) * min(stack.shape[-2:])
    scale = jnp.sqrt(stack_map.stack_inner(stack, stack) / count)
    return direction / divisor(scale), scale


def nuclear_norm(stack_map: StackMap, stack: Inexact[Array, "batch rows columns"]) -> Float[Array, ""]:
    """The sum of all singular values of the operator that the stack stands for."""
    values = svdvals(stack)
    return jnp.sum(stack_map.counts[..., 0] * values)


def _gain(stack_map: StackMap) -> Float[Array, "..."]:
    """`S^* S`, which is one number for each tap."""
    return stack_map.pull_back(stack_map.stack(jnp.ones_like(stack_map.weights)))


def feasible_multiplier(stack_map: StackMap, direction: Float[Array, "..."], multiplier) -> Inexact[Array, "..."]:
    """The dual feasible point nearest to a multiplier: `Z` with `S^* Z = B`.

    For every `K` of the ball `<B, K>_d = <Z, S(K)> <= ||Z||_*`.
    """
    return multiplier + stack_map.stack(ratio(direction - stack_map.pull_back(multiplier), _gain(stack_map)))


def first_stack(direction: Float[Array, "..."], stack_map: StackMap) -> Inexact[Array, "batch rows columns"]:
    """The stack that the passes start from: the cropped polar factor, and the multiplier `S(B)`."""
    stack = stack_map.stack(direction)
    return stack_map.stack(stack_map.pull_back(polar(stack))) + jnp.asarray(_STEP, stack.dtype) * stack


class Passed(NamedTuple):
    """What passes end with.

    Attributes:
      kernel: the taps of `inside`; near the ball.
      inside: `W`, the clipped stack.
      multiplier: `Y / h`, for `feasible_multiplier`.
      stack: `X`, where to go on.
    """

    kernel: Float[Array, "..."]
    inside: Inexact[Array, "batch rows columns"]
    multiplier: Inexact[Array, "batch rows columns"]
    stack: Inexact[Array, "batch rows columns"]


def passes(
    direction: Float[Array, "..."], stack_map: StackMap, num_passes: int | Int[Array, ""], stack=None, step=_STEP
) -> Passed:
    """Passes of the step `h` from a stack of an earlier one, by default from the first."""
    one, gain = jnp.ones((), direction.dtype), _gain(stack_map)
    stack = first_stack(direction, stack_map) if stack is None else stack

    def one_pass(_, state):
        clipping = split(state[2], one)
        inside, beyond = clipped(clipping), overshooting(clipping)
        kernel = ratio(stack_map.pull_back(inside - beyond) + step * direction, gain)
        return inside, beyond, inside + _RELAXATION * (stack_map.stack(kernel) - inside) + beyond

    start = jnp.zeros_like(stack), jnp.zeros_like(stack), stack
    inside, beyond, stack = lax.fori_loop(0, num_passes, one_pass, start)
    kernel = ratio(stack_map.pull_back(inside), gain)
    return Passed(kernel, inside, beyond / jnp.asarray(step, beyond.dtype), stack)


class Solved(NamedTuple):
    """The best kernel of the ball of a stack, and what is proven of it.

    Attributes:
      kernel: the norms of its stack are at most 1.
      value: `<B, kernel>_d`.
      bound: an upper bound of the largest value of all kernels of the ball.
      stack: where the passes go on.
      step: their `h`.
      num_passes: passes done.
    """

    kernel: Float[Array, "..."]
    value: Float[Array, ""]
    bound: Float[Array, ""]
    stack: Inexact[Array, "batch rows columns"]
    step: Float[Array, ""]
    num_passes: Int[Array, ""]


def solved(direction: Float[Array, "..."], stack_map: StackMap, gap, max_passes: int) -> Solved:
    """Passes until the value is proven to be within the share `gap` of the largest one, or `max_passes` are done."""
    length, count = jnp.sqrt(stack_map.inner(direction, direction)), min(_PASSES_PER_PROOF, max_passes)

    def some_passes(state: Solved) -> Solved:
        num_passes = jnp.minimum(count, max_passes - state.num_passes)
        found = passes(direction, stack_map, num_passes, state.stack, state.step)
        kernel = ratio(found.kernel, jnp.max(top_values(stack_map.stack(found.kernel))))
        value = stack_map.inner(direction, kernel)
        # NaN compares as false, and must reach the result.
        better = ~(value <= state.value)
        step = state.step * _balance(found, direction, length, stack_map)
        return Solved(
            kernel=jnp.where(better, kernel, state.kernel),
            value=jnp.where(better, value, state.value),
            bound=jnp.minimum(
                state.bound, nuclear_norm(stack_map, feasible_multiplier(stack_map, direction, found.multiplier))
            ),
            stack=found.stack + (step - state.step).astype(found.stack.dtype) * found.multiplier,
            step=step,
            num_passes=state.num_passes + num_passes,
        )

    def unfinished(state: Solved):
        return (state.value < (1 - gap) * state.bound) & (state.num_passes < max_passes)

    zero = jnp.zeros((), direction.dtype)
    begun = Solved(
        kernel=jnp.zeros_like(direction),
        value=zero,
        bound=zero + jnp.inf,
        stack=first_stack(direction, stack_map),
        step=zero + _STEP,
        num_passes=jnp.asarray(0, jnp.int32),
    )
    return lax.while_loop(unfinished, some_passes, begun)


def _balance(found: Passed, direction, length, stack_map: StackMap) -> Float[Array, ""]:
    """The factor of the step that brings both infeasibilities together (Boyd et al. 2011, section 3.4.1).

    A longer step makes the multipliers feasible sooner, and the clipped stack later.
    """
    cropped = found.inside - stack_map.stack(found.kernel)
    primal = jnp.sqrt(stack_map.stack_inner(cropped, cropped) / stack_map.stack_inner(found.inside, found.inside))
    missing = direction - stack_map.pull_back(found.multiplier)
    dual = jnp.sqrt(stack_map.inner(missing, missing)) / length
    factor = jnp.sqrt(_PREFERENCE * ratio(dual, primal))
    return jnp.clip(jnp.where(factor > 0, factor, 1.0), 0.5, 2.0)

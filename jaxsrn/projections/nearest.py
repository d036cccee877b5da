"""The nearest kernel to `A` in the spectral ball of any layer, with a proven lower bound on the distance.

A layer whose own matrices are small is solved by the convex problem itself (`augmented_lagrangian.py`). The ball of a
larger zero-padded layer stands between the balls of two circular layers, in the same distance:

- The inner ball is that of the cover (`bounds/covers.py`): a kernel in the cover's ball is in the layer's. Its radius
  is widened until the layer's own norm is the limit.
- The outer ball is that of the tapered layer. Let `h` and `g` be windows, an image of the inputs and one of the outputs
  that fade towards the edges. A plane wave with amplitudes `u` in the window `h` is an input image, and one with
  amplitudes `v` in the window `g` is an output image. Tap `p` connects the sample `n(m, p)` of the inputs with the
  sample `m` of the outputs, so that

      <g v e^(i w m), T(K) (h u e^(i w n))>  =  v^H S_{tau K}(w) u,    tau_p = sum_m g(m) h(n(m, p)),

  for windows whose squares have the sum 1, those of the inputs in each phase. The **tapered** kernel `tau K` of a
  kernel of the layer's ball therefore has a norm of at most `c` at every frequency, and the distance to that larger set
  is a lower bound. A half sine along each axis of `n` samples has `1 - tau_p` of the order of `1 / n**2`, where a
  constant window has `1 / n`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.held import moving, refusing
from jaxsrn._tools.linalg import divisor, inner, ratio, safe_sqrt
from jaxsrn._tools.tolerances import SPLIT_SIZE
from jaxsrn.bounds.covers import covers
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.projections.augmented_lagrangian import Iterate, begin, derivative, distance_and_excess, minimise
from jaxsrn.projections.clipping import StackMap, stack_map_of
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair, value_gradient
from jaxsrn.spectra.singular_pair import Pair, has_small_matrices

__all__ = [
    "Nearest",
    "SolvedBall",
    "inner_map",
    "nearest",
    "outer_map",
    "with_derivative",
    "without_a_step",
]

# Radii of the cover that are tried, each a convex problem of its own. A radius that misses the limit costs distance,
# not feasibility: the last kernel is scaled into the ball.
_NUM_RADII = 6
# The derivative is that of the solved problem, whose own motion is not computed.
_NO_MOVE = refusing(
    "project_spectral_ball: got a second derivative, expected first ones alone; take clip_singular_values, which has "
    "both, or bounds and penalties of the norm."
)


class SolvedBall(NamedTuple):
    """The last iterate of the ball that was solved (the layer's own or its cover's), and the radius of that ball."""

    iterate: Iterate
    radius: Float[Array, ""]


class Nearest(NamedTuple):
    """A kernel of the ball with its leading pair.

    `distance` is its distance from `A`, and `excess` how much larger that can be than the least one.
    """

    kernel: Float[Array, "..."]
    leading: Pair
    distance: Float[Array, ""]
    excess: Float[Array, ""]
    num_steps: Int[Array, ""]


def inner_map(op: Operator, kernel_shape: tuple[int, ...], dtype) -> StackMap:
    """The stack whose ball is a part of the layer's: its own, or that of the cover of a layer too large to split."""
    if has_small_matrices(op, kernel_shape, SPLIT_SIZE):
        return stack_map_of(op, kernel_shape, dtype)
    return _circular(op, kernel_shape, dtype, tapered=False)


def outer_map(op: Operator, kernel_shape: tuple[int, ...], dtype) -> StackMap:
    """The stack whose ball contains the layer's: its own, or that of the tapered layer."""
    if has_small_matrices(op, kernel_shape, SPLIT_SIZE):
        return stack_map_of(op, kernel_shape, dtype)
    return _circular(op, kernel_shape, dtype, tapered=True)


def _circular(op: ZeroPaddedConv, kernel_shape: tuple[int, ...], dtype, tapered: bool) -> StackMap:
    """The stack of the cover.

    With `tapered` it is the stack of the tapered layer, at the frequencies of the smallest image that holds the layer's
    and separates taps.
    """
    weights = jnp.broadcast_to(op.frobenius_weights(kernel_shape, dtype), kernel_shape)
    example, cover = covers(jnp.zeros(kernel_shape, dtype), op)[0]
    taper = jnp.ones((), dtype)
    if tapered:
        cover = dataclasses.replace(cover, input_shape=_smallest_image(op, kernel_shape, cover.strides))
        taper = jnp.asarray(_taper(op, kernel_shape, cover.strides), dtype)
    own = stack_map_of(cover, example.shape, dtype)
    return StackMap(lambda kernel: own.stack(covers(kernel * taper, op)[0][0]), own.counts, weights)


def _smallest_image(op: ZeroPaddedConv, kernel_shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    images = op._dilated_shape, op.out_shape(kernel_shape)
    # A layer with input dilation alone has the cover of its adjoint, whose images change sides.
    if strides != op.strides:
        images = op.out_shape(kernel_shape), op.input_shape
    sizes = zip(*images, op._extents(kernel_shape), strides, strict=False)
    return tuple(-(-max(n, s * m, extent) // s) * s for n, m, extent, s in sizes)


def _taper(op: ZeroPaddedConv, kernel_shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """`tau` for the cover of the given strides, `(*taps, 1, 1)` (static)."""
    axes = []
    for axis, (low, _) in enumerate(op._pads(kernel_shape)):
        outputs = op.out_shape(kernel_shape)[axis], op.strides[axis]
        inputs = op.input_shape[axis], op.input_dilation[axis]
        offsets = op.kernel_dilation[axis] * np.arange(kernel_shape[axis]) - low
        # The adjoint, whose strides are the input dilation, exchanges inputs and outputs, and looks back.
        lines = (outputs, inputs, offsets) if strides == op.strides else (inputs, outputs, -offsets)
        axes.append(_axis_taper(*lines))
    return functools.reduce(np.multiply.outer, axes)[..., None, None]


def _axis_taper(first: tuple[int, int], second: tuple[int, int], offsets: np.ndarray) -> np.ndarray:
    """`tau` of one axis for taps that connect samples `m` and `n` of two lines where `step m + offset = spacing n`.

    Args:
      first, second: the number of samples and the step of either line.
      offsets: those of the taps.
    """
    (size, step), (other, spacing) = first, second
    window, samples = _half_sine(size), _half_sine(other)
    taper = []
    for offset in offsets:
        places = step * np.arange(size) + offset
        meets = (places % spacing == 0) & (places >= 0) & (places < spacing * other)
        # Samples of one phase are those that a tap could meet if the first line had no ends.
        in_phase = (spacing * np.arange(other) - offset) % step == 0
        length = np.linalg.norm(window) * np.linalg.norm(samples[in_phase])
        taper.append(window[meets] @ samples[places[meets] // spacing] / length if meets.any() else 0.0)
    return np.array(taper)


def _half_sine(size: int) -> np.ndarray:
    return np.sin(np.pi * np.arange(1, size + 1) / (size + 1))


def without_a_step(
    a: Float[Array, "..."], op: Operator, limit: Float[Array, ""], own: Pair
) -> tuple[SolvedBall, Nearest]:
    """What `nearest` returns for a kernel in the ball, without a step.

    It also takes the place of what `nearest` has yet to find: a loop that starts from it compiles `nearest` once, in
    its body.
    """
    zero = jnp.zeros_like(limit)
    stack_map = inner_map(op, a.shape, a.dtype)
    return SolvedBall(begin(a, stack_map, limit), limit), Nearest(a, own, zero, zero, jnp.asarray(0, jnp.int32))


def nearest(
    a: Float[Array, "..."], op: Operator, limit: Float[Array, ""], own: Pair, max_steps: int, largest_excess
) -> tuple[SolvedBall, Nearest]:
    """The nearest kernel in the ball of radius `limit`, its distance at most `largest_excess` above the least one.

    `own` is the leading pair of `A`. Where `max_steps` run out, or the layer is too large to split, the excess may be
    larger; it is in the result.
    """
    shape, dtype = a.shape, a.dtype
    stack_map = inner_map(op, shape, dtype)
    solve = functools.partial(_from_scratch, a, max_steps=max_steps, largest_excess=largest_excess)
    if has_small_matrices(op, shape, SPLIT_SIZE):
        found = solve(stack_map, limit)
        best = found.best.kernel
        leading = leading_pair(best, op)
        factor = _into_ball(best, pair_value(best, op, leading), a, stack_map, limit)
        distance, excess = distance_and_excess(a, stack_map, found.best, factor)
        return SolvedBall(found, limit), Nearest(factor * best, leading, distance, excess, found.num_steps)
    larger = outer_map(op, shape, dtype)
    outer = solve(larger, limit)
    reached, beyond = distance_and_excess(a, larger, outer.best, jnp.ones_like(limit))
    begun = begin(a, stack_map, limit)
    widened = _widened(lambda radius: solve(stack_map, radius), begun, op, limit, own)
    best = widened.solution.iterate.best.kernel
    kernel = _into_ball(best, widened.norm, a, stack_map, limit) * best
    distance = safe_sqrt(stack_map.inner(kernel - a, kernel - a))
    excess = distance - jnp.maximum(reached - beyond, 0)
    num_steps = widened.num_steps + outer.num_steps
    return widened.solution, Nearest(kernel, widened.leading, distance, excess, num_steps)


def _from_scratch(a, stack_map: StackMap, radius, max_steps: int, largest_excess) -> Iterate:
    """The solved ball, started without multipliers: those of another radius need penalties that make it slower."""
    return minimise(begin(a, stack_map, radius), a, stack_map, radius, max_steps, largest_excess)


def _into_ball(kernel, norm, a, stack_map: StackMap, limit) -> Float[Array, ""]:
    """The factor that takes a kernel of known norm to its multiple in the ball that is nearest to `A`."""
    squared = stack_map.inner(kernel, kernel)
    zero = (norm == 0) | (squared == 0)
    nearest_multiple = stack_map.inner(kernel, a) / jnp.where(zero, 1.0, squared)
    # Rounding can give the multiple either sign, where `A` is far outside of the ball.
    most = limit / jnp.where(zero, 1.0, norm)
    return jnp.where(zero, 1.0, jnp.clip(nearest_multiple, -most, most))


class _Widened(NamedTuple):
    """The projection on the cover's ball, the layer's norm and leading pair at its kernel, and the next radius."""

    solution: SolvedBall
    norm: Float[Array, ""]
    leading: Pair
    radius: Float[Array, ""]
    num_steps: Int[Array, ""]


def _widened(solve: Callable, begun: Iterate, op: Operator, limit: Float[Array, ""], own: Pair) -> _Widened:
    """The projection on the cover's ball whose radius makes the layer's own norm the limit, with all steps taken.

    The loop starts from `begun`, the problem before its first step, so that the program holds `solve` once.
    """

    def try_radius(_, state: _Widened) -> _Widened:
        found = solve(state.radius)
        leading = leading_pair(found.best.kernel, op)
        norm = pair_value(found.best.kernel, op, leading)
        # The radius is scaled as if the norm were proportional to it.
        radius = jnp.where(norm == 0, state.radius, state.radius * limit / divisor(norm))
        return _Widened(SolvedBall(found, state.radius), norm, leading, radius, state.num_steps + found.num_steps)

    nothing = _Widened(SolvedBall(begun, limit), jnp.zeros_like(limit), own, limit, jnp.asarray(0, jnp.int32))
    return lax.fori_loop(0, _NUM_RADII, try_radius, nothing)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def with_derivative(op: Operator, a, limit, kernel, solution: SolvedBall, leading: Pair) -> Float[Array, "..."]:
    """`kernel`, the solution for `a` and `limit`, with the derivative of the projection in these two.

    `leading` is the leading pair of the kernel, whose value stays at the limit.
    """
    return kernel


@with_derivative.defjvp
def _with_derivative_jvp(op: Operator, primals, tangents):
    a, limit, kernel, solution, leading = primals
    solution, leading = moving(_NO_MOVE, (a, limit), (solution, leading))
    stack_map, functional = inner_map(op, a.shape, a.dtype), value_gradient(leading, op, a.shape)
    # The kernel is this multiple of the solution, which may be a little outside of the ball.
    found = solution.iterate.best.kernel
    factor = ratio(stack_map.inner(kernel, found), stack_map.inner(found, found))

    def moved(direction):
        return factor * derivative(solution.iterate, stack_map, solution.radius, direction)

    def rise(change):
        return inner(functional, change)

    if has_small_matrices(op, a.shape, SPLIT_SIZE):
        # The projection is homogeneous: scaling `A` and the radius by `t` scales the result by `t`. What the derivative
        # at a fixed radius adds to the norm, as between the frequencies of a grid, is scaled away.
        rate = tangents[1] / limit
        within = moved(tangents[0] - rate * a)
        return kernel, within + (rate - rise(within) / limit) * kernel
    # The radius moves so that the norm is the limit.
    within, by_radius = moved(tangents[0]), kernel - moved(a)
    return kernel, within + (tangents[1] - rise(within)) / divisor(rise(by_radius)) * by_radius

"""The nearest kernel in the spectral ball of any layer, with a proven lower bound on the distance.

Where the layer's own matrices are small enough to split, by the convex problem itself. Larger zero-padded layers stand
between two circular ones that share their distance:

- The layer is the restriction of a circular one on the padded image, its **cover**: in the cover's ball a kernel is in
  the layer's. Its radius is widened until the layer's own norm is met.
- Let `C(Y)` be the circular map with symbol `Y` on a grid of `N_c` samples that holds the image, and `R C(Y) E` its
  part on the image. Restricting cannot raise a nuclear norm, and tap `p` of a zero-padded layer meets `d_p` samples, so

      c sum_w ||Y(w)||_*  >=  c ||R C(Y) E||_*  >=  <R C(Y) E, T(K)>  =  sum_w <Y(w), S_{(d / N_c) K}(w)>

  for every `K` of the layer's ball: the **tapered** kernel `(d / N_c) K` is in the ball of the circular layer on the
  image. The distance to that larger set is a lower bound.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn import _ball
from jaxsrn._ball import Iterate
from jaxsrn._clip import Blocks, blocks_of
from jaxsrn.bounds import _covers as covers
from jaxsrn.norms import norm_of
from jaxsrn.operators import Operator, ZeroPaddedConv

__all__ = ["Nearest", "Search", "nearest", "start", "with_derivative"]

# Entries of the explicit matrix of a zero-padded layer that is still split in every step.
_EXPLICIT_LIMIT = 2**16
# Radii of the cover that are tried; the last misses the norm by little.
_NUM_RADII = 4


class Search(NamedTuple):
    """The state of a search, to go on from.

    Attributes:
      inner: in the ball that the kernel is taken from: the layer's own, or its cover's.
      widening: the radius of that ball over the limit.
      outer: in the ball that the lower bound is from, where that is another one.
    """

    inner: Iterate
    widening: Float[Array, ""]
    outer: Iterate | None


class Nearest(NamedTuple):
    """A kernel of the ball, how far it is from the target, and how much less that could be at most."""

    kernel: Float[Array, "..."]
    distance: Float[Array, ""]
    excess: Float[Array, ""]
    num_steps: Int[Array, ""]


def is_split(op: Operator, kernel_shape: tuple[int, ...]) -> bool:
    """Whether the layer's own matrices are split."""
    size = math.prod(op.in_shape(kernel_shape)) * math.prod(op.out_shape(kernel_shape))
    return not isinstance(op, ZeroPaddedConv) or size <= _EXPLICIT_LIMIT


def _inner_blocks(op: Operator, kernel_shape: tuple[int, ...], dtype) -> Blocks:
    if is_split(op, kernel_shape):
        return blocks_of(op, kernel_shape, dtype)
    return _circular(op, kernel_shape, dtype, tight=False)


def _circular(op: ZeroPaddedConv, kernel_shape: tuple[int, ...], dtype, tight: bool) -> Blocks:
    """The stack of the cover; `tight`: tapered, on the smallest image that holds the layer's and keeps taps apart."""
    weights = jnp.broadcast_to(op.frobenius_weights(kernel_shape, dtype), kernel_shape)
    example, cover = covers(jnp.zeros(kernel_shape, dtype), op, False)[0]
    taper = jnp.ones_like(weights)
    if tight:
        cover = dataclasses.replace(cover, input_shape=_smallest_image(op, kernel_shape, cover.strides))
        taper = weights / math.prod(cover.grid)
    own = blocks_of(cover, example.shape, dtype)
    return Blocks(lambda kernel: own.stack(covers(kernel * taper, op, False)[0][0]), own.counts, weights)


def _smallest_image(op: ZeroPaddedConv, kernel_shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    images = op.dilated_shape, op.out_shape(kernel_shape)
    # The cover of a layer with input dilation alone is that of its adjoint.
    if strides != op.strides:
        images = op.out_shape(kernel_shape), op.input_shape
    sizes = zip(*images, op.extents(kernel_shape), strides, strict=False)
    return tuple(-(-max(n, s * m, extent) // s) * s for n, m, extent, s in sizes)


def start(target: Float[Array, "..."], op: Operator) -> Search:
    """A search from the target itself."""
    shape, dtype = target.shape, target.dtype
    inner = _ball.begin(target, _inner_blocks(op, shape, dtype))
    outer = None if is_split(op, shape) else _ball.begin(target, _circular(op, shape, dtype, tight=True))
    return Search(inner, jnp.ones((), dtype), outer)


def nearest(
    search: Search, target: Float[Array, "..."], op: Operator, limit: Float[Array, ""], max_steps: int, largest_excess
) -> tuple[Search, Nearest]:
    """Goes on with a search, until the kernel is proven to be no farther than it must by more than `largest_excess`."""
    shape = target.shape
    blocks = _inner_blocks(op, shape, target.dtype)
    if is_split(op, shape):
        inner = _ball.solve(search.inner, target, blocks, limit, max_steps, largest_excess)
        factor = _into_ball(inner.best.kernel, op, limit)
        distance, excess = _ball.distance_and_excess(target, blocks, inner.best, factor)
        kernel = factor * inner.best.kernel
        return Search(inner, search.widening, None), Nearest(kernel, distance, excess, inner.num_steps)
    outer_blocks = _circular(op, shape, target.dtype, tight=True)
    outer = _ball.solve(search.outer, target, outer_blocks, limit, max_steps, largest_excess)
    reached, beyond = _ball.distance_and_excess(target, outer_blocks, outer.best, jnp.ones_like(limit))
    inner, widening, num_steps = _widened(search, target, op, blocks, limit, max_steps, largest_excess)
    kernel = _into_ball(inner.best.kernel, op, limit) * inner.best.kernel
    distance = jnp.sqrt(blocks.inner(kernel - target, kernel - target))
    excess = distance - jnp.maximum(reached - beyond, 0)
    return Search(inner, widening, outer), Nearest(kernel, distance, excess, num_steps + outer.num_steps)


def _into_ball(kernel: Float[Array, "..."], op: Operator, limit: Float[Array, ""]) -> Float[Array, ""]:
    """What to scale the kernel with."""
    norm = norm_of(kernel, op)
    return jnp.where(norm > limit, limit / jnp.where(norm == 0, 1.0, norm), jnp.where(jnp.isnan(norm), norm, 1.0))


def _widened(search: Search, target, op: Operator, blocks: Blocks, limit, max_steps: int, largest_excess):
    """The projection on the cover's ball of the radius at which the layer's own norm is the limit."""

    def try_radius(_, state):
        inner, widening, num_steps = state
        inner = _ball.solve(_ball.again(inner), target, blocks, widening * limit, max_steps, largest_excess)
        norm = norm_of(inner.best.kernel, op)
        wider = jnp.where(norm == 0, widening, widening * limit / jnp.where(norm == 0, 1.0, norm))
        return inner, wider, num_steps + inner.num_steps

    inner, widening, num_steps = lax.fori_loop(
        0, _NUM_RADII - 1, try_radius, (search.inner, search.widening, jnp.asarray(0))
    )
    last = _ball.solve(_ball.again(inner), target, blocks, widening * limit, max_steps, largest_excess)
    return last, widening, num_steps + last.num_steps


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def with_derivative(op: Operator, target, limit, kernel, search: Search) -> Float[Array, "..."]:
    """`kernel`, found for `target` and `limit`, with the derivative of the projection in these two."""
    return kernel


@with_derivative.defjvp
def _with_derivative_jvp(op: Operator, primals, tangents):
    target, limit, kernel, search = primals
    blocks = _inner_blocks(op, target.shape, target.dtype)
    # The projection of t A on the ball of radius t c is t times that of A on that of radius c.
    rate = tangents[1] / limit
    direction = tangents[0] - rate * target
    inner = _ball.derivative(search.inner, blocks, search.widening * limit, direction)
    return kernel, inner + rate * kernel

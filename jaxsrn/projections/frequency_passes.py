"""Steepest descent directions of a convolution by a few passes over a coarse grid of frequencies.

The problem is `max <G, K>` over the kernels `K` of the support whose symbol `S(K)` has norms of at most 1. Without the
support its solution is the polar factor `U V^H` of the symbol `S(G)` at each frequency. Cropping it to the taps loses
much, and the passes get it back. They are the alternating direction method of multipliers (Boyd et al. 2011, section
3.1.1, scaled form), with the symbol `W` clipped and the kernel `K` cropped:

    X = S(K) + Y,   W = clip(X),   Y <- X - W,   K <- S^*(W - Y) + rho G.

Each pass takes one SVD of the symbol on the grid. At rest `S(K) = W` is in the ball, and `Y / rho` solves the dual. The
stack `X` is all that a pass needs of the last one, so that an optimizer can go on from it with its next direction.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from jaxsrn._tools.linalg import matmul
from jaxsrn.bounds.covers import covers
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.projections.clipping import MatrixStack, clipped, overshooting, split
from jaxsrn.spectra.circular.boxes import degrees, on_coarse_grid
from jaxsrn.spectra.circular.fourier import half_symbol
from jaxsrn.spectra.circular.sites import multiplicity, without_edges

__all__ = [
    "dual_point",
    "few_frequencies",
    "first_stack",
    "nuclear_norm",
    "passes",
    "polar",
    "unit_direction",
]

# Angles per degree of the symbol. With fewer, frequencies between them exceed the grid's by more, and crops are worse;
# more take more SVDs and change little (m = 4, 8, 16 in `python benchmarks/steepest.py`).
_ANGLES = 4
# The length of the step along `G` in each pass; the root mean square of the singular values of `S(G)` is 1. Longer ones
# are slower to begin with, shorter ones to end.
_STEP = 0.2


def few_frequencies(op: Operator, kernel_shape: tuple[int, ...], dtype, per_degree: int = _ANGLES) -> MatrixStack:
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
    return MatrixStack(
        lambda kernel: half_symbol(covers(kernel, op)[0][0], layer), counts, jnp.ones(kernel_shape, dtype)
    )


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


def unit_direction(gradient: Float[Array, "..."], blocks: MatrixStack) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """`(B, scale)` with `<G, K> = scale <B, K>_d` for all `K`; the mean square of the singular values of `S(B)` is 1.

    Taps that meet no sample, and a zero gradient, give zeros.
    """
    dead = blocks.weights == 0
    direction = jnp.where(dead, 0.0, gradient / jnp.where(dead, 1.0, blocks.weights))
    stack = blocks.stack(direction)
    count = jnp.sum(jnp.broadcast_to(blocks.counts, (len(stack), 1, 1))) * min(stack.shape[-2:])
    scale = jnp.sqrt(blocks.stack_inner(stack, stack) / count)
    return direction / jnp.where(scale == 0, 1.0, scale), scale


def nuclear_norm(blocks: MatrixStack, stack: Inexact[Array, "batch rows columns"]) -> Float[Array, ""]:
    """The sum of all singular values of the operator that the stack stands for."""
    values = jnp.linalg.svd(stack, compute_uv=False)
    return jnp.sum(blocks.counts[..., 0] * values)


def dual_point(blocks: MatrixStack, direction: Float[Array, "..."], multiplier) -> Inexact[Array, "..."]:
    """The dual feasible point nearest to a multiplier, `Z` with `S^* Z = B`, and `S^* S` one number for each tap.

    For every `K` of the ball `<B, K>_d = <Z, S(K)> <= ||Z||_*`.
    """
    gain = blocks.pull_back(blocks.stack(jnp.ones_like(direction)))
    missing = direction - blocks.pull_back(multiplier)
    return multiplier + blocks.stack(missing / jnp.where(gain == 0, 1.0, gain))


def first_stack(direction: Float[Array, "..."], blocks: MatrixStack) -> Inexact[Array, "batch rows columns"]:
    """The stack that the passes start from: the cropped polar factor, and the multiplier `S(B)`."""
    stack = blocks.stack(direction)
    return blocks.stack(blocks.pull_back(polar(stack))) + _STEP * stack


def passes(direction: Float[Array, "..."], blocks: MatrixStack, num_passes: int, stack=None):
    """Passes from a stack of an earlier one, by default from the first.

    Returns:
      `(kernel, multiplier, stack)`: a kernel near the ball, the multiplier of `dual_point`, and where to go on.
    """
    one = jnp.ones((), direction.dtype)
    stack = first_stack(direction, blocks) if stack is None else stack

    def one_pass(_, state):
        clipping = split(state[2], one)
        inside, beyond = clipped(clipping), overshooting(clipping)
        kernel = blocks.pull_back(inside - beyond) + _STEP * direction
        return blocks.pull_back(inside), beyond, blocks.stack(kernel) + beyond

    start = jnp.zeros_like(direction), jnp.zeros_like(stack), stack
    kernel, beyond, stack = lax.fori_loop(0, num_passes, one_pass, start)
    return kernel, beyond / jnp.asarray(_STEP, beyond.dtype), stack

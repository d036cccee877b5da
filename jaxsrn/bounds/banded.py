"""Zero padding: a proof by block Cholesky factorization that no singular value exceeds a limit.

A layer with zero padding has no symbol, and its Gram matrix `G = T^T T` (or `T T^T`) is large. But it is banded, as
samples that lie further apart than the taps reach have no output in common. So along one axis of the image `G` falls
into blocks, each of which meets only its two neighbours. All eigenvalues of `G` are below a level exactly where each of
the Schur complements

    S_0 = level I - G_00,    S_i = level I - G_ii - G_i,i-1 S_{i-1}^{-1} G_i-1,i

is positive definite. One pass along the axis decides that. Its cost is linear in the length of the axis and cubic in
the rows of a block, which hold a few lines of the image with all channels of a group.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.linalg import einsum
from jaxsrn._tools.proofs import rounding
from jaxsrn.operators.convolutions import ZeroPaddedConv

__all__ = ["is_affordable", "is_below", "room"]

# The most rows of a block, and the most entries of all blocks on the diagonal: about a second on two cores.
_MOST_ROWS, _MOST_ENTRIES = 2**10, 2**23
# The most entries of the images on the other side from which the blocks of one phase come, an image for each row. They
# are 128 MiB in float32, and their products take about a second too.
_MOST_IMAGE_ENTRIES = 2**25
# Blocks of fewer rows take as long, so that they hold more samples than they must.
_LEAST_ROWS = 64


class _Blocks(NamedTuple):
    """How the Gram matrix of a layer is cut (static).

    Attributes:
      between_outputs: whether the matrix is `T T^T`.
      axis: the axis of the image along which the blocks lie.
      samples: those of the axis in one block.
      count: the number of blocks.
      rows: the rows of a block in one group of channels.
      groups: the groups, each with its own blocks.
    """

    between_outputs: bool
    axis: int
    samples: int
    count: int
    rows: int
    groups: int


def is_affordable(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> bool:
    """Whether a proof takes about a second at most (static)."""
    blocks, (in_size, out_size) = _blocks(op, kernel_shape), op._sizes(kernel_shape)
    entries, across = blocks.groups * blocks.count * blocks.rows**2, in_size if blocks.between_outputs else out_size
    return blocks.rows <= _MOST_ROWS and entries <= _MOST_ENTRIES and blocks.rows * across <= _MOST_IMAGE_ENTRIES


def room(op: ZeroPaddedConv, kernel_shape: tuple[int, ...], dtype) -> float:
    """The share by which rounding may let a singular value exceed a limit that `is_below` has proven (static)."""
    # A row of the factorization has sums over its own block and the one before.
    return rounding(2 * _blocks(op, kernel_shape).rows, dtype)


def is_below(kernel: Float[Array, "..."], op: ZeroPaddedConv, limit: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether all singular values of `T(kernel)` are below a limit, up to `room`.

    The kernel's scale must not be extreme. The answer is no where the limit is not positive.
    """
    blocks = _blocks(op, kernel.shape)
    scale = jnp.where(limit > 0, limit, 1)
    diagonal, above = _gram_blocks(kernel / scale, op, blocks)
    identity = jnp.broadcast_to(jnp.eye(blocks.rows, dtype=kernel.dtype), diagonal.shape[1:])

    def eliminate(factor, block):
        own, coupling = block
        solved = lax.linalg.triangular_solve(factor, coupling, left_side=True, lower=True)
        rest = identity - own - einsum("gki,gkj->gij", solved, solved)
        return lax.linalg.cholesky(rest, symmetrize_input=False), None

    last, _ = lax.scan(eliminate, identity, (diagonal, above))
    # A factor that does not exist is NaN, and so are all that follow it.
    return jnp.all(jnp.isfinite(last[..., -1, -1])) & (limit > 0)


@functools.lru_cache(maxsize=1024)
def _blocks(op: ZeroPaddedConv, kernel_shape: tuple[int, ...]) -> _Blocks:
    """The cut with the least work, over the axes and over both Gram matrices."""
    sides = [
        (False, op.in_shape(kernel_shape), op.input_dilation),
        (True, op.out_shape(kernel_shape), op.strides),
    ]

    def cut(side, axis):
        between_outputs, (*image, channels), steps = side
        groups, length = op.feature_group_count, image[axis]
        line = math.prod(image) // length * (channels // groups)
        # Samples with a common output, or outputs with a common sample, are at most so far apart.
        reach = (op._extents(kernel_shape)[axis] - 1) // steps[axis]
        samples = min(length, max(1, reach, -(-_LEAST_ROWS // line)))
        return _Blocks(between_outputs, axis, samples, -(-length // samples), samples * line, groups)

    cuts = (cut(side, axis) for side, axis in itertools.product(sides, range(op.num_axes)))
    return min(cuts, key=lambda blocks: blocks.count * blocks.rows**3)


def _gram_blocks(kernel: Float[Array, "..."], op: ZeroPaddedConv, blocks: _Blocks):
    """The blocks on the diagonal of the Gram matrix, and those above it, each `(count, groups, rows, rows)`.

    The first block above the diagonal, which has no neighbour, is zero. An image with a one in every third block meets
    each neighbour's outputs alone, so that three images for each row of a block show all columns.
    """
    _, axis, samples, count, rows, groups = blocks
    shape = op.out_shape(kernel.shape) if blocks.between_outputs else op.in_shape(kernel.shape)
    length, others = shape[axis], (*shape[:axis], *shape[axis + 1 : -1])

    def images_of(flat):
        """From `(images, count, rows)`, the same in every group, to images."""
        lines = flat.reshape((-1, count * samples, *others, 1, shape[-1] // groups))[:, :length]
        lines = jnp.broadcast_to(lines, (*lines.shape[:-2], groups, lines.shape[-1]))
        return jnp.moveaxis(lines.reshape((len(lines), length, *others, shape[-1])), 1, 1 + axis)

    def blocks_of(images):
        """From images to `(images, count, groups, rows)`."""
        lines = jnp.moveaxis(images, 1 + axis, 1)
        lines = jnp.pad(lines, [(0, 0), (0, count * samples - length)] + [(0, 0)] * (lines.ndim - 2))
        lines = lines.reshape((len(lines), count, samples, *others, groups, -1))
        return jnp.moveaxis(lines, -2, 2).reshape((len(lines), count, groups, rows))

    def columns(phase):
        chosen = np.arange(count) % 3 == phase
        ones = jnp.eye(rows, dtype=kernel.dtype)[:, None] * jnp.asarray(chosen, kernel.dtype)[None, :, None]
        products = (op.transpose, op.apply) if blocks.between_outputs else (op.apply, op.transpose)
        images = images_of(ones)
        for product in products:
            images = product(kernel, images, precision=lax.Precision.HIGHEST)
        return blocks_of(images)

    phases = min(3, count)
    found = jnp.stack([columns(phase) for phase in range(phases)])
    index = np.arange(count)
    diagonal = found[index % phases, :, index]
    above = jnp.where(index[:, None, None, None] > 0, found[(index - 1) % phases, :, index], 0)
    return (jnp.moveaxis(side, 1, 2) for side in (diagonal, above))

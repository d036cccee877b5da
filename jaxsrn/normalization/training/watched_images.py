"""The watch of a matrix, or of a layer with zero padding: the inputs of the leading pair and of the **runners-up**.

Singular values of images lie close together, and cross. One vector alone, however many steps it takes, is late to turn
into another; the runners-up are at hand. A step takes power steps of the first two inputs and the best pairs of the
space that they and all inputs span (Rayleigh, Ritz). No step leads from one group of channels to another, so that every
group has its own inputs. One image holds one input of each group, and the products are as many as without groups.

`jax.experimental.sparse.linalg.lobpcg_standard` iterates to convergence from where it starts, and needs more than five
times as many rows as vectors; here one step is wanted, for matrices of any size. `watched_torus.py` is the counterpart
for circular convolutions, and `tracking.py` chooses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import picked, place_of_largest
from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.programs import program
from jaxsrn._tools.subspaces import extended, fixed_start, rayleigh_ritz
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["Step", "as_floats", "begin", "follow", "of_floats", "watch_shapes"]

# Inputs kept of every group beside the leading one, and inputs of which a power step is taken. More see more crossings;
# a runner-up costs one product a step, an input with a power step two more.
_RUNNERS_UP = 2
_EXPANDED = 2
# Overlap above which the inputs before and after a step are taken for those of one pair. Different pairs have
# orthogonal inputs, with overlap 0; a pair that moves with its kernel stays near 1.
_SAME_OVERLAP = 0.9


class Step(NamedTuple):
    """What a step says of the kernel on which it was taken.

    Attributes:
      before: the value that the first product gives the pair of before, at most the largest singular value.
      after: the value of the new pair.
      turned: whether another pair has taken over.
    """

    before: Float[Array, ""]
    after: Float[Array, ""]
    turned: Bool[Array, ""]


def watch_shapes(op: Operator, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the watch, the leading input of every group and its runners-up (static)."""
    return (1 + _RUNNERS_UP, *op.in_shape(kernel_shape))


def as_floats(watch: Float[Array, "..."], op: Operator, kernel_shape) -> Float[Array, "..."]:
    """The inputs as they are kept between steps: they consist of real floats already."""
    return watch


def of_floats(watch: Float[Array, "..."], op: Operator, kernel_shape, dtype) -> Float[Array, "..."]:
    """The inputs of `as_floats` in a dtype, whatever was done to them; NaN becomes what `begin` has."""
    return jnp.where(jnp.isnan(watch), fixed_start(watch.shape, dtype), watch.astype(dtype))


def begin(kernel: Float[Array, "..."], op: Operator) -> Float[Array, "..."]:
    """Inputs that know nothing of the kernel."""
    return fixed_start(watch_shapes(op, kernel.shape), kernel.dtype)


def follow(kernel: Float[Array, "..."], op: Operator, pair: Pair, watch: Float[Array, "..."], _turn):
    """The best pairs in the space of the leading inputs and power steps of the first two of them, in every group.

    All vectors move in every step, whatever the turn.

    Returns:
      `(pair, watch, step)`: another pair has taken over where the first one has another input.
    """
    shape, highest, groups = pair.input.shape, lax.Precision.HIGHEST, op._groups

    def forward(rows):
        # Outputs stay images: a kernel may be sharded over its output channels, and images can be sharded with it.
        return op.apply(kernel, _images(rows, shape), precision=highest)

    # The pair is in one group, up to rounding and what an average of states has in others.
    own, kept = _by_group(pair.input[None], groups), _by_group(watch, groups)
    lead = place_of_largest(jnp.sum(own**2, axis=(1, 2)))
    first = _in_group(lead, own, kept[:, :1])
    # The vectors come in orthonormal up to rounding, which the choice of the largest would amplify from step to step.
    num_kept = kept.shape[1]
    room = jnp.zeros((groups, _EXPANDED, kept.shape[2]), kept.dtype)
    rows = jnp.concatenate([first, kept[:, 1:], room], axis=1)
    basis = _orthonormalised(rows, np.int32(0), np.int32(num_kept))
    images = forward(basis[:, :num_kept])
    steps = _by_group(op.transpose(kernel, images[:_EXPANDED], precision=highest), groups)
    rows = jnp.concatenate([basis[:, :num_kept], steps], axis=1)
    basis = _orthonormalised(rows, np.int32(num_kept), np.int32(num_kept + _EXPANDED))
    images = jnp.concatenate([images, forward(basis[:, num_kept:])])
    parts = images.reshape((len(images), -1, groups, images.shape[-1] // groups))
    gram = einsum("isgc,jsgc->gij", parts, parts)
    squares, weights = rayleigh_ritz(gram)
    inputs = einsum("gkj,gjn->gkn", weights[:, :num_kept], basis)
    best = place_of_largest(squares[:, 0])
    leading = _in_group(best, inputs[:, :1], 0.0)
    output = einsum("gj,jsgc->sgc", _in_group(best, weights[:, 0], 0.0), parts).reshape(images.shape[1:])
    turned = (best != lead) | (jnp.abs(picked(weights[:, 0, 0], best)) < _SAME_OVERLAP)
    step = Step(jnp.sqrt(picked(gram[:, 0, 0], lead)), jnp.sqrt(picked(squares[:, 0], best)), turned)
    return Pair(pair.site, _images(leading, shape)[0], unit(output)), _images(inputs, shape), step


def _by_group(images: Float[Array, "rows ..."], groups: int) -> Float[Array, "{groups} rows n"]:
    """What the channels of each group have of every image."""
    if groups == 1:
        return images.reshape((1, len(images), -1))
    parts = images.reshape((len(images), -1, groups, images.shape[-1] // groups))
    return jnp.moveaxis(parts, 2, 0).reshape((groups, len(images), -1))


def _images(rows: Float[Array, "groups rows n"], shape: tuple[int, ...]) -> Float[Array, "rows ..."]:
    """The inverse of `_by_group` for images of a shape."""
    groups, count, _ = rows.shape
    if groups == 1:
        return rows.reshape((count, *shape))
    parts = rows.reshape((groups, count, -1, shape[-1] // groups))
    return jnp.moveaxis(parts, 0, 2).reshape((count, *shape))


def _in_group(group, values: Float[Array, "groups ..."], otherwise) -> Float[Array, "groups ..."]:
    """The values in one group, and others elsewhere."""
    if len(values) == 1:
        return values
    places = lax.broadcasted_iota(jnp.int32, (len(values), *(1,) * (values.ndim - 1)), 0)
    return jnp.where(places == group, values, otherwise)


# A subroutine, as a step takes it twice.
@program
def _orthonormalised(rows: Float[Array, "groups k n"], first: Int[Array, ""], end: Int[Array, ""]):
    """In every group what each vector from `first` to `end` adds to the span of those before it.

    It is a unit vector, or 0 where that is nothing. Vectors before the first are orthonormal already, and stay.
    """
    places = lax.broadcasted_iota(jnp.int32, (rows.shape[1], 1), 0)

    def of_group(vectors):
        def add(i, basis):
            before = jnp.where(places < i, basis, 0)
            return jnp.where(places == i, extended(before, picked(basis, i))[-1:], basis)

        return lax.fori_loop(first, end, add, vectors)

    return of_group(rows[0])[None] if len(rows) == 1 else jax.vmap(of_group)(rows)

"""The watch of a matrix, or of a layer with zero padding: the **runners-up**, the inputs of the next singular pairs.

Singular values of images lie close together, and cross. One vector alone, however many steps it takes, is late to turn
into another; the runners-up are at hand. A step takes power steps of the first two inputs and the best pairs of the
space that they and all inputs span (Rayleigh, Ritz). `jax.experimental.sparse.linalg.lobpcg_standard` iterates to
convergence from where it starts, and needs more than five times as many rows as vectors; here one step is wanted, for
matrices of any size. `tracked_torus.py` is the counterpart for circular convolutions, and `tracking.py` chooses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn._tools.indexing import picked
from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.programs import program
from jaxsrn._tools.subspaces import extended, fixed_start, rayleigh_ritz
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["Step", "as_floats", "begin", "follow", "of_floats", "watch_shapes"]

# Vectors kept beside the leading one, and inputs of which a power step is taken. More see more crossings; a runner-up
# costs one product a step, an input with a power step two more.
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
    """The shape of the watch, the inputs of the runners-up (static)."""
    return (_RUNNERS_UP, *op.in_shape(kernel_shape))


def as_floats(watch: Float[Array, "..."], op: Operator, kernel_shape) -> Float[Array, "..."]:
    """The runners-up as they are kept between steps: they consist of real floats already."""
    return watch


def of_floats(watch: Float[Array, "..."], op: Operator, kernel_shape, dtype) -> Float[Array, "..."]:
    """The runners-up of `as_floats` in a dtype, whatever was done to them."""
    return watch.astype(dtype)


def begin(kernel: Float[Array, "..."], op: Operator) -> Float[Array, "..."]:
    """Runners-up that know nothing of the kernel."""
    return fixed_start(watch_shapes(op, kernel.shape), kernel.dtype)


def follow(kernel: Float[Array, "..."], op: Operator, pair: Pair, watch: Float[Array, "..."], _turn):
    """The best pairs in the space of the leading inputs and power steps of the first two of them.

    All vectors move in every step, whatever the turn.

    Returns:
      `(pair, watch, step)`: another pair has taken over where the first one has another input.
    """
    shape, highest = pair.input.shape, lax.Precision.HIGHEST

    def forward(vectors):
        # Outputs stay images: a kernel may be sharded over its output channels, and images can be sharded with it.
        return op.apply(kernel, vectors.reshape((-1, *shape)), precision=highest)

    # The vectors come in orthonormal up to rounding, which the choice of the largest would amplify from step to step.
    num_kept = 1 + _RUNNERS_UP
    vectors = jnp.concatenate([unit(pair.input)[None], watch]).reshape((num_kept, -1))
    room = jnp.zeros((_EXPANDED, vectors.shape[1]), vectors.dtype)
    basis = _orthonormalised(jnp.concatenate([vectors, room]), np.int32(0), np.int32(num_kept))
    images = forward(basis[:num_kept])
    steps = op.transpose(kernel, images[:_EXPANDED], precision=highest).reshape(room.shape)
    vectors = jnp.concatenate([basis[:num_kept], steps])
    basis = _orthonormalised(vectors, np.int32(num_kept), np.int32(len(vectors)))
    images = jnp.concatenate([images, forward(basis[num_kept:])])
    axes = tuple(range(1, images.ndim))
    gram = jnp.tensordot(images, images, axes=(axes, axes), precision=highest)
    squares, weights = rayleigh_ritz(gram)
    weights = weights[:num_kept]
    inputs = einsum("kj,jn->kn", weights, basis)
    output = unit(jnp.tensordot(weights[0], images, axes=1, precision=highest))
    turned = jnp.abs(weights[0, 0]) < _SAME_OVERLAP
    step = Step(jnp.sqrt(gram[0, 0]), jnp.sqrt(squares[0]), turned)
    return Pair(pair.site, inputs[0].reshape(shape), output), inputs[1:].reshape(watch.shape), step


# A subroutine, as a step takes it twice.
@program
def _orthonormalised(vectors: Float[Array, "k n"], first: Int[Array, ""], end: Int[Array, ""]) -> Float[Array, "k n"]:
    """What each vector from `first` to `end` adds to the span of those before it, as a unit vector, or 0 for nothing.

    Those before the first are orthonormal already, and stay.
    """
    places = lax.broadcasted_iota(jnp.int32, (len(vectors), 1), 0)

    def add(i, basis):
        before = jnp.where(places < i, basis, 0)
        return jnp.where(places == i, extended(before, picked(basis, i))[-1:], basis)

    return lax.fori_loop(first, end, add, vectors)

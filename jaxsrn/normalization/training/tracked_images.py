"""The watch of a matrix, or of a layer with zero padding: the **runners-up**, the inputs of the next singular pairs.

Singular values of images lie close together, and cross. One vector alone, however many steps it takes, is late to turn
into another; the runners-up are at hand. A step takes power steps of the first two inputs and the best pairs of the
space that they and all inputs span (Rayleigh, Ritz). `jax.experimental.sparse.linalg.lobpcg_standard` iterates to
convergence from where it starts, and needs more than five times as many rows as vectors; here one step is wanted, for
matrices of any size. `tracked_torus.py` is the counterpart for circular convolutions, and `tracking.py` chooses.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.subspaces import extended, fixed_start, rayleigh_ritz
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["begin", "follow", "watch_shape"]

# Vectors kept beside the leading one, and inputs of which a power step is taken. More see more crossings; a runner-up
# costs one product a step, an input with a power step two more.
_RUNNERS_UP = 2
_EXPANDED = 2
# Steps from a random start until the runners-up are near enough to be of use; they need not be exact.
_COLD_STEPS = 30


def watch_shape(op: Operator, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the watch, the inputs of the runners-up (static)."""
    return (_RUNNERS_UP, *op.in_shape(kernel_shape))


def begin(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Float[Array, "..."]:
    """The runners-up of a kernel whose leading pair is known."""
    others = fixed_start((_RUNNERS_UP, pair.input.size), kernel.dtype)
    watch = _all_extended(pair.input.reshape((1, -1)), others)[1:].reshape((-1, *pair.input.shape))
    return lax.fori_loop(0, _COLD_STEPS, lambda _, state: follow(kernel, op, *state), (pair, watch))[1]


def follow(kernel: Float[Array, "..."], op: Operator, pair: Pair, watch: Float[Array, "..."]):
    """The best pairs in the space of the leading inputs and power steps of the first two of them.

    Returns:
      `(pair, watch)`, a step further.
    """
    shape, highest = pair.input.shape, lax.Precision.HIGHEST

    def forward(vectors):
        # Outputs stay images: a kernel may be sharded over its output channels, and images can be sharded with it.
        return op.apply(kernel, vectors.reshape((-1, *shape)), precision=highest)

    def backward(images):
        return op.transpose(kernel, images, precision=highest).reshape((len(images), -1))

    # The vectors come in orthonormal up to rounding, which the choice of the largest would amplify from step to step.
    kept = _all_extended(unit(pair.input.reshape((1, -1))), watch.reshape((_RUNNERS_UP, -1)))
    images = forward(kept)
    basis = _all_extended(kept, backward(images[:_EXPANDED]))
    images = jnp.concatenate([images, forward(basis[len(kept) :])])
    axes = tuple(range(1, images.ndim))
    weights = rayleigh_ritz(jnp.tensordot(images, images, axes=(axes, axes), precision=highest))[1][: len(kept)]
    inputs = einsum("kj,jn->kn", weights, basis)
    output = unit(jnp.tensordot(weights[0], images, axes=1, precision=highest))
    return Pair(pair.site, unit(inputs[0]).reshape(shape), output), inputs[1:].reshape(watch.shape)


def _all_extended(basis: Float[Array, "j n"], vectors: Float[Array, "k n"]) -> Float[Array, "j+k n"]:
    """The basis with what each of the vectors adds to it, which is 0 where that is nothing."""
    return functools.reduce(extended, vectors, basis)

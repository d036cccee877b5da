"""The map on flat vectors, and pairs of images by Lanczos with it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import unit
from jaxsrn._tools.subspaces import leading_singular_vectors
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.pair import Found, Pair

__all__ = [
    "as_images",
    "flat_products",
    "matrix_free",
]


def flat_products(kernel: Float[Array, "..."], op: Operator):
    """The map on flat vectors: `(matvec, rmatvec, in_size, out_size)`."""
    in_shape, out_shape = op.in_shape(kernel.shape), op.out_shape(kernel.shape)
    highest = jax.lax.Precision.HIGHEST

    def matvec(x):
        return op.apply(kernel, x.reshape(in_shape), precision=highest).reshape(-1)

    def rmatvec(y):
        return op.transpose(kernel, y.reshape(out_shape), precision=highest).reshape(-1)

    return matvec, rmatvec, math.prod(in_shape), math.prod(out_shape)


def matrix_free(kernel, op: Operator, start: Float[Array, "..."], tolerance, **options) -> Found:
    """Lanczos with the real operator from a given right vector; options of `leading_singular_vectors`."""
    matvec, rmatvec, _, out_size = flat_products(kernel, op)
    value, left, right, _ = leading_singular_vectors(matvec, rmatvec, start.reshape(-1), out_size, tolerance, **options)
    return Found(value, as_images(unit(right), unit(left), op, kernel.shape))


def as_images(right: Float[Array, " in"], left: Float[Array, " out"], op: Operator, kernel_shape) -> Pair:
    """The pair of two flat vectors, of a layer that is not circular."""
    return Pair(jnp.asarray(0), right.reshape(op.in_shape(kernel_shape)), left.reshape(op.out_shape(kernel_shape)))

"""Pairs that are stored as vectors or images: dense layers, and convolutions that have no symbol.

`circular/site_pairs.py` has the same functions for pairs that are stored at one frequency; `pairs_by_kind.py` chooses.
"""

from __future__ import annotations

import math

import jax
from jaxtyping import Array, Float

from jaxsrn._tools.lanczos import leading_singular_vectors
from jaxsrn._tools.linalg import unit
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.singular_pair import Found, Pair

__all__ = [
    "as_floats",
    "flat_products",
    "gradient",
    "images",
    "matrix_free",
    "nearby",
    "of_flat_vectors",
    "of_floats",
    "of_images",
    "power_step",
    "shapes",
]

_HIGHEST = jax.lax.Precision.HIGHEST
# The number of steps from a near pair, after which the residual is looked at. A pair that is wrongly taken for the
# leading one is found out by the search at the end of a round (`normalization/iteration.py`).
_NEAR_STEPS = 4


def shapes(op: Operator, kernel_shape: tuple[int, ...]) -> Pair:
    """A `Pair` that holds the shapes of the arrays of a pair in floats, which are the pair's own (static)."""
    return Pair(None, op.in_shape(kernel_shape), op.out_shape(kernel_shape))


def as_floats(pair: Pair, op: Operator, kernel_shape) -> Pair:
    """The pair as it is kept between steps: it consists of real floats already."""
    return pair


def of_floats(pair: Pair, op: Operator, kernel_shape, dtype) -> Pair:
    """The pair of `as_floats` in a dtype, whatever was done to it."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), pair)


def gradient(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`grad_K <v, T(K) u>`."""
    return op._kernel_gradient(kernel_shape, pair.input, pair.output, precision=_HIGHEST)


def images(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The two real vectors `(input, output)`, which are the pair itself."""
    return pair.input, pair.output


def of_images(inputs: Float[Array, "..."], outputs: Float[Array, "..."], op: Operator, kernel_shape) -> Pair:
    """The pair of two real vectors, which are normalised first."""
    return Pair(None, unit(inputs), unit(outputs))


def power_step(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Pair:
    """The adjoint turns the output into the new input, the map turns that into the new output; both are normalised."""
    step = unit(op.transpose(kernel, pair.output, precision=_HIGHEST))
    return Pair(pair.site, step, unit(op.apply(kernel, step, precision=_HIGHEST)))


def nearby(kernel: Float[Array, "..."], op: Operator, pair: Pair, tolerance) -> Pair:
    """The leading pair of the Krylov space that starts at the pair's input."""
    return matrix_free(kernel, op, pair.input, tolerance, first_check=_NEAR_STEPS).pair


# Lanczos on flat vectors


def of_flat_vectors(inputs: Float[Array, " in"], outputs: Float[Array, " out"], op: Operator, kernel_shape) -> Pair:
    """The pair of two flat unit vectors."""
    return Pair(None, inputs.reshape(op.in_shape(kernel_shape)), outputs.reshape(op.out_shape(kernel_shape)))


def flat_products(kernel: Float[Array, "..."], op: Operator):
    """The map and its adjoint on flat vectors: `(matvec, rmatvec, in_size, out_size)`."""
    in_shape, out_shape = op.in_shape(kernel.shape), op.out_shape(kernel.shape)

    def matvec(x):
        return op.apply(kernel, x.reshape(in_shape), precision=_HIGHEST).reshape(-1)

    def rmatvec(y):
        return op.transpose(kernel, y.reshape(out_shape), precision=_HIGHEST).reshape(-1)

    return matvec, rmatvec, math.prod(in_shape), math.prod(out_shape)


def matrix_free(kernel, op: Operator, start: Float[Array, "..."], tolerance, **options) -> Found:
    """The pair that the Lanczos method finds from a given input; the options are of `leading_singular_vectors`."""
    matvec, rmatvec, _, out_size = flat_products(kernel, op)
    found = leading_singular_vectors(matvec, rmatvec, start.reshape(-1), out_size, tolerance, **options)
    return Found(found.value, of_flat_vectors(unit(found.input), unit(found.output), op, kernel.shape))

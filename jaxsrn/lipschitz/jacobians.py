"""Local Lipschitz constants: the norms of the Jacobian at given points, without the Jacobian.

The Jacobian of a network is known by its products, `jvp` and `vjp`. The spectral norm is found by the Lanczos method
(`_tools/lanczos.py`); the Frobenius norm row by row, or estimated (Hutchinson 1990, "A stochastic estimator of the
trace of the influence matrix for Laplacian smoothing splines").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import ensure, positive_scalar, static_int
from jaxsrn._tools.held import held, stationary
from jaxsrn._tools.indexing import stack_of_one
from jaxsrn._tools.lanczos import leading_singular_vectors
from jaxsrn._tools.linalg import divisor, ratio, safe_sqrt, unit
from jaxsrn._tools.programs import program
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn._tools.tolerances import search_tolerance
from jaxsrn.lipschitz.samples import check_network, checked_batches, nan_where_nan, output_of, rows

__all__ = ["LocalConstant", "LocalFrobeniusNorm", "local", "local_frobenius"]


class LocalConstant(NamedTuple):
    """The spectral norm of the Jacobian at each sample.

    Attributes:
      value: `||J(x)||_2`, of shape `(samples,)`.
      residual: `max(||J u - value v||, ||J^T v - value u||) / value` for the vectors found, 0 where `J` is 0.
    """

    value: Float[Array, "..."]
    residual: Float[Array, "..."]


class LocalFrobeniusNorm(NamedTuple):
    """The Frobenius norm of the Jacobian at each sample.

    Attributes:
      value: `||J(x)||_F`, of shape `(samples,)`.
      standard_error: that of an estimated value; 0 where it is exact.
    """

    value: Float[Array, "..."]
    standard_error: Float[Array, "..."]


def local(f: Callable, params, x, *, tolerance=None) -> LocalConstant:
    """The local Lipschitz constants `||J(x)||_2` of a network, at each sample of a batch.

    `J` is the Jacobian of the output in the input. Where it is continuous, its norm is the limit of the Lipschitz
    constants in ever smaller balls around the sample (Sanyal, Torr, Dokania 2020, section 2). It is a lower bound of
    the global constant of `f`. The Lanczos method finds it from products with `J` and `J^T`, on the smaller of the two
    sides, input and output: about `n` products with each where that has `n < 20` entries, and 20 or more otherwise. It
    holds up to 21 vectors of that side for each sample, beside what `jax.linearize` stores of the network. A small
    residual proves a singular value, not that none is larger.

    Args:
      f: a function `f(params, x)` from a batch of inputs to a batch of outputs, which may have any shape. The samples
        must not depend on each other (batch normalization in evaluation mode). Pass the same function object again to
        use its compiled program again.
      params: any tree of arrays.
      x: `(samples, ...)`.
      tolerance: the relative residual at which the search stops, traced; by default `eps ** 0.75` of the output's
        dtype.

    Returns:
      A `LocalConstant` in float32 or wider; NaN where `x`, `params` or the output has one. The value is
      differentiable in `params` and `x`: the singular vectors are held constant, which is exact for a simple value.
      The second derivative is exact there too.

    Raises:
      ValueError: an `x` that is not a real floating-point array, an output that does not fit, or a bad tolerance.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsrn import lipschitz
      >>> def f(params, x):
      ...     return jnp.maximum(x @ params, 0)
      >>> x = jnp.array([[1.0, -1.0], [-1.0, 2.0]])
      >>> print(lipschitz.local(f, jnp.array([[3.0, 0.0], [4.0, 1.0]]), x).value.round(3))
      [0.    5.064]
    """
    check_network(f)
    tolerance = None if tolerance is None else positive_scalar(tolerance, "tolerance", jnp.float32)
    return _local(f, params, jnp.asarray(x), tolerance)


@functools.partial(program, static_argnums=0)
def _local(f, params, x, tolerance):
    (x,) = checked_batches(f, params, x)
    tolerance = search_tolerance(output_of(f, params, x).dtype) if tolerance is None else tolerance.astype(x.dtype)
    fixed, points = lax.stop_gradient((params, x))
    inputs, outputs, residual = jax.vmap(lambda point: _leading_vectors(f, fixed, point, tolerance))(points)
    # The product with the found vectors is the only part that depends on what is differentiated.
    values = functools.partial(_values_of_vectors, f)
    move = jax.vmap(stationary(functools.partial(_value_of_sample, f)), ((None, 0), 0))
    value = held(values, move, (params, x), (inputs, outputs))
    return nan_where_nan(f, fixed, points, LocalConstant(value, residual))


def _values_of_vectors(f: Callable, where, vectors) -> Float[Array, " samples"]:
    """`<v, J u>` of vectors `(u, v)`, one row of each a sample; `where` is `(params, x)`."""
    (params, x), (inputs, outputs) = where, vectors
    images = jax.jvp(lambda x: rows(f, params, x), (x,), (inputs.reshape(x.shape),))[1]
    return jnp.sum(outputs * images, axis=1)


def _value_of_sample(f: Callable, where, vectors) -> Float[Array, ""]:
    params, point = where
    return _values_of_vectors(f, (params, point[None]), stack_of_one(vectors))[0]


def _products(f: Callable, params, point: Float[Array, "..."]):
    """The Jacobian at a point over a scale, and its transpose: `(matvec, rmatvec, in_size, out_size, scale)`.

    Both act on flat vectors. The Jacobian of a deep network can be so small or large that squares of its products are
    no numbers of its dtype. The scale is the size of one product, held constant in derivatives.
    """

    def function(x):
        return rows(f, params, x.reshape((1, *point.shape)))[0]

    value, matvec = jax.linearize(function, point.reshape(-1))
    transpose = jax.linear_transpose(matvec, point.reshape(-1))
    probe = matvec(fixed_start((point.size,), point.dtype))
    scale = divisor(lax.stop_gradient(jnp.max(jnp.abs(probe))))
    return lambda x: matvec(x) / scale, lambda y: transpose(y)[0] / scale, point.size, value.size, scale


def _leading_vectors(f: Callable, params, point: Float[Array, "..."], tolerance):
    """The leading singular vectors of the Jacobian, `(input, output, residual)`."""
    matvec, rmatvec, in_size, out_size, _ = _products(f, params, point)
    found = leading_singular_vectors(matvec, rmatvec, fixed_start((in_size,), point.dtype), out_size, tolerance)
    return unit(found.input), unit(found.output), found.residual


def local_frobenius(f: Callable, params, x, *, key=None, num_probes: int | None = None) -> LocalFrobeniusNorm:
    """The Frobenius norms `||J(x)||_F` of the Jacobian of a network, at each sample of a batch.

    Without `key` they are exact: one product with `J` or `J^T` for each entry of the smaller of input and output, one
    after the other. With `key` and `num_probes` they are estimates (Hutchinson 1990): for a vector `z` of random signs
    `||J^T z||^2` has the mean `||J||_F^2`. The root of the average of such squares has a standard error of that of the
    average over twice the root, to first order, and is too low by a second-order amount in the mean.

    Args:
      f, params, x: as in `local`.
      key: a key of `jax.random`; every sample has probes of its own. Give every batch its own key.
      num_probes: static, at least 2; the number of products for each sample.

    Returns:
      A `LocalFrobeniusNorm` in float32 or wider; NaN where `x`, `params` or the output has one. The value is
      differentiable in `params` and `x`, with derivative 0 where it is 0.

    Raises:
      ValueError: what `local` refuses, or only one of `key` and `num_probes`.
    """
    check_network(f)
    ensure(
        (key is None) == (num_probes is None),
        f"key, num_probes: got {key!r} and {num_probes!r}, expected both for an estimate or none for the exact norm.",
    )
    if key is None:
        return _exact_frobenius(f, params, jnp.asarray(x))
    return _estimated_frobenius(f, params, jnp.asarray(x), key, static_int(num_probes, "num_probes", 2))


def _from_smaller_side(f: Callable, params, point: Float[Array, "..."]):
    """`J^T`, or `J` where its inputs are fewer, over a scale, the size of its inputs, and the scale."""
    matvec, rmatvec, in_size, out_size, scale = _products(f, params, point)
    return (rmatvec, out_size, scale) if out_size <= in_size else (matvec, in_size, scale)


@functools.partial(program, static_argnums=0)
def _exact_frobenius(f, params, x):
    (x,) = checked_batches(f, params, x)

    def norm(point):
        product, size, scale = _from_smaller_side(f, params, point)
        places = jnp.arange(size)
        # One row after the other: all at once would be the whole Jacobian.
        squares = lax.map(lambda i: jnp.sum(product((places == i).astype(point.dtype)) ** 2), places)
        return scale * safe_sqrt(jnp.sum(squares))

    value = nan_where_nan(f, params, x, jax.vmap(norm)(x))
    return LocalFrobeniusNorm(value, jnp.where(jnp.isnan(value), value, 0))


@functools.partial(program, static_argnums=(0, 4))
def _estimated_frobenius(f, params, x, key, num_probes):
    (x,) = checked_batches(f, params, x)

    def estimate(point, key):
        product, size, scale = _from_smaller_side(f, params, point)
        probes = jax.random.split(key, num_probes)
        squares = lax.map(lambda key: jnp.sum(product(jax.random.rademacher(key, (size,), point.dtype)) ** 2), probes)
        norm, fixed = safe_sqrt(jnp.mean(squares)), lax.stop_gradient(squares)
        of_mean = jnp.std(fixed, ddof=1) / num_probes**0.5
        return scale * norm, scale * ratio(of_mean, 2 * lax.stop_gradient(norm))

    value, error = jax.vmap(estimate)(x, jax.random.split(key, len(x)))
    return LocalFrobeniusNorm(*nan_where_nan(f, params, x, (value, error)))

"""Products in full precision, roots with safe derivatives, and singular pairs of stacks of small matrices.

Singular pairs come from `jax.numpy.linalg.svd`. `gram_bound` bounds a norm by products alone (Delattre, Barthelemy,
Araujo, Allauzen 2023, "Efficient bound of Lipschitz constant for convolutional layers by Gram iteration").
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from jaxsrn._tools.indexing import picked, place_of_largest
from jaxsrn._tools.programs import program

__all__ = [
    "by_largest",
    "divisor",
    "einsum",
    "end_pairs",
    "gram_bound",
    "inner",
    "matmul",
    "moderate",
    "nan_for_infinity",
    "norm_along",
    "ratio",
    "real_times",
    "real_where_possible",
    "safe_sqrt",
    "svdvals",
    "thin_svd",
    "top_pairs",
    "top_values",
    "unit",
    "zero_for_nan",
]

# The default precision of TPUs and of recent GPUs is below float32, and every certificate would be false in it.
einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

# `inner` sums at most 256 terms at once, and cuts longer axes into parts of 128.
_SHORT, _PART = 256, 128


@program
def unit(vector: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`vector` with norm 1; the first basis vector in place of zero."""
    squared = _squared_norm(vector)
    is_zero = squared == 0
    first = lax.pad(np.ones(1, vector.dtype), np.zeros((), vector.dtype), ((0, vector.size - 1, 0),))
    # The derivative of a norm is 0/0 at zero; the one taken here is that of the constant first basis vector.
    norm = jnp.sqrt(jnp.where(is_zero, 1, squared)).astype(vector.dtype)
    return jnp.where(is_zero, first.reshape(vector.shape), vector / norm)


def by_largest(z: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """`(z / scale, scale)`; the scale is the largest absolute entry (1 for zero), held constant in derivatives.

    It stays below the numbers whose reciprocal, by which XLA multiplies, is denormal and therefore taken for 0. All are
    NaN where an entry is infinite.
    """
    largest = nan_for_infinity(lax.stop_gradient(jnp.max(jnp.abs(z))))
    scale = jnp.minimum(divisor(largest), 0.25 / jnp.finfo(z.dtype).tiny)
    return z / scale, scale


def nan_for_infinity(x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`x` with NaN in place of infinities: LAPACK's SVDs of infinite entries may never end."""
    return x + (x - x)


def zero_for_nan(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` with 0 in place of NaN."""
    return jnp.where(jnp.isnan(x), 0, x)


@program
def inner(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, ""]:
    """`sum(a * b)`, the inner product of two arrays.

    XLA may add the terms of a long sum one after another on a CPU, in a dot product too. The rounding errors of equal
    terms then add up to more than certified intervals allow for in float32. So this is a sum of short sums.
    """
    sums = _summed_at_the_end(a * b)
    while sums.ndim:
        # Without the barrier XLA makes one long sum of all.
        sums = _summed_at_the_end(lax.optimization_barrier(sums))
    return sums


def _summed_at_the_end(terms: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sums along the last axes, as many as are short together, or along parts of the last axis if it is long."""
    length = terms.shape[-1]
    if length > _SHORT:
        fill = [(0, 0, 0)] * (terms.ndim - 1) + [(0, -length % _PART, 0)]
        filled = lax.pad(terms, np.zeros((), terms.dtype), fill) if length % _PART else terms
        return jnp.sum(filled.reshape(*terms.shape[:-1], -1, _PART), axis=-1)
    num_axes = np.count_nonzero(np.cumprod(terms.shape[::-1]) <= _SHORT)
    return jnp.sum(terms, axis=tuple(range(-num_axes, 0)))


def _squared_norm(z: Inexact[Array, "..."]) -> Float[Array, ""]:
    """The square of the Euclidean norm of an array."""
    return inner(z.real, z.real) + inner(z.imag, z.imag) if jnp.iscomplexobj(z) else inner(z, z)


def moderate(z: Float[Array, "..."], axes):
    """`z / scale`, whose squares neither overflow nor vanish, the scale, and whether `z` is 0 (ones take its place).

    The sums along `axes`, one or several, are kept as axes of length 1.
    """
    largest = jnp.max(jnp.abs(lax.stop_gradient(z)), axis=axes, keepdims=True, initial=0.0)
    zero = largest < jnp.finfo(z.dtype).tiny
    # Ordinary vectors are not scaled, which saves a rounding: normalizing twice then changes nothing. Squares of these
    # sizes are far inside the range of float32.
    ordinary = (largest > 1e-10) & (largest < 1e10)
    scale = jnp.where(zero | ordinary, 1.0, largest)
    return jnp.where(zero, 1.0, z) / scale, scale, zero


def norm_along(z: Float[Array, "..."], axes) -> Float[Array, "..."]:
    """The Euclidean norm along `axes`, which are kept with length 1, of numbers of any size; derivative 0 at 0."""
    parts, scale, zero = moderate(z, axes)
    return jnp.where(zero, 0.0, scale * jnp.sqrt(jnp.sum(parts * parts, axis=axes, keepdims=True)))


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`sqrt(max(x, 0))` with derivative 0 wherever `x <= 0`: the constraint that it stands for is not active there."""
    clipped = x <= 0  # NaN compares false, so that it stays NaN.
    return jnp.where(clipped, 0.0, jnp.sqrt(jnp.where(clipped, 1.0, x)))


def ratio(numerator, denominator):
    """`numerator / denominator`, and 0 where the denominator is 0."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0.0, numerator / jnp.where(is_zero, 1.0, denominator))


def divisor(x):
    """`x` to divide by, with 1 in place of 0: where a quotient is not used, its derivative must not be NaN either."""
    return jnp.where(x == 0, 1.0, x)


def real_times(spec: str, real: Float[Array, "..."], vectors: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`einsum` of real coefficients and complex vectors, without a complex copy of the coefficients.

    Real and imaginary parts stand side by side in one product, so that the coefficients are read once.
    """
    inputs, output = spec.split("->")
    parts = einsum(f"{inputs}Z->{output}Z", real, jnp.stack([vectors.real, vectors.imag], axis=-1))
    return lax.complex(parts[..., 0], parts[..., 1])


def top_pairs(matrices: Inexact[Array, "batch in out"]):
    """Leading singular values and vectors of a stack of matrices: `(values, u, v)` with `u^H A v = value`.

    Both vectors are real where the matrix is.
    """
    return end_pairs(matrices, (0,))[0]


def end_pairs(matrices: Inexact[Array, "batch in out"], places: tuple[int, ...]):
    """As `top_pairs`, for each of the given places among the `min(in, out)` singular values, which decrease."""
    if min(matrices.shape[-2:]) == 1:
        u, v, values = _pair_of_vector(matrices)
        return ((values, *real_where_possible(u, v)),) * len(places)
    u, values, vh = thin_svd(matrices)
    return tuple((values[..., i], *real_where_possible(u[..., i], jnp.conj(vh[..., i, :]))) for i in places)


def real_where_possible(u, v):
    """A pair with both vectors turned by the same phase, which makes them real where one phase can.

    The sum of the squares of a real unit vector turned by a phase is the square of that phase.
    """
    square = jnp.sum(u * u, axis=-1, keepdims=True)
    phase = jnp.sqrt(jnp.where(square == 0, 1.0, square))
    turn = jnp.conj(phase) / jnp.abs(phase).astype(u.dtype)
    return u * turn, v * turn


def _pair_of_vector(matrices):
    """The singular pairs `(u, v, values)` of matrices of one row or one column, without an SVD."""
    row = matrices.shape[-2] == 1
    vector = matrices[..., 0, :] if row else matrices[..., 0]
    values = _frobenius(matrices)
    direction = jax.vmap(unit)(vector)
    one = jnp.ones((*values.shape, 1), matrices.dtype)
    return (one, jnp.conj(direction), values) if row else (direction, one, values)


def top_values(matrices: Inexact[Array, "batch in out"]) -> Float[Array, " batch"]:
    """The largest singular value of each matrix of a stack."""
    if min(matrices.shape[-2:]) == 1:
        return _frobenius(matrices)
    return svdvals(matrices)[..., 0]


def thin_svd(matrices: Inexact[Array, "*batch rows columns"]):
    """The thin SVD `(u, values, vh)` of one matrix or a stack.

    A wide matrix is decomposed as its transpose. LAPACK's own decomposition of it is off by 1e-5 and more in float32
    where thousands of entries are alike, and its vectors do not have norm 1.
    """
    if matrices.shape[-2] >= matrices.shape[-1]:
        return jnp.linalg.svd(matrices, full_matrices=False)
    u, values, vh = jnp.linalg.svd(matrices.mT, full_matrices=False)
    return vh.mT, values, u.mT


def svdvals(matrices: Inexact[Array, "*batch rows columns"]) -> Float[Array, "*batch values"]:
    """The singular values of one matrix or a stack, in decreasing order, of `thin_svd`."""
    return jnp.linalg.svd(_tall(matrices), compute_uv=False)


def _tall(matrices: Inexact[Array, "*batch rows columns"]) -> Inexact[Array, "*batch longer shorter"]:
    """The matrices, or their transposes if these have more rows."""
    return matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT


def gram_bound(matrices: Inexact[Array, "batch in out"], num_steps: int) -> Float[Array, ""]:
    """An upper bound of every singular value of a stack of matrices, by Gram iteration (Delattre et al. 2023).

    With `G_0 = A^H A` and `G_t = G_(t-1)^2` it is the largest `||G_t||_F ** (1 / 2 ** (t + 1))` at `t = num_steps`.
    """
    if min(matrices.shape[-2:]) == 1:
        return jnp.max(_frobenius(matrices))
    matrices = _tall(matrices)
    bounds = _gram_bounds(lax.stop_gradient(matrices), num_steps)
    # The largest alone is differentiated: second derivatives for a matrix that is nothing but rounding overflow.
    largest = _gram_bounds(picked(matrices, place_of_largest(bounds))[None], num_steps)[0]
    return largest + lax.stop_gradient(jnp.max(bounds) - largest)


def _gram_bounds(matrices: Inexact[Array, "batch in out"], num_steps: int) -> Float[Array, " batch"]:
    """`||G_t||_F ** (1 / 2 ** (t + 1))` of each matrix; 0 for zero matrices."""

    def step(state, share):
        grams, norms, log_bounds = state
        # The bound is a root of the norm, so it gets back the same root of every factor that is divided out.
        scale = divisor(norms)
        grams = grams / scale[:, None, None].astype(grams.dtype)
        grams = matmul(grams, grams)
        return (grams, _frobenius(grams), log_bounds + share * jnp.log(scale)), None

    grams = matmul(matrices.mT.conj(), matrices)
    norms = _frobenius(grams)
    shares = jnp.asarray(0.5 ** np.arange(1, num_steps + 2), norms.dtype)
    (_, last, log_bounds), _ = lax.scan(step, (grams, norms, jnp.zeros_like(norms)), shares[:-1])
    return jnp.where(norms == 0, 0.0, jnp.exp(log_bounds + shares[-1] * jnp.log(divisor(last))))


def _frobenius(matrices: Inexact[Array, "batch rows columns"]) -> Float[Array, " batch"]:
    """The Frobenius norm of each matrix, with derivative 0 at a zero matrix."""
    return jax.vmap(lambda matrix: safe_sqrt(_squared_norm(matrix)))(matrices)

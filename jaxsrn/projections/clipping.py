"""A layer as a stack of matrices that carries its norm, and the clipping of their singular values.

The stack of a circular layer is its symbol at half of the frequencies; that of an unbounded layer is the same on a
coarse grid; that of a dense or zero-padded layer is its one matrix. The map `S` from kernels to stacks keeps inner
products (Parseval), `<K, L>_d = sum_b counts_b Re <S_b(K), S_b(L)>`, with the weighted inner product
`<K, L>_d = sum_p d_p <K_p, L_p>` of kernels, where `d_p` counts the outputs that tap `p` meets. Clipping replaces each
singular value `s` by `min(s, c)`: the nearest stack in the spectral ball (Sedghi, Gupta, Long 2019, Clip_OperatorNorm;
Sanyal et al. 2020, Algorithm 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from jaxsrn._tools.linalg import divisor, inner, matmul, nan_for_infinity, ratio, thin_svd
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.fourier import half_symbol
from jaxsrn.spectra.circular.grid_certificate import on_coarse_grid
from jaxsrn.spectra.circular.sites import multiplicity, repetitions, without_constant_axes

__all__ = [
    "Clipping",
    "StackMap",
    "clipped",
    "curvature",
    "excess_derivative",
    "held_part",
    "overshooting",
    "smooth_clipped",
    "split",
    "stack_map_of",
]


# Angles per degree of the symbol of an unbounded convolution. The frequencies between them can exceed them by
# `1 / cos(pi / 32)`, 0.5% per axis, which the projection then gives away; twice as many take twice the SVDs per axis.
_ANGLES = 16


class StackMap(NamedTuple):
    """The map from kernels to stacks of matrices, with its two inner products.

    Attributes:
      stack: `S`, a linear function from the kernel to `(batch, rows, columns)`.
      counts: how many matrices of the whole operator each matrix of the stack stands for, `(batch, 1, 1)`.
      weights: `d`, of the kernel's shape; 0 at taps that meet no sample.
    """

    stack: Callable
    counts: Float[Array, "..."]
    weights: Float[Array, "..."]

    def inner(self, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, ""]:
        """`<a, b>_d` of two kernels."""
        return inner(self.weights * a, b)

    def stack_inner(self, a: Inexact[Array, "..."], b: Inexact[Array, "..."]) -> Float[Array, ""]:
        """The inner product of two stacks."""
        return jnp.sum(self.counts * jnp.real(jnp.conj(a) * b))

    def pull_back(self, matrices: Inexact[Array, "..."]) -> Float[Array, "..."]:
        """The adjoint of `stack`: `<pull_back(Y), K>_d = <Y, S(K)>` for every kernel."""
        transpose = jax.linear_transpose(self.stack, jax.ShapeDtypeStruct(self.weights.shape, self.weights.dtype))
        plain = transpose(jnp.conj(matrices) * self.counts.astype(matrices.dtype))[0]
        return ratio(plain, self.weights)


def stack_map_of(op: Operator, kernel_shape: tuple[int, ...], dtype, per_degree: int = _ANGLES) -> StackMap:
    """The stack of an operator without aliased taps: those that fall on each other on the image.

    An unbounded convolution has `per_degree` angles per degree of its symbol.
    """
    weights = jnp.broadcast_to(op.frobenius_weights(kernel_shape, dtype), kernel_shape)
    if isinstance(op, (CircularConv, UnboundedConv)):
        layer, repeated = _on_few_frequencies(op, kernel_shape, per_degree)
        counts = repeated * multiplicity(layer)[:, None, None]
        return StackMap(lambda kernel: half_symbol(kernel, layer), jnp.asarray(counts, dtype), weights)
    return StackMap(lambda kernel: op.to_dense(kernel)[None], jnp.ones((1, 1, 1), dtype), weights)


def _on_few_frequencies(op: CircularConv | UnboundedConv, kernel_shape, per_degree: int) -> tuple[CircularConv, float]:
    """The layer whose matrices stand for the operator's, and how many of the operator's each of them counts for.

    The frequencies of an unbounded convolution count for one output sample together.
    """
    if isinstance(op, CircularConv):
        layer = without_constant_axes(op, kernel_shape)
        return layer, float(repetitions(op, layer))
    layer = on_coarse_grid(op, kernel_shape, per_degree)
    return layer, 1 / math.prod(layer.grid)


class Clipping(NamedTuple):
    """The SVD of a stack, and the limit that its singular values are clipped to."""

    rows: Inexact[Array, "batch rows k"]
    values: Float[Array, "batch k"]
    columns: Inexact[Array, "batch k columns"]
    limit: Float[Array, ""]


def split(matrices: Inexact[Array, "batch rows columns"], limit: Float[Array, ""]) -> Clipping:
    """The SVD of the stack, to be clipped at `limit`."""
    rows, values, columns = thin_svd(nan_for_infinity(matrices))
    return Clipping(rows, values, columns, limit)


def clipped(clipping: Clipping) -> Inexact[Array, "batch rows columns"]:
    """The nearest stack whose singular values are at most the limit."""
    return _assemble(clipping, jnp.minimum(clipping.values, clipping.limit))


def overshooting(clipping: Clipping) -> Inexact[Array, "batch rows columns"]:
    """The part that clipping takes away: `g(s) = max(s - c, 0)` in place of every singular value `s`."""
    return _assemble(clipping, jnp.maximum(clipping.values - clipping.limit, 0.0))


@jax.custom_jvp
def smooth_clipped(matrices: Inexact[Array, "batch rows columns"], limit: Float[Array, ""]):
    """The clipped stack with its derivative in both arguments, and the largest singular value as a constant.

    The stack is assembled from the clipped values. Subtracting the overshooting part from a stack far above the limit
    would leave rounding alone.
    """
    clipping = split(matrices, limit)
    return clipped(clipping), jnp.max(clipping.values)


@smooth_clipped.defjvp
def _smooth_clipped_jvp(primals, tangents):
    clipping = split(*primals)
    # A higher limit raises every value that is above it.
    above = (clipping.values > clipping.limit).astype(clipping.values.dtype)
    tangent = tangents[0] - excess_derivative(clipping, tangents[0])
    tangent = tangent + tangents[1].astype(tangent.dtype) * _assemble(clipping, above)
    largest = jnp.max(clipping.values)
    return (clipped(clipping), largest), (tangent, jnp.zeros_like(largest))


def _assemble(clipping: Clipping, values):
    return matmul(clipping.rows * values[:, None, :].astype(clipping.rows.dtype), clipping.columns)


def excess_derivative(clipping: Clipping, direction: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """The derivative of `overshooting` in the matrices along `direction`: a symmetric map with eigenvalues in [0, 1].

    With `M = U^H H V` of the direction `H` it is `U (a o sym(M) + b o skew(M)) V^H`, where `a` holds the divided
    differences of `g(s) = max(s - c, 0)` and `b = (g_i + g_j) / (s_i + s_j)`. The part of `H` outside the span of the
    singular vectors, which a rectangular matrix has on its longer side, is scaled by `g_i / s_i`. Where singular values
    coincide the result is one of the generalised derivatives, and finite.
    """
    s, limit = clipping.values, clipping.limit
    gains = jnp.maximum(s - limit, 0.0)
    high, low = _ordered(s)
    across = (high - limit) / jnp.where(high > low, high - low, 1.0)
    even = jnp.where(low > limit, 1.0, jnp.where(high > limit, across, 0.0))
    return _weighted(clipping, direction, even, _sums(gains) / divisor(_sums(s)), gains / divisor(s))


def held_part(clipping: Clipping, direction: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """The part of a direction that would move the singular values above the limit, or turn them into one another."""
    _, low = _ordered(clipping.values)
    above = (low > clipping.limit).astype(low.dtype)
    return _weighted(clipping, direction, above, jnp.zeros_like(above), jnp.zeros_like(clipping.values))


def curvature(clipping: Clipping, penalty, hold, direction: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """How a multiplier bends the constraint, and `hold` times `held_part`.

    Without the latter it is `rho` times `excess_derivative` as `rho` grows, where the multiplier `Y = rho (s - c)`
    stays as it is while `s` approaches `c` from above. Singular values below the limit but nearer to it than `c / hold`
    are taken to be that far away.
    """
    s, limit = clipping.values, clipping.limit
    multiplier, inside = penalty * jnp.maximum(s - limit, 0.0), jnp.minimum(s, limit)
    high, low = _ordered(s)
    gap = jnp.maximum(limit - low, limit / hold)
    even = jnp.where(low > limit, hold, penalty * jnp.maximum(high - limit, 0.0) / gap)
    return _weighted(clipping, direction, even, _sums(multiplier) / divisor(_sums(inside)), multiplier / limit)


def _weighted(clipping: Clipping, direction, even, odd, beyond):
    """`U (even o sym(M) + odd o skew(M)) V^H` for `M = U^H H V`, and the rest of `H` scaled by `beyond`."""
    u, _, vh, _ = clipping
    uh, v = u.mT.conj(), vh.mT.conj()
    inside = matmul(matmul(uh, direction), v)
    symmetric, skew = (inside + inside.mT.conj()) / 2, (inside - inside.mT.conj()) / 2
    out = matmul(matmul(u, even.astype(u.dtype) * symmetric + odd.astype(u.dtype) * skew), vh)
    shares = beyond[:, None, :].astype(u.dtype)
    if direction.shape[-2] > direction.shape[-1]:
        out = out + matmul((matmul(direction, v) - matmul(u, inside)) * shares, vh)
    if direction.shape[-2] < direction.shape[-1]:
        out = out + matmul(u, shares.mT * (matmul(uh, direction) - matmul(inside, vh)))
    return out


def _ordered(values):
    """The larger and the smaller one of every two values of a matrix."""
    return jnp.maximum(values[:, :, None], values[:, None, :]), jnp.minimum(values[:, :, None], values[:, None, :])


def _sums(values):
    """The sum of every two values of a matrix."""
    return values[:, :, None] + values[:, None, :]

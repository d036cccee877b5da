"""The leading singular triplet and the spectral norm of a layer."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.pair import Pair, rescaled
from jaxsrn.spectra.pairs import leading_pair, pair_images, value_gradient

__all__ = [
    "SingularTriplet",
    "leading_triplet",
    "spectral_norm",
]


class SingularTriplet(NamedTuple):
    """A leading singular triplet of `T(K)`, real.

    Attributes:
      value: the singular value.
      left: unit vector of `out_shape`.
      right: unit vector of `in_shape`.
      residual: `max(||T v - value u||, ||T^T u - value v||) / value` as measured (0 for a zero kernel).
    """

    value: Float[Array, "..."]
    left: Float[Array, "..."]
    right: Float[Array, "..."]
    residual: Float[Array, "..."]


def frozen_value(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Float[Array, ""]:
    """`<u, T(K) v>` as a function of `K` alone.

    With the leading pair this is the spectral norm and its exact derivative, the outer product of the vectors;
    where singular values coincide it is one of the subgradients, and finite.
    """
    gradient = value_gradient(jax.tree.map(lax.stop_gradient, pair), op, kernel.shape)
    return jnp.sum(gradient * kernel)


def leading_triplet(
    kernel: Kernel, op: Operator, *, initial: SingularTriplet | None = None, tolerance=None, proven: bool = True
) -> SingularTriplet:
    """The largest singular value of `T(kernel)` with its two vectors, from a cold start.

    Circular: the leading value of the symbol over all its frequencies, its vectors as plane waves. Dense, and zero
    padding up to 2**18 entries of the explicit matrix: an SVD, or Lanczos with a proof; layers of one tap on images of
    any size, too. Larger layers with zero padding: Lanczos with thick restarts on the real operator, from the largest
    waves of the circular layer, each as long as its value on the torus exceeds what is found; of 32 channels or more
    in the few that they use most, first.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      initial: an earlier triplet of a similar kernel, where the matrix-free search starts in place of the waves,
        with a small random part mixed in; it saves most of the steps. Layers that are not searched do not use it:
        circular and dense ones, with zero padding those that are proven and those with an axis of one tap.
      tolerance: relative residual at which that search stops; default `eps ** 0.75` of the dtype. Traced. It never
        takes a proof away, and does nothing where there is no search.
      proven: static; `False` searches small layers with zero padding too, as it does large ones, without a proof.
        Circular and dense layers, and those of one tap, keep theirs.

    Returns:
      A `SingularTriplet` in float32 or wider. `value` is differentiable (outer product of the vectors, exact for a
      simple value, finite always); the vectors are constants.

    Raises:
      ValueError: a kernel or an `initial` that does not fit, or a bad tolerance.
    """
    kernel = kernel_array(kernel, op)
    dtype = float_dtype(kernel.dtype)
    tolerance = None if tolerance is None else positive_scalar(tolerance, "tolerance", dtype)
    if initial is not None:
        check_triplet(initial, op, kernel.shape)
    if initial is None and tolerance is None and proven:
        return _triplet(kernel, op, leading_of(kernel, op))
    return _triplet(kernel, op, _searched(kernel, op, initial, tolerance, bool(proven)))


def check_triplet(initial: SingularTriplet, op: Operator, kernel_shape) -> None:
    """Raises `ValueError` unless the triplet's vectors fit the operator."""
    got = (getattr(initial, "left", None), getattr(initial, "right", None))
    expected = op.out_shape(kernel_shape), op.in_shape(kernel_shape)
    ensure(
        all(a is not None and jnp.shape(a) == shape for a, shape in zip(got, expected, strict=True)),
        f"initial: expected a SingularTriplet with left {expected[0]} and right {expected[1]} for {op}; "
        "take it from leading_triplet of a kernel of the same shape.",
    )


@functools.partial(jax.jit, static_argnames="proven")
def _searched(kernel, op, initial, tolerance, proven):
    kernel = lax.stop_gradient(kernel.astype(float_dtype(kernel.dtype)))
    start = None if initial is None else lax.stop_gradient(initial.right).astype(kernel.dtype)
    return leading_pair(rescaled(kernel, op)[0], op, tolerance=tolerance, start=start, proven=proven)


@jax.jit
def _triplet(kernel, op, pair):
    kernel = kernel.astype(float_dtype(kernel.dtype))
    fixed, scale = rescaled(lax.stop_gradient(kernel), op)
    value = frozen_value(kernel, op, pair)
    right, left = (lax.stop_gradient(vector) for vector in pair_images(pair, op, kernel.shape))
    return SingularTriplet(value, left, right, _residual(fixed, op, lax.stop_gradient(value) / scale, left, right))


def _residual(kernel, op, value, left, right):
    highest = lax.Precision.HIGHEST
    errors = (
        jnp.linalg.norm(op.apply(kernel, right, precision=highest) - value * left),
        jnp.linalg.norm(op.transpose(kernel, left, precision=highest) - value * right),
    )
    return jnp.where(value == 0, 0.0, jnp.maximum(*errors) / jnp.where(value == 0, 1.0, value))


def spectral_norm(kernel: Kernel, op: Operator) -> Float[Array, ""]:
    """`||T(kernel)||_2`, the largest singular value of exactly this operator.

    Circular: the maximum over all frequencies, guaranteed to rounding: by an SVD at each of them in small layers, in
    large ones by branch and bound, at a cost that does not depend on the image. Dense: an SVD; of large matrices
    Lanczos, and a Cholesky factorization that proves it. Zero padding: the same up to 2**18 entries of the explicit
    matrix, and of one tap; above, Lanczos to a relative residual of `eps ** 0.75`, without a proof. The gradient is the
    outer product of the leading vectors, held constant: exact for a simple value, finite always (also at zero), in
    forward and reverse mode.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one.

    Raises:
      ValueError: a kernel that does not fit.
    """
    kernel = kernel_array(kernel, op)
    return _value(kernel, op, leading_of(kernel, op))


@jax.jit
def leading_of(kernel: Float[Array, "..."], op: Operator) -> Pair:
    """The leading pair of a kernel of any scale and dtype, a constant for derivatives.

    Public functions call this stage before what they make of the pair, so that they share its program: one that was
    called on a shape leaves little to compile to the next.
    """
    kernel = lax.stop_gradient(kernel.astype(float_dtype(kernel.dtype)))
    return leading_pair(rescaled(kernel, op)[0], op)


@jax.jit
def _value(kernel, op, pair):
    return frozen_value(kernel.astype(float_dtype(kernel.dtype)), op, pair)


def norm_of(kernel: Float[Array, "..."], op: Operator) -> Float[Array, ""]:
    """`spectral_norm` of a kernel that is already checked and wide enough."""
    return frozen_value(kernel, op, leading_of(kernel, op))

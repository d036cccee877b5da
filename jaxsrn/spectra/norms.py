"""The leading singular triplet and the spectral norm of a layer, whose derivatives are exact where it is simple.

`pairs_by_kind.py` finds the leading pair, and the norm is its value as a function of the kernel (`moving_pairs.py`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form, ensure, float_dtype, positive_scalar, real_floating
from jaxsrn._tools.linalg import ratio
from jaxsrn._tools.programs import program
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.common_shapes import in_common_shape
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair, pair_images
from jaxsrn.spectra.singular_pair import rescaled

__all__ = [
    "SingularTriplet",
    "check_triplet",
    "leading_triplet",
    "norm_of",
    "spectral_norm",
]


class SingularTriplet(NamedTuple):
    """A real leading singular triplet of `T(K)`.

    Attributes:
      value: the singular value.
      left: the unit vector `v` among the outputs, of `out_shape`.
      right: the unit vector `u` among the inputs, of `in_shape`.
      residual: `max(||T u - value v||, ||T^T v - value u||) / value` as measured, 0 for a zero kernel.
    """

    value: Float[Array, "..."]
    left: Float[Array, "..."]
    right: Float[Array, "..."]
    residual: Float[Array, "..."]


def leading_triplet(
    kernel: Kernel, op: Operator, *, initial: SingularTriplet | None = None, tolerance=None, proven: bool = True
) -> SingularTriplet:
    """The largest singular value of `T(kernel)` with its two vectors, from a cold start.

    Circular layers: the leading value of the symbol over all its frequencies, with plane waves as vectors. Dense
    layers, and layers with zero padding of at most 2**18 entries of the explicit matrix or of one tap: an SVD, or the
    Lanczos method with a proof. Larger layers with zero padding: the Lanczos method with thick restarts (Wu, Simon
    2000) on the real operator, without a proof. It starts from a sum of the largest waves of the circular layer and
    noise, and is repeated once where the start may have missed the other phase of what is found, and from channels that
    the found vectors leave idle where these may hold a larger value.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      initial: an earlier triplet of a similar kernel. The search starts there, with a small fixed part mixed in, in
        place of the waves, which saves most of the steps. Layers that are not searched ignore it: circular and dense
        ones, and with zero padding the proven ones and those with an axis of one tap.
      tolerance: the relative residual at which that search stops, traced; by default `eps ** 0.75` of the dtype. The
        search also stops after 200 restarts, in float64 1,000: long sequences in float64 have singular values so close
        that the residual may be larger then, with norms within about 1e-10. It never takes a proof away, and does
        nothing where there is no search.
      proven: static; with `False` small layers with zero padding are searched as large ones are, without a proof.
        Circular and dense layers, and those of one tap, keep their proof.

    Returns:
      A `SingularTriplet` in float32 or wider. `value` is differentiable: its gradient is the outer product of the
      vectors, exact for a simple value and always finite; second derivatives are those of `spectral_norm`. The vectors
      are constants.

    Raises:
      ValueError: a kernel or an `initial` that does not fit, an `UnboundedConv`, whose vectors are no images, a bad
        tolerance, or a `proven` that is no bool.
    """
    kernel, op = computed_form(kernel, op)
    ensure(isinstance(proven, (bool, np.bool_)), f"proven: got {proven!r}, expected True or False.")
    # The vectors are images, which an operator without a size has none of.
    op.in_shape(kernel.shape)
    dtype = float_dtype(kernel.dtype)
    tolerance = None if tolerance is None else positive_scalar(tolerance, "tolerance", dtype)
    if initial is not None:
        check_triplet(initial, op, kernel.shape)
    start = None if initial is None else lax.stop_gradient(jnp.asarray(initial.right)).astype(dtype)
    return _triplet(kernel, op, leading_pair(kernel, op, tolerance=tolerance, start=start, proven=bool(proven)))


def check_triplet(initial: SingularTriplet, op: Operator, kernel_shape) -> None:
    """Raises `ValueError` unless the vectors of the triplet fit the operator."""
    got = (getattr(initial, "left", None), getattr(initial, "right", None))
    expected = op.out_shape(kernel_shape), op.in_shape(kernel_shape)
    ensure(
        all(a is not None and jnp.shape(a) == shape for a, shape in zip(got, expected, strict=True)),
        f"initial: got left and right of shapes {[None if a is None else jnp.shape(a) for a in got]}, expected a "
        f"SingularTriplet with {expected[0]} and {expected[1]} for {op}; take it from leading_triplet of a kernel of "
        "the same shape.",
    )
    real_floating(jnp.asarray(initial.right).dtype, "initial")


@functools.partial(program, brief=True)
def _triplet(kernel, op, pair):
    kernel, scale = rescaled(kernel, op)
    value = pair_value(kernel, op, pair)
    right, left = (lax.stop_gradient(vector) for vector in pair_images(pair, op, kernel.shape))
    residual = _residual(*lax.stop_gradient((kernel, value)), op, left, right)
    return SingularTriplet(scale * value, left, right, residual)


def _residual(kernel, value, op, left, right):
    """The larger miss of the two singular equations, relative to the value; 0 where the value is 0."""
    highest = lax.Precision.HIGHEST
    errors = (
        jnp.linalg.norm(op.apply(kernel, right, precision=highest) - value * left),
        jnp.linalg.norm(op.transpose(kernel, left, precision=highest) - value * right),
    )
    return ratio(jnp.maximum(*errors), value)


def spectral_norm(kernel: Kernel, op: Operator) -> Float[Array, ""]:
    """`||T(kernel)||_2`, the largest singular value of exactly this operator.

    Circular layers: the maximum over all frequencies, guaranteed to rounding. Small layers take an SVD at each
    frequency (Sedghi, Gupta, Long 2019), large ones branch and bound, whose cost does not depend on the image. Dense
    layers: an SVD, or for large matrices the Lanczos method with a Cholesky factorization that proves its value. Zero
    padding: the same as dense layers up to 2**18 entries of the explicit matrix, and for layers of one tap; above, the
    Lanczos method to a relative residual of `eps ** 0.75`, without a proof. How far the norm can be off there is what
    `bounds.certified(kernel, op)` says: the true norm is at most its `upper`.

    The gradient is the outer product of the leading vectors, held constant: exact for a simple value, always finite
    (also at zero), in both modes. The second derivative is exact for a simple value too, and takes a linear system in
    the vectors. Where values coincide, what would turn their vectors into each other is left out; with more than 512
    numbers in the vectors it may be NaN there. Values that differ by less than `2 * eps ** (2/3)` of the norm count as
    coinciding (4.8e-5 in float32, 7.3e-11 in float64).

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one.

    Raises:
      ValueError: a kernel that does not fit.

    Examples:
      >>> import jax.numpy as jnp, jaxsrn
      >>> kernel = jnp.array([1.0, 2.0, 1.0]).reshape(3, 1, 1)  # the norm of non-negative taps is their sum
      >>> print(jaxsrn.spectral_norm(kernel, jaxsrn.CircularConv((8,))).round(4))
      4.0
    """
    kernel, op, _ = in_common_shape(*computed_form(kernel, op))
    return norm_of(kernel, op)


@functools.partial(program, brief=True)
def _value(kernel, op, pair):
    # Products of a small kernel with a small part of the pair would vanish.
    kernel, scale = rescaled(kernel, op)
    return scale * pair_value(kernel, op, pair)


def norm_of(kernel: Float[Array, "..."], op: Operator) -> Float[Array, ""]:
    """`spectral_norm` of a kernel that is already checked."""
    return _value(kernel, op, leading_pair(kernel, op))

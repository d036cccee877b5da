"""Algorithm 2.1 of Guo, Ye 2019: two eigenpairs that follow the kernel while it trains.

They are stored between the training steps, and each step moves them by a few power steps, at the cost of a few
products. There are two of them, because the leading ones can cross as the kernel changes.
The paper moves each pair by the power method. Here both move as a block and are rotated to the best vectors of their
span (Rayleigh, Ritz), so that they stay orthogonal. `guo_ye.py` computes the pairs of each kernel to the end instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form, ensure, float_dtype, positive_scalar, static_int
from jaxsrn._tools.held import held, stationary
from jaxsrn._tools.lanczos import top_singular_vectors
from jaxsrn._tools.linalg import matmul
from jaxsrn._tools.programs import program
from jaxsrn._tools.subspaces import orthonormal_rows, rayleigh_ritz, subspace_iteration
from jaxsrn._tools.tolerances import vector_tolerance
from jaxsrn.operators.base import Operator
from jaxsrn.penalties.guo_ye import check_side, exceeds_output

__all__ = [
    "TrackedPairs",
    "extreme_singular_values_step",
    "init_pairs",
]


class TrackedPairs(NamedTuple):
    """Two eigenpairs of `G - alpha I` with a Gram matrix `G` of a layer, the one larger in absolute value first.

    Attributes:
      values: `(2,)`, signed: positive above `alpha`, negative below it.
      vectors: `(2, *in_shape)`, or `(2, *out_shape)` where `G = M M^T`; orthonormal.
    """

    values: Float[Array, "..."]
    vectors: Float[Array, "..."]


def init_pairs(kernel: Kernel, op: Operator, *, alpha=1.0, gram: str = "small") -> TrackedPairs:
    """The two eigenpairs of `M^T M - alpha I` farthest from 0, with which Algorithm 2.1 of Guo, Ye 2019 starts.

    They come from Lanczos with deflation, matrix-free, for every operator with an image size.

    Args:
      kernel, op, alpha, gram: as in `extreme_singular_values`.

    Returns:
      `TrackedPairs`, constants, in float32 or wider; the values are NaN where the kernel has a NaN.

    Raises:
      ValueError: as `extreme_singular_values`, an `UnboundedConv`, whose vectors are no images, or a Gram matrix of one
        row, which has no two eigenpairs.
    """
    kernel, op = computed_form(kernel, op)
    _checked_side(op, kernel.shape, gram)
    return _init_pairs(kernel, op, positive_scalar(alpha, "alpha", float_dtype(kernel.dtype)), gram)


@functools.partial(program, static_argnums=(1, 3))
def _init_pairs(kernel, op, alpha, gram):
    kernel, alpha = lax.stop_gradient((kernel.astype(float_dtype(kernel.dtype)), alpha))
    shape = _side_shape(op, kernel.shape, gram)
    shifted = _shifted_gram(kernel, op, alpha, gram)

    def product(x):
        return shifted(x.reshape(shape)).reshape(-1)

    size, tolerance = math.prod(shape), vector_tolerance(kernel.dtype)
    vectors, _ = top_singular_vectors(product, product, size, size, 2, tolerance, kernel.dtype)
    return _rotated(kernel, op, alpha, gram, vectors.reshape((2, *shape)))


def extreme_singular_values_step(
    kernel: Kernel, pairs: TrackedPairs, op: Operator, *, alpha=1.0, gram: str = "small", num_steps: int = 2
) -> tuple[Float[Array, ""], TrackedPairs]:
    """`R_alpha` from eigenvectors that follow the kernel: steps 6 and 7 of Algorithm 2.1 of Guo, Ye 2019, in training.

    Both vectors take `num_steps` power steps with `G - alpha I`, are made orthonormal and are rotated to the best of
    their span (Rayleigh, Ritz). The pair that is larger in absolute value gives `R_alpha`. Two pairs are kept, since
    the leading ones can cross as the kernel changes.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      pairs: the pairs of the step before, with the same `gram`; the first ones come from `init_pairs`.
      op, alpha, gram: as in `extreme_singular_values`.
      num_steps: static; power steps, two in the paper (section 3).

    Returns:
      `(value, pairs)`. The value is an estimate of `R_alpha` from below, and its gradient holds the vectors constant.
      Both, and the second derivative, are exact where the pairs have converged. The stepped pairs are constants.

    Raises:
      ValueError: as `init_pairs`, pairs that do not fit, or fewer than one step.
    """
    kernel, op = computed_form(kernel, op)
    expected = (2, *_checked_side(op, kernel.shape, gram))
    got = jnp.shape(getattr(pairs, "vectors", None))
    ensure(got == expected, f"pairs: got vectors of shape {got}, expected {expected}; take them from init_pairs.")
    alpha = positive_scalar(alpha, "alpha", float_dtype(kernel.dtype))
    return _stepped(kernel, pairs, op, alpha, gram, static_int(num_steps, "num_steps"))


@functools.partial(program, static_argnums=(2, 4, 5))
def _stepped(kernel, pairs, op, alpha, gram, num_steps):
    kernel = kernel.astype(float_dtype(kernel.dtype))
    fixed, fixed_alpha, vectors = lax.stop_gradient((kernel, alpha, pairs.vectors.astype(kernel.dtype)))
    shifted = _shifted_gram(fixed, op, fixed_alpha, gram)

    def product(rows):
        return shifted(rows.reshape(vectors.shape)).reshape(rows.shape)

    rows = subspace_iteration(product, orthonormal_rows(vectors.reshape((2, -1))), num_steps)
    stepped = _rotated(fixed, op, fixed_alpha, gram, rows.reshape(vectors.shape))
    squared = functools.partial(_squared_image, op, gram)
    value = held(squared, stationary(squared), kernel, stepped.vectors[0]) - alpha
    return jnp.where(stepped.values[0] < 0, -value, value), stepped


def _checked_side(op: Operator, kernel_shape, gram: str) -> tuple[int, ...]:
    """`_side_shape`; raises `ValueError` where it has no two eigenpairs."""
    check_side(gram)
    shape = _side_shape(op, kernel_shape, gram)
    ensure(
        math.prod(shape) > 1,
        f"kernel: the Gram matrix of {op} has one row, expected at least two; use extreme_singular_values.",
    )
    return shape


def _side_shape(op: Operator, kernel_shape, gram: str) -> tuple[int, ...]:
    """The shape of the vectors that the Gram matrix acts on."""
    on_output = gram == "small" and exceeds_output(op, kernel_shape)
    return op.out_shape(kernel_shape) if on_output else op.in_shape(kernel_shape)


def _gram_maps(kernel, op: Operator, gram: str) -> tuple[Callable, Callable]:
    """`M` and `M^T` on images, or the other way round where the Gram matrix is `M M^T`."""
    forward, back = (functools.partial(f, kernel, precision=lax.Precision.HIGHEST) for f in (op.apply, op.transpose))
    on_output = gram == "small" and exceeds_output(op, kernel.shape)
    return (back, forward) if on_output else (forward, back)


def _image(kernel, op: Operator, vector: Float[Array, "..."], gram: str) -> Float[Array, "..."]:
    """`M v`, or `M^T v` where the Gram matrix is `M M^T`."""
    return _gram_maps(kernel, op, gram)[0](vector)


def _squared_image(op: Operator, gram: str, kernel, vector: Float[Array, "..."]) -> Float[Array, ""]:
    """`||M v||^2`, or `||M^T v||^2` where the Gram matrix is `M M^T`."""
    return jnp.sum(_image(kernel, op, vector, gram) ** 2)


def _shifted_gram(kernel, op: Operator, alpha, gram: str) -> Callable:
    """The map `G - alpha I` up to a factor."""
    kernel, shift, _ = _scaled(kernel, alpha)
    forward, back = _gram_maps(kernel, op, gram)

    def product(vector):
        return back(forward(vector)) - shift * vector

    return product


def _scaled(kernel, alpha):
    """The kernel over a scale, `alpha` over its square, and the scale; squares are in the range of the dtype then."""
    scale = jnp.maximum(jnp.max(jnp.abs(kernel)), jnp.sqrt(alpha))
    return kernel / scale, (jnp.sqrt(alpha) / scale) ** 2, scale


def _rotated(kernel, op: Operator, alpha, gram: str, vectors: Float[Array, "..."]) -> TrackedPairs:
    """The eigenpairs of `G - alpha I` restricted to the span of two orthonormal vectors."""
    kernel, shift, scale = _scaled(kernel, alpha)
    images = _image(kernel, op, vectors, gram).reshape((2, -1))
    values, basis = rayleigh_ritz(matmul(images, images.T))
    values = values - shift
    order = jnp.argsort(-jnp.abs(values))
    turned = matmul(basis[order], vectors.reshape((2, -1)))
    # The square of the scale alone may be infinite.
    return TrackedPairs(scale * (scale * values[order]), turned.reshape(vectors.shape))

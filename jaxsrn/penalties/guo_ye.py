"""Differentiable regularisers: singular values drawn together (Guo, Ye 2019), batch norm folded in, sums of layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, ensure, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.linalg import end_pairs, matmul, unit
from jaxsrn._tools.subspaces import default_tolerance, leading_singular_vectors, random_start, top_singular_vectors
from jaxsrn.operators import layers as _layers
from jaxsrn.operators.maps import CircularConv, Dense, Operator
from jaxsrn.spectra import leading as _leading
from jaxsrn.spectra import pairs as _pairs
from jaxsrn.spectra.circular import fourier as _fourier
from jaxsrn.spectra.norms import frozen_value

__all__ = [
    "TrackedPairs",
    "extreme_singular_values",
    "extreme_singular_values_step",
    "fold_batch_norm",
    "init_pairs",
    "total",
]

# Entries of an explicit matrix that is formed for both its ends: an SVD of it takes about a second.
_DENSE_LIMIT = 2**20
# Relative to the squared norm: the residual at which Lanczos stops for the smallest eigenvalue of a Gram matrix.
_LOWER_TOLERANCE = 1e-4
_SIDES = ("small", "input")


# Both ends of the spectrum


def extreme_singular_values(kernel: Kernel, op: Operator, *, alpha=1.0, gram: str = "small") -> Float[Array, ""]:
    """`R_alpha`, which draws all singular values of a layer towards `sqrt(alpha)`.

    Guo, Ye 2019: with the matrix `M` of the layer

        R_alpha(K) = ||M^T M - alpha I||_2 = max(sigma_max(M)^2 - alpha, alpha - lambda_min(M^T M)).

    Their Theorem 2.1: `R_alpha < t alpha` with `0 < t <= 1` implies
    `sqrt((1 - t) alpha) < sigma_min <= sigma_max < sqrt((1 + t) alpha)`.

    Which Gram matrix matters. Where the input is larger than the output (`c_in > c_out`), `M^T M` is singular:
    `R_alpha >= alpha` whatever the kernel, and once `sigma_max^2 <= 2 alpha` the gradient is exactly 0. This is the
    barrier at `alpha` that the paper saw. `gram="small"` uses the smaller one, `M M^T` there, so `sigma_min` is the
    least of all `min(prod(in_shape), prod(out_shape))` singular values, and the theorem holds for it.

    Circular: extreme singular values over all frequencies. Dense and small zero-padded layers (up to 2**20 matrix
    entries): an SVD. Larger zero-padded layers, whose both ends come from Lanczos: the upper one as in
    `spectral_norm`; the lower one to a residual of `1e-4 sigma_max^2` (at most 200 restarts), within which there is an
    eigenvalue of the Gram matrix. Where the lower end decides, `R_alpha` may be too small by that much.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator; the paper's is `ZeroPaddedConv(input_shape)`.
      alpha: positive, traced; the square of the singular value to aim at.
      gram: static; `"small"`, or `"input"` for `M^T M` always, as in the paper.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one. The gradient, `+-grad_K ||M v||^2` with the extremal
      eigenvector `v` held constant, is their (2.3) and (2.5): exact for a simple eigenvalue, finite always. Where both
      ends are equally far it is that of the upper one.

    Raises:
      ValueError: a kernel that does not fit, an `alpha` that is not positive, an unknown `gram`.
    """
    kernel = kernel_array(kernel, op)
    _check_side(gram)
    return _extreme(kernel, op, positive_scalar(alpha, "alpha", float_dtype(kernel.dtype)), gram)


def _check_side(gram) -> None:
    ensure(gram in _SIDES, f"gram: got {gram!r}, expected one of {_SIDES}.")


def _exceeds_output(op: Operator, kernel_shape) -> bool:
    return math.prod(op.in_shape(kernel_shape)) > math.prod(op.out_shape(kernel_shape))


@functools.partial(jax.jit, static_argnums=(1, 3))
def _extreme(kernel, op, alpha, gram):
    kernel = kernel.astype(float_dtype(kernel.dtype))
    if isinstance(op, CircularConv):
        op = _fourier.without_idle_axes(op, kernel.shape)
    fixed, _ = _pairs.rescaled(lax.stop_gradient(kernel), op)
    largest, smallest = _extreme_pairs(fixed, op)
    above = frozen_value(kernel, op, largest) ** 2 - alpha
    singular = gram == "input" and _exceeds_output(op, kernel.shape)
    below = alpha - (0.0 if singular else frozen_value(kernel, op, smallest) ** 2)
    # NaN compares as false, and must not end as alpha.
    return jnp.where(below > above, below, above)


def _extreme_pairs(kernel: Float[Array, "..."], op: Operator) -> tuple[_pairs.Pair, _pairs.Pair]:
    """The pairs of the largest and of the smallest singular value, of `min(prod(in_shape), prod(out_shape))`."""
    if isinstance(op, CircularConv):
        return _extreme_at_sites(kernel, op)
    if isinstance(op, Dense) or _pairs.matrix_size(op, kernel.shape) <= _DENSE_LIMIT:
        # Transposed: like a symbol it maps outputs to inputs.
        matrix = op.to_dense(kernel).T[None]
        return tuple(_pairs.as_images(u[0], v[0], op, kernel.shape) for _, u, v in end_pairs(matrix))
    largest = _leading.leading(kernel, op)
    return largest, _smallest_matrix_free(kernel, op, frozen_value(kernel, op, largest))


def _extreme_at_sites(kernel, op: CircularConv):
    """Singular values at all sites, vectors at the two that matter."""
    sites = jnp.asarray(_fourier.distinct_sites(op)[0])
    values = jnp.linalg.svd(_fourier.half_symbol(kernel, op)[sites], compute_uv=False)
    pairs = []
    for end, site in enumerate((sites[jnp.argmax(values[:, 0])], sites[jnp.argmin(values[:, -1])])):
        _, u, v = end_pairs(_fourier.site_symbol(kernel, op, site)[None])[end]
        pairs.append(_pairs.Pair(site, u[0], v[0]))
    return tuple(pairs)


def _smallest_matrix_free(kernel, op: Operator, norm) -> _pairs.Pair:
    """The pair of the smallest eigenvalue of the smaller Gram matrix `G`: Lanczos for the top of `norm^2 I - G`."""
    matvec, rmatvec, in_size, out_size = _pairs.flat_products(kernel, op)
    if in_size > out_size:
        matvec, rmatvec = rmatvec, matvec
    size = min(in_size, out_size)

    def shifted(x):
        return norm**2 * x - rmatvec(matvec(x))

    start = random_start((size,), kernel.dtype)
    _, _, vector, _ = leading_singular_vectors(shifted, shifted, start, size, _LOWER_TOLERANCE)
    vector = unit(vector)
    # Unit images, or zero: what the map makes of the vector is its singular value times them.
    image = unit(matvec(vector))
    right, left = (image, vector) if in_size > out_size else (vector, image)
    return _pairs.as_images(right, left, op, kernel.shape)


# Algorithm 2.1: pairs that follow the kernel


class TrackedPairs(NamedTuple):
    """Two eigenpairs of `G - alpha I` with a Gram matrix `G` of a layer, the larger in absolute value first.

    Attributes:
      values: `(2,)`, signed: positive above `alpha`, negative below it.
      vectors: `(2, *in_shape)`, or `(2, *out_shape)` where `G = M M^T`; orthonormal.
    """

    values: Float[Array, "..."]
    vectors: Float[Array, "..."]


def init_pairs(kernel: Kernel, op: Operator, *, alpha=1.0, gram: str = "small") -> TrackedPairs:
    """The two eigenpairs of `M^T M - alpha I` farthest from 0: where Algorithm 2.1 of Guo, Ye 2019 starts.

    By Lanczos with deflation, matrix-free, for every operator.

    Args:
      kernel, op, alpha, gram: as in `extreme_singular_values`.

    Returns:
      `TrackedPairs`, constants, in float32 or wider; the values are NaN where the kernel has a NaN.

    Raises:
      ValueError: as `extreme_singular_values`, or a Gram matrix of one row, which has no two eigenpairs.
    """
    kernel = kernel_array(kernel, op)
    _check_side(gram)
    size = math.prod(_side_shape(op, kernel.shape, gram))
    ensure(
        size > 1, f"kernel: the Gram matrix of {op} has one row, expected at least two; use extreme_singular_values."
    )
    return _init_pairs(kernel, op, positive_scalar(alpha, "alpha", float_dtype(kernel.dtype)), gram)


def _side_shape(op: Operator, kernel_shape, gram: str) -> tuple[int, ...]:
    on_output = gram == "small" and _exceeds_output(op, kernel_shape)
    return op.out_shape(kernel_shape) if on_output else op.in_shape(kernel_shape)


def _gram_maps(kernel, op: Operator, gram: str) -> tuple[Callable, Callable]:
    """`M` and `M^T` on images, or the other way round where the Gram matrix is `M M^T`."""
    maps = [functools.partial(f, kernel, precision=lax.Precision.HIGHEST) for f in (op.apply, op.transpose)]
    on_output = gram == "small" and _exceeds_output(op, kernel.shape)
    return tuple(maps[::-1] if on_output else maps)


def _image(kernel, op: Operator, vector: Float[Array, "..."], gram: str) -> Float[Array, "..."]:
    """`M v`, or `M^T v` where the Gram matrix is `M M^T`."""
    return _gram_maps(kernel, op, gram)[0](vector)


def _shifted_gram(kernel, op: Operator, alpha, gram: str) -> Callable:
    """The map `G - alpha I`, up to a factor that keeps it in the range of the dtype."""
    scale = jnp.maximum(jnp.max(jnp.abs(kernel)), jnp.sqrt(alpha))
    kernel, shift = kernel / scale, (jnp.sqrt(alpha) / scale) ** 2
    forward, back = _gram_maps(kernel, op, gram)

    def product(vector):
        return back(forward(vector)) - shift * vector

    return product


@functools.partial(jax.jit, static_argnums=(1, 3))
def _init_pairs(kernel, op, alpha, gram):
    kernel, alpha = lax.stop_gradient((kernel.astype(float_dtype(kernel.dtype)), alpha))
    shape = _side_shape(op, kernel.shape, gram)
    shifted = _shifted_gram(kernel, op, alpha, gram)

    def product(x):
        return shifted(x.reshape(shape)).reshape(-1)

    size, tolerance = math.prod(shape), default_tolerance(kernel.dtype)
    _, vectors = top_singular_vectors(product, product, size, size, 2, tolerance, kernel.dtype)
    return _rotated(kernel, op, alpha, gram, vectors.reshape((2, *shape)))


def extreme_singular_values_step(
    kernel: Kernel, pairs: TrackedPairs, op: Operator, *, alpha=1.0, gram: str = "small", num_steps: int = 2
) -> tuple[Float[Array, ""], TrackedPairs]:
    """`R_alpha` from tracked eigenvectors: steps 6 and 7 of Algorithm 2.1 of Guo, Ye 2019, for use in training.

    Both vectors take `num_steps` power steps with `G - alpha I`, are made orthonormal and rotated to the best of their
    span (Rayleigh, Ritz); the larger in absolute value gives `R_alpha`. Two, since the leading ones can cross as the
    kernel changes.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      pairs: of the step before, first from `init_pairs`, with the same `gram`.
      op, alpha, gram: as in `extreme_singular_values`.
      num_steps: static; power steps, two in the paper.

    Returns:
      `(value, pairs)`: an estimate of `R_alpha` from below, exact where the pairs have converged, with the gradient
      for vectors held constant; and the stepped pairs, constants.

    Raises:
      ValueError: as `init_pairs`, pairs that do not fit, or fewer than one step.
    """
    kernel = kernel_array(kernel, op)
    _check_side(gram)
    expected = (2, *_side_shape(op, kernel.shape, gram))
    got = jnp.shape(getattr(pairs, "vectors", None))
    ensure(got == expected, f"pairs: got vectors of shape {got}, expected {expected}; take them from init_pairs.")
    alpha = positive_scalar(alpha, "alpha", float_dtype(kernel.dtype))
    return _step(kernel, pairs, op, alpha, gram, static_int(num_steps, "num_steps"))


@functools.partial(jax.jit, static_argnums=(2, 4, 5))
def _step(kernel, pairs, op, alpha, gram, num_steps):
    kernel = kernel.astype(float_dtype(kernel.dtype))
    fixed, fixed_alpha, vectors = lax.stop_gradient((kernel, alpha, pairs.vectors.astype(kernel.dtype)))
    shifted = _shifted_gram(fixed, op, fixed_alpha, gram)
    vectors = lax.fori_loop(0, num_steps, lambda _, v: _orthonormal(shifted(v)), _orthonormal(vectors))
    stepped = _rotated(fixed, op, fixed_alpha, gram, vectors)
    value = jnp.sum(_image(kernel, op, stepped.vectors[0], gram) ** 2) - alpha
    return jnp.where(stepped.values[0] < 0, -value, value), stepped


def _orthonormal(vectors: Float[Array, "..."]) -> Float[Array, "..."]:
    q, _ = jnp.linalg.qr(vectors.reshape((2, -1)).T)
    return q.T.reshape(vectors.shape)


def _rotated(kernel, op: Operator, alpha, gram: str, vectors: Float[Array, "..."]) -> TrackedPairs:
    """The eigenpairs of `G - alpha I` restricted to the span of two orthonormal vectors."""
    images = _image(kernel, op, vectors, gram).reshape((2, -1))
    # As its eigenvectors: stacks of eigh are no safe ground in jaxlib 0.10.2 (jax issue 39292).
    _, values, basis = jnp.linalg.svd(matmul(images, images.T))
    values = values - alpha
    order = jnp.argsort(-jnp.abs(values))
    turned = matmul(basis[order], vectors.reshape((2, -1)))
    return TrackedPairs(values[order], turned.reshape(vectors.shape))


# What penalties are composed of


def fold_batch_norm(kernel: Kernel, scale, var, *, epsilon: float = 1e-5) -> Kernel:
    """The kernel of a layer followed by batch normalization in evaluation: `kernel * scale / sqrt(var + epsilon)`.

    Norms and bounds of the composition, as Grishina et al. 2024 (Figure 4) follow it, are those of this kernel:
    `spectral_norm(fold_batch_norm(kernel, scale, var), op)`.

    Args:
      kernel: `(..., c_out)`.
      scale: `(c_out,)`, Flax's `scale`, the gamma of the literature; ones where the layer has none.
      var: `(c_out,)`, the running variance.
      epsilon: positive; that of the layer.

    Returns:
      A kernel of the same shape, in float32 or wider: rounding would move the norm that it is for. Differentiable in
      all three.

    Raises:
      ValueError: a kernel that is not real floating, channels that do not fit, or a bad epsilon.
    """
    kernel, scale, var = (jnp.asarray(array) for array in (kernel, scale, var))
    for name, array in (("kernel", kernel), ("scale", scale), ("var", var)):
        ensure(
            jnp.issubdtype(array.dtype, jnp.floating),
            f"{name}: got dtype {array.dtype}, expected a real floating-point array.",
        )
    ensure(kernel.ndim >= 2, f"kernel: got shape {kernel.shape}, expected (..., c_in, c_out).")
    for name, array in (("scale", scale), ("var", var)):
        ensure(
            array.shape == kernel.shape[-1:],
            f"{name}: got shape {array.shape}, expected {kernel.shape[-1:]}, one per output channel of the kernel.",
        )
    dtype = float_dtype(kernel.dtype)
    factors = scale.astype(dtype) / jnp.sqrt(var.astype(dtype) + positive_scalar(epsilon, "epsilon", dtype))
    factors = factors.reshape((1,) * (kernel.ndim - 1) + (-1,))
    return kernel.astype(dtype) * factors


def total(function: Callable, layers: _layers.Layers, params) -> Float[Array, ""]:
    """`sum function(kernel, op)` over layers of a model: a penalty on all of them at once.

    Kernels of equal operator, shape and dtype are stacked, and `function` is mapped over each stack: one call, and one
    compilation, per distinct shape.

    Args:
      function: `f(kernel, op)` to a scalar, such as `spectral_norm`, `bounds.tensor_norm`, `stable_rank` or
        `functools.partial(penalties.extreme_singular_values, alpha=2.0)`.
      layers: `{path: operator}`; a path is the tuple of plain keys to the kernel, `("conv1", "kernel")`, as
        `flax.traverse_util.flatten_dict` and `flax.nnx.to_flat_state` name it.
      params: nested dicts, an `nnx.State`, or any pytree; other leaves are not read.

    Returns:
      A scalar in float32 or wider; 0 without layers.

    Raises:
      ValueError: a path that is not in `params` (it is named), a kernel that does not fit its operator, or a function
        whose value is not a scalar.
    """
    running = jnp.zeros((), jnp.float32)
    for stack in _layers.stacks(layers, params):
        values = jax.vmap(function, (0, None))(_layers.after(stack.kernels, running), stack.op)
        ensure(
            jnp.shape(values) == (len(stack.paths),),
            f"function: got a value of shape {jnp.shape(values)[1:]} for {stack.paths[0]!r}, expected a scalar.",
        )
        dtype = max(running.dtype, values.dtype, key=lambda dtype: dtype.itemsize)
        running = running.astype(dtype) + jnp.sum(values).astype(dtype)
    return running

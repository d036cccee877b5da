"""The regulariser of Guo, Ye 2019, which draws the extreme singular values of a layer together, computed to the end.

It needs the largest and the smallest singular value. The paper follows both with power steps while it trains
(`tracked_pairs.py`); here they are computed anew for every kernel: all frequencies of a circular layer by SVDs, one SVD
of a small matrix, and Lanczos for the rest, whose lower end is the upper end of a shifted Gram matrix.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, check_choice, computed_form, float_dtype, positive_scalar
from jaxsrn._tools.indexing import picked
from jaxsrn._tools.lanczos import leading_singular_vectors
from jaxsrn._tools.linalg import end_pairs, svdvals, unit
from jaxsrn._tools.programs import program
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn._tools.tolerances import BOTH_ENDS_SIZE
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.fourier import half_symbol, site_symbol
from jaxsrn.spectra.circular.grid_certificate import on_dividing_grid
from jaxsrn.spectra.circular.sites import distinct_sites, sites_at, without_constant_axes
from jaxsrn.spectra.image_pairs import flat_products, of_flat_vectors
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import Pair, has_small_matrices, rescaled

__all__ = [
    "check_side",
    "exceeds_output",
    "extreme_singular_values",
]

# The residual, relative to the squared norm, at which Lanczos stops for the smallest eigenvalue of a Gram matrix. A
# smaller one costs more restarts, above all where the small singular values lie close together.
_LOWER_TOLERANCE = 1e-4
# Angles per degree of the grid on which the smallest singular value of an unbounded convolution is looked for.
_ANGLES = 16
_SIDES = ("small", "input")


def extreme_singular_values(kernel: Kernel, op: Operator, *, alpha=1.0, gram: str = "small") -> Float[Array, ""]:
    """`R_alpha`, which draws all singular values of a layer towards `sqrt(alpha)`.

    Guo, Ye 2019: with the matrix `M` of the layer

        R_alpha(K) = ||M^T M - alpha I||_2 = max(sigma_max(M)^2 - alpha, alpha - lambda_min(M^T M)).

    Their Theorem 2.1: `R_alpha < t alpha` with `0 < t <= 1` implies
    `sqrt((1 - t) alpha) < sigma_min <= sigma_max < sqrt((1 + t) alpha)`.

    The choice of the Gram matrix matters. Where the input is larger than the output (`c_in > c_out`), `M^T M` is
    singular: `R_alpha >= alpha` whatever the kernel, and once `sigma_max^2 <= 2 alpha` the gradient is exactly 0. This
    is the barrier at `alpha` that the paper saw. `gram="small"` uses the smaller matrix, which is `M M^T` there. Then
    `sigma_min` is the least of all `min(prod(in_shape), prod(out_shape))` singular values, and the theorem holds for
    it.

    A circular layer takes its extreme singular values over all frequencies, an unbounded one the largest over all and
    the smallest over a grid of at least 16 angles per degree of its symbol. Dense and small zero-padded layers (up to
    2**20 matrix entries) take an SVD. Larger zero-padded layers take Lanczos: the upper end as in `spectral_norm`, the
    lower end to a residual of `1e-4 sigma_max^2` (at most 200 restarts). Some eigenvalue of the Gram matrix lies within
    this residual, and where the lower end decides, `R_alpha` may be too small by that much.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator; the paper's is `ZeroPaddedConv(input_shape)`.
      alpha: positive, traced; the square of the singular value to aim at.
      gram: static; `"small"`, or `"input"` for `M^T M` always, as in the paper.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one. The gradient, `+-grad_K ||M v||^2` with the extremal
      eigenvector `v` held constant, is their (2.3) and (2.5): exact for a simple eigenvalue, and always finite. Where
      both ends are equally far it is the gradient of the upper one. The second derivative is exact for a simple
      eigenvalue other than 0.

    Raises:
      ValueError: a kernel that does not fit, an `alpha` that is not positive, an unknown `gram`.
    """
    kernel, op = computed_form(kernel, op)
    check_side(gram)
    return _extreme(kernel, op, positive_scalar(alpha, "alpha", float_dtype(kernel.dtype)), gram)


def check_side(gram) -> None:
    """Raises `ValueError` where `gram` names no Gram matrix."""
    check_choice(gram, "gram", _SIDES)


def exceeds_output(op: Operator, kernel_shape) -> bool:
    """Whether the input is larger than the output (static)."""
    inputs, outputs = op._sizes(kernel_shape)
    return inputs > outputs


@functools.partial(program, static_argnums=(1, 3), brief=True)
def _extreme(kernel, op, alpha, gram):
    kernel = kernel.astype(float_dtype(kernel.dtype))
    fixed, _ = rescaled(lax.stop_gradient(kernel), op)
    largest, smallest = _extreme_pairs(fixed, op)
    above = pair_value(kernel, op, largest) ** 2 - alpha
    singular = gram == "input" and exceeds_output(op, kernel.shape)
    below = alpha - (0.0 if singular else pair_value(kernel, _with_smallest(op, kernel.shape), smallest) ** 2)
    # NaN compares as false; in this order it is the result and not alpha.
    return jnp.where(below > above, below, above)


def _extreme_pairs(kernel: Float[Array, "..."], op: Operator) -> tuple[Pair, Pair]:
    """The pairs of the largest and of the smallest of the `min(prod(in_shape), prod(out_shape))` singular values."""
    if isinstance(op, CircularConv):
        return _extreme_at_sites(kernel, op)
    if isinstance(op, UnboundedConv):
        return leading_pair(kernel, op), _extreme_at_sites(kernel, _with_smallest(op, kernel.shape))[1]
    if has_small_matrices(op, kernel.shape, BOTH_ENDS_SIZE):
        # `end_pairs` wants the inputs in the rows, as a symbol has them.
        matrix = op.to_dense(kernel).T[None]
        largest, smallest = (of_flat_vectors(u[0], v[0], op, kernel.shape) for _, u, v in end_pairs(matrix, (0, -1)))
        return largest, smallest
    largest = leading_pair(kernel, op)
    return largest, _smallest_matrix_free(kernel, op, pair_value(kernel, op, largest))


def _extreme_at_sites(kernel, op: CircularConv):
    """The extreme pairs of a circular layer: singular values at all sites, vectors at the two sites that matter."""
    layer = without_constant_axes(op, kernel.shape)
    places = distinct_sites(layer)[0]
    values = svdvals(half_symbol(kernel, layer)[places])
    sites, pairs = jax.tree.map(jnp.asarray, sites_at(layer, places)), []
    for end, place in ((0, jnp.argmax(values[:, 0])), (-1, jnp.argmin(values[:, -1]))):
        site = picked(sites, place)
        _, rows, columns = end_pairs(site_symbol(kernel, layer, site)[None], (end,))[0]
        pairs.append(Pair(site, rows[0], columns[0]))
    return tuple(pairs)


def _with_smallest(op: Operator, kernel_shape) -> Operator:
    """The operator whose smallest singular value is taken: of an unbounded layer one on a coarse grid."""
    return on_dividing_grid(op, kernel_shape, _ANGLES) if isinstance(op, UnboundedConv) else op


def _smallest_matrix_free(kernel, op: Operator, norm) -> Pair:
    """The pair of the smallest eigenvalue of the smaller Gram matrix `G`.

    Lanczos (`_tools/lanczos.py`) finds the largest eigenvalue of `norm^2 I - G` in its place.
    """
    matvec, rmatvec, in_size, out_size = flat_products(kernel, op)
    if in_size > out_size:
        matvec, rmatvec = rmatvec, matvec
    size = min(in_size, out_size)

    def shifted(x):
        return norm**2 * x - rmatvec(matvec(x))

    start = fixed_start((size,), kernel.dtype)
    vector = unit(leading_singular_vectors(shifted, shifted, start, size, _LOWER_TOLERANCE).input)
    # The image is the singular value times a unit vector. Where the singular value is 0, any unit vector will do.
    image = unit(matvec(vector))
    return of_flat_vectors(*((image, vector) if in_size > out_size else (vector, image)), op, kernel.shape)

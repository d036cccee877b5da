"""The direction of steepest descent under a layer's own norm: Muon for convolutions.

Among the kernels of the same support with `||T(K)||_2 <= 1` it is the one with the largest `<G, K>`, for a gradient or
momentum `G`: the linear minimization oracle of the spectral ball. Its value is the dual norm of `G`. For a dense layer
it is `U V^T` and the nuclear norm (Muon: Jordan et al. 2024; Bernstein, Newhouse 2024, "Old optimizer, new norm").

**The dual.** Let `S(K)` be the stack of matrices that carries the layer (`clipping.py`). Every stack `Z` with
`S^* Z = G / d` gives `<G, K> = <Z, S(K)> <= ||Z||_*` for all `K` of the ball, a bound of the dual norm. The best such
bound is the dual norm.

**Exactly.** The passes of `frequency_passes.py`, on the stack that carries the layer's norm, end when the bound proves
the kernel. They add numbers of the size of the solution alone. The limit of projections of `t G` on the ball, `t` to
infinity, has the same solution, but loses a factor of `t` to rounding: in float32 it stalls before a gap of 1e-3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxsrn._tools.checks import Kernel, check_choice, ensure, float_dtype, kernel_array, positive_scalar, static_int
from jaxsrn._tools.linalg import divisor, inner, svdvals
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import PROVEN_SIZE, torus_excess
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.projections.clipping import stack_map_of
from jaxsrn.projections.frequency_passes import (
    feasible_multiplier,
    few_frequencies,
    nuclear_norm,
    passes,
    polar,
    solved,
    unit_direction,
)
from jaxsrn.projections.nearest import inner_map, outer_map
from jaxsrn.spectra.common_shapes import as_matrix
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair_and_excess
from jaxsrn.spectra.singular_pair import Pair, has_small_matrices, rescaled, without_idle_taps

__all__ = [
    "METHODS",
    "SteepestResult",
    "flattened",
    "steepest",
]

METHODS = "exact", "frequency", "flattened"
# Angles per degree of the symbol of an unbounded convolution. What frequencies between them exceed the grid's by counts
# as gap, up to 0.2% for two axes (`1 / cos(pi / 64) ** 2`), and less as a rule.
_ANGLES = 32
# The share of the tolerance that the solver may use up. The norm takes another one, and, of unbounded layers, the
# frequencies between those of the grid.
_SOLVERS_SHARE = 0.4
# How far branch and bound may leave the norm that the result is divided by above the value that was found: a share of
# the tolerance of `"exact"`, and this number for the other methods.
_NORMS_SHARE, _EXCESS = 0.1, 1e-2
# By default: the gap and the most passes of `"exact"`, and the passes of `"frequency"`.
_TOLERANCE, _MAX_PASSES, _NUM_PASSES = 1e-3, 2000, 30


class SteepestResult(NamedTuple):
    """A kernel of the spectral ball along a gradient, and a proof of how good it is.

    Attributes:
      kernel: `||T(kernel)||_2 <= 1`; for a matrix up to rounding.
      dual_norm: an upper bound of the dual norm, the largest `<G, K>` over the ball, proven up to rounding.
      gap: `1 - <G, kernel> / dual_norm`. No kernel of the ball has a `<G, K>` that is larger by more than this share of
        `dual_norm`.
    """

    kernel: Shaped[Array, "..."]
    dual_norm: Float[Array, "..."]
    gap: Float[Array, "..."]


def steepest(
    kernel: Kernel,
    op: Operator,
    *,
    method: str = "exact",
    max_passes: int | None = None,
    tolerance=None,
    num_passes: int | None = None,
) -> SteepestResult:
    """The kernel of the same support and of norm 1 along which a linear function grows fastest.

    Solves the convex problem

        maximise <G, K>   subject to   ||T(K)||_2 <= 1

    for a gradient `G`, given as `kernel`; minus the result is the direction of steepest descent under the norm of the
    whole layer. `<G, K>` is the plain inner product. The result is divided by a bound of its norm, so that it is in the
    ball whatever the method. The bound exceeds the norm by 3.5e-6 in float32 and 1e-6 in float64. Where the norm is
    found by branch and bound it may be more: at most 1e-2, or with `"exact"` a tenth of the tolerance. Of large
    zero-padded layers the norm is not proven (`spectral_norm`).

    - `"exact"`: by passes that clip singular values and keep the taps, until the gap is proven. Zero-padded layers take
      their explicit matrix up to 2**18 entries. Larger ones take the ball of their cover, and a bound from the tapered
      layer (see `project_spectral_ball`); their gap stays larger, most of it because the bound is.
    - `"frequency"`: the polar factor at each frequency of a coarse grid, cropped to the taps, then `num_passes` passes
      that get back what cropping lost (`frequency_passes.py`). The grid has four angles per degree of the symbol.
    - `"flattened"`: `U V^T` of the kernel as a matrix of `taps * c_in` rows, as optax's and PyTorch's Muon take it, to
      compare with.

    For a dense layer, and for a convolution without edges of one tap, all of them are `U V^T`, without the directions
    of singular values that are 0. A zero gradient gives zeros.

    Args:
      kernel: the gradient, `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: the operator of the layer.
      method: static; one of the three.
      max_passes: static, with `"exact"`; the most passes, one SVD of all matrices each, by default 2000.
      tolerance: with `"exact"`; the gap at which it stops, by default 1e-3; traced. Of unbounded convolutions of
        several axes a smaller one than the default is not reached, because the grid of frequencies gives that much
        away. `gap` says what was reached.
      num_passes: static, with `"frequency"`; the passes, by default 30.

    Returns:
      A `SteepestResult`. It is a constant for derivatives. Taps that meet no sample of the image get 0.

    Raises:
      ValueError: a kernel that does not fit, aliased taps, an unknown method, an option of another method, a bad
        tolerance or number of passes.
    """
    check_choice(method, "method", METHODS)
    options = {
        "max_passes": ("exact", max_passes),
        "tolerance": ("exact", tolerance),
        "num_passes": ("frequency", num_passes),
    }
    others = [name for name, (of, value) in options.items() if of != method and value is not None]
    ensure(not others, f"{', '.join(others)}: got it with method={method!r}, which has no such option.")
    kernel = kernel_array(kernel, op)
    shape = kernel.shape
    kernel, op = as_matrix(kernel, op)
    op._check_not_aliased(kernel.shape)
    dtype = float_dtype(kernel.dtype)
    # A gap is at most 1, so that no larger tolerance would ask for a pass.
    tolerance = positive_scalar(_TOLERANCE if tolerance is None else tolerance, "tolerance", dtype)
    tolerance = jnp.minimum(tolerance, 1.0)
    most = static_int(_MAX_PASSES if max_passes is None else max_passes, "max_passes")
    count = static_int(_NUM_PASSES if num_passes is None else num_passes, "num_passes")
    found, bound = _candidate(lax.stop_gradient(kernel), op, tolerance, method, most, count)
    pair, excess = None, 0.0
    if not isinstance(op, Dense):
        allowed = _NORMS_SHARE * tolerance if method == "exact" else _EXCESS
        pair, excess = leading_pair_and_excess(found, op, excess=allowed)
        # The proof for layers without edges leaves at least so much open; elsewhere it is room for rounding.
        excess = jnp.maximum(excess, torus_excess(dtype))
    result = _of_norm_one(kernel, op, found, bound, pair, excess)
    return result._replace(kernel=result.kernel.reshape(shape))


@functools.partial(program, static_argnums=(3, 4, 5))
def _candidate(kernel, op, tolerance, method, max_passes, num_passes):
    """A kernel of any scale along the gradient, and the proven bound of the dual norm of the rescaled gradient."""
    gradient, _ = rescaled(kernel, op)
    if isinstance(op, Dense):
        return polar(gradient[None])[0], jnp.sum(svdvals(gradient))
    if method == "exact":
        found, bound = _exact(gradient, op, tolerance, max_passes)
    elif method == "frequency":
        found, bound = _by_frequency(gradient, op, num_passes)
    else:
        found, bound = flattened(gradient), _plain_bound(gradient, op)
    return found, bound


@program
def _of_norm_one(kernel, op, found, bound, pair: Pair | None, excess):
    gradient, scale = rescaled(lax.stop_gradient(kernel).astype(found.dtype), op)
    largest = jnp.max(jnp.abs(found)) if pair is None else pair_value(found, op, pair) * (1 + excess)
    # The polar factor of a matrix has norm 1 as it is.
    norm = jnp.where(largest > 0, 1.0, largest) if pair is None else largest
    size = jnp.max(jnp.abs(gradient))
    nothing = (norm == 0) | (size == 0)
    # NaN compares as false, and reaches every field.
    step = jnp.where(nothing, 0.0, without_idle_taps(found, op) / divisor(norm))
    value = inner(gradient, step)
    bound = jnp.where(size == 0, 0.0, jnp.maximum(bound, value))
    gap = jnp.where(bound == 0, 0.0, 1 - value / divisor(bound))
    return SteepestResult(step.astype(kernel.dtype), scale * bound, gap)


def flattened(gradient: Float[Array, "..."]) -> Float[Array, "..."]:
    """`U V^T` of the gradient as a matrix with one column for each output channel."""
    return polar(gradient.reshape((1, -1, gradient.shape[-1]))).reshape(gradient.shape)


def _by_frequency(gradient, op: Operator, num_passes: int):
    """The kernel after the passes, and its bound: of zero-padded layers that of the gradient alone."""
    stack_map = few_frequencies(op, gradient.shape, gradient.dtype)
    direction, scale = unit_direction(gradient, stack_map)
    found = passes(direction, stack_map, num_passes)
    if isinstance(op, ZeroPaddedConv):
        return found.kernel, _plain_bound(gradient, op)
    return found.kernel, scale * nuclear_norm(stack_map, feasible_multiplier(stack_map, direction, found.multiplier))


def _plain_bound(gradient, op: Operator) -> Float[Array, ""]:
    """The nuclear norm of the layer whose taps are the gradient: the bound that knows nothing of the support."""
    stack_map = outer_map(op, gradient.shape, gradient.dtype)
    direction, scale = unit_direction(gradient, stack_map)
    nothing = jnp.zeros_like(stack_map.stack(direction))
    return scale * nuclear_norm(stack_map, feasible_multiplier(stack_map, direction, nothing))


def _exact(gradient, op: Operator, tolerance, max_passes: int):
    """The kernel and the bound, by passes on the layer's own stack, or on one each inside and outside its ball."""
    shape, dtype = gradient.shape, gradient.dtype

    def solve(stack_map):
        direction, scale = unit_direction(gradient, stack_map)
        found = solved(direction, stack_map, _SOLVERS_SHARE * tolerance, max_passes)
        return found.kernel, scale * found.bound

    if has_small_matrices(op, shape, PROVEN_SIZE):
        return solve(stack_map_of(op, shape, dtype, _ANGLES))
    return solve(inner_map(op, shape, dtype))[0], solve(outer_map(op, shape, dtype))[1]

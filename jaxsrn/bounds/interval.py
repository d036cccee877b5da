"""The certified interval: two numbers that are guaranteed to hold the spectral norm of a layer between them.

The lower end is a value that the map attains. The upper end of a circular or unbounded layer is the proof by branch and
bound. That of a zero-padded one is the norm of its explicit matrix where that is small, else the proof of its covers
(`covers.py`) or, where they are too wide and it can be afforded, the banded proof (`banded.py`). `spectral_norm` gives
one number instead.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form, ensure, float_dtype, is_static_number
from jaxsrn._tools.loops import one_by_one
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import torus_excess
from jaxsrn.bounds import banded
from jaxsrn.bounds.covers import NormInterval, covers, slack_of, widened
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.grid_certificate import overshoot
from jaxsrn.spectra.circular.leading import leading_wave
from jaxsrn.spectra.circular.sites import on_grid
from jaxsrn.spectra.common_shapes import in_common_shape
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.padded.idle_axes import without_idle_axes
from jaxsrn.spectra.padded.leading import is_proven
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import Pair, of_unit_vectors, rescaled, without_idle_taps

__all__ = [
    "certified",
    "certified_by_pair",
]

# The search for the lower end where the upper one is that of covers. Every Rayleigh quotient is a lower end, so that no
# proof is needed. The error of the value is about the square of the residual, 1e-5: far less than the covers lose.
_LOWER_END_TOLERANCE = 3e-3
# The least width of an interval by the banded proof: `spectral_norm` may be off by half of it (`search_tolerance`).
_LEAST_WIDTH = 2e-5


def certified(kernel: Kernel, op: Operator, *, resolution: float = 0.01) -> NormInterval:
    """An interval that is guaranteed to hold the spectral norm of `T(kernel)`.

    The lower end of a circular or unbounded layer is the norm at one frequency; its upper end is the proof by
    branch and bound that no other frequency exceeds it by more than `resolution`. Both ends of a dense layer, and of a
    zero-padded one of up to 2**18 entries of the explicit matrix, are its `spectral_norm`. All ends are widened for
    rounding. Denormal entries count as 0, as in XLA.

    The lower end of a larger zero-padded layer is a Rayleigh quotient of the map itself (Lanczos). Its upper end is the
    norm of a circular layer that holds this one, its cover. A cover loses most on small images. Where it loses more
    than `resolution`, and the image is small, a block Cholesky factorization of the Gram matrix proves that the norm is
    within `resolution` of the lower end. It takes up to a second, and is left out for layers that are too large: with
    3x3 taps above 64 channels on 8x8 images, 32 on 16x16 and 11 on 32x32. There the interval is as wide as the cover
    leaves it, whatever the `resolution`. `probabilistic` has an upper end that is far closer, and that may fail with a
    probability of 1e-9.

    `spectral_norm` of a zero-padded layer above 2**18 entries is searched for without a proof: the true norm exceeds it
    by at most `upper - spectral_norm(kernel, op)`. The upper end of an `UnboundedConv` bounds the norm of the layer at
    every image size, circular or zero-padded. The upper end at one image size does not exceed a converged
    `tensor_norm`, up to rounding, because `tensor_norm` bounds the covers too.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      resolution: static; the relative width of the interval that is good enough. Unbounded layers take at least 3.5e-6
        in float32, and 1e-6 in float64, the proof of zero-padded ones 2e-5 and the room for rounding.

    Returns:
      A `NormInterval` in float32 or wider; NaN where the kernel has one. It is that of the kernel in which denormal
      numbers count as 0, as XLA takes them. The ends' gradients hold the singular
      vectors constant, and are finite. Second derivatives are those of `spectral_norm` and as exact as the pairs: the
      lower end of zero-padded layers may have a search that stops early.

    Raises:
      ValueError: a kernel that does not fit, or a resolution that is not at least 0 and below 1.

    Examples:
      >>> import jax, jaxsrn
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
      >>> lower, upper = jaxsrn.bounds.certified(kernel, jaxsrn.UnboundedConv(), resolution=1e-4)
      >>> bool(jaxsrn.spectral_norm(kernel, jaxsrn.CircularConv((64, 64))) <= upper <= 1.0001 * lower)
      True
    """
    kernel, op = computed_form(kernel, op)
    ensure(
        is_static_number(resolution) and 0 <= float(resolution) < 1,
        f"resolution: got {resolution!r}, expected a static number, at least 0 and below 1, such as 0.01.",
    )
    kernel, op, _ = in_common_shape(kernel.astype(float_dtype(kernel.dtype)), op)
    # The pairs are found by compiled functions that the norms share.
    if _is_explicit(op, kernel.shape):
        return certified_by_pair(kernel, op, leading_pair(kernel, op))
    fixed = without_idle_taps(lax.stop_gradient(kernel), op)
    # The width is the excess that the proof leaves open and the room for rounding together.
    excess = max(float(resolution) - 3 * slack_of(kernel, op), 0.0)
    if not isinstance(op, ZeroPaddedConv):
        above = leading_wave(fixed, op, excess)
        return _interval(kernel, op, above[0], (above,), None)
    # The norms of covers are exact, so that the upper end is never looser than bounds that read the kernel alone.
    above = tuple((leading_wave(k, cover, 0.0)[0], None) for k, cover in covers(fixed, op))
    if not banded.is_affordable(op, kernel.shape):
        return _interval(kernel, op, leading_pair(kernel, op, tolerance=_LOWER_END_TOLERANCE), above, None)
    least = max(excess - banded.room(op, kernel.shape, kernel.dtype), _LEAST_WIDTH)
    return _interval(kernel, op, leading_pair(kernel, op), above, least)


def certified_by_pair(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> NormInterval:
    """The interval of a layer from its leading pair, whose search has proven it already.

    It is what `certified` returns at its finest resolution, without a second search. `pair` is that of `leading_pair`,
    of a layer without zero padding or of one whose matrix is small.
    """
    kernel = kernel.astype(float_dtype(kernel.dtype))
    excess = torus_excess(kernel.dtype) if isinstance(op, UnboundedConv) else 0.0
    return _interval(kernel, op, pair, () if _is_explicit(op, kernel.shape) else ((pair, excess),), None)


def _is_explicit(op: Operator, kernel_shape: tuple[int, ...]) -> bool:
    """Whether the norm is that of an explicit matrix, so that nothing may exceed it (static)."""
    return isinstance(op, Dense) or (isinstance(op, ZeroPaddedConv) and is_proven(op, kernel_shape))


@functools.partial(program, brief=True)
def _interval(kernel, op, below: Pair, above: tuple[tuple[Pair, Float[Array, ""] | float | None], ...], excess):
    """The interval of a layer.

    Args:
      kernel, op: the layer.
      below: the pair whose value is the lower end.
      above: the pairs of the covers, each with the share by which its value may be exceeded, `None` for an exact one;
        no pairs where nothing exceeds the lower end.
      excess: a share by which the banded proof may find that the norm exceeds the lower end at most; `None` without it.
    """
    kernel, scale = rescaled(kernel, op)
    # A vector whose norm is above 1 by rounding would lift the lower end above the norm.
    lower = pair_value(kernel, op, of_unit_vectors(below))
    covered = covers(kernel, op) if above else []
    ends = [_end(k, cover, pair, share) for (k, cover), (pair, share) in zip(covered, above, strict=True)]
    upper = functools.reduce(jnp.minimum, ends) if ends else lower
    if excess is not None:
        proven, limit = _banded_proof(lax.stop_gradient(kernel), op, lower, upper, excess)
        upper = jnp.where(proven, limit, upper)
    # An explicit matrix is longer than the symbol of the layer.
    longest = 1 if above else max(_explicit_sizes(op, kernel.shape))
    wide = widened(NormInterval(lower, upper), kernel, op, longest)
    return NormInterval(wide.lower * scale, wide.upper * scale)


def _banded_proof(kernel: Float[Array, "..."], op: ZeroPaddedConv, lower, upper, excess):
    """`(proven, limit)`: whether the norm is at most a limit just above the lower end.

    It is not tried where the upper end is no larger than the limit.
    """
    level = lower * (1 + excess)
    limit = level * (1 + banded.room(op, kernel.shape, kernel.dtype))

    def proof(kernel, level, pays):
        return lax.cond(pays, banded.is_below, lambda *_: jnp.asarray(False), kernel, op, level)

    return one_by_one(proof)(kernel, lax.stop_gradient(level), lax.stop_gradient(limit < upper)), limit


def _explicit_sizes(op: Operator, kernel_shape: tuple[int, ...]) -> tuple[int, int]:
    """The sides of the explicit matrix, with one sample along each axis of one tap (static)."""
    return (without_idle_axes(op, kernel_shape) if isinstance(op, ZeroPaddedConv) else op)._sizes(kernel_shape)


def _end(kernel: Float[Array, "..."], op: CircularConv | UnboundedConv, pair: Pair, excess) -> Float[Array, ""]:
    """The upper end that a cover proves, with its pair and the share by which its value may be exceeded."""
    end = pair_value(kernel, op, pair)
    end = end if excess is None else (1 + excess) * end
    # The grid of an unbounded layer is one among all frequencies.
    return end * overshoot(on_grid(op, kernel.shape), kernel.shape) if isinstance(op, UnboundedConv) else end

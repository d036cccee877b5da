"""The stable rank of a layer, and the stable ranks that kernels of its shape can have.

The stable rank `||T||_F^2 / ||T||_2^2` is a soft version of the rank, and at most it (Sanyal, Torr, Dokania 2020,
Definition 3.1).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxsrn._tools.checks import Kernel, computed_form, ensure, float_dtype, kernel_shape_of, static_share
from jaxsrn._tools.linalg import inner, ratio
from jaxsrn._tools.programs import program
from jaxsrn.operators.base import Operator
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.common_shapes import in_common_shape
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.singular_pair import rescaled

__all__ = [
    "StableRankRange",
    "largest_squared_functional",
    "norm_and_rank",
    "squared_frobenius_norm",
    "stable_rank",
    "stable_rank_range",
    "target_of_fraction",
]


def stable_rank(kernel: Kernel, op: Operator) -> Float[Array, ""]:
    """`srank(T) = ||T||_F^2 / ||T||_2^2` of the layer `T(kernel)`.

    It does not depend on the scale, and lies between 1 and the rank; it is 0 at the zero kernel. Of an `UnboundedConv`
    it is that per output sample, which can be below 1. The gradient is exact where the leading singular value is
    simple, and always finite. The second derivative is exact there too; elsewhere it is as that of `spectral_norm`.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one.

    Raises:
      ValueError: a kernel that does not fit.

    Examples:
      >>> import jax.numpy as jnp, jaxsrn
      >>> print(jaxsrn.stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0])), jaxsrn.Dense()).round(4))
      1.5
    """
    kernel, op, copies = in_common_shape(*computed_form(kernel, op))
    return norm_and_rank(kernel, op, leading_pair(kernel, op), copies)[1]


@functools.partial(program, brief=True)
def norm_and_rank(kernel, op, pair, copies=1) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The spectral norm and the stable rank of a kernel of any scale and dtype, from its leading pair.

    `copies` says how many times the layer applies the operator, each time to other samples.
    """
    kernel, scale = rescaled(kernel, op)
    norm = pair_value(kernel, op, pair)
    # The map can be zero where the kernel is not: taps can miss the image, and aliased ones can cancel.
    return norm * scale, copies * ratio(squared_frobenius_norm(kernel, op), norm**2)


def squared_frobenius_norm(kernel: Kernel, op: Operator) -> Shaped[Array, ""]:
    """`||T(kernel)||_F^2`; taps that fall on each other are summed first."""
    kernel = op.wrap(kernel.astype(float_dtype(kernel.dtype)))
    return inner(op.frobenius_weights(kernel.shape, kernel.dtype) * kernel, kernel)


def largest_squared_functional(kernel_shape: tuple[int, ...], op: Operator) -> float:
    """An upper bound `e*` of `<E, E>_d` over unit `u` and `v`, where `E = grad_K <v, T(K) u> / d` tap by tap (static).

    Here `d_p` is the weight of tap `p` in the Frobenius norm, and `<A, B>_d = sum_p d_p <A_p, B_p>`. By Cauchy and
    Schwarz a tap contributes at most `|x|^2 |y|^2 / d_p`, where `x` and `y` are the samples of `u` and `v` that it
    touches. Taps of different phases (strides, input dilation) touch different samples, so that only the largest phase
    counts: on each axis the sum of `1 / d_p` over one phase. Every kernel has `srank >= 1 / e*`.
    """
    total, strides, dilations = 1.0, op._axis_strides(kernel_shape), op._axis_input_dilations(kernel_shape)
    for axis, contacts in enumerate(op._axis_contacts(op._distinct_shape(kernel_shape))):
        stride, dilation = strides[axis], dilations[axis]
        common = math.gcd(stride, dilation)
        phases: dict[tuple[int, int], float] = {}
        for tap in contacts:
            if len(tap.outputs):
                phase = (tap.inputs[0] % (stride // common), tap.outputs[0] % (dilation // common))
                phases[phase] = phases.get(phase, 0.0) + 1 / len(tap.outputs)
        total *= max(phases.values(), default=0.0)
    return total


class StableRankRange(NamedTuple):
    """The stable ranks that kernels of one shape can have, `low <= srank <= high`, as static floats."""

    low: float
    high: float


def stable_rank_range(kernel_shape: tuple[int, ...], op: Operator) -> StableRankRange:
    """The interval of stable ranks that kernels of this shape can have.

    Circular convolutions and dense layers attain both ends. A circular convolution has the ends `N_out / (most distinct
    taps in one stride phase)` and `N_out min(c_out, c_in * non-empty phases)`, with `N_out` output positions.
    The ends for zero padding are certified, but not always attained: `max(1, 1 / e*)`, with `e*` the sum over the taps
    of one phase of one over the number of samples that a tap meets, and the smaller number of input or output samples
    that the taps reach, times channels. Unbounded convolutions attain the ends of circular ones with `N_out = 1`.

    Args:
      kernel_shape: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A `StableRankRange(low, high)` of static floats.

    Raises:
      ValueError: a shape that does not fit.

    Examples:
      >>> import jaxsrn
      >>> jaxsrn.stable_rank_range((3, 3, 16, 32), jaxsrn.UnboundedConv())
      StableRankRange(low=0.1111111111111111, high=16.0)
    """
    kernel_shape = kernel_shape_of(kernel_shape, op)
    contacts = op._axis_contacts(kernel_shape)
    samples_in = math.prod(_number_in_any([tap.inputs for tap in axis]) for axis in contacts)
    samples_out = math.prod(_number_in_any([tap.outputs for tap in axis]) for axis in contacts)
    channels_in, channels_out = op._channels(kernel_shape)
    bound = largest_squared_functional(kernel_shape, op)
    high = float(min(samples_in * channels_in, samples_out * channels_out))
    # The stable rank of a whole layer is at least 1, that per output sample can be less.
    lowest = 0.0 if isinstance(op, UnboundedConv) else 1.0
    return StableRankRange(max(lowest, 1 / bound) if bound else 0.0, high)


def _number_in_any(progressions: list[range]) -> int:
    """How many numbers are in at least one of some arithmetic progressions with the same step (static)."""
    step, some = progressions[0].step, [progression for progression in progressions if progression]
    begins, ends = [one[0] for one in some], [one[-1] + step for one in some]
    # The progressions that hold a number are those that begin up to it less those that end, counted along the step.
    changes = np.zeros((max(ends, default=0) // step + 1, step), int)
    np.add.at(changes.reshape(-1), begins, 1)
    np.subtract.at(changes.reshape(-1), ends, 1)
    return int(np.count_nonzero(np.cumsum(changes, axis=0)))


def target_of_fraction(fraction: float, kernel_shape: tuple[int, ...], op: Operator) -> float:
    """A share of the largest stable rank, as a target for `srnc` and `srnc_step`.

    The largest stable rank is the upper end of `stable_rank_range`. That of an operator with equal singular values is
    `min(prod(in_shape), prod(out_shape))`, and for an unbounded convolution, per output sample,
    `min(c_in * prod(strides), c_out)`; it is less where strides leave out samples that no tap meets.
    The share is `c` of Sanyal, Torr, Dokania 2020 and `beta` of Zheng et al. 2025. Where all kernels have the same
    stable rank, as matrices of one row or column have, that is the target.

    Args:
      fraction: static, in (0, 1].
      kernel_shape: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A static float.

    Raises:
      ValueError: a shape that does not fit, or a fraction outside (0, 1] or below what the taps of the kernel allow.
    """
    fraction = static_share(fraction, "fraction")
    low, high = stable_rank_range(kernel_shape, op)
    if low == high:
        return low
    # The slack keeps the lower end itself allowed in spite of rounding.
    ensure(
        fraction * high >= low * (1 - 1e-6),
        f"fraction: got {fraction}, expected at least {low / high:.6g}: the stable rank of {op} with a kernel of "
        f"shape {tuple(kernel_shape)} is at least {low:.6g} of {high:.6g}.",
    )
    return fraction * high

"""The convolution on an image without edges, and what all convolutions share.

A tap is one sample of the kernel, a `(c_in // groups, c_out)` matrix. All convolutions follow Flax: cross-correlation,
with channels last.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxsrn._tools.checks import ensure, int_tuple
from jaxsrn.operators.base import Contacts, Operator

__all__ = ["Conv", "UnboundedConv"]


class Conv(Operator):
    """What all convolutions share: their channels, and how they are written as a call."""

    # What the subclasses hold: ints and tuples, whatever they were given as.
    strides: int | tuple[int, ...]
    kernel_dilation: int | tuple[int, ...]
    feature_group_count: int

    def __repr__(self) -> str:
        """The operator as a call, without arguments that have their default value."""
        arguments = [(p, getattr(self, p.name)) for p in inspect.signature(type(self)).parameters.values()]
        given = [
            repr(value) if argument.default is argument.empty else f"{argument.name}={value!r}"
            for argument, value in arguments
            if not self._is_default(value, argument.default)
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def _is_default(self, value, default) -> bool:
        return value == default

    def _hold(self, *, feature_group_count: int, **fields) -> None:
        """Sets the fields of the frozen operator, once."""
        fields["feature_group_count"] = int_tuple(feature_group_count, 1, "feature_group_count")[0]
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _check_channels(self, kernel_shape) -> None:
        groups = self.feature_group_count
        ensure(
            kernel_shape[-1] % groups == 0,
            f"kernel: got {kernel_shape[-1]} output channels, expected a multiple of feature_group_count={groups}.",
        )

    @property
    def _groups(self) -> int:
        return self.feature_group_count

    def _channels(self, kernel_shape):
        return kernel_shape[-2] * self.feature_group_count, kernel_shape[-1]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class UnboundedConv(Conv):
    """The convolution on an image without edges, with as many axes as its kernel has.

    It is what a convolution layer is before anyone says how large the image is. Its norm, the supremum over all
    frequencies, bounds the norm of the layer at every image size, circular or with any zero padding, and no smaller
    number does. Frobenius norms and stable ranks are those per output sample. What needs an image (`apply`,
    `transpose`, `to_dense`, `in_shape`, `out_shape`) raises `ValueError`.

    Args:
      strides, kernel_dilation: an int, or one per axis. Where an array may be a stack of layers (`penalties.total`,
        `optim.keep_spectral_norm`), only one per axis, `strides=(1, 1)`, says how many axes a kernel has; with ints
        every array is one kernel.
      feature_group_count: number of groups.

    Raises:
      ValueError: sizes that are not positive integers, or strides and dilations of different numbers of axes.
    """

    strides: int | tuple[int, ...]
    kernel_dilation: int | tuple[int, ...]
    feature_group_count: int

    def __init__(
        self,
        *,
        strides: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
    ):
        sizes = {"strides": strides, "kernel_dilation": kernel_dilation}
        fields = {name: int_tuple(size, None, name) for name, size in sizes.items()}
        one_for_all = {name: field[0] for name, field in fields.items() if np.ndim(sizes[name]) == 0}
        self._hold(**fields | one_for_all, feature_group_count=feature_group_count)
        ensure(
            len(self._numbers_of_axes) < 2,
            f"strides, kernel_dilation: got {strides!r} and {kernel_dilation!r}, expected one for each axis of both.",
        )

    @property
    def _numbers_of_axes(self) -> set[int]:
        # A number for each axis says how many there are.
        return {len(sizes) for sizes in (self.strides, self.kernel_dilation) if isinstance(sizes, tuple)}

    @property
    def _kernel_axes(self) -> int | None:
        return next((number + 2 for number in self._numbers_of_axes), None)

    def _per_axis(self, name: str, kernel_shape) -> tuple[int, ...]:
        return int_tuple(getattr(self, name), len(kernel_shape) - 2, name)

    def _axis_strides(self, kernel_shape):
        return self._per_axis("strides", kernel_shape)

    def _check_kernel_shape(self, kernel_shape):
        ensure(
            3 <= len(kernel_shape) <= 5 and min(kernel_shape) > 0,
            f"kernel: got shape {tuple(kernel_shape)}, expected (one to three tap sizes, c_in // groups, c_out), all "
            f"positive, for {self}.",
        )
        for name in ("strides", "kernel_dilation"):
            self._per_axis(name, kernel_shape)
        self._check_channels(kernel_shape)

    def _in_shape(self, kernel_shape):
        raise ValueError(
            f"op: got {self}, whose image has no size, expected a convolution with one, CircularConv(input_shape) or "
            "ZeroPaddedConv(input_shape); an image without edges has norms and stable ranks, but no vectors."
        )

    _out_shape = _in_shape

    def _sizes(self, kernel_shape):
        channels_in, channels_out = self._channels(kernel_shape)
        return channels_in * math.prod(self._axis_strides(kernel_shape)), channels_out

    def _axis_contacts(self, kernel_shape):
        # One output sample stands for all; its inputs are known by their phase.
        dilations = self._per_axis("kernel_dilation", kernel_shape)
        axes = zip(kernel_shape, self._axis_strides(kernel_shape), dilations, strict=False)
        phases = [[tap * dilation % s for tap in range(k)] for k, s, dilation in axes]
        return [[Contacts(range(1), range(phase, phase + 1)) for phase in axis] for axis in phases]

    def _apply_batch(self, kernel, x, precision, layout, by_fft):
        return self.in_shape(kernel.shape)

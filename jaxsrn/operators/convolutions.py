"""Convolutions on images, with circular or zero padding, which equal Flax's layers element by element."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from jaxsrn._tools.checks import ensure, int_tuple, is_integer
from jaxsrn.operators.base import Contacts
from jaxsrn.operators.layouts import Layout, convolve
from jaxsrn.operators.many_taps import Axis, convolve_by_fft, is_cheaper_by_fft
from jaxsrn.operators.unbounded import Conv

__all__ = [
    "CircularConv",
    "ZeroPaddedConv",
]


class _SizedConv(Conv):
    """The geometry and the application of convolutions of images; the subclasses add their padding."""

    input_shape: tuple[int, ...]
    strides: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    @property
    def num_axes(self) -> int:
        """The number of spatial axes."""
        return len(self.input_shape)

    def _is_default(self, value, default):
        # An int stands for all axes of the image.
        return value == default or (default == 1 and set(np.ravel(value)) == {1})

    @property
    def _kernel_axes(self) -> int:
        return self.num_axes + 2

    def _hold_sizes(self, input_shape, feature_group_count: int, **sizes) -> None:
        """Sets the fields: each of the `sizes` is a positive int, or one per axis of the image."""
        shape = int_tuple(input_shape, None, "input_shape")
        sizes = {name: int_tuple(size, len(shape), name) for name, size in sizes.items()}
        self._hold(input_shape=shape, **sizes, feature_group_count=feature_group_count)

    def _axis_strides(self, kernel_shape):
        return self.strides

    def _check_kernel_shape(self, kernel_shape):
        dims = self.num_axes
        ensure(
            len(kernel_shape) == dims + 2 and min(kernel_shape) > 0,
            f"kernel: got shape {tuple(kernel_shape)}, expected ({dims} tap sizes, c_in // groups, c_out), all "
            f"positive, for {self}; input_shape must list the spatial axes only.",
        )
        self._check_channels(kernel_shape)

    def _in_shape(self, kernel_shape):
        return (*self.input_shape, self._channels(kernel_shape)[0])

    def _extents(self, kernel_shape) -> tuple[int, ...]:
        """The number of samples that the dilated taps span on each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(kernel_shape, self.kernel_dilation, strict=False))

    @abc.abstractmethod
    def _axes(self, kernel_shape) -> list[Axis]:
        """The geometry of each axis as a convolution with zero padding (static)."""

    def _is_cheaper_by_fft(self, kernel_shape):
        return is_cheaper_by_fft(kernel_shape, self._axes(kernel_shape), self.feature_group_count)

    def _convolve(self, kernel, x, precision, layout: Layout, by_fft: bool):
        """The convolution of `_axes`."""
        axes, groups = self._axes(kernel.shape), self.feature_group_count
        if by_fft:
            return convolve_by_fft(kernel, x, layout, axes, groups)
        if any(not 0 <= pad < axis.extent for axis in axes for pad in axis.padding):
            # XLA's convolution on CPUs is wrong where it crops at the low end and pads at the high one, by 1e13 or NaN
            # (jaxlib 0.10.2). The adjoint of one that pads by more than the taps reach is such a convolution.
            x, axes = _padded(x, axes)
        return convolve(
            kernel,
            x,
            layout,
            window_strides=self.strides,
            padding=[axis.padding for axis in axes],
            lhs_dilation=[axis.input_dilation for axis in axes],
            rhs_dilation=self.kernel_dilation,
            feature_group_count=groups,
            precision=precision,
        )


def _padded(x: Shaped[Array, "..."], axes: list[Axis]) -> tuple[Shaped[Array, "..."], list[Axis]]:
    """Images with their padding and the zeros of the input dilation, and the geometry that is left to them."""
    pads = [(*axis.padding, axis.input_dilation - 1) for axis in axes]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    sizes = [axis.image + sum(axis.padding) for axis in axes]
    return x, [axis._replace(samples=n, padding=(0, 0), input_dilation=1) for axis, n in zip(axes, sizes, strict=True)]


def _contacts(axis: Axis, tap: int, outputs: int) -> Contacts:
    """Where a tap meets samples of an axis with zero padding: the outputs whose place in the image holds a sample."""
    stride, dilation = axis.stride, axis.input_dilation
    place = tap * axis.kernel_dilation - axis.padding[0]
    common = math.gcd(stride, dilation)
    lowest, end = max(0, -(place // stride)), min(outputs, (axis.image - 1 - place) // stride + 1)
    # Whether a place holds a sample repeats with a period that divides the dilation.
    period = range(lowest, min(lowest + dilation // common, end))
    first = next((output for output in period if (place + stride * output) % dilation == 0), end)
    met = range(first, end, dilation // common)
    sample, step = (place + stride * first) // dilation, stride // common
    return Contacts(met, range(sample, sample + len(met) * step, step))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class CircularConv(_SizedConv):
    """A convolution with circular padding, equal to `flax.nnx.Conv(padding="CIRCULAR")` element by element.

    Args:
      input_shape: the spatial shape, one to three axes.
      strides, kernel_dilation: an int, or one per axis. Strides must divide the image, as the map is block circulant
        only then; Flax's own layer takes others, and is not circulant for them.
      feature_group_count: number of groups.

    Raises:
      ValueError: sizes that are not positive integers, or a stride that does not divide the image.
    """

    input_shape: tuple[int, ...]
    strides: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    feature_group_count: int

    def __init__(
        self,
        input_shape: int | Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
    ):
        self._hold_sizes(input_shape, feature_group_count, strides=strides, kernel_dilation=kernel_dilation)
        ensure(
            all(n % s == 0 for n, s in zip(self.input_shape, self.strides, strict=True)),
            f"strides: got {self.strides} on an image of {self.input_shape}, expected divisors of it; a circular "
            "convolution is block circulant only then. Crop or pad the image to multiples of the strides, give the "
            "layer another padding (ZeroPaddedConv), or leave it out.",
        )

    @property
    def input_dilation(self) -> tuple[int, ...]:
        """Ones, as a circular convolution reads the image as it is."""
        return (1,) * self.num_axes

    @property
    def grid(self) -> tuple[int, ...]:
        """The spatial shape of the output, which is also the number of frequencies along each axis."""
        return tuple(n // s for n, s in zip(self.input_shape, self.strides, strict=True))

    def _out_shape(self, kernel_shape):
        return (*self.grid, kernel_shape[-1])

    def _centre(self, kernel_shape) -> tuple[int, ...]:
        """How many samples before the output position the first tap lies (Flax's centring)."""
        return tuple((extent - 1) // 2 for extent in self._extents(kernel_shape))

    def _axis_contacts(self, kernel_shape):
        centre, geometry = self._centre(kernel_shape), (self.input_shape, self.strides, self.kernel_dilation)
        axes = zip(kernel_shape, centre, *geometry, strict=False)
        # The stride divides the image, so that a tap reads all samples of one phase.
        return [
            [Contacts(range(n // s), range((tap * dilation - low) % s, n, s)) for tap in range(k)]
            for k, low, n, s, dilation in axes
        ]

    def _distinct_shape(self, kernel_shape):
        # The dilated offsets return to 0 modulo the image after this many taps.
        periods = (n // math.gcd(n, d) for n, d in zip(self.input_shape, self.kernel_dilation, strict=True))
        return (*(min(k, period) for k, period in zip(kernel_shape, periods, strict=False)), *kernel_shape[-2:])

    def _axes(self, kernel_shape):
        # The image is continued around itself first, and there is no padding then.
        lengths = (n + extent - 1 for n, extent in zip(self.input_shape, self._extents(kernel_shape), strict=True))
        axes = zip(lengths, kernel_shape, self.strides, self.kernel_dilation, strict=False)
        return [Axis(length, k, (0, 0), s, 1, dilation) for length, k, s, dilation in axes]

    def _apply_batch(self, kernel, x, precision, layout, by_fft):
        extents = self._extents(kernel.shape)
        pads = [((extent - 1) // 2, extent // 2) for extent in extents]
        x = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="wrap")
        return self._convolve(kernel, x, precision, layout, by_fft)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class ZeroPaddedConv(_SizedConv):
    """A convolution with zero padding, equal to `flax.nnx.Conv` with the same arguments.

    Args:
      input_shape: the spatial shape, one to three axes.
      padding: `"SAME"`, `"VALID"`, `"CAUSAL"` (one axis) or `(low, high)` pairs, one per axis. Negative padding crops
        the image.
      strides, input_dilation, kernel_dilation: an int, or one per axis. With input dilation (transposed
        convolutions) the padding must be pairs.
      feature_group_count: number of groups.

    Raises:
      ValueError: sizes that are not positive integers, or an unknown padding.
    """

    _needs_explicit_matrix = True

    input_shape: tuple[int, ...]
    padding: str | tuple[tuple[int, ...], ...]
    strides: tuple[int, ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    feature_group_count: int

    def __init__(
        self,
        input_shape: int | Sequence[int],
        *,
        padding: str | Sequence[Sequence[int]] = "SAME",
        strides: int | Sequence[int] = 1,
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
    ):
        sizes = {"strides": strides, "input_dilation": input_dilation, "kernel_dilation": kernel_dilation}
        self._hold_sizes(input_shape, feature_group_count, **sizes)
        object.__setattr__(self, "padding", self._normalised(padding))

    def _normalised(self, padding) -> str | tuple[tuple[int, ...], ...]:
        """The padding as a known name, or as one `(low, high)` pair per axis."""
        if isinstance(padding, str):
            known = ("SAME", "VALID", "CAUSAL") if self.num_axes == 1 else ("SAME", "VALID")
            ensure(
                padding in known,
                f"padding: got {padding!r} for {self.num_axes} axes, expected one of {known} or (low, high) "
                "pairs; circular padding is CircularConv.",
            )
            ensure(
                set(np.ravel(self.input_dilation)) == {1},
                f"padding: got {padding!r} with input_dilation={self.input_dilation}, expected (low, high) pairs.",
            )
            return padding
        pairs = padding if isinstance(padding, (tuple, list)) else ()
        ensure(
            len(pairs) == self.num_axes
            and all(np.shape(pair) == (2,) and all(map(is_integer, pair)) for pair in pairs),
            f"padding: got {padding!r}, expected a name or {self.num_axes} (low, high) pairs of integers.",
        )
        return tuple((int(low), int(high)) for low, high in pairs)

    def _axis_input_dilations(self, kernel_shape):
        return self.input_dilation

    @property
    def _dilated_shape(self) -> tuple[int, ...]:
        """The image with `input_dilation - 1` zeros between its samples."""
        return tuple((n - 1) * d + 1 for n, d in zip(self.input_shape, self.input_dilation, strict=True))

    def _pads(self, kernel_shape) -> Sequence[Sequence[int]]:
        """The padding as `(low, high)` pairs."""
        extents = self._extents(kernel_shape)
        if self.padding == "CAUSAL":
            return ((extents[0] - 1, 0),)
        if isinstance(self.padding, str):
            return tuple(lax.padtype_to_pads(self.input_shape, extents, self.strides, self.padding))
        return self.padding

    def _check_kernel_shape(self, kernel_shape):
        super()._check_kernel_shape(kernel_shape)
        ensure(
            min(self._out_shape(kernel_shape)) > 0,
            f"kernel: taps {tuple(kernel_shape[: self.num_axes])} leave no output on input_shape={self.input_shape} "
            f"with padding={self.padding!r}; expected a larger image or more padding.",
        )

    def _out_shape(self, kernel_shape):
        geometry = zip(
            self._dilated_shape, self._pads(kernel_shape), self._extents(kernel_shape), self.strides, strict=True
        )
        spatial = tuple((n + low + high - extent) // s + 1 for n, (low, high), extent, s in geometry)
        return (*spatial, kernel_shape[-1])

    def _axis_contacts(self, kernel_shape):
        axes = zip(self._axes(kernel_shape), self.out_shape(kernel_shape), strict=False)
        return [[_contacts(axis, tap, outputs) for tap in range(axis.taps)] for axis, outputs in axes]

    def _axes(self, kernel_shape):
        pads, geometry = self._pads(kernel_shape), (self.strides, self.input_dilation, self.kernel_dilation)
        return [Axis(*axis) for axis in zip(self.input_shape, kernel_shape, pads, *geometry, strict=False)]

    def _apply_batch(self, kernel, x, precision, layout, by_fft):
        return self._convolve(kernel, x, precision, layout, by_fft)

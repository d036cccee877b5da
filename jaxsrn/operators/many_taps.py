"""Convolutions of many taps by FFT, and the choice between FFTs and XLA's convolutions, from shapes alone.

A convolution of `m` outputs and `q` taps takes `m q` multiply-adds for each pair of channels. Transforms take about
`m log m` for each channel, and products of transforms a few times `m` for each pair. All derivatives and adjoints are
JAX's own, which are again transforms and products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Shaped

from jaxsrn.operators.layouts import TO_TRANSPOSE_IN_IMAGES, Layout

__all__ = [
    "Axis",
    "convolve_by_fft",
    "is_cheaper_by_fft",
]

# Times in units of one multiply-add of a convolution of two axes and many channels, 0.035 ns. They are measured in the
# steps `T^T T x` of a loop, float32, jaxlib 0.10.2, on two CPU cores (`benchmarks/norms --only many-taps`). A
# convolution takes `_PAIR` for each output, tap and pair of channels, by its number of axes. It takes `_TAP` more for
# each output, tap and group, which is nearly all of its time where it is depthwise. One axis takes as long as two.
_TAP, _PAIR = {1: 70, 2: 70, 3: 500}, {1: 1, 2: 1, 3: 2.5}
# A transform takes `_TRANSFORM` times its length and the binary logarithm of it, and the products take `_PRODUCT` for
# each pair of channels and each entry of a real transform, the pair's share of the transform of the taps included. All
# of it takes `_OVERHEAD` at least, 7 us, which is more than the direct product of a tiny layer.
_TRANSFORM, _PRODUCT, _OVERHEAD = 14, 40, 200_000
# How many times as fast the FFT has to be: the times differ by half from shape to shape and more between machines.
_MARGIN = 4


class Axis(NamedTuple):
    """The geometry of a convolution along one axis; negative padding crops the image."""

    samples: int
    taps: int
    padding: tuple[int, int]
    stride: int
    input_dilation: int
    kernel_dilation: int

    @property
    def image(self) -> int:
        """The length of the image with zeros between its samples."""
        return (self.samples - 1) * self.input_dilation + 1

    @property
    def extent(self) -> int:
        """The number of samples that the dilated taps span."""
        return (self.taps - 1) * self.kernel_dilation + 1

    @property
    def outputs(self) -> int:
        """The number of outputs, those between two strides included."""
        return self.image + sum(self.padding) - self.extent + 1

    @property
    def period(self) -> int:
        """The length of the transform.

        It repeats the image with this period. The repeated samples must lie in the padding, or beyond it.
        """
        # Loading it takes a good part of the time of `import jaxsrn`.
        from scipy.fft import next_fast_len

        return int(next_fast_len(max(self.image + max(self.padding), self.extent, self.outputs), real=True))


def convolve_by_fft(
    kernel: Shaped[Array, "..."], x: Shaped[Array, "..."], layout: Layout, axes: list[Axis], feature_group_count: int
) -> Shaped[Array, "..."]:
    """The convolution of `(n, *spatial, c_in)` with `(*taps, c_in // groups, c_out)`, in a form.

    It is XLA's convolution up to rounding errors, whose norm is some `eps` times the norm of the output.
    """
    zero, whole, spatial = jnp.zeros((), x.dtype), (0, 0, 0), range(-len(axes), 0)
    # Transforms are along the last axes, so channels come before them.
    images = [(axis.padding[0], axis.period - axis.padding[0] - axis.image, axis.input_dilation - 1) for axis in axes]
    images = lax.pad(jnp.moveaxis(x, -1, 1), zero, [whole, whole, *images])
    taps = [(0, axis.period - axis.extent, axis.kernel_dilation - 1) for axis in axes]
    taps = lax.pad(jnp.moveaxis(kernel, (-2, -1), (0, 1)), zero, [whole, whole, *taps])

    # The products are those of a correlation, of which the transform of the taps is the conjugate.
    images, taps = (jnp.fft.rfftn(array, axes=spatial) for array in (images, taps))
    frequencies, (width, channels_out) = taps.shape[2:], kernel.shape[-2:]
    images = images.reshape((len(x), feature_group_count, width, *frequencies))
    taps = jnp.conj(taps).reshape((width, feature_group_count, channels_out // feature_group_count, *frequencies))
    product = _each_output if layout == TO_TRANSPOSE_IN_IMAGES else _sum_of_inputs
    outputs = product(images, taps)

    outputs = outputs.reshape((len(x), channels_out, *frequencies))
    outputs = jnp.fft.irfftn(outputs, [axis.period for axis in axes], axes=spatial)
    outputs = outputs[(..., *(slice(0, axis.outputs, axis.stride) for axis in axes))]
    return jnp.moveaxis(outputs, 1, -1)


# Products at every frequency, `(n, groups, in, ...)` with `(in, groups, out, ...)` to `(n, groups, out, ...)`. XLA is
# slow on CPUs where it sums over channels (jaxlib 0.10.2: 11 ms in place of 2 ms for 32 x 32 channels at 64 x 33
# frequencies). A loop that adds one channel after another is fast, and is the transpose of the other form here.


def _sum_of_inputs(images: Complex[Array, "..."], taps: Complex[Array, "..."]) -> Complex[Array, "..."]:
    """The products as a sum over inputs."""

    def add(total, channel):
        image, tap = channel
        return total + image[:, :, None] * tap[None], None

    zero = jnp.zeros((len(images), *taps.shape[1:]), images.dtype)
    return lax.scan(add, zero, (jnp.moveaxis(images, 2, 0), taps))[0]


def _each_output(images: Complex[Array, "..."], taps: Complex[Array, "..."]) -> Complex[Array, "..."]:
    """The products for each output in turn; the transpose in the images is a sum over outputs."""
    outputs = lax.map(lambda tap: jnp.sum(images * jnp.swapaxes(tap, 0, 1)[None], axis=2), jnp.moveaxis(taps, 2, 0))
    return jnp.moveaxis(outputs, 0, 2)


def is_cheaper_by_fft(kernel_shape: tuple[int, ...], axes: list[Axis], feature_group_count: int) -> bool:
    """Whether the FFT takes a small part of the time of XLA's convolution (static)."""
    width_in, channels_out = kernel_shape[-2:]
    channels_in, pairs = width_in * feature_group_count, width_in * channels_out
    taps = math.prod(axis.taps for axis in axes)
    outputs = math.prod(-(-axis.outputs // axis.stride) for axis in axes)
    direct = outputs * taps * (_TAP[len(axes)] * feature_group_count + _PAIR[len(axes)] * pairs)
    points = math.prod(axis.period for axis in axes)
    transforms = _TRANSFORM * (channels_in + channels_out) * points * math.log2(points)
    return _MARGIN * (_OVERHEAD + transforms + _PRODUCT * pairs * points) < direct

"""The shared registry of operators, and their explicit matrices from the definition, in plain numpy.

Nothing here calls jaxsrn but for its constructors: `dense` and `pull_back` are the oracle of all tests. They read
the geometry of an operator (its fields), never its methods.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxsrn import CircularConv, Dense, ZeroPaddedConv


class Case(NamedTuple):
    """An operator, and the shape of the kernels that it is tested with."""

    name: str
    op: Dense | CircularConv | ZeroPaddedConv
    kernel_shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("dense-tall", Dense(), (5, 3)),
    Case("dense-wide", Dense(), (3, 5)),
    Case("dense-square", Dense(), (4, 4)),
    Case("dense-row", Dense(), (1, 4)),
    Case("dense-scalar", Dense(), (1, 1)),
    # Circular, one axis: odd and even images and taps.
    Case("circular-1d", CircularConv((8,)), (3, 2, 3)),
    Case("circular-1d-odd-image", CircularConv((7,)), (3, 1, 1)),
    Case("circular-1d-even-taps", CircularConv((7,)), (4, 3, 2)),
    Case("circular-1d-one-tap", CircularConv((6,)), (1, 2, 2)),
    Case("circular-1d-one-sample", CircularConv((1,)), (1, 2, 3)),
    Case("circular-1d-full", CircularConv((2,)), (2, 1, 2)),
    Case("circular-1d-stride", CircularConv((8,), strides=2), (3, 2, 3)),
    Case("circular-1d-empty-phase", CircularConv((6,), strides=3), (2, 1, 2)),
    Case("circular-1d-dilation", CircularConv((8,), kernel_dilation=2), (3, 2, 2)),
    Case("circular-1d-coprime-dilation", CircularConv((7,), kernel_dilation=3), (4, 1, 2)),
    Case("circular-1d-stride-dilation", CircularConv((12,), strides=2, kernel_dilation=2), (3, 1, 2)),
    Case("circular-1d-stride-odd-dilation", CircularConv((12,), strides=2, kernel_dilation=3), (3, 2, 1)),
    Case("circular-1d-groups", CircularConv((6,), feature_group_count=2), (3, 3, 4)),
    Case("circular-1d-depthwise", CircularConv((5,), feature_group_count=3), (3, 1, 3)),
    # Circular, two axes.
    Case("circular-2d", CircularConv((4, 4)), (3, 3, 2, 2)),
    Case("circular-2d-one-channel", CircularConv((6, 5)), (3, 3, 1, 1)),
    Case("circular-2d-non-square", CircularConv((5, 3)), (2, 3, 1, 2)),
    Case("circular-2d-strides", CircularConv((4, 6), strides=(2, 3)), (3, 2, 2, 1)),
    Case("circular-2d-dilation", CircularConv((5, 4), kernel_dilation=(1, 2)), (2, 2, 2, 1)),
    Case("circular-2d-groups", CircularConv((4, 4), feature_group_count=2), (2, 2, 1, 4)),
    Case("circular-2d-stride-groups", CircularConv((4, 4), strides=2, feature_group_count=2), (3, 3, 1, 2)),
    # Circular, three axes.
    Case("circular-3d", CircularConv((3, 2, 4)), (2, 2, 3, 1, 2)),
    Case(
        "circular-3d-stride-groups", CircularConv((2, 4, 3), strides=(1, 2, 1), feature_group_count=2), (1, 3, 2, 1, 2)
    ),
    # Circular, taps that reach around the image and fall on each other.
    Case("aliased-1d", CircularConv((4,)), (6, 1, 2)),
    Case("aliased-1d-dilation", CircularConv((4,), kernel_dilation=2), (3, 2, 2)),
    Case("aliased-1d-stride", CircularConv((4,), strides=2), (7, 1, 2)),
    Case("aliased-2d", CircularConv((3, 2)), (4, 3, 1, 2)),
    # Zero padding, one axis.
    Case("same-1d", ZeroPaddedConv((7,)), (3, 2, 3)),
    Case("same-1d-even-taps", ZeroPaddedConv((8,)), (4, 2, 1)),
    Case("same-1d-stride", ZeroPaddedConv((7,), strides=2), (3, 2, 2)),
    Case("same-1d-even-image-stride", ZeroPaddedConv((8,), strides=3), (4, 1, 2)),
    Case("same-1d-five-taps-on-two", ZeroPaddedConv((2,)), (5, 1, 1)),
    Case("same-1d-one-sample", ZeroPaddedConv((1,)), (3, 2, 2)),
    Case("same-1d-stride-beyond-taps", ZeroPaddedConv((8,), strides=3), (2, 2, 1)),
    Case("same-1d-depthwise", ZeroPaddedConv((5,), feature_group_count=3), (3, 1, 6)),
    Case("valid-1d", ZeroPaddedConv((8,), padding="VALID", strides=2), (3, 2, 1)),
    Case("valid-1d-one-output", ZeroPaddedConv((3,), padding="VALID"), (3, 2, 2)),
    Case("causal-1d", ZeroPaddedConv((9,), padding="CAUSAL", strides=2, kernel_dilation=2), (3, 1, 2)),
    Case("pairs-1d-wide", ZeroPaddedConv((4,), padding=((5, 3),)), (2, 2, 1)),
    Case("pairs-1d-crop", ZeroPaddedConv((8,), padding=((-1, -2),)), (3, 2, 1)),
    Case("pairs-1d-crop-and-pad", ZeroPaddedConv((7,), padding=((-2, 3),), strides=2), (3, 1, 2)),
    Case("transposed-1d", ZeroPaddedConv((5,), padding=((2, 2),), input_dilation=2), (3, 2, 2)),
    Case(
        "transposed-1d-stride",
        ZeroPaddedConv((5,), padding=((1, 3),), input_dilation=3, strides=2, kernel_dilation=2),
        (4, 1, 2),
    ),
    Case("transposed-1d-empty-phase", ZeroPaddedConv((4,), padding=((1, 1),), input_dilation=3), (2, 1, 2)),
    Case("transposed-1d-even-stride", ZeroPaddedConv((6,), padding=((2, 1),), input_dilation=2, strides=2), (3, 2, 1)),
    # Zero padding, two and three axes.
    Case("same-2d", ZeroPaddedConv((5, 4)), (3, 3, 2, 2)),
    Case("same-2d-stride-groups", ZeroPaddedConv((5, 4), strides=2, feature_group_count=2), (3, 2, 1, 4)),
    Case("same-2d-taps-beyond-image", ZeroPaddedConv((2, 2)), (5, 3, 1, 2)),
    Case("same-2d-one-tap-beside-unused-ones", ZeroPaddedConv((1, 4)), (3, 1, 2, 2)),
    Case("valid-2d-dilation", ZeroPaddedConv((5, 6), padding="VALID", kernel_dilation=(2, 1)), (2, 3, 1, 2)),
    Case(
        "transposed-2d",
        ZeroPaddedConv((3, 3), padding=((1, 2), (2, 1)), input_dilation=2),
        (3, 3, 2, 1),
    ),
    Case("pairs-2d", ZeroPaddedConv((4, 5), padding=((1, -1), (0, 2)), strides=(1, 2)), (2, 3, 1, 2)),
    Case("same-3d", ZeroPaddedConv((2, 3, 2)), (3, 2, 1, 1, 2)),
    Case("valid-3d-groups", ZeroPaddedConv((3, 3, 2), padding="VALID", feature_group_count=2), (2, 2, 2, 1, 2)),
]
# Kernels that no function takes for a convolution of two axes, and what it says.
BAD_KERNELS = [
    (jnp.ones((3, 1, 2)), r"kernel: got shape \(3, 1, 2\), expected \(2 tap sizes"),
    (jnp.ones((3, 3, 1, 2), jnp.int32), "kernel: got dtype int32, expected a real floating-point"),
    (jnp.ones((3, 3, 1, 2), jnp.complex64), "kernel: got dtype complex64, expected a real floating-point"),
]
BY_NAME = {case.name: case for case in CASES}


def by_name(*names: str) -> list[Case]:
    """The cases of these names."""
    return [BY_NAME[name] for name in names]


def is_aliased(case: Case) -> bool:
    """Whether taps of the case fall on each other."""
    return case.name.startswith("aliased")


def kernel(case: Case, dtype=np.float64, seed: int = 0) -> jax.Array:
    """A Gaussian kernel for the case; the same numbers in every dtype, up to rounding."""
    return jnp.asarray(gaussian(case.kernel_shape, seed), dtype)


def gaussian(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A Gaussian float64 array, determined by its shape and seed."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def gaussian32(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """A Gaussian float32 array of JAX, determined by its seed."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _lowest_samples(op, taps: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Per axis: zeros (or wrapped samples) before the image, and the number of outputs."""
    extents = [(k - 1) * d + 1 for k, d in zip(taps, op.kernel_dilation, strict=True)]
    if isinstance(op, CircularConv):
        lows = [(extent - 1) // 2 for extent in extents]
        return lows, [-(-n // s) for n, s in zip(op.input_shape, op.strides, strict=True)]
    dilated = [(n - 1) * d + 1 for n, d in zip(op.input_shape, op.input_dilation, strict=True)]
    if op.padding == "SAME":
        totals = [
            max((-(-n // s) - 1) * s + extent - n, 0)
            for n, s, extent in zip(op.input_shape, op.strides, extents, strict=True)
        ]
        pairs = [(total // 2, total - total // 2) for total in totals]
    elif op.padding == "VALID":
        pairs = [(0, 0)] * len(taps)
    elif op.padding == "CAUSAL":
        pairs = [(extents[0] - 1, 0)]
    else:
        pairs = op.padding
    sizes = [
        (n + low + high - extent) // s + 1
        for n, (low, high), extent, s in zip(dilated, pairs, extents, op.strides, strict=True)
    ]
    return [low for low, _ in pairs], sizes


def meetings(op, taps: tuple[int, ...]):
    """Every `(output position, tap, input sample)` that the layer multiplies."""
    circular = isinstance(op, CircularConv)
    lows, sizes = _lowest_samples(op, taps)
    dilations = (1,) * len(taps) if circular else op.input_dilation
    for output in itertools.product(*map(range, sizes)):
        for tap in itertools.product(*map(range, taps)):
            sample = []
            for o, t, low, s, kd, d, n in zip(
                output, tap, lows, op.strides, op.kernel_dilation, dilations, op.input_shape, strict=True
            ):
                place = o * s + t * kd - low
                place, rest = (place % n, 0) if circular else divmod(place, d)
                if rest == 0 and 0 <= place < n:
                    sample.append(place)
            if len(sample) == len(taps):
                yield output, tap, tuple(sample)


def shapes(kernel_shape: tuple[int, ...], op) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`(in_shape, out_shape)` of one example."""
    if isinstance(op, Dense):
        return kernel_shape[:1], kernel_shape[1:]
    _, sizes = _lowest_samples(op, kernel_shape[:-2])
    return (*op.input_shape, kernel_shape[-2] * op.feature_group_count), (*sizes, kernel_shape[-1])


def _groups(kernel_shape, op) -> list[tuple[slice, slice]]:
    """Input and output channels of each group."""
    width_in, width_out = kernel_shape[-2], kernel_shape[-1] // op.feature_group_count
    return [
        (slice(g * width_in, (g + 1) * width_in), slice(g * width_out, (g + 1) * width_out))
        for g in range(op.feature_group_count)
    ]


def dense(kernel, op) -> np.ndarray:
    """The float64 matrix `(prod(out_shape), prod(in_shape))` of the layer, by its definition."""
    kernel = np.asarray(kernel, np.float64)
    if isinstance(op, Dense):
        return kernel.T
    in_shape, out_shape = shapes(kernel.shape, op)
    matrix = np.zeros((*out_shape, *in_shape))
    for output, tap, sample in meetings(op, kernel.shape[:-2]):
        for ins, outs in _groups(kernel.shape, op):
            matrix[(*output, outs, *sample, ins)] += kernel[tap][:, outs].T
    return matrix.reshape((np.prod(out_shape), np.prod(in_shape)))


def pull_back(matrix, op, kernel_shape: tuple[int, ...]) -> np.ndarray:
    """The adjoint of `dense`: `sum(pull_back(G) * K) == sum(G * dense(K))` for every kernel.

    Turns a gradient with respect to the matrix into one with respect to the kernel.
    """
    if isinstance(op, Dense):
        return matrix.T
    in_shape, out_shape = shapes(kernel_shape, op)
    matrix = matrix.reshape((*out_shape, *in_shape))
    gradient = np.zeros(kernel_shape)
    for output, tap, sample in meetings(op, kernel_shape[:-2]):
        for ins, outs in _groups(kernel_shape, op):
            gradient[(*tap, slice(None), outs)] += matrix[(*output, outs, *sample, ins)].T
    return gradient


def weights(kernel_shape: tuple[int, ...], op) -> np.ndarray:
    """How many output positions meet a real sample, by tap: `(*taps, 1, 1)`."""
    if isinstance(op, Dense):
        return np.ones((1, 1))
    counts = np.zeros(kernel_shape[:-2])
    for _, tap, _ in meetings(op, kernel_shape[:-2]):
        counts[tap] += 1
    return counts[..., None, None]


def leading(matrix: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The leading singular triplet `(value, left, right)` of a matrix."""
    left, values, right = np.linalg.svd(matrix)
    return values[0], left[:, 0], right[0]


def derivative(function, point, direction, step: float = 1e-6) -> float:
    """The derivative of a function of a float64 array along a direction, by central differences."""
    point, direction = np.asarray(point), np.asarray(direction)
    return (function(point + step * direction) - function(point - step * direction)) / (2 * step)


def fft_norms(kernels, size):
    """Largest singular values of a stack of kernels with stride 1, over the half grid: Sedghi's two lines."""
    axes = tuple(range(1, 1 + len(size)))
    symbols = np.fft.rfftn(np.asarray(kernels, np.float64), size, axes=axes)
    values = np.linalg.svd(symbols, compute_uv=False)
    return values.max(axis=tuple(range(1, values.ndim)))


def orthogonal(rng, count, channels):
    return np.linalg.qr(rng.standard_normal((count, channels, channels)))[0]


def spectral_kinds(count: int, taps: tuple[int, ...], channels: int) -> dict[str, np.ndarray]:
    """Stacks of kernels whose spectra are flat, constant, peaked, or of many equal peaks."""
    rng = np.random.default_rng(0)
    shape = (count, *taps, channels, channels)
    last, first, middle = (-1,) * len(taps), (0,) * len(taps), tuple(t // 2 for t in taps)
    delta, two_taps = np.zeros(shape), np.zeros(shape)
    delta[(slice(None), *middle)] = orthogonal(rng, count, channels)
    # The extremal polynomials of the certificate, of the highest degree there is.
    two_taps[(slice(None), *first)] = orthogonal(rng, count, channels)
    two_taps[(slice(None), *last)] = orthogonal(rng, count, channels)
    smooth = np.abs(rng.standard_normal((count, *taps, 1, 1))) * np.ones((1,) * (1 + len(taps)) + (channels, channels))
    signs = rng.choice([-1.0, 1.0], size=shape)
    near = delta + 1e-3 * rng.standard_normal(shape)
    gauss = rng.standard_normal(shape)
    return {"gaussian": gauss, "delta": delta, "two taps": two_taps, "smooth": smooth, "signs": signs, "near": near}


def one_dimensional_geometries(lowest_pad: int, highest_pad: int):
    """A strategy for the arguments of `one_dimensional`."""
    sizes = (st.integers(1, 6), st.integers(1, 5), *3 * [st.integers(1, 3)])
    return st.tuples(*sizes, st.tuples(*2 * [st.integers(lowest_pad, highest_pad)]))


def one_dimensional(n: int, taps: int, stride: int, input_dilation: int, kernel_dilation: int, pads: tuple[int, int]):
    """`(op, kernel shape, whether it has an output)` of a zero-padded layer of one axis and one channel."""
    op = ZeroPaddedConv(
        (n,), padding=(pads,), strides=stride, input_dilation=input_dilation, kernel_dilation=kernel_dilation
    )
    has_output = (n - 1) * input_dilation + 1 + sum(pads) >= (taps - 1) * kernel_dilation + 1
    return op, (taps, 1, 1), has_output

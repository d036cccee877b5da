"""The kernels that are measured, Gaussian and trained, each with the layer in which it acts and its exact norm."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import resnet50

from jaxsrn import CircularConv


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A float32 kernel in Flax's layout, and the layer in which it acts."""

    name: str
    kernel: np.ndarray
    op: CircularConv

    @functools.cached_property
    def norm(self) -> float:
        """The spectral norm, in float64."""
        return reference_norm(self.kernel, self.op)

    @functools.cached_property
    def plain(self) -> tuple[np.ndarray, CircularConv]:
        """An unstrided layer of the same singular values, for peers that know no strides: taps are split by phase."""
        pads = [(0, -k % s) for k, s in zip(self.kernel.shape, self.op.strides, strict=False)]
        return polyphase(np.pad(self.kernel, [*pads, (0, 0), (0, 0)]), self.op.strides), CircularConv(self.op.grid)


def polyphase(array: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    """`(*taps, i, o)` to `(*(taps / strides), phases * i, o)`: residues modulo the stride become channels."""
    d = len(strides)
    split = sum(((k // s, s) for k, s in zip(array.shape, strides, strict=False)), ())
    array = array.reshape((*split, *array.shape[d:])).transpose((*range(0, 2 * d, 2), *range(1, 2 * d, 2), -2, -1))
    return array.reshape((*array.shape[:d], -1, array.shape[-1]))


def reference_norm(kernel: np.ndarray, op: CircularConv) -> float:
    """The norm by NumPy's SVDs in float64, at half of the frequencies: those of a real kernel come in pairs."""
    taps = [np.arange(k) * d % n for k, d, n in zip(kernel.shape, op.kernel_dilation, op.input_shape, strict=False)]
    image = np.zeros((*op.input_shape, *kernel.shape[-2:]))
    np.add.at(image, np.ix_(*taps), kernel.astype(np.float64))
    symbol = np.fft.rfftn(polyphase(image, op.strides), axes=range(op.num_axes))
    symbol = np.moveaxis(symbol.reshape((*symbol.shape[:-1], op.feature_group_count, -1)), -2, 0)
    return float(np.max(np.linalg.svd(symbol, compute_uv=False)))


def gaussian(n: int, c: int, k: int, **options) -> Case:
    """A Gaussian kernel of `k x k` taps, `c` to `c` channels, on an `n x n` image: always the same one."""
    kernel = np.random.default_rng(0).standard_normal((k, k, c, c)).astype(np.float32)
    return Case(f"Gaussian ({n}, {c}, {k})", kernel, CircularConv((n, n), **options))


@functools.cache
def trained() -> dict[str, list[Case]]:
    """The 3x3 kernels of the trained ResNet-50 by stage, and its strided stem, all at their true sizes."""
    found: dict[str, list[Case]] = {}
    for layer in resnet50.load().values():
        (k, _, _, c), n = layer.kernel.shape, layer.input_shape[0]
        if k > 1:
            name = f"ResNet-50 ({n}, {c}, 3)" if k == 3 else "ResNet-50 stem (224, 3 to 64, 7), stride 2"
            case = Case(name, layer.kernel, CircularConv(layer.input_shape, strides=layer.strides))
            found.setdefault(name, []).append(case)
    return found

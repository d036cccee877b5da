"""How far the searched norms of zero-padded layers are off: families of kernels against the explicit float64 matrix.

Above 2**18 entries of the explicit matrix a norm has no proof. These layers are little above, so that all of their
singular values can be computed, and the kernels are of families that a search might miss: channels or samples without
connection, nearly equal peaks, taps on one side, flat and steep spectra.

    python -m tests.searches --kernels 20

draws so many kernels of each family for each layer, and prints the largest errors. `bounds.certified` is asked too:
its interval must hold the norm. `--larger` takes layers whose matrix is too large for that. Their norms are searched
by a thousand Lanczos steps or so from a random start in float64 (`bounds.probabilistic`), which know nothing of waves.
`--waves` takes wide layers on large images, and kernels that are sums of waves in orthogonal channels. Each wave is a
layer of one channel, whose matrix is small, and the norm is the largest of theirs.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

# As a module of the root the folder of the tests is not on the path yet.
sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: F401  (XLA's flags, before JAX is imported)
import jax
import jax.numpy as jnp
import scipy.linalg
from cases import meetings, shapes

import jaxsrn
from jaxsrn import ZeroPaddedConv, bounds

MOST_ERROR = 1e-5
LAYERS = {
    "1-D": (ZeroPaddedConv((64,)), (3, 9, 9)),
    "1-D, one channel": (ZeroPaddedConv((600,)), (5, 1, 1)),
    "1-D, causal": (ZeroPaddedConv((64,), padding="CAUSAL"), (4, 9, 9)),
    "1-D, wide": (ZeroPaddedConv((20,)), (5, 32, 32)),
    "2-D": (ZeroPaddedConv((8, 8)), (3, 3, 9, 9)),
    "2-D, one channel": (ZeroPaddedConv((24, 24)), (3, 3, 1, 1)),
    "2-D, two channels": (ZeroPaddedConv((17, 16)), (3, 3, 2, 2)),
    "2-D, wide": (ZeroPaddedConv((5, 5)), (3, 3, 32, 32)),
    "2-D, more outputs": (ZeroPaddedConv((9, 9)), (3, 3, 4, 12)),
    "2-D, 5x5 taps": (ZeroPaddedConv((10, 10)), (5, 5, 6, 6)),
    "2-D, VALID": (ZeroPaddedConv((13, 13), padding="VALID"), (3, 3, 4, 5)),
    "2-D, narrow image": (ZeroPaddedConv((3, 48)), (3, 3, 4, 4)),
    "2-D, strides": (ZeroPaddedConv((16, 16), strides=2), (3, 3, 4, 9)),
    "2-D, dilation": (ZeroPaddedConv((14, 13), kernel_dilation=2), (3, 3, 3, 3)),
    "2-D, groups": (ZeroPaddedConv((12, 12), feature_group_count=2), (3, 3, 2, 4)),
    "2-D, depthwise": (ZeroPaddedConv((9, 9), feature_group_count=8), (3, 3, 1, 8)),
    "2-D, transposed": (ZeroPaddedConv((7, 7), padding=((2, 2), (2, 2)), input_dilation=2), (4, 4, 12, 3)),
    "3-D": (ZeroPaddedConv((5, 6, 6)), (3, 3, 3, 3, 3)),
}
LARGER = {
    "1-D, larger": (ZeroPaddedConv((1000,)), (5, 8, 8)),
    "2-D, larger": (ZeroPaddedConv((40, 40)), (3, 3, 8, 8)),
    "2-D, larger and wide": (ZeroPaddedConv((28, 28)), (3, 3, 32, 32)),
}
OF_WAVES = {
    "1-D, waves": (ZeroPaddedConv((600,)), (5, 48, 48)),
    "1-D, waves, many taps": (ZeroPaddedConv((600,)), (31, 32, 32)),
    "2-D, waves": (ZeroPaddedConv((32, 32)), (3, 3, 16, 16)),
    "2-D, waves, wide": (ZeroPaddedConv((28, 28)), (3, 3, 32, 32)),
    "2-D, waves, wider": (ZeroPaddedConv((32, 32)), (3, 3, 64, 64)),
}


# Families


def _waves(taps: tuple[int, ...], frequency: np.ndarray, phase: float) -> np.ndarray:
    """A real wave on the taps."""
    places = np.moveaxis(np.indices(taps), 0, -1) - (np.array(taps) - 1) / 2
    return np.cos(places @ frequency + phase)


class Modes(NamedTuple):
    """Filters of one channel, `(count, *taps)`, each between a direction of the inputs and one of the outputs.

    The directions are orthonormal where there are as many channels as filters, and repeat where there are fewer.
    """

    filters: np.ndarray
    ins: np.ndarray
    outs: np.ndarray

    def kernel(self) -> np.ndarray:
        return np.einsum("k...,ik,ok->...io", self.filters, self.ins, self.outs)


def _modes(rng, shape, frequencies, values) -> Modes:
    """Waves, whose phases are random."""
    *taps, c_in, c_out = shape
    places = np.arange(len(values))
    ins, outs = (np.linalg.qr(rng.standard_normal((n, n)))[0][:, places % n] for n in (c_in, c_out))
    filters = [
        value * _waves(tuple(taps), frequency, rng.uniform(0, np.pi))
        for frequency, value in zip(frequencies, values, strict=True)
    ]
    return Modes(np.array(filters), ins, outs)


def _num_waves(shape) -> int:
    """One for each channel, and two of a single one."""
    return max(2, min(shape[-2:]))


def _nearly_equal(rng, count) -> np.ndarray:
    return 1 - 10 ** rng.uniform(-5, -2) * rng.uniform(size=count)


def of_waves(draw):
    """The family of kernels of the modes that a function draws; `family.modes` is that function."""

    @functools.wraps(draw)
    def family(rng, shape):
        return draw(rng, shape).kernel()

    family.modes = draw
    return family


def gaussian(rng, shape):
    return rng.standard_normal(shape)


def trained(rng, shape):
    """Smooth taps, and channels whose strengths decay, as in trained networks."""
    *taps, c_in, c_out = shape
    ins, outs = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (c_in, c_out))
    inner = (
        rng.standard_normal((*taps, c_in, c_out))
        * np.exp(-np.arange(c_in) / 2)[:, None]
        * np.exp(-np.arange(c_out) / 2)
    )
    return np.einsum("...io,ai,bo->...ab", inner + inner.mean(axis=tuple(range(len(taps)))), ins, outs)


def blocks(rng, shape):
    """Two to four sets of channels without connection, of nearly equal norms."""
    return _blocks(rng, shape, lambda block: rng.standard_normal(block))


def decaying_blocks(rng, shape):
    return _blocks(rng, shape, lambda block: trained(rng, block))


def delta_blocks(rng, shape):
    """The same near to a single orthogonal tap, whose singular values are all nearly equal."""
    return _blocks(rng, shape, lambda block: orthogonal_tap(rng, block) + 0.02 * rng.standard_normal(block))


def _circular_norm(kernel, size=24) -> float:
    """The largest value over a fine grid of frequencies, without strides."""
    axes = tuple(range(kernel.ndim - 2))
    symbol = np.fft.fftn(kernel, [max(size, 4 * n) if n > 1 else 1 for n in kernel.shape[:-2]], axes=axes)
    return np.linalg.svd(symbol, compute_uv=False).max()


def _blocks(rng, shape, draw, most=4):
    *taps, c_in, c_out = shape
    count = int(rng.integers(1, most + 1)) + 1
    count = min(count, c_in, c_out)
    cuts = [np.sort(rng.permutation(np.arange(1, n))[: count - 1]) for n in (c_in, c_out)]
    edges = [np.r_[0, cut, n] for cut, n in zip(cuts, (c_in, c_out), strict=True)]
    kernel, gap = np.zeros(shape), 10 ** rng.uniform(-5, -1.5)
    for k in range(count):
        sides = [slice(edge[k], edge[k + 1]) for edge in edges]
        block = draw((*taps, *(side.stop - side.start for side in sides)))
        kernel[..., sides[0], sides[1]] = block / _circular_norm(block) * (1 - gap * rng.uniform())
    return kernel[..., rng.permutation(c_in), :][..., rng.permutation(c_out)]


def connected_blocks(rng, shape):
    """Blocks that are connected by next to nothing."""
    return blocks(rng, shape) + 10 ** rng.uniform(-8, -2) * rng.standard_normal(shape)


def depthwise(rng, shape):
    """A dense kernel in which each input channel reaches one output channel, with nearly equal norms."""
    return _blocks(rng, shape, lambda block: rng.standard_normal(block), most=10**6)


def equal_depthwise(rng, shape):
    """The same taps for every channel, to a relative difference."""
    taps, gap = rng.standard_normal(shape[:-2])[..., None, None], 10 ** rng.uniform(-6, -2)
    few = min(shape[-2:])
    identity = np.zeros(shape[-2:])
    identity[rng.permutation(shape[-2])[:few], rng.permutation(shape[-1])[:few]] = 1 - gap * rng.uniform(size=few)
    return taps * identity


@of_waves
def several_peaks(rng, shape):
    """Waves of nearly equal size at several frequencies."""
    count = _num_waves(shape)
    frequencies = rng.uniform(0, np.pi, (count, len(shape) - 2))
    return _modes(rng, shape, frequencies, _nearly_equal(rng, count))


@of_waves
def equal_peaks(rng, shape):
    """The same, and without edges the norms of all waves are nearly equal."""
    count = _num_waves(shape)
    frequencies = rng.uniform(0, np.pi, (count, len(shape) - 2))
    modes = _modes(rng, shape, frequencies, np.ones(count))
    norms = [_circular_norm(wave[..., None, None], 96) for wave in modes.filters]
    return modes._replace(filters=(modes.filters.T * _nearly_equal(rng, count) / norms).T)


@of_waves
def low_and_high(rng, shape):
    """Low-pass and high-pass waves of nearly equal size."""
    count = _num_waves(shape)
    frequencies = np.pi * rng.integers(0, 2, (count, len(shape) - 2))
    return _modes(rng, shape, frequencies, _nearly_equal(rng, count))


@of_waves
def windowed(rng, shape):
    """Waves at several frequencies that fade at the ends of the taps, with nearly equal norms without edges.

    With many taps each of them is near 0 at the frequencies of the others.
    """
    modes = equal_peaks.modes(rng, shape)
    window = functools.reduce(np.multiply.outer, [np.hanning(n + 2)[1:-1] for n in shape[:-2]])
    filters = modes.filters * window
    norms = np.array([_circular_norm(wave[..., None, None], 96) for wave in filters])
    values = _nearly_equal(rng, len(norms)) / norms
    return modes._replace(filters=filters * values.reshape((-1,) + (1,) * window.ndim))


@of_waves
def one_frequency(rng, shape):
    """Waves of nearly equal size at one frequency."""
    count, frequency = _num_waves(shape), rng.choice([0.0, np.pi, rng.uniform(0, np.pi)])
    return _modes(rng, shape, np.full((count, len(shape) - 2), frequency), _nearly_equal(rng, count))


def checkerboard(rng, shape):
    """The highest frequency, and a little of others."""
    signs = _waves(shape[:-2], np.full(len(shape) - 2, np.pi), np.pi * (sum(shape[:-2]) - len(shape) + 2) / 2)
    return signs[..., None, None] * np.abs(rng.standard_normal(shape)) + 0.1 * rng.standard_normal(shape)


def one_sided(rng, shape):
    """Taps on one side of the centre alone."""
    kernel = rng.standard_normal(shape)
    for axis, taps in enumerate(shape[:-2]):
        away = slice((taps + 1) // 2, None) if rng.integers(2) else slice(None, taps // 2)
        kernel[(slice(None),) * axis + (away,)] = 0
    return kernel


def orthogonal_tap(rng, shape):
    """One orthogonal tap: all singular values equal, but for samples that it pushes out of the image."""
    *taps, c_in, c_out = shape
    kernel = np.zeros((math.prod(taps), c_in, c_out))
    full = np.linalg.qr(rng.standard_normal((max(c_in, c_out),) * 2))[0]
    kernel[rng.integers(len(kernel))] = full[:c_in, :c_out]
    return kernel.reshape(shape)


def near_orthogonal(rng, shape):
    return orthogonal_tap(rng, shape) + 10 ** rng.uniform(-6, -1) * rng.standard_normal(shape)


def every_other_tap(rng, shape):
    """Taps of one parity: an image falls into parts without connection."""
    parity = np.indices(shape[:-2]) % 2
    return (
        rng.standard_normal(shape)
        * (parity == rng.integers(2, size=(len(parity),) + (1,) * (parity.ndim - 1))).all(axis=0)[..., None, None]
    )


def sparse(rng, shape):
    """Few weights: channels and samples in many parts, most of them without connection."""
    return rng.standard_normal(shape) * (
        rng.uniform(size=shape) < 1.5 / min(math.prod(shape[:-2]) * max(shape[-2:]), 20)
    )


def signs(rng, shape):
    return rng.choice([-1.0, 1.0], shape)


def positive(rng, shape):
    return np.abs(rng.standard_normal(shape))


def symmetric(rng, shape):
    """Even or odd taps: both phases of a wave have the same norm but for the edges."""
    kernel = rng.standard_normal(shape)
    flipped = np.flip(kernel, axis=tuple(range(kernel.ndim - 2)))
    return kernel + rng.choice([-1, 1]) * flipped


def uneven_channels(rng, shape):
    """Strengths of channels over many orders of magnitude."""
    ins, outs = (10 ** rng.uniform(-4, 0, n) for n in shape[-2:])
    return rng.standard_normal(shape) * ins[:, None] * outs


def rank_one(rng, shape):
    *taps, c_in, c_out = shape
    return np.multiply.outer(rng.standard_normal(taps), np.outer(rng.standard_normal(c_in), rng.standard_normal(c_out)))


FAMILIES = (
    *(gaussian, trained, blocks, decaying_blocks, delta_blocks, connected_blocks, depthwise, equal_depthwise),
    *(several_peaks, equal_peaks, windowed, low_and_high, one_frequency, checkerboard, one_sided, orthogonal_tap),
    *(near_orthogonal, every_other_tap, sparse, signs, positive, symmetric, uneven_channels, rank_one),
)


# Errors


def drawn(family, op, shape, number: int) -> np.ndarray:
    """The kernel of a family by its number, the same in every run."""
    return family(np.random.default_rng([number, *family.__name__.encode(), *shape]), shape)


class Oracle:
    """The norms of a layer's kernels, from the explicit matrix."""

    def __init__(self, op: ZeroPaddedConv, shape: tuple[int, ...]):
        met = list(meetings(op, shape[:-2]))
        (*self.inputs, c_in), (*self.outputs, c_out) = shapes(shape, op)
        self.output, self.tap, self.sample = (np.array(each).T for each in zip(*met, strict=True))
        self.groups, self.channels = op.feature_group_count, (c_in, c_out)

    def matrix(self, kernel) -> np.ndarray:
        """The float64 matrix from outputs to inputs: zero padding lets each pair of samples meet at one tap at most."""
        parts = np.split(np.asarray(kernel, np.float64), self.groups, axis=-1)
        taps = kernel.shape[:-2]
        whole = np.stack([scipy.linalg.block_diag(*(part[tap] for part in parts)) for tap in np.ndindex(taps)])
        outputs, samples = (
            np.ravel_multi_index(self.output, self.outputs),
            np.ravel_multi_index(self.sample, self.inputs),
        )
        (c_in, c_out), rows, columns = self.channels, math.prod(self.outputs), math.prod(self.inputs)
        matrix = np.zeros((rows, columns, c_in, c_out))
        matrix[outputs, samples] = whole[np.ravel_multi_index(self.tap, taps)]
        return matrix.transpose((0, 3, 1, 2)).reshape((rows * c_out, columns * c_in))

    def norm(self, kernel) -> float:
        """From the eigenvalues of the smaller Gram matrix."""
        matrix = self.matrix(kernel)
        gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
        last = len(gram) - 1
        return math.sqrt(max(scipy.linalg.eigh(gram, eigvals_only=True, subset_by_index=(last, last))[0], 0))


class LongSearch:
    """The norms of a layer's kernels where the matrix is too large: lower ends, which differ from them by 1e-4 at most.

    As a rule the difference is that of rounding.
    """

    def __init__(self, op: ZeroPaddedConv, shape: tuple[int, ...]):
        self.interval = jax.jit(lambda kernel, key: bounds.probabilistic(kernel, op, key=key, resolution=1e-4))

    def norm(self, kernel) -> float:
        """From a start that depends on the kernel's first entry, so that it is another one for every kernel."""
        key = jax.random.key(np.asarray(kernel, np.float32).ravel()[:1].view(np.uint32)[0])
        return float(self.interval(jnp.asarray(kernel, jnp.float64), key).lower)


def exact_norm_of_modes(modes: Modes, op: ZeroPaddedConv) -> float:
    """The largest norm of a layer of one channel with one of the filters, whose directions must be orthonormal."""
    oracle, best = Oracle(op, (*modes.filters.shape[1:], 1, 1)), 0.0
    filters = modes.filters[..., None, None]
    # A circular layer has the larger norm, and the grid misses less of it than a tenth.
    largest = np.array([1.1 * _circular_norm(taps) for taps in filters])
    for place in np.argsort(-largest):
        if largest[place] > best:
            best = max(best, oracle.norm(filters[place]))
    return best


def errors_of_waves(name: str, count: int, dtype=np.float32) -> dict[str, np.ndarray]:
    """Relative errors of `spectral_norm` on a layer, by family."""
    op, shape = OF_WAVES[name]
    norm, found = jax.jit(lambda k: jaxsrn.spectral_norm(k, op)), {}
    for family in (family for family in FAMILIES if hasattr(family, "modes")):
        drawn_modes = [drawn(family.modes, op, shape, number) for number in range(count)]
        exact = np.array([exact_norm_of_modes(modes, op) for modes in drawn_modes])
        values = np.array([norm(jnp.asarray(modes.kernel().astype(dtype))) for modes in drawn_modes], np.float64)
        found[family.__name__] = np.abs(values / exact - 1)
    return found


def errors(name: str, count: int, dtype=np.float32) -> dict[str, np.ndarray]:
    """Relative errors of `spectral_norm` on a layer, by family; an interval that does not hold the norm is an error."""
    op, shape = (LAYERS | LARGER)[name]
    oracle, found = (LongSearch if name in LARGER else Oracle)(op, shape), {}
    norm, interval = jax.jit(lambda k: jaxsrn.spectral_norm(k, op)), jax.jit(lambda k: bounds.certified(k, op))
    for family in FAMILIES:
        kernels = [drawn(family, op, shape, number).astype(dtype) for number in range(count)]
        exact = np.array([oracle.norm(kernel) for kernel in kernels])
        values = np.array([norm(jnp.asarray(kernel)) for kernel in kernels], np.float64)
        found[family.__name__] = np.abs(values - exact) / np.where(exact == 0, 1, exact)
        # One of the family: the proof is tested for many more kernels in `properties.py`.
        lower, upper = (float(end) for end in interval(jnp.asarray(kernels[0])))
        assert lower * (1 - 1e-13) <= exact[0] <= upper * (1 + 1e-13), (name, family.__name__, lower, exact[0], upper)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=int, default=5, help="kernels of each family for each layer")
    parser.add_argument("--larger", action="store_true", help="the layers whose matrix is too large, and no others")
    parser.add_argument("--waves", action="store_true", help="wide layers and sums of waves, and no others")
    parser.add_argument(
        "--layer", action="append", choices=LAYERS | LARGER | OF_WAVES, help="this layer alone; may be repeated"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further layer after so long")
    args = parser.parse_args()
    start, total, misses = time.monotonic(), 0, 0
    for name in args.layer or (LARGER if args.larger else OF_WAVES if args.waves else LAYERS):
        if time.monotonic() - start > 60 * args.minutes:
            break
        found = (errors_of_waves if name in OF_WAVES else errors)(name, args.kernels)
        missed = {family: int(np.sum(error > MOST_ERROR)) for family, error in found.items()}
        total, misses = total + sum(map(len, found.values())), misses + sum(missed.values())
        worst = max(found, key=lambda family: found[family].max())
        print(f"{name}: worst {found[worst].max():.1e} ({worst}), {sum(missed.values())} misses", flush=True)
        for family in (family for family, count in missed.items() if count):
            places = np.flatnonzero(found[family] > MOST_ERROR)
            print(f"  {family}: numbers {places.tolist()}, errors {[f'{e:.1e}' for e in found[family][places]]}")
    print(f"{total:,} kernels, {misses} off by more than {MOST_ERROR:g}")
    sys.exit(bool(misses))


if __name__ == "__main__":
    main()

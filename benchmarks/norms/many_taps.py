"""Part `many-taps`: products by FFT beside direct ones, and norms of layers whose products are by FFT."""

from __future__ import annotations

import functools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal
import scipy.sparse.linalg
from _clock import race
from _report import duration, table
from tqdm import tqdm

import jaxsrn
import jaxsrn.operators.convolutions
from jaxsrn import ZeroPaddedConv
from norms.in_jax import jax_call
from norms.parts import TOLERANCE, Checks, Effort, Part

# Steps of one loop, in which XLA transforms the kernel once, as it does in a search.
_STEPS = 10


class Layer(NamedTuple):
    """A layer with SAME or causal padding, and the shape of its kernel."""

    n: tuple[int, ...]
    taps: tuple[int, ...]
    channels: tuple[int, int]  # of the kernel
    groups: int
    padding: str = "SAME"

    @property
    def op(self) -> ZeroPaddedConv:
        return ZeroPaddedConv(self.n, padding=self.padding, feature_group_count=self.groups)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.taps, *self.channels)

    @property
    def name(self) -> str:
        sizes = ["x".join(map(str, size)) for size in (self.taps, self.n)]
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{sizes[0]} taps on {sizes[1]}, {self.channels[0]} to {self.channels[1]}{groups}"


# The norms of the first two are computed too: one channel of a group alone has a reference by SciPy.
_NORMS = (
    Layer((56, 56), (31, 31), (1, 16), 16),
    Layer((4096,), (4096,), (1, 1), 1, "CAUSAL"),
)
_LAYERS = (
    *_NORMS,
    Layer((56, 56), (7, 7), (1, 96), 96),
    Layer((56, 56), (3, 3), (1, 96), 96),
    Layer((14, 14), (7, 7), (1, 64), 64),
    Layer((1024,), (64,), (1, 64), 64),
    Layer((56, 56), (31, 31), (32, 32), 1),
    Layer((56, 56), (13, 13), (32, 32), 1),
    Layer((56, 56), (7, 7), (3, 64), 1),
    Layer((14, 14), (7, 7), (64, 64), 1),
    Layer((1024,), (64,), (16, 16), 1),
    Layer((1024,), (16,), (64, 64), 1),
    Layer((4096,), (256,), (16, 16), 1),
    Layer((16, 16, 16), (5, 5, 5), (8, 8), 1),
    Layer((16, 16, 16), (3, 3, 3), (32, 32), 1),
    Layer((16, 16, 16), (3, 3, 3), (1, 32), 32),
)
_TINY = (Layer((16, 16), (9, 9), (1, 4), 4), Layer((256,), (256,), (1, 1), 1, "CAUSAL"))


def kernel_of(layer: Layer) -> np.ndarray:
    """A Gaussian kernel."""
    return np.random.default_rng(0).standard_normal(layer.shape).astype(np.float32)


def power_steps(kernel, op: ZeroPaddedConv):
    """The input after power steps, each of which takes two products with the layer."""
    highest = jax.lax.Precision.HIGHEST

    def step(_, x):
        x = op.transpose(kernel, op.apply(kernel, x, precision=highest), precision=highest)
        return x / jnp.linalg.norm(x)

    return jax.lax.fori_loop(0, _STEPS, step, jnp.ones(op.in_shape(kernel.shape), kernel.dtype))


def compiled_steps(layer: Layer, by_fft: bool):
    """`power_steps` with one way of computing products."""
    with mock.patch.object(jaxsrn.operators.convolutions, "is_cheaper_by_fft", return_value=by_fft):
        steps = jax.jit(lambda kernel: power_steps(kernel, layer.op)).lower(jnp.asarray(kernel_of(layer))).compile()
    return functools.partial(steps, jnp.asarray(kernel_of(layer)))


def product_rows(layers, effort: Effort) -> tuple[list[list], Checks]:
    """A row for each layer, and whether the FFT is faster where it is chosen."""
    rows, checks = [], []
    for layer in tqdm(layers, desc="products", leave=False):
        calls = {name: compiled_steps(layer, name == "FFT") for name in ("direct", "FFT")}
        times = race(calls, effort.rounds, effort.seconds)
        direct, fft = (times[name].seconds / (2 * _STEPS) for name in ("direct", "FFT"))
        chosen = layer.op._is_cheaper_by_fft(layer.shape)
        rows.append([layer.name, duration(direct), duration(fft), f"{direct / fft:.1f}", "FFT" if chosen else "direct"])
        if chosen and not effort.fast:
            checks.append((fft < direct, f"{layer.name}: the FFT is chosen, and is {direct / fft:.1f} times as fast"))
    return rows, checks


def scipy_norm(layer: Layer, kernel: np.ndarray) -> float:
    """The norm in float64, the largest of all groups of one channel, by ARPACK and SciPy's FFT convolutions."""

    def of_group(taps: np.ndarray) -> float:
        causal = layer.padding == "CAUSAL"
        lows = [k - 1 if causal else (k - 1) // 2 for k in taps.shape]
        sizes = list(zip(taps.shape, lows, layer.n, strict=True))

        def forward(x):
            full = scipy.signal.fftconvolve(x.reshape(layer.n), np.flip(taps))
            return full[tuple(slice(k - 1 - low, k - 1 - low + n) for k, low, n in sizes)].reshape(-1)

        def adjoint(y):
            full = scipy.signal.fftconvolve(y.reshape(layer.n), taps)
            return full[tuple(slice(low, low + n) for _, low, n in sizes)].reshape(-1)

        size = int(np.prod(layer.n))
        start = np.random.default_rng(0).standard_normal(size)
        operator = scipy.sparse.linalg.LinearOperator((size, size), forward, adjoint, dtype=np.float64)
        values = scipy.sparse.linalg.svds(operator, k=1, tol=1e-10, ncv=40, v0=start, return_singular_vectors=False)
        return float(values[0])

    groups = np.moveaxis(kernel[..., 0, :].astype(np.float64), -1, 0)
    return max(of_group(taps) for taps in groups)


def norm_rows(layers, effort: Effort) -> tuple[list[list], Checks]:
    """A row for each layer, and whether its norm is right."""
    rows, checks = [], []
    for layer in tqdm(layers, desc="norms", leave=False):
        kernel = kernel_of(layer)
        calls = {"norm": jax_call(jaxsrn.spectral_norm, kernel, layer.op)}
        run = race(calls, effort.rounds, effort.seconds)["norm"]
        error = abs(float(run.result) / scipy_norm(layer, kernel) - 1)
        rows.append([layer.name, duration(run.seconds), f"{error:.1e}"])
        checks.append((error <= TOLERANCE, f"{layer.name}: the norm is off by {error:.1e}, at most {TOLERANCE:.0e}"))
    return rows, checks


def many_taps(effort: Effort) -> Part:
    """The part: products of many shapes both ways, and two norms against SciPy's in float64."""
    layers, with_norms = (_TINY, _TINY) if effort.fast else (_LAYERS, _NORMS)
    products, faster = product_rows(layers, effort)
    norms, right = norm_rows(with_norms, effort)
    text = (
        "One product, of loops of power steps, in float32 and full precision. The FFT is chosen where the estimate of\n"
        "its time (`jaxsrn/operators/many_taps.py`) is a quarter of the other's."
    )
    product_table = table(("layer", "direct", "FFT", "ratio", "chosen"), products)
    norm_table = table(("layer", "spectral_norm", "error"), norms)
    sections = [("Products", f"{text}\n\n{product_table}"), ("Norms", norm_table)]
    return Part(sections, [*faster, *right], {})

"""How fast and how exact are the norms, beside everything else that computes, bounds or estimates them?

    python benchmarks/norms.py                 # everything, some 20 minutes on 2 quiet cores; records every part
    python benchmarks/norms.py --only memory   # one part of it (may be repeated)
    python benchmarks/norms.py --no-network    # without the trained ResNet-50: no download, nothing recorded
    python benchmarks/norms.py --fast          # tiny kernels, a minute or two, no download, nothing recorded

Peers: the two lines of Sedghi, Gupta, Long 2019 in NumPy, JAX and PyTorch; Gram iteration and real-operator power
iteration in PyTorch; orthogonium; flax.nnx.SpectralNorm. They need

    pip install -e ".[bench]" torch==2.13.0 orthogonium==0.0.4

Each method is compiled before the clock starts, then all take turns, so that whatever else the machine does hits all
of them. Errors are measured against NumPy's SVDs in float64. The script fails where a requirement is not met.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# PyTorch shares the GPU, if there is one. Read when JAX first uses it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import resnet50
import scipy.sparse.linalg
from _report import RESULTS, document, record, table, verdict
from batch import CLEAR_REFS, forget_peak, megabytes, peak
from flax import nnx
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, ZeroPaddedConv, bounds

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    raise SystemExit(f"The peers need PyTorch: pip install torch ({error})") from error

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOLERANCE = 1e-5  # relative error that a float32 norm may have
DEVICE = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
# Okabe, Ito: distinguishable with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

Checks = list[tuple[bool, str]]


class Part(NamedTuple):
    """What one part of the benchmark found: sections `(heading, body)`, requirements, pictures by file name."""

    sections: list[tuple[str, str]]
    checks: Checks
    figures: dict[str, plt.Figure]


class Effort(NamedTuple):
    """How much to run: tiny kernels only? the trained network? Most rounds, and seconds, per method and kernel."""

    fast: bool
    network: bool
    rounds: int
    seconds: float


# Kernels


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A float32 kernel in Flax's layout, and where it acts."""

    name: str
    kernel: np.ndarray
    op: CircularConv

    @functools.cached_property
    def norm(self) -> float:
        """The spectral norm, in float64."""
        return reference_norm(self.kernel, self.op)

    @functools.cached_property
    def plain(self) -> tuple[np.ndarray, CircularConv]:
        """The same singular values without strides, for peers that know none: the kernel's taps split by phase."""
        pads = [(0, -k % s) for k, s in zip(self.kernel.shape, self.op.strides, strict=False)]
        return polyphase(np.pad(self.kernel, [*pads, (0, 0), (0, 0)]), self.op.strides), CircularConv(self.op.grid)


def polyphase(array: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    """`(*taps, i, o)` to `(*(taps / strides), phases * i, o)`: residues modulo the stride become channels."""
    d = len(strides)
    split = sum(((k // s, s) for k, s in zip(array.shape, strides, strict=False)), ())
    array = array.reshape((*split, *array.shape[d:])).transpose((*range(0, 2 * d, 2), *range(1, 2 * d, 2), -2, -1))
    return array.reshape((*array.shape[:d], -1, array.shape[-1]))


def reference_norm(kernel: np.ndarray, op: CircularConv) -> float:
    """The largest of NumPy's singular values in float64 at half of the frequencies: those of a real kernel pair up."""
    taps = [np.arange(k) * d % n for k, d, n in zip(kernel.shape, op.kernel_dilation, op.input_shape, strict=False)]
    image = np.zeros((*op.input_shape, *kernel.shape[-2:]))
    np.add.at(image, np.ix_(*taps), kernel.astype(np.float64))
    symbol = np.fft.rfftn(polyphase(image, op.strides), axes=range(op.num_axes))
    symbol = np.moveaxis(symbol.reshape((*symbol.shape[:-1], op.feature_group_count, -1)), -2, 0)
    return float(np.max(np.linalg.svd(symbol, compute_uv=False)))


def gaussian(n: int, c: int, k: int, **options) -> Case:
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


class Entry(NamedTuple):
    """A row: the times of its kernels are summed. With the least required ratios to the fastest exact peer."""

    name: str
    cases: tuple[Case, ...]
    exact: float | None = None
    certified: float | None = None


@functools.cache
def entries(effort: Effort) -> list[Entry]:
    if effort.fast:
        cases = [gaussian(8, 4, 3), gaussian(9, 6, 3), gaussian(12, 3, 7, strides=2)]
        return [Entry(case.name, (case,)) for case in cases]
    required = {(32, 64, 3): (3, 10), (56, 64, 3): (8, 30), (224, 16, 7): (20, 50)}
    rows = []
    for size in ((16, 16, 3), (32, 64, 3), (56, 64, 3), (32, 128, 3), (224, 16, 7)):
        case = gaussian(*size)
        rows.append(Entry(case.name, (case,), *required.get(size, ())))
    if not effort.network:
        return rows
    stages = [Entry(name, tuple(cases)) for name, cases in trained().items()]
    square = [stage._replace(name=f"{stage.name}, all {len(stage.cases)}") for stage in stages if len(stage.cases) > 1]
    sixteen = Entry("ResNet-50, all sixteen 3x3", sum((stage.cases for stage in square), ()), 30)
    return [*rows, *square, sixteen, *(stage for stage in stages if len(stage.cases) == 1)]


# Methods


@functools.cache
def compiled(function: Callable, op, shape: tuple[int, ...]) -> Callable:
    """`function(kernel, op)` for float32 kernels of a shape; only the call is left to be timed."""
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(lambda kernel: function(kernel, op)).lower(spec).compile()


def jax_call(function: Callable, kernel: np.ndarray, op) -> Callable:
    return functools.partial(compiled(function, op, kernel.shape), jnp.asarray(kernel))


def two_liner(kernel, op):
    symbol = jnp.fft.fft2(kernel, op.input_shape, axes=(0, 1))
    return jnp.max(jnp.linalg.svd(symbol, compute_uv=False))


def all_values(kernel, op):
    symbol = jnp.fft.fft2(kernel, op.input_shape, axes=(0, 1))
    return jnp.sort(jnp.linalg.svd(symbol, compute_uv=False).reshape(-1))[::-1]


def numpy_two_liner(kernel, size):
    symbol = np.fft.fft2(kernel, size, axes=(0, 1))
    return np.max(np.linalg.svd(symbol, compute_uv=False))


@torch.inference_mode()
def torch_two_liner(kernel, size) -> float:
    symbol = torch.fft.fft2(kernel, size, dim=(0, 1))
    return torch.linalg.svdvals(symbol).max().item()


@torch.inference_mode()
def torch_gram(weight, size, steps: int) -> float:
    """Gram iteration (Delattre et al. 2023, algorithm 3); as in the authors' code on half of the frequencies."""
    if weight.shape[1] > weight.shape[0]:
        weight = weight.transpose(0, 1)
    gram = torch.fft.rfft2(weight, s=size).flatten(2).permute(2, 0, 1)
    log_scale = torch.zeros(len(gram), device=gram.device)
    for _ in range(steps):
        norm = gram.norm(dim=(1, 2))
        log_scale = 2 * (log_scale + norm.log())
        gram = gram / norm[:, None, None]
        gram = torch.bmm(gram.mH, gram)
    return ((gram.norm(dim=(1, 2)).log() + log_scale) / 2**steps).exp().max().item()


def torch_maps(weight, circular: bool) -> tuple[Callable, Callable]:
    """A layer with an odd number of taps, circular or SAME, and its adjoint."""
    reach = weight.shape[-1] - 1
    if not circular:
        same = {"weight": weight, "padding": reach // 2}
        return functools.partial(F.conv2d, **same), functools.partial(F.conv_transpose2d, **same)
    return (
        lambda x: F.conv2d(F.pad(x, (0, reach, 0, reach), mode="circular"), weight),
        lambda y: F.conv_transpose2d(F.pad(y, (reach, 0, reach, 0), mode="circular"), weight, padding=reach),
    )


@torch.inference_mode()
def torch_power(weight, size, steps: int, circular: bool = True) -> float:
    """Power iteration with the real operator (Ryu et al. 2019)."""
    forward, adjoint = torch_maps(weight, circular)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn((1, len(weight), *size), generator=generator).to(weight.device)
    for _ in range(steps):
        v = adjoint(u)
        v = v / v.norm()
        image = forward(v)
        u = image / image.norm()
    return (u * forward(v)).sum().item()


def flax_norm(steps: int, kernel, op):
    """What `flax.nnx.SpectralNorm` divides a layer by, from its fresh state: power iteration on a flattened kernel."""
    *taps, c_in, c_out = kernel.shape
    layer = nnx.Conv(c_in, c_out, taps, padding="CIRCULAR", use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel
    wrapper = nnx.SpectralNorm(layer, n_steps=steps, rngs=nnx.Rngs(0))
    # The norm does not depend on the image, and XLA drops the layer's output.
    wrapper(jnp.zeros((1, *op.input_shape, c_in)))
    return wrapper.batch_stats["kernel", "sigma"][...]


FLAX = {steps: functools.partial(flax_norm, steps) for steps in (1, 10)}


@functools.cache
def orthogonium_norm() -> Callable | None:
    """`orthogonium`'s `get_conv_sv`, or `None` with a note where it is not installed."""
    try:
        from orthogonium.layers.conv.singular_values import get_conv_sv
    except ImportError as error:
        tqdm.write(f"orthogonium is left out: {error} (pip install orthogonium)")
        return None
    return get_conv_sv


def orthogonium_call(weight, size, steps: int) -> Callable | None:
    if orthogonium_norm() is None:
        return None
    layer = torch.nn.Conv2d(*weight.shape[1::-1], weight.shape[2:], padding_mode="circular", bias=False)
    layer.weight = torch.nn.Parameter(weight)

    @torch.inference_mode()
    def call() -> float:
        return orthogonium_norm()(layer, n_iter=steps, return_stab_rank=False, imsize=size[0]).item()

    return call


NORM, CERTIFIED = "jaxsrn.spectral_norm", "jaxsrn.bounds.certified"
BOUNDS = {CERTIFIED: bounds.certified, "jaxsrn.bounds.gram_iteration": bounds.gram_iteration}
EXACT_PEERS = ("NumPy", "JAX", "PyTorch")
# What is known of the sign of the error in exact arithmetic, by method.
GUARANTEED = {
    CERTIFIED: "both ends, in floating point",
    "jaxsrn.bounds.gram_iteration": "above, in floating point",
    "Gram, T = 5 (PyTorch)": "above",
    "Gram, T = 6 (PyTorch)": "above",
    "orthogonium get_conv_sv, 6": "above",
    "power, 1 (PyTorch)": "below",
    "power, 10 (PyTorch)": "below",
    "power, 100 (PyTorch)": "below",
    "flax.nnx.SpectralNorm, 1": "no",
    "flax.nnx.SpectralNorm, 10": "no",
}


def exact_calls(case: Case) -> dict[str, Callable]:
    kernel, op = case.plain
    tensor = torch.tensor(kernel, device=DEVICE)
    return {
        "NumPy": functools.partial(numpy_two_liner, kernel.astype(np.float64), op.input_shape),
        "JAX": jax_call(two_liner, kernel, op),
        "PyTorch": functools.partial(torch_two_liner, tensor, op.input_shape),
        NORM: jax_call(jaxsrn.spectral_norm, case.kernel, case.op),
    }


def approximate_calls(case: Case) -> dict[str, Callable]:
    kernel, op = case.plain
    weight, size = torch.tensor(kernel.transpose(3, 2, 0, 1).copy(), device=DEVICE), op.input_shape
    calls = {name: jax_call(bound, case.kernel, case.op) for name, bound in BOUNDS.items()}
    for steps in (5, 6):
        calls[f"Gram, T = {steps} (PyTorch)"] = functools.partial(torch_gram, weight, size, steps)
    calls["orthogonium get_conv_sv, 6"] = orthogonium_call(weight, size, 6)
    for steps in (1, 10, 100):
        calls[f"power, {steps} (PyTorch)"] = functools.partial(torch_power, weight, size, steps)
    for steps, function in FLAX.items():
        calls[f"flax.nnx.SpectralNorm, {steps}"] = jax_call(function, kernel, op)
    return {name: call for name, call in calls.items() if call is not None}


# The clock


class Timed(NamedTuple):
    """Median seconds of a call, and what it returned."""

    seconds: float
    result: Any


def timed(call: Callable, repeat: int = 1) -> Timed:
    start = time.perf_counter()
    for _ in range(repeat):
        result = jax.block_until_ready(call())
    return Timed((time.perf_counter() - start) / repeat, result)


def race(calls: dict[str, Callable], effort: Effort) -> dict[str, Timed]:
    """All calls in turns. The first round warms up; it counts only for what is too slow to be called again."""
    first = {name: timed(call) for name, call in calls.items()}
    rounds = {name: min(effort.rounds, int(effort.seconds / run.seconds)) for name, run in first.items()}
    times = {name: [] if rounds[name] else [run.seconds] for name, run in first.items()}
    for i in range(effort.rounds):
        for name, call in calls.items():
            if i < rounds[name]:
                # Threads of the libraries (OpenBLAS above all) go on spinning for a while after their last call.
                time.sleep(0.05)
                times[name].append(timed(call, math.ceil(0.01 / first[name].seconds)).seconds)
    return {name: Timed(float(np.median(times[name])), run.result) for name, run in first.items()}


@functools.cache
def raced(case: Case, effort: Effort) -> dict[str, Timed]:
    """Every exact and approximate method on one kernel."""
    return race(exact_calls(case) | approximate_calls(case), effort)


def ends(result) -> tuple[float, float]:
    """An interval's lower and upper end; twice the value of anything else."""
    return (float(result.lower), float(result.upper)) if hasattr(result, "lower") else (float(result),) * 2


def relative_errors(entry: Entry, name: str, effort: Effort) -> np.ndarray:
    """Signed, per kernel and end."""
    found = [np.array(ends(raced(case, effort)[name].result)) / case.norm - 1 for case in entry.cases]
    return np.array(found)


def total(entry: Entry, name: str, effort: Effort) -> float:
    return sum(raced(case, effort)[name].seconds for case in entry.cases)


def fastest_peer(entry: Entry, effort: Effort) -> float:
    return min(total(entry, peer, effort) for peer in EXACT_PEERS)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{1 if seconds >= 0.01 else 3}f} ms"


# Exact and approximate norms


EXACT = """\
One spectral norm with circular padding at (n, c, k): an n x n image, c to c channels, k x k taps. Medians of
{rounds} interleaved rounds, fewer where they would take more than {seconds:g} s, and one call where that does (many
of NumPy's). NumPy works in complex128, JAX and PyTorch in complex64 on float32 kernels. Kernels with strides go to the
peers split by phase, with the same singular values. Times of several kernels are sums; the ratios say how many times
longer the peer takes."""

ERRORS = """\
Relative errors against NumPy's SVDs in float64, the largest of the row's kernels:"""

APPROXIMATE = """\
The same kernels in the same rounds. `ratio`: to the fastest exact peer. `error`: relative and signed, the worst of the
row's kernels; of an interval both ends. `guaranteed`: on which side of the norm the result is, in exact arithmetic or
where rounding is accounted for. Gram iteration and power iteration are written from the papers (Delattre et al. 2023,
Ryu et al. 2019) and their authors' code, the former on half of the frequencies; numbers are iterations from a cold
start. flax.nnx.SpectralNorm does not estimate this norm but that of the flattened kernel."""


def exact_row(entry: Entry, effort: Effort) -> list[str]:
    own = total(entry, NORM, effort)
    peers = [total(entry, peer, effort) for peer in EXACT_PEERS]
    ratios = [f"{peer / own:.1f}" for peer in (*peers, min(peers))]
    return [entry.name, *map(duration, (*peers, own)), *ratios, f"{entry.exact:g}" if entry.exact else ""]


def error_row(entry: Entry, effort: Effort) -> list[str]:
    worst = (np.max(np.abs(relative_errors(entry, name, effort))) for name in (*EXACT_PEERS, NORM))
    return [entry.name, *(f"{error:.1e}" for error in worst)]


def approximate_rows(entry: Entry, effort: Effort) -> list[list[str]]:
    rows = []
    for name, known in GUARANTEED.items():
        if name in raced(entry.cases[0], effort):
            seconds, errors = total(entry, name, effort), relative_errors(entry, name, effort)
            interval = name == CERTIFIED
            worst = [end[np.argmax(np.abs(end))] for end in (errors.T if interval else errors.T[:1])]
            width = f"{np.max(np.diff(1 + errors)):.1e}" if interval else ""
            ratio = fastest_peer(entry, effort) / seconds
            text = " / ".join(f"{error:+.1e}" for error in worst)
            rows.append([entry.name, name, duration(seconds), f"{ratio:.1f}", text, width, known])
    return rows


def exact_checks(rows: list[Entry], effort: Effort) -> Checks:
    checks = []
    for entry in rows:
        if entry.exact:
            own = total(entry, NORM, effort)
            ratio, to_numpy = fastest_peer(entry, effort) / own, total(entry, "NumPy", effort) / own
            text = f"spectral_norm, {entry.name}: {ratio:.1f} times the fastest exact peer, required {entry.exact:g}"
            checks.append((ratio >= entry.exact, f"{text} ({to_numpy:.0f} times NumPy)"))
    worst = max(np.max(np.abs(relative_errors(entry, NORM, effort))) for entry in rows)
    checks.append((worst <= TOLERANCE, f"spectral_norm on all of these: error {worst:.1e}, at most {TOLERANCE:g}"))
    return checks


def certified_checks(rows: list[Entry], effort: Effort) -> Checks:
    checks = []
    for entry in rows:
        if entry.certified:
            ratio = fastest_peer(entry, effort) / total(entry, CERTIFIED, effort)
            text = f"certified, {entry.name}: {ratio:.1f} times the fastest exact peer, required {entry.certified:g}"
            checks.append((ratio >= entry.certified, text))
    errors = np.concatenate([relative_errors(entry, CERTIFIED, effort) for entry in rows])
    inside = bool(np.all((errors[:, 0] <= 0) & (errors[:, 1] >= 0)))
    return [*checks, (inside, "certified holds the float64 norm of each of these kernels")]


def norms(effort: Effort) -> Part:
    rows = entries(effort)
    for case in tqdm([case for entry in rows for case in entry.cases], desc="norms", leave=False):
        raced(case, effort)
    header = ("kernel", *EXACT_PEERS, "jaxsrn", *(f"{peer} / jaxsrn" for peer in EXACT_PEERS), "fastest", "required")
    exact = table(header, (exact_row(entry, effort) for entry in rows))
    errors = table(("kernel", *EXACT_PEERS, "jaxsrn"), (error_row(entry, effort) for entry in rows))
    columns = ("kernel", "method", "time", "ratio", "error", "width", "guaranteed")
    approximate = table(columns, (row for entry in rows for row in approximate_rows(entry, effort)))
    about = EXACT.format(rounds=effort.rounds, seconds=effort.seconds)
    sections = [
        ("Exact", f"{about}\n\n{exact}\n\n{ERRORS}\n\n{errors}"),
        ("Approximate and bounds", f"{APPROXIMATE}\n\n{approximate}"),
    ]
    checks = exact_checks(rows, effort) + certified_checks(rows, effort)
    pictured = rows[1].cases[0]
    return Part(sections, checks, {"norms_error": error_figure(pictured, raced(pictured, effort))})


# Width of the interval


def width_cases(effort: Effort) -> dict[str, tuple[CircularConv, list[np.ndarray]]]:
    """Families of kernels of one shape, `{name: (operator, kernels)}`."""
    rng = np.random.default_rng(0)
    shapes = {
        "Gaussian (8, 8, 3)": (CircularConv((8, 8)), (3, 3, 8, 8)),
        "Gaussian (16, 16, 3)": (CircularConv((16, 16)), (3, 3, 16, 16)),
        "Gaussian (32, 4, 3)": (CircularConv((32, 32)), (3, 3, 4, 4)),
        "Gaussian (33, 32, 3)": (CircularConv((33, 33)), (3, 3, 32, 32)),
        "Gaussian (64, 16, 5)": (CircularConv((64, 64)), (5, 5, 16, 16)),
        "Gaussian (64, 8, 7), stride 2": (CircularConv((64, 64), strides=2), (7, 7, 8, 8)),
        "Gaussian 1-D (64, 16, 5)": (CircularConv((64,)), (5, 16, 16)),
    }
    count = 2 if effort.fast else 20
    chosen = dict(list(shapes.items())[:2]) if effort.fast else shapes
    families = {
        name: (op, [rng.standard_normal(shape).astype(np.float32) for _ in range(count)])
        for name, (op, shape) in chosen.items()
    }
    for cases in trained().values() if effort.network else ():
        if len(cases) > 1:
            for n in (32, 64):
                name = f"ResNet-50 kernels ({n}, {cases[0].kernel.shape[-1]}, 3)"
                families[name] = CircularConv((n, n)), [case.kernel for case in cases]
    return families


def widths(effort: Effort) -> Part:
    """How wide `certified` is at its default resolution."""
    rows, large = [], []
    for name, (op, kernels) in tqdm(width_cases(effort).items(), desc="widths", leave=False):
        found = [ends(jax_call(bounds.certified, kernel, op)()) for kernel in kernels]
        width = np.array([upper / lower - 1 for lower, upper in found])
        rows.append([name, len(width), f"{np.median(width):.1e}", f"{np.max(width):.1e}"])
        if op.input_shape[0] >= 32:
            large.append(width)
    text = "`upper / lower - 1` of `bounds.certified` at its default resolution, circular padding."
    text = f"{text}\n\n{table(('kernels', 'number', 'median', 'maximum'), rows)}"
    if not large:
        return Part([("Width of the interval", text)], [], {})
    median, largest = np.median(np.concatenate(large)), np.max(np.concatenate(large))
    check = f"certified, n >= 32: width {median:.1e} in the median, at most 1e-2 required; maximum {largest:.1e}"
    return Part([("Width of the interval", text)], [(median <= 0.01, check)], {})


# Correctness


def orthogonal(rng, size: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def gaussian_kernel(rng, shape):
    return rng.standard_normal(shape)


def one_tap(rng, shape, matrix=None):
    """A matrix at a random tap: the same singular values at every frequency."""
    kernel = np.zeros(shape)
    kernel[tuple(rng.integers(k) for k in shape[:-2])] = rng.standard_normal(shape[-2:]) if matrix is None else matrix
    return kernel


def orthogonal_tap(rng, shape):
    return one_tap(rng, shape, orthogonal(rng, max(shape[-2:]))[: shape[-2], : shape[-1]])


def orthogonal_taps(rng, shape):
    """A product of orthogonal matrices and of shifts of part of the channels: all singular values 1, on all taps."""
    size = max(shape[-2:])
    kernel = orthogonal(rng, size).reshape((*(1,) * (len(shape) - 2), size, size))
    for axis, k in enumerate(shape[:-2]):
        for _ in range(k - 1):
            basis = orthogonal(rng, size)[:, : size // 2]
            stays = kernel @ (basis @ basis.T)
            before, after = ([(0, 0) if a != axis else pad for a in range(kernel.ndim)] for pad in ((1, 0), (0, 1)))
            kernel = np.pad(stays, after) + np.pad(kernel - stays, before)
    return kernel[..., : shape[-2], : shape[-1]]


def equal_taps(rng, shape):
    return np.ones(shape)


def peaked(rng, shape):
    """Smooth taps times a matrix of rank 1, and a little noise: nearly all energy is at frequency 0."""
    taps = functools.reduce(np.multiply.outer, [np.hanning(k + 2)[1:-1] for k in shape[:-2]])
    matrix = np.outer(rng.standard_normal(shape[-2]), rng.standard_normal(shape[-1]))
    return taps[..., None, None] * matrix + 0.02 * rng.standard_normal(shape)


def waves(rng, shape):
    """Three waves with a matrix of rank 1 each, and a little noise: far apart, norms nearly the same."""
    places = np.meshgrid(*map(np.arange, shape[:-2]), indexing="ij")
    kernel = 0.02 * rng.standard_normal(shape)
    for _ in range(3):
        angle = sum(w * place for w, place in zip(rng.uniform(0, np.pi, len(places)), places, strict=True))
        left, right = (vector / np.linalg.norm(vector) for vector in map(rng.standard_normal, shape[-2:]))
        kernel += np.multiply.outer(np.cos(angle + rng.uniform(0, 2 * np.pi)), np.outer(left, right))
    return kernel


def trained_block(rng, shape):
    """A block of channels of a trained kernel, where there is one with these taps; else nothing."""
    if shape[:2] not in ((3, 3), (7, 7)) or len(shape) != 4 or (shape[0] == 7 and shape[2] > 3):
        return None
    pool = [case.kernel for cases in trained().values() for case in cases if case.kernel.shape[0] == shape[0]]
    kernel = pool[rng.integers(len(pool))]
    first = [rng.integers(have - want + 1) for have, want in zip(kernel.shape[2:], shape[2:], strict=True)]
    return kernel[:, :, first[0] : first[0] + shape[2], first[1] : first[1] + shape[3]].astype(np.float64)


KINDS = {
    "Gaussian": gaussian_kernel,
    "one tap": one_tap,
    "orthogonal, one tap": orthogonal_tap,
    "orthogonal, all taps": orthogonal_taps,
    "equal positive taps": equal_taps,
    "peaked": peaked,
    "trained": trained_block,
}
GEOMETRIES = {
    "even": (CircularConv((16, 16)), (3, 3, 8, 8)),
    "odd": (CircularConv((15, 15)), (3, 3, 8, 8)),
    "rectangular": (CircularConv((12, 9)), (3, 5, 6, 4)),
    "32 channels": (CircularConv((32, 32)), (3, 3, 32, 32)),
    "many to few channels": (CircularConv((14, 14)), (3, 3, 24, 6)),
    "strided": (CircularConv((16, 16), strides=2), (3, 3, 4, 8)),
    "strided, 7x7": (CircularConv((24, 24), strides=2), (7, 7, 3, 8)),
    "dilated": (CircularConv((15, 15), kernel_dilation=2), (3, 3, 4, 4)),
    "grouped": (CircularConv((12, 12), feature_group_count=2), (3, 3, 4, 8)),
    "depthwise": (CircularConv((16, 16), feature_group_count=8), (3, 3, 1, 8)),
    "1-D": (CircularConv((64,)), (5, 8, 8)),
    "1-D, one channel": (CircularConv((33,)), (5, 1, 1)),
    "3-D": (CircularConv((6, 6, 6)), (3, 3, 3, 4, 4)),
    "aliased": (CircularConv((4, 4)), (7, 7, 4, 4)),
    "aliased by dilation": (CircularConv((6, 5), kernel_dilation=3), (3, 3, 4, 4)),
}


def kernels_of(kind: str, rng, op: CircularConv, shape, count: int) -> list[np.ndarray]:
    """Kernels of a kind and of very different scale; groups are drawn one by one."""
    groups = op.feature_group_count
    kernels = []
    for _ in range(count):
        parts = [KINDS[kind](rng, (*shape[:-1], shape[-1] // groups)) for _ in range(groups)]
        if parts[0] is not None:
            kernels.append((np.concatenate(parts, axis=-1) * 10 ** rng.uniform(-3, 3)).astype(np.float32))
    return kernels


def kernel_errors(kernels: list[np.ndarray], op: CircularConv) -> np.ndarray:
    """Relative errors of `spectral_norm`, one call per kernel and all under `vmap`: the larger of the two."""
    stack = np.stack(kernels)
    batched = jax.jit(jax.vmap(jaxsrn.spectral_norm, (0, None)), static_argnums=1)(stack, op)
    single = [jax_call(jaxsrn.spectral_norm, kernel, op)() for kernel in kernels]
    exact = np.array([reference_norm(kernel, op) for kernel in kernels])
    return np.max([np.abs(np.asarray(found, np.float64) / exact - 1) for found in (batched, single)], axis=0)


def correctness(effort: Effort) -> Part:
    fast = effort.fast
    by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
    by_geometry: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    for name, (op, shape) in tqdm(list(GEOMETRIES.items())[:: 7 if fast else 1], desc="correctness", leave=False):
        drawn = []
        for kind in KINDS:
            count = 0 if kind == "trained" and not effort.network else 2 if fast else 6
            drawn += [(kind, kernel) for kernel in kernels_of(kind, rng, op, shape, count)]
        by_geometry[name] = kernel_errors([kernel for _, kernel in drawn], op).tolist()
        for (kind, _), error in zip(drawn, by_geometry[name], strict=True):
            by_kind[kind].append(error)
    if effort.network:
        cases = list(itertools.chain(*trained().values()))
        by_kind["trained, true size"] = [
            abs(float(jax_call(jaxsrn.spectral_norm, case.kernel, case.op)()) / case.norm - 1) for case in cases
        ]
    errors = list(itertools.chain(*by_kind.values()))
    misses = sum(not error <= TOLERANCE for error in errors)
    text = (
        "float32, scales from 1e-3 to 1e3, against NumPy's SVDs in float64; every kernel in a call of its own and\n"
        f"under `vmap`, the larger error of the two. Misses: errors above {TOLERANCE:g}, or NaN."
    )
    tables = error_table("kind", by_kind), error_table("geometry (circular)", by_geometry)
    check = misses == 0 and (fast or len(errors) >= 500), f"spectral_norm: {misses} misses in {len(errors)} kernels"
    return Part([("Correctness", "\n\n".join([text, *tables]))], [check], {})


def error_table(title: str, errors: dict[str, list[float]]) -> str:
    rows = [
        [name, len(found), f"{np.max(found):.1e}", sum(not error <= TOLERANCE for error in found)]
        for name, found in errors.items()
        if found
    ]
    return table((title, "kernels", "worst error", "misses"), rows)


# Cost against image size and channels


def image_cases(effort: Effort) -> tuple[list[Case], tuple[int, ...]]:
    if effort.fast:
        return [gaussian(7, 4, 3)], (7, 14, 28)
    cases = trained()["ResNet-50 (56, 64, 3)"] if effort.network else [gaussian(56, 64, 3)]
    return cases, (14, 28, 56, 112, 224, 512, 1024)


def image_times(effort: Effort) -> tuple[list[int], dict[str, list[float]], list[float]]:
    """Sizes, `{method: seconds}` (the two-liner only while it takes seconds), and the widths of the interval."""
    cases, sizes = image_cases(effort)
    times: dict[str, list[float]] = {}
    width, limit = [], (0.1 if effort.fast else 5.0)
    for n in tqdm(sizes, desc="image size", leave=False):
        op, calls = CircularConv((n, n)), {}
        for i, case in enumerate(cases):
            calls[f"spectral_norm, kernel {i + 1}"] = jax_call(jaxsrn.spectral_norm, case.kernel, op)
        calls["certified, kernel 1"] = jax_call(bounds.certified, cases[0].kernel, op)
        peer = "two-liner (JAX), kernel 1"
        known = times.get(peer, [])
        if not known or known[-1] * (n / sizes[len(known) - 1]) ** 2 <= limit:
            calls[peer] = jax_call(two_liner, cases[0].kernel, op)
        found = race(calls, effort)
        for name, run in found.items():
            times.setdefault(name, []).append(run.seconds)
        lower, upper = ends(found["certified, kernel 1"].result)
        width.append(upper / lower - 1)
    return list(sizes), times, width


def image_size(effort: Effort) -> Part:
    sizes, times, width = image_times(effort)
    name = image_cases(effort)[0][0].name
    rows = [[method, *map(duration, values), *["-"] * (len(sizes) - len(values))] for method, values in times.items()]
    rows.append(["certified, kernel 1: width", *(f"{w:.1e}" for w in width)])
    text = (
        f"{name}, circular padding, on images of other sizes than its own too, in turns at each size.\n"
        "`-`: would take more than some seconds."
    )
    checks = []
    for method, values in times.items():
        if not effort.fast and not method.startswith("two-liner"):
            ratio = values[-1] / values[sizes.index(224)]
            checks.append((ratio <= 2, f"{method}: n = 1024 takes {ratio:.2f} times as long as n = 224, at most 2"))
    figure = lines_figure(sizes, times, "image size n", name)
    sections = [("Cost against image size", f"{text}\n\n{table(('n', *map(str, sizes)), rows)}")]
    return Part(sections, checks, {"norms_image_size": figure})


def channels(effort: Effort) -> Part:
    """Sedghi's Figure 1."""
    counts = (2, 4) if effort.fast else (4, 8, 16, 32, 64, 128)
    times: dict[str, list[float]] = {}
    for c in tqdm(counts, desc="channels", leave=False):
        case = gaussian(16, c, 3)
        calls = exact_calls(case) | {CERTIFIED: jax_call(bounds.certified, case.kernel, case.op)}
        for name, run in race(calls, effort).items():
            times.setdefault(name, []).append(run.seconds)
    rows = [[name, *map(duration, values)] for name, values in times.items()]
    text = "Gaussian 3x3 kernels, n = 16, after Figure 1 of Sedghi, Gupta, Long 2019."
    figure = lines_figure(counts, times, "channels", "Gaussian 3x3 kernels, n = 16")
    sections = [("Cost against channels", f"{text}\n\n{table(('channels', *map(str, counts)), rows)}")]
    return Part(sections, [], {"norms_channels": figure})


# Memory


MEMORY_METHODS = {"spectral_norm": jaxsrn.spectral_norm, "two-liner (JAX)": two_liner, "two-liner (PyTorch)": None}


def memory_of_run(method: str, n: int, c: int) -> dict[str, float | None]:
    """Bytes by which this process grows at the peak of one run, after compilation; and what XLA plans."""
    case = gaussian(n, c, 3)
    planned = None
    if MEMORY_METHODS[method] is None:
        call = functools.partial(torch_two_liner, torch.tensor(case.kernel, device=DEVICE), case.op.input_shape)
        torch_two_liner(torch.ones((1, 1, 2, 2)), (1, 1))
    else:
        call = jax_call(MEMORY_METHODS[method], case.kernel, case.op)
        planned = call.func.memory_analysis().temp_size_in_bytes
    forget_peak()
    before = peak()
    jax.block_until_ready(call())
    return {"growth": peak() - before, "planned": planned}


def in_process(*arguments: str, **settings: str) -> Any:
    """What this script prints as JSON in a fresh process, with the given environment variables."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
    return json.loads(done.stdout)


def memory(effort: Effort) -> Part:
    if not CLEAR_REFS.exists() or jax.default_backend() != "cpu":
        return Part([("Memory", "Not measured: memory of the host, on Linux only.")], [], {})
    n, c = (16, 8) if effort.fast else (224, 64)
    found = {m: in_process("--memory", m, str(n), str(c)) for m in tqdm(MEMORY_METHODS, desc="memory", leave=False)}
    rows = []
    for name, run in found.items():
        planned = "" if run["planned"] is None else megabytes(run["planned"])
        rows.append([name, megabytes(run["growth"]), planned])
    text = (
        f"One spectral norm at ({n}, {c}, 3), each in a process of its own: growth of the resident memory (VmHWM) at\n"
        "the peak of the run, after compilation and with the kernel in place; beside it what XLA plans for temporaries."
    )
    header = ("method", "growth at the peak", "XLA's temporaries")
    text = f"{text}\n\n{table(header, rows)}"
    if effort.fast:
        return Part([("Memory", text)], [], {})
    least = min(run["growth"] for name, run in found.items() if name != "spectral_norm")
    share = found["spectral_norm"]["growth"] / least
    check = f"memory at ({n}, {c}, 3): {share:.1%} of the leanest two-liner's, under 10%"
    return Part([("Memory", text)], [(share < 0.1, check)], {})


# All singular values


# One thread of XLA's pool for each core and one more, none of OpenBLAS's.
FREE = {"NPROC": str((os.cpu_count() or 1) + 1), "OPENBLAS_NUM_THREADS": "1"}

SPECTRUM = """\
All singular values, sorted, of Gaussian kernels; `difference` relative to the largest. Each kernel in a process of its
own, with {settings}: a batch of jaxlib's SVDs (0.10.2) holds a thread of XLA's
pool while the others work, and OpenBLAS's threads spin against them. By default, with one thread a core, it is chance
which of the two methods has all cores; the last column is the ratio there."""


def spectrum_of_run(n: int, c: int, effort: Effort) -> tuple[float, float, float]:
    """Seconds of the two-liner and of `singular_values`, and by how much they differ."""
    case = gaussian(n, c, 3)
    calls = {
        name: jax_call(function, case.kernel, case.op)
        for name, function in (("jaxsrn", jaxsrn.singular_values), ("JAX", all_values))
    }
    # Short calls: more rounds.
    found = race(calls, effort if effort.fast else effort._replace(rounds=5 * effort.rounds))
    (own, values), (peer, theirs) = found["jaxsrn"], found["JAX"]
    return peer, own, float(jnp.max(jnp.abs(values - theirs)) / theirs[0])


def spectrum(effort: Effort) -> Part:
    sizes = ((8, 4), (9, 6)) if effort.fast else ((32, 16), (32, 64), (33, 32), (56, 64), (64, 32), (112, 16))
    rows, checks = [], []
    for n, c in tqdm(sizes, desc="all singular values", leave=False):
        arguments = ("--spectrum", str(n), str(c), *(["--fast"] if effort.fast else []))
        (peer, own, difference), by_default = in_process(*arguments, **FREE), in_process(*arguments)
        name, ratio = f"({n}, {c}, 3)", peer / own
        default_ratio = f"{by_default[0] / by_default[1]:.2f}"
        rows.append([name, duration(peer), duration(own), f"{ratio:.2f}", f"{difference:.1e}", default_ratio])
        if not effort.fast:
            text = (
                f"singular_values, {name}: {ratio:.2f} times the two-liner, required 1.8 ({default_ratio} by default)"
            )
            checks.append((ratio >= 1.8, text))
        difference = max(difference, by_default[2])
        checks.append((difference <= TOLERANCE, f"singular_values, {name}: as the two-liner's, {difference:.1e}"))
    header = ("kernel", "two-liner (JAX)", "jaxsrn.singular_values", "ratio", "difference", "ratio by default")
    text = SPECTRUM.format(settings=" and ".join(f"{name}={value}" for name, value in FREE.items()))
    return Part([("All singular values", f"{text}\n\n{table(header, rows)}")], checks, {})


# Zero padding


class Counting(ZeroPaddedConv):
    """Counts, when it runs, the multiplications by which it or an adjoint is applied to images, up to a factor."""

    count = 0

    @property
    def silent(self) -> ZeroPaddedConv:
        return ZeroPaddedConv(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def apply(self, kernel, x, *, precision=None):
        self._count(kernel.shape, x)
        return self.silent.apply(kernel, x, precision=precision)

    def transpose(self, kernel, y, *, precision=None):
        self._count(kernel.shape, y)
        return self.silent.transpose(kernel, y, precision=precision)

    def kernel_gradient(self, kernel_shape, x, y, **options):
        self._count(kernel_shape, x)
        return self.silent.kernel_gradient(kernel_shape, x, y, **options)

    def _count(self, kernel_shape, images):
        # The same image and taps: products with a layer of fewer channels take as much less as its kernel is smaller.
        jax.debug.callback(self._add, math.prod(images.shape[: -self.num_axes - 1]) * math.prod(kernel_shape))

    @staticmethod
    def _add(number):
        Counting.count += int(number)


jax.tree_util.register_static(Counting)


# Up to 512 x 512 entries norms are proven, above searched.
PROVEN = {
    "SAME, even": (ZeroPaddedConv((8, 8)), (3, 3, 4, 4)),
    "SAME, odd": (ZeroPaddedConv((9, 7)), (3, 3, 6, 3)),
    "SAME, 5x5": (ZeroPaddedConv((8, 8)), (5, 5, 3, 3)),
    "VALID": (ZeroPaddedConv((10, 10), padding="VALID"), (3, 3, 4, 4)),
    "CAUSAL": (ZeroPaddedConv((48,), padding="CAUSAL"), (5, 4, 4)),
    "strided": (ZeroPaddedConv((12, 12), strides=2), (3, 3, 3, 6)),
    "dilated": (ZeroPaddedConv((10, 10), kernel_dilation=2), (3, 3, 3, 3)),
    "transposed": (ZeroPaddedConv((5, 5), padding=((1, 2), (1, 2)), input_dilation=2), (3, 3, 4, 3)),
    "grouped": (ZeroPaddedConv((8, 8), feature_group_count=2), (3, 3, 3, 6)),
    "3-D": (ZeroPaddedConv((4, 4, 4)), (3, 3, 3, 3, 3)),
}
SEARCHED = {
    "SAME, even": (ZeroPaddedConv((10, 10)), (3, 3, 6, 6)),
    "SAME, odd": (ZeroPaddedConv((15, 9)), (3, 3, 6, 4)),
    "SAME, 5x5": (ZeroPaddedConv((14, 14)), (5, 5, 3, 3)),
    "VALID": (ZeroPaddedConv((16, 16), padding="VALID"), (3, 3, 3, 4)),
    "CAUSAL": (ZeroPaddedConv((160,), padding="CAUSAL"), (5, 4, 4)),
    "strided": (ZeroPaddedConv((24, 24), strides=2), (3, 3, 2, 4)),
    "dilated": (ZeroPaddedConv((15, 15), kernel_dilation=2), (3, 3, 3, 3)),
    "transposed": (ZeroPaddedConv((9, 9), padding=((1, 2), (1, 2)), input_dilation=2), (3, 3, 8, 2)),
    "grouped": (ZeroPaddedConv((12, 12), feature_group_count=2), (3, 3, 2, 4)),
    "3-D": (ZeroPaddedConv((6, 6, 6)), (3, 3, 3, 3, 3)),
}


def dense_errors(op: ZeroPaddedConv, shape, count: int) -> list[float]:
    """Relative errors of `spectral_norm` against the SVD of the explicit matrix."""
    rng = np.random.default_rng(0)
    kinds = itertools.cycle((gaussian_kernel, peaked, waves))
    errors = []
    for kind in itertools.islice(kinds, count):
        kernel = kind(rng, shape).astype(np.float32)
        # to_dense only moves entries: float32 loses nothing.
        exact = np.linalg.norm(np.asarray(op.to_dense(kernel), np.float64), 2)
        errors.append(abs(float(jax_call(jaxsrn.spectral_norm, kernel, op)()) / exact - 1))
    return errors


def errors_by_geometry(geometries: dict, effort: Effort) -> dict[str, list[float]]:
    chosen, count = (list(geometries.items())[:2], 3) if effort.fast else (geometries.items(), 60)
    return {name: dense_errors(*where, count) for name, where in tqdm(chosen, desc="zero padding", leave=False)}


def arpack_norm(kernel: np.ndarray, op: ZeroPaddedConv) -> float:
    """The norm with SAME padding and an odd number of taps, by ARPACK and PyTorch's convolution in float64."""
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1), dtype=torch.float64)

    def product(convolution, channels):
        def apply(x):
            return convolution(torch.from_numpy(x.reshape((1, channels, *op.input_shape)))).numpy().reshape(-1)

        return apply

    sizes = [c * math.prod(op.input_shape) for c in weight.shape[:2]]
    forward, adjoint = map(product, torch_maps(weight, circular=False), weight.shape[1::-1])
    operator = scipy.sparse.linalg.LinearOperator(sizes, forward, adjoint, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(sizes))
    return float(scipy.sparse.linalg.svds(operator, k=1, tol=1e-9, v0=start, return_singular_vectors=False)[0])


def own_products(kernel: np.ndarray, op: ZeroPaddedConv, tolerance: float | None = None) -> tuple[float, float]:
    """The norm, and the products with the operator that it took; those of the residual are none of it."""
    counting = Counting(op.input_shape, padding=op.padding)
    jax.effects_barrier()
    before = Counting.count
    if tolerance is None:
        value, beside = jaxsrn.spectral_norm(jnp.asarray(kernel), counting), 0
    else:
        triplet = jaxsrn.leading_triplet(jnp.asarray(kernel), counting, tolerance=tolerance, proven=False)
        value, beside = triplet.value, 2
    jax.effects_barrier()
    return float(value), (Counting.count - before) / kernel.size - beside


def fewest_products(kernel: np.ndarray, op: ZeroPaddedConv, norm: float) -> float:
    """With the largest `tolerance` at which the norm is within 1e-5, which takes the norm to know."""
    for exponent in range(1, 17):
        value, products = own_products(kernel, op, 0.5**exponent)
        if abs(value / norm - 1) <= TOLERANCE:
            return products
    return own_products(kernel, op)[1]


@functools.partial(jax.jit, static_argnums=1)
def power_step(kernel, op, v):
    """`(||T v||, the next unit vector)`."""
    image = op.apply(kernel, v, precision="highest")
    back = op.transpose(kernel, image, precision="highest")
    return jnp.linalg.norm(image), back / jnp.linalg.norm(back)


def power_products(kernel: np.ndarray, op: ZeroPaddedConv, norm: float, error: float = 1e-3, limit: int = 2_000) -> int:
    """Products that power iteration from a random image needs to come that close to the norm, or `2 * limit`."""
    v = jax.random.normal(jax.random.key(0), op.in_shape(kernel.shape))
    v = v / jnp.linalg.norm(v)
    for step in range(limit):
        value, v = power_step(kernel, op, v)
        if value >= (1 - error) * norm:
            return 2 * step + 1
    return 2 * limit


def product_cases(effort: Effort) -> list[Case]:
    if effort.fast:
        return [gaussian(8, 4, 3)]
    cases = [gaussian(n, c, k) for n, c, k in ((14, 32, 3), (28, 32, 3), (32, 64, 3), (56, 16, 5), (112, 16, 3))]
    # The first of each stage: the float64 reference takes most of the time.
    return cases + ([stage[0] for stage in trained().values() if len(stage) > 1] if effort.network else [])


def padded_times(case: Case, op: ZeroPaddedConv, steps: int, effort: Effort) -> list[str]:
    """Of power iteration and of `spectral_norm`, and how many times longer the former takes."""
    weight = torch.tensor(case.kernel.transpose(3, 2, 0, 1).copy(), device=DEVICE)
    calls = {
        "power": functools.partial(torch_power, weight, op.input_shape, max(steps, 1), circular=False),
        "own": jax_call(jaxsrn.spectral_norm, case.kernel, op),
    }
    power, own = (run.seconds for run in race(calls, effort).values())
    return [duration(power), duration(own), f"{power / own:.1f}"]


def zero_padding(effort: Effort) -> Part:
    proven, searched = (errors_by_geometry(geometries, effort) for geometries in (PROVEN, SEARCHED))
    rows, times, shares, errors, inside = [], [], [], [], True
    for case in tqdm(product_cases(effort), desc="products", leave=False):
        op = ZeroPaddedConv(case.op.input_shape)
        exact = arpack_norm(case.kernel, op)
        value, own = own_products(case.kernel, op)
        fewest = fewest_products(case.kernel, op, exact)
        power = power_products(case.kernel, op, exact)
        errors.append(abs(value / exact - 1))
        shares.append((fewest / power, own / power) if fewest else (math.inf, math.inf))
        lower, upper = ends(jax_call(bounds.certified, case.kernel, op)())
        inside = inside and lower <= exact <= upper
        both = [f"{count:.0f} ({share:.0%})" for count, share in zip((fewest, own), shares[-1], strict=True)]
        rows.append([case.name, power, *both, f"{errors[-1]:.1e}", f"{upper / lower - 1:.1e}"])
        times.append([case.name, *padded_times(case, op, power // 2, effort)])
    header = ("kernel, SAME", "power iteration, to 1e-3", "Lanczos, to 1e-5", "spectral_norm", "error", "width")
    clock = ("kernel, SAME", "power iteration, to 1e-3 (PyTorch)", "spectral_norm", "ratio")
    text = (
        "float32; Gaussian, peaked kernels and sums of three waves, against the SVD of the whole matrix in float64.\n"
        "Small layers, whose norms are proven:\n\n"
        f"{error_table('geometry (zero padding)', proven)}\n\n"
        "Larger layers, whose norms are searched without a proof:\n\n"
        f"{error_table('geometry (zero padding)', searched)}\n\n"
        "Products with the operator or its adjoint, counted as they run, with their share of power iteration's. Those\n"
        "with the layer of few channels, in which a wide one is searched first, count as far as they multiply. Power\n"
        "iteration starts from a random image and stops 0.1% below the norm (or after 4000 products). Lanczos, the\n"
        "method of `leading_triplet`, stops at the largest `tolerance` of 1/2, 1/4, ... at which the norm is within\n"
        "1e-5. Both as only those can who know the norm; `spectral_norm` stops by itself, when the vectors are there,\n"
        "which are its gradient. Its error is against ARPACK in float64; the width is that of `bounds.certified`.\n\n"
        f"{table(header, rows)}\n\n"
        "Times; of power iteration, as published, with the number of steps that it takes to 1e-3:\n\n"
        f"{table(clock, times)}"
    )
    worst = {
        "small layers": max(itertools.chain(*proven.values())),
        "larger layers": max(itertools.chain(*searched.values())),
        "each of these kernels": max(errors),
    }
    checks = [
        *(
            (error <= TOLERANCE, f"zero padding, {name}: error {error:.1e}, at most {TOLERANCE:g}")
            for name, error in worst.items()
        ),
        (inside, "zero padding: certified holds ARPACK's norm of each of these kernels"),
    ]
    if not effort.fast:
        for name, own in zip(("to 1e-5", "spectral_norm"), zip(*shares, strict=True), strict=True):
            met = sum(share <= 0.2 for share in own)
            found = f"at most 20% for {met} of {len(own)} kernels; median {np.median(own):.0%}, largest {max(own):.0%}"
            checks.append((met == len(own), f"zero padding: products, {name}, of power iteration's for 1e-3: {found}"))
    return Part([("Zero padding", text)], checks, {})


# Pictures


# Colour and marker by the beginning of a method's name; the first that fits.
STYLES = {
    "jaxsrn.bounds.gram": (ORANGE, "s"),
    "jaxsrn.bounds.cert": (ORANGE, "D"),
    "certified": (ORANGE, "D"),
    "jaxsrn.spectral": (RED, "*"),
    "spectral_norm": (RED, "*"),
    "NumPy": (BLACK, "o"),
    "JAX": (BLUE, "s"),
    "two-liner": (BLUE, "s"),
    "PyTorch": (SKY, "^"),
    "Gram, T = 5": (GREEN, "^"),
    "Gram, T = 6": (GREEN, "v"),
    "orthogonium": (GREEN, "x"),
    "power, 100": (PURPLE, "P"),
    "power, 10": (PURPLE, "X"),
    "power": (PURPLE, "+"),
    "flax.nnx.SpectralNorm, 10": (BLACK, "X"),
    "flax": (BLACK, "+"),
}


def style(name: str) -> dict[str, str]:
    colour, marker = next(look for start, look in STYLES.items() if name.startswith(start))
    return {"color": colour, "marker": marker, "label": name}


def error_figure(case: Case, runs: dict[str, Timed]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for name, run in runs.items():
        # No error at all has no place on a logarithmic axis.
        errors = [max(abs(end / case.norm - 1), 1e-16) for end in ends(run.result)]
        axes.plot([1e3 * run.seconds] * 2, errors, linestyle=":", markersize=9, markeredgewidth=1.5, **style(name))
    axes.set(xscale="log", yscale="log", xlabel="time of one norm, ms", ylabel="relative error")
    axes.set_title(f"{case.name}: time against error; an interval shows both ends")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def lines_figure(xs: Iterable[int], times: dict[str, list[float]], label: str, title: str) -> plt.Figure:
    xs = list(xs)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, values in times.items():
        dash = {"2": "--", "3": ":"}.get(name[-1], "-") if "kernel" in name else "-"
        milliseconds = 1e3 * np.array(values)
        axes.plot(xs[: len(values)], milliseconds, dash, **style(name))
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="time of one norm, ms", title=title)
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def save(figures: dict[str, plt.Figure], keep: bool) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name, figure in figures.items():
        # Drawn even where nothing is kept: a smoke test of the pictures too. Metadata would differ in every version.
        figure.savefig(RESULTS / f"{name}.png" if keep else io.BytesIO(), dpi=130, metadata={"Software": None})
        plt.close(figure)


# Report


PARTS = {
    "norms": norms,
    "widths": widths,
    "correctness": correctness,
    "image-size": image_size,
    "channels": channels,
    "memory": memory,
    "spectrum": spectrum,
    "zero-padding": zero_padding,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="tiny kernels, no download, nothing recorded")
    parser.add_argument("--no-network", action="store_true", help="without the trained ResNet-50, nothing recorded")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--memory", nargs=3, metavar=("METHOD", "N", "C"), help=argparse.SUPPRESS)
    parser.add_argument("--spectrum", nargs=2, type=int, metavar=("N", "C"), help=argparse.SUPPRESS)
    return parser.parse_args()


def describe_setting() -> str:
    threads = {name: os.environ[name] for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ}
    threads = ", ".join(f"{name}={value}" for name, value in threads.items()) or "default thread settings"
    # Threads of the peers wait for each other: another busy process slows PyTorch down a hundred times and more.
    load = f"load average {os.getloadavg()[0]:.1f} before the run"
    return f"torch {torch.__version__} with {torch.get_num_threads()} threads on {DEVICE}; {threads}; {load}."


def main() -> None:
    args = parse()
    if args.memory:
        method, n, c = args.memory
        print(json.dumps(memory_of_run(method, int(n), int(c))))
        return
    keep = not (args.fast or args.no_network)
    effort = Effort(True, False, 2, 0.1) if args.fast else Effort(False, not args.no_network, 5, 0.5)
    if args.spectrum:
        print(json.dumps(spectrum_of_run(*args.spectrum, effort)))
        return
    met = [run(name, effort, keep) for name in args.only or PARTS]
    sys.exit(0 if all(met) else 1)


def run(name: str, effort: Effort, keep: bool) -> bool:
    """Prints one part, and records it where it is to be kept; whether all its requirements are met."""
    setting = describe_setting()
    part = PARTS[name](effort)
    pictures = [("Pictures", "\n\n".join(f"![{figure}]({figure}.png)" for figure in part.figures))]
    requirements = [("Requirements", "\n".join(verdict(*check) for check in part.checks))]
    sections = [("Setting", setting), *part.sections]
    sections += (pictures if part.figures else []) + (requirements if part.checks else [])
    text = document(f"Norms: {name}", f"python benchmarks/norms.py --only {name}", sections)
    print(text, flush=True)
    save(part.figures, keep)
    if keep:
        record(f"norms_{name.replace('-', '_')}", text)
    return all(met for met, _ in part.checks)


if __name__ == "__main__":
    main()

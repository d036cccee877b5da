"""Does jaxsrn work on one GPU: how fast from a cold start and warm, and how close to a CPU?

    python benchmarks/gpu.py          # at most six minutes on a machine with one GPU; records the tables
    python benchmarks/gpu.py --fast   # tiny sizes, a few minutes, on a CPU too; nothing recorded

Every part has its share of five minutes: what would start after it is skipped, and the report says what that was.
Norms are compared with PyTorch's SVDs on the same GPU, or with JAX's where PyTorch is missing or has no GPU; all
numbers are compared with those of the same functions on the CPU of the same machine. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _clock import interleaved, race, timed
from _report import Checks, duration, publish, table
from _resnets import resnet50
from _training_step import TrainingStep, first_of
from _wrapping import PLAIN, VARIANTS, wrapped
from compilation.functions import FUNCTIONS, Layer, lowered
from flax import nnx
from norms.cases import Case, gaussian, reference_norm
from norms.in_jax import ends, jax_call, relative_width, two_liner
from norms.kinds import KINDS

import jaxsrn
from jaxsrn import bounds

TOLERANCE = 1e-5  # relative error that a float32 norm or stable rank may have
ROUNDS, SECONDS = 5, 2.0  # of each warm call


class Row(NamedTuple):
    """One measurement: the cells behind its name, and what it requires."""

    cells: list[str]
    checks: Checks


class Part(NamedTuple):
    """A table: `jobs(fast)` gives what is measured for each row by its name. No row starts after `until` seconds."""

    about: str
    header: tuple[str, ...]
    jobs: Callable[[bool], dict[str, Callable[[], Row]]]
    until: float


def on_cpu(call: Callable, *arrays):
    """What a function of arrays gives on the CPU of this machine."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.block_until_ready(call(*jax.device_put(arrays, cpu)))


def difference(here, there) -> float:
    """The largest difference of two results, relative to the largest number of the second."""
    here, there = np.asarray(here, np.float64), np.asarray(there, np.float64)
    return float(np.max(np.abs(here - there)) / np.max(np.abs(there)))


def within(value: float, limit: float, text: str) -> tuple[bool, str]:
    return bool(value <= limit), f"{text}: {value:.1e}, at most {limit:g}"


# First calls


def compared(result):
    """The part of a result that has one value: of what is normalized the distance, of a step its kernel, no state."""
    if isinstance(result, jaxsrn.SRNResult):
        return result.distance
    if isinstance(result, jaxsrn.SRNCState):
        return None
    return result[0] if isinstance(result, tuple) and not hasattr(result, "lower") else result


def first_call(name: str, layer: Layer, padding: str) -> Row:
    """The first and the second call on the device, then on the CPU, and the difference of the results."""
    op, (call, prepare) = layer.operators[padding], FUNCTIONS[name]

    def twice(kernel):
        prepared = jax.block_until_ready(prepare(kernel, op))
        return [timed(lambda: call(kernel, op, *prepared)) for _ in range(2)]

    kernel = layer.kernel()
    here, there = twice(kernel), on_cpu(twice, kernel)
    times = [duration(run.seconds) for run in (*here, *there)]
    values = [compared(runs[0].result) for runs in (here, there)]
    if values[0] is None:
        return Row([*times, ""], [])
    found = difference(*values)
    # Intervals may end at different widths; what iterates may stop a step apart.
    limit = {"bounds.certified": 0.02, "spectral_norm": TOLERANCE, "stable_rank": TOLERANCE}.get(name, 1e-3)
    return Row([*times, f"{found:.1e}"], [within(found, limit, f"{name}, {padding}: difference to the CPU")])


def first_calls(fast: bool) -> dict[str, Callable[[], Row]]:
    layer = Layer(3, 4, 8) if fast else Layer(3, 64, 32)
    names = ("spectral_norm", "stable_rank", "bounds.certified", "srnc_state", "srnc_step", "srnc")
    return {
        f"{name}, {padding}": functools.partial(first_call, name, layer, padding)
        for padding in layer.operators
        for name in names
    }


# Norms


@functools.cache
def torch_peer() -> Callable | None:
    """`(kernel, image size) -> norm` by PyTorch's SVDs on this GPU, or `None` where it cannot use one."""
    try:
        import torch
    except ImportError:
        return None
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        return None
    from norms.peers import DEVICE, torch_two_liner

    return lambda kernel, size: torch_two_liner(torch.tensor(kernel, device=DEVICE), size)


def peer_name() -> str:
    """Whose SVDs norms are compared with."""
    return "jnp.linalg.svd" if torch_peer() is None else "torch.linalg.svdvals"


def norm(case: Case) -> Row:
    """The norm and the interval beside SVDs at all frequencies; errors are to NumPy's in float64."""
    torch_norm = torch_peer()
    if torch_norm is None:
        peer = jax_call(two_liner, case.kernel, case.op)
    else:
        peer = functools.partial(torch_norm, case.kernel, case.op.input_shape)
    calls = {"peer": peer, "norm": jax_call(jaxsrn.spectral_norm, case.kernel, case.op)}
    calls["certified"] = jax_call(bounds.certified, case.kernel, case.op)
    found = race(calls, ROUNDS, SECONDS)
    errors = [abs(float(found[name].result) / case.norm - 1) for name in ("peer", "norm")]
    times = [run.seconds for run in found.values()]
    cells = [*map(duration, times), f"{times[0] / times[1]:.1f}", *(f"{error:.1e}" for error in errors)]
    lower, upper = ends(found["certified"].result)
    checks = [
        within(errors[1], TOLERANCE, f"spectral_norm, {case.name}: error"),
        (lower <= case.norm <= upper, f"certified holds the float64 norm, {case.name}"),
    ]
    return Row(cells, checks)


def norms(fast: bool) -> dict[str, Callable[[], Row]]:
    """The Gaussian kernels of `benchmarks/norms`, and such kernels of the sizes of a ResNet-50."""
    sizes = ((16, 16, 3), (32, 64, 3), (56, 64, 3), (32, 128, 3), (224, 16, 7), (28, 128, 3), (14, 256, 3), (7, 512, 3))
    cases = [gaussian(*size) for size in (((8, 4, 3), (9, 6, 3)) if fast else sizes)]
    return {case.name: functools.partial(norm, case) for case in cases}


# Certificates


def certificate(kind: str, layer: Layer) -> Row:
    """The interval in float32 and in float64, against NumPy's SVDs in float64 on the float32 kernel."""
    kernel, op = KINDS[kind](np.random.default_rng(0), layer.shape).astype(np.float32), layer.operators["circular"]
    exact = reference_norm(kernel, op)
    single = bounds.certified(jnp.asarray(kernel), op)
    with jax.enable_x64(True):
        double = bounds.certified(jnp.asarray(kernel, jnp.float64), op)
        both = {"float32": (ends(single), relative_width(single)), "float64": (ends(double), relative_width(double))}
    checks = [
        (lower <= exact <= upper, f"certified holds the float64 norm, {kind}, {dtype}")
        for dtype, ((lower, upper), _) in both.items()
    ]
    sides = [f"{end / exact - 1:+.1e}" for found, _ in both.values() for end in found]
    return Row([f"{width:.1e}" for _, width in both.values()] + sides, checks)


def certificates(fast: bool) -> dict[str, Callable[[], Row]]:
    layer = Layer(3, 4, 8) if fast else Layer(3, 32, 32)
    kinds = [kind for kind in KINDS if kind != "trained"]
    return {kind: functools.partial(certificate, kind, layer) for kind in kinds}


# Normalization


def normalization(layer: Layer, padding: str) -> Row:
    """Norm and `srnc`, warm, and the distance beside the CPU's."""
    op, kernel = layer.operators[padding], layer.kernel()

    def normalized(kernel):
        return lowered(kernel, op)

    calls = {"norm": lambda: jaxsrn.spectral_norm(kernel, op), "srnc": lambda: normalized(kernel)}
    found = race(calls, ROUNDS, SECONDS)
    result, there = found["srnc"].result, on_cpu(normalized, kernel)
    times, apart = [run.seconds for run in found.values()], difference(result.distance, there.distance)
    cells = [*map(duration, times), f"{times[1] / times[0]:.1f}", str(result.num_steps), f"{apart:.1e}"]
    return Row(cells, [within(apart, 1e-3, f"srnc, {layer}, {padding}: difference of the distance to the CPU's")])


def normalizations(fast: bool) -> dict[str, Callable[[], Row]]:
    layers = [Layer(3, 4, 8)] if fast else [Layer(3, 64, 32), Layer(3, 64, 56)]
    return {
        f"({layer.size}, {layer.channels}, {layer.taps}), {padding}": functools.partial(normalization, layer, padding)
        for layer in layers
        for padding in layer.operators
    }


# Training


@functools.cache
def network(fast: bool) -> tuple[nnx.Module, jax.Array]:
    """A ResNet-50 and a batch of images."""
    make, batch, size = (functools.partial(resnet50, blocks=(1,), width=8), 2, 32) if fast else (resnet50, 128, 224)
    return make(rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (batch, size, size, 3))


@functools.cache
def plain_step(fast: bool) -> tuple[TrainingStep, float]:
    """The plain network's step, after its first call, and the seconds until then."""
    return first_of(*network(fast))


def training(fast: bool, variant: str) -> Row:
    """Seconds to wrap every layer, of the first step and of the next ones, in turns with the plain network's."""
    (model, x), (plain, plain_first) = network(fast), plain_step(fast)
    wrap = timed(lambda: wrapped(model, x, variant))
    step, first = first_of(wrap.result, x)
    times = interleaved({PLAIN: plain.run, variant: step.run}, 2 * ROUNDS)
    ratio = np.median(times[variant] / times[PLAIN])
    steps = [f"{1e3 * np.median(seconds):.1f} ms" for seconds in times.values()]
    first_times = [duration(seconds) for seconds in (wrap.seconds, plain_first, first)]
    return Row([*first_times, *steps, f"{ratio:.3f}", f"{step.flops / plain.flops:.4f}"], [])


def trainings(fast: bool) -> dict[str, Callable[[], Row]]:
    return {name: functools.partial(training, fast, name) for name in VARIANTS if name != PLAIN}


# All parts

PARTS = {
    "Norms": Part(
        "One norm with circular padding at (n, c, k): an n x n image, c to c channels, k x k taps, Gaussian kernels.\n"
        "Compiled; medians of interleaved rounds. The peer takes the SVDs at all frequencies. `ratio`: how many times\n"
        "longer it takes than `spectral_norm`. Errors: relative, against NumPy's SVDs in float64.",
        ("kernel", "peer", "spectral_norm", "certified", "ratio", "peer: error", "spectral_norm: error"),
        norms,
        until=80,
    ),
    "First calls": Part(
        "Functions as a user calls them, outside of `jax.jit`, 3x3 taps, 64 to 64 channels, 32x32 samples (with\n"
        "--fast 4 to 4, 8x8), in one process and in this order: a function uses what those above it have compiled.\n"
        "Then the same on the CPU.",
        ("function", "first call", "second call", "CPU: first", "CPU: second", "difference to the CPU"),
        first_calls,
        until=160,
    ),
    "Training": Part(
        "A ResNet-50 on 128 images of 224x224 samples (with --fast one block on 2 images of 32x32), SGD, float32,\n"
        "StableRankNorm on every layer. Wrapping, the first steps (compilation included), then steps in turns; `time`\n"
        "is the median ratio within a round.",
        ("StableRankNorm", "wrapping", "plain: first", "first step", "plain: step", "step", "time", "FLOPs"),
        trainings,
        until=240,
    ),
    "srnc": Part(
        "To a tenth of the largest stable rank, at (n, c, k), Gaussian kernels; warm, medians of interleaved rounds.\n"
        "`difference`: of the distance, relative to the CPU's.",
        ("kernel", "spectral_norm", "srnc", "srnc / norm", "steps", "difference"),
        normalizations,
        until=280,
    ),
    "Certificates": Part(
        "`bounds.certified` of kernels of 3x3 taps, circular, in float32 and in float64 on the same device: widths,\n"
        "and both ends relative to the norm by NumPy's SVDs in float64.",
        ("kernel", "width, 32", "width, 64", "lower, 32", "upper, 32", "lower, 64", "upper, 64"),
        certificates,
        until=300,
    ),
}


def rows_of(name: str, part: Part, fast: bool, clock: Callable[[], float]) -> Iterable[tuple[str, Row | None]]:
    """The rows of a part by name, each printed as it comes; `None` for what is skipped or fails."""
    for job, measure in part.jobs(fast).items():
        if clock() > part.until:
            print(f"{clock():5.0f} s  {name}: {job}: skipped", flush=True)
            yield job, None
            continue
        start = clock()
        try:
            row = measure()
        except Exception as error:  # one that fails must not take the time of the others with it
            row = Row(["failed", *[""] * (len(part.header) - 2)], [(False, f"{job}: {type(error).__name__}: {error}")])
            print(row.checks[0][1], flush=True)
        print(f"{clock():5.0f} s  {name}: {job} ({clock() - start:.1f} s): {', '.join(row.cells)}", flush=True)
        yield job, row


def measured(fast: bool) -> tuple[list[tuple[str, str]], Checks]:
    """The sections of the report, and what is required."""
    begin = time.perf_counter()
    sections, checks = [], []
    for name, part in PARTS.items():
        start = time.perf_counter()
        found = dict(rows_of(name, part, fast, lambda: time.perf_counter() - begin))
        rows = [[job, *row.cells] for job, row in found.items() if row is not None]
        skipped = [job for job, row in found.items() if row is None]
        took = f"{time.perf_counter() - start:.0f} s" + (f"; skipped: {'; '.join(skipped)}" if skipped else "")
        sections.append((name, f"{part.about}\n\n{table(part.header, rows)}\n\nTook {took}."))
        checks += [check for row in found.values() if row is not None for check in row.checks]
    return sections, checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="tiny sizes, on a CPU too; nothing recorded")
    args = parser.parse_args()
    # First calls are timed: none may come from another process.
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    if device.platform == "cpu" and not args.fast:
        raise SystemExit("No GPU was found by JAX; --fast runs tiny sizes on the CPU.")
    sections, checks = measured(args.fast)
    setting = f"{device.device_kind}, one of {jax.device_count()}. The peer of the norms is {peer_name()}, on it too."
    met = publish("gpu", "One GPU", [("Setting", setting), *sections], checks, keep=not args.fast)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()

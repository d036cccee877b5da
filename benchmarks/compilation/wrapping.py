"""Part `wrapping`: what stable rank norms on every layer of a network cost, to wrap, at the first step, at every step.

StableRankNorm without `input_shape` holds the norm at every image size, with it at the layer's own.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from _clock import interleaved, timed
from _report import Checks, table
from _resnets import resnet18, resnet50
from _training_step import first_of, training_step
from _wrapping import PLAIN, SIZED, UNBOUNDED, VARIANTS, wrapped
from flax import nnx

from compilation.parts import ABSENT, Effort, Part, at_most, count, in_fresh_processes, memory_maps, seconds

FIRST = """\
{small}, {size}x{size} images, batch {batch}, SGD, float32, StableRankNorm on every layer. The first step is traced,
compiled and taken once. `maps` are those of wrapping and first step together. Each line is a process of its own
(medians of {repeats}); the network is there before its clock starts."""
STEPS = """\
Steps of the same networks as multiples of the plain step. Time: the median over {rounds} interleaved rounds of the
ratio within a round, in one process a line (medians of {repeats}); FLOPs: XLA's cost analysis."""
WRAPPED = "StableRankNorm on {deep}, on images of {images}x{images} samples:"
BATCHES = (32, 128)
# At most: seconds to wrap, the first step and each step as a multiple of the plain one.
MOST_WRAPPING = {UNBOUNDED: 10.0, SIZED: 25.0}
MOST_FIRST = {UNBOUNDED: 2.0, SIZED: 3.0}
MOST_STEP = {UNBOUNDED: (1.10, 1.03), SIZED: (1.25, 1.08)}
MOST_RESNET50 = {UNBOUNDED: 20.0}
WRAPPERS = tuple(MOST_WRAPPING)


def rounds(effort: Effort) -> int:
    return 3 if effort.fast else 21


def network(effort: Effort, deep: bool, batch: int) -> tuple[nnx.Module, jax.Array]:
    """The plain ResNet-50 (`deep`) or ResNet-18, and a batch of images."""
    make, size = (resnet50, 224) if deep else (resnet18, 32)
    if effort.fast:
        make, size = partial(make, blocks=(1, 1), width=8), size // 4
    x = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    return make(rngs=nnx.Rngs(0)), jax.block_until_ready(x)


def first_step(effort: Effort, variant: str) -> dict[str, float]:
    """Seconds to wrap the ResNet-18 and to take its first step, and the memory maps of both."""
    model, x = network(effort, False, BATCHES[0])
    before = memory_maps()
    wrap = timed(lambda: wrapped(model, x, variant))
    # The step is held until the maps are counted: they go with it.
    step, first = first_of(wrap.result, x)
    found = {"wrapping": wrap.seconds, "first": first, "maps": memory_maps() - before}
    del step
    return found


def steps(effort: Effort, variant: str, batch: str) -> dict[str, float]:
    """A variant's step beside the plain one, in turns: milliseconds, and the ratios of times and of FLOPs."""
    model, x = network(effort, False, int(batch))
    plain, own = (training_step(wrapped(model, x, name), x) for name in (PLAIN, variant))
    times = interleaved({PLAIN: plain.run, variant: own.run}, rounds(effort))
    return {
        "plain": 1e3 * float(np.median(times[PLAIN])),
        "own": 1e3 * float(np.median(times[variant])),
        "time": float(np.median(times[variant] / times[PLAIN])),
        "flops": own.flops / plain.flops,
    }


def convolutions(effort: Effort, variant: str) -> dict[str, float]:
    """Seconds to wrap the convolutions of a ResNet-50, and the memory maps of it."""
    model, x = network(effort, True, 1)
    before = memory_maps()
    wrap = timed(lambda: wrapped(model, x, variant, nnx.Conv))
    return {"wrapping": wrap.seconds, "maps": memory_maps() - before}


MEASURES = {"first step": first_step, "steps": steps, "ResNet-50": convolutions}


def measure(effort: Effort, what: str, *arguments: str) -> dict[str, float]:
    return MEASURES[what](effort, *arguments)


# The report


def first_steps(effort: Effort) -> tuple[str, Checks]:
    """A row is the plain network or a wrapped one."""
    found = {name: in_fresh_processes(effort, "wrapping", "first step", name) for name in VARIANTS}
    plain, rows, checks = found[PLAIN], [], []
    for name, run in found.items():
        ratio = run["first"] / plain["first"] if run and plain else None
        shown = ABSENT if ratio is None else f"{ratio:.2f}"
        rows.append([name, seconds(run, "wrapping"), seconds(run, "first"), shown, count(run, "maps")])
        if name != PLAIN:
            wrap = run and run["wrapping"]
            checks.append(at_most(wrap, MOST_WRAPPING[name], f"ResNet-18 {name}: wrapped in", " s"))
            checks.append(at_most(ratio, MOST_FIRST[name], f"ResNet-18 {name}: first step", " times the plain"))
    return table(("StableRankNorm", "wrapping", "first step", "of the plain", "maps"), rows), checks


def later_steps(effort: Effort) -> tuple[str, Checks]:
    """A row is a wrapped network at one batch."""
    rows, checks = [], []
    places = {"plain": 1, "own": 1, "time": 3, "flops": 4}
    for name in WRAPPERS:
        for batch, limit in zip(BATCHES[:1] if effort.fast else BATCHES, MOST_STEP[name], strict=False):
            run = in_fresh_processes(effort, "wrapping", "steps", name, str(batch))
            rows.append([name, batch, *(f"{run[key]:.{n}f}" if run else ABSENT for key, n in places.items())])
            text = f"ResNet-18 {name}, batch {batch}: step"
            checks.append(at_most(run and run["time"], limit, text, " times the plain"))
    return table(("StableRankNorm", "batch", "plain, ms", "wrapped, ms", "time", "FLOPs"), rows), checks


def larger_network(effort: Effort) -> tuple[str, Checks]:
    """A row is a way to wrap the convolutions of a ResNet-50."""
    found = {name: in_fresh_processes(effort, "wrapping", "ResNet-50", name) for name in WRAPPERS}
    rows = [[name, seconds(run, "wrapping"), count(run, "maps")] for name, run in found.items()]
    checks = [
        at_most(found[name] and found[name]["wrapping"], limit, f"ResNet-50 {name}: wrapped in", " s")
        for name, limit in MOST_RESNET50.items()
    ]
    return table(("StableRankNorm", "wrapping", "maps"), rows), checks


def measured(effort: Effort) -> Part:
    """The part: wrapping and first steps, then steps at each batch, then the convolutions of a larger network."""
    size, images = (8, 56) if effort.fast else (32, 224)
    small, deep = "ResNet-18: 21 layers of 16 to 128 channels", "the 53 convolutions of a ResNet-50"
    if effort.fast:
        small, deep = "Two small blocks in place of a ResNet-18", "two small blocks in place of a ResNet-50"
    about = {"small": small, "deep": deep, "size": size, "images": images}
    about |= {"batch": BATCHES[0], "rounds": rounds(effort), "repeats": effort.repeats}
    sections, checks = [], []
    for heading, text, report in (
        ("Wrapping and first step", FIRST, first_steps),
        ("Steps", STEPS, later_steps),
        ("ResNet-50", WRAPPED, larger_network),
    ):
        body, required = report(effort)
        sections.append((heading, f"{text.format(**about)}\n\n{body}"))
        checks += required
    return Part(sections, [] if effort.fast else checks)

"""Part `wrapping`: what stable rank norms on every layer of a network cost, to wrap, at the first step, at every step.

StableRankNorm without `input_shape` holds the norm at every image size, with it at the layer's own.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from _clock import interleaved, timed
from _report import table
from _resnets import resnet18, resnet50
from _training_step import first_of, training_step
from _wrapping import PLAIN, SIZED, UNBOUNDED, VARIANTS, wrapped
from flax import nnx
from tqdm import tqdm

from compilation.parts import ABSENT, Effort, Part, at_most, count, in_fresh_processes, memory_maps, seconds

FIRST = """\
ResNet-18: 21 layers of 16 to 128 channels, {size}x{size} images, batch {batch}, SGD, float32, StableRankNorm on every
layer. The first step is traced, compiled and taken once. `maps` are those of wrapping and first step together. Each
line is a process of its own (medians of {repeats}); the network is there before its clock starts."""
STEPS = """\
Steps of the same networks as multiples of the plain step. Time: the median over {rounds} interleaved rounds of the
ratio within a round, in one process a line (medians of {repeats}); FLOPs: XLA's cost analysis."""
WRAPPED = "StableRankNorm on the 53 convolutions of a ResNet-50, on images of {size}x{size} samples:"
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


def ratio_of(found: dict | None, plain: dict | None) -> float | None:
    """The first step as a multiple of the plain one."""
    return None if found is None or plain is None else found["first"] / plain["first"]


def measured(effort: Effort) -> Part:
    """The part: wrapping and first steps, then steps at each batch, then the convolutions of a larger network."""
    fresh = partial(in_fresh_processes, effort, "wrapping")
    firsts = {variant: fresh("first step", variant) for variant in tqdm(VARIANTS, desc="first steps", leave=False)}
    batches = BATCHES[:1] if effort.fast else BATCHES
    later = {(name, batch): fresh("steps", name, str(batch)) for name in WRAPPERS for batch in batches}
    large = {variant: fresh("ResNet-50", variant) for variant in WRAPPERS}

    rows, checks = [], []
    for variant, found in firsts.items():
        ratio = ratio_of(found, firsts[PLAIN])
        shown = ABSENT if ratio is None else f"{ratio:.2f}"
        wrap = "" if variant == PLAIN else seconds(found, "wrapping")
        rows.append([variant, wrap, seconds(found, "first"), shown, count(found, "maps")])
        if variant != PLAIN:
            wrap = found and found["wrapping"]
            checks.append(at_most(wrap, MOST_WRAPPING[variant], f"ResNet-18 {variant}: wrapped in", " s"))
            checks.append(at_most(ratio, MOST_FIRST[variant], f"ResNet-18 {variant}: first step", " times the plain"))
    first = table(("StableRankNorm", "wrapping", "first step", "of the plain", "maps"), rows)

    rows = []
    for (variant, batch), found in later.items():
        numbers = (
            [f"{found[key]:.{places}f}" for key, places in (("plain", 1), ("own", 1), ("time", 3), ("flops", 4))]
            if found
            else [ABSENT] * 4
        )
        rows.append([variant, batch, *numbers])
        text = f"ResNet-18 {variant}, batch {batch}: step"
        limit = MOST_STEP[variant][BATCHES.index(batch)]
        checks.append(at_most(found and found["time"], limit, text, " times the plain"))
    step = table(("StableRankNorm", "batch", "plain, ms", "wrapped, ms", "time", "FLOPs"), rows)

    rows = [[variant, seconds(found, "wrapping"), count(found, "maps")] for variant, found in large.items()]
    for variant, limit in MOST_RESNET50.items():
        found = large[variant]
        checks.append(at_most(found and found["wrapping"], limit, f"ResNet-50 {variant}: wrapped in", " s"))
    wide = table(("StableRankNorm", "wrapping", "maps"), rows)

    small, images = (8, 56) if effort.fast else (32, 224)
    about = {"size": small, "batch": BATCHES[0], "rounds": rounds(effort), "repeats": effort.repeats}
    sections = [
        ("Wrapping and first step", f"{FIRST.format(**about)}\n\n{first}"),
        ("Steps", f"{STEPS.format(**about)}\n\n{step}"),
        ("ResNet-50", f"{WRAPPED.format(size=images)}\n\n{wide}"),
    ]
    return Part(sections, [] if effort.fast else checks)

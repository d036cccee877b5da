"""Part `many-shapes`: does a process that sees many different shapes live, and how many memory maps has it?"""

from __future__ import annotations

import itertools
import time

import jax
import numpy as np
from _report import table

from compilation.functions import FUNCTIONS, Layer
from compilation.parts import Effort, Part, at_most, count, in_fresh_processes, memory_maps, seconds

ABOUT = """\
Norm, stable rank, certified interval and `srnc` of Gaussian kernels of {number} different shapes, one after the other
in one process: 3x3 taps, 4 to 18 channels in and 4 to 23 out, {size}x{size} samples, with one operator for all.
`maps`: the most that the process has after any of them. One process each."""
NAMES = ("spectral_norm", "stable_rank", "bounds.certified", "srnc")
MOST_MAPS = 30_000
SIZE = 12


def channels(effort: Effort) -> list[tuple[int, int]]:
    pairs = itertools.product(range(4, 19), range(4, 24))
    return list(itertools.islice(pairs, 3 if effort.fast else None))


def measure(effort: Effort, padding: str) -> dict[str, float]:
    """The seconds that all shapes take, and the most memory maps."""
    op, rng = Layer(3, 4, SIZE).operators[padding], np.random.default_rng(0)
    start, maps = time.perf_counter(), 0
    for pair in channels(effort):
        kernel = rng.standard_normal((3, 3, *pair), np.float32)
        for name in NAMES:
            jax.block_until_ready(FUNCTIONS[name].call(kernel, op))
            maps = max(maps, memory_maps())
    return {"seconds": time.perf_counter() - start, "maps": maps}


def measured(effort: Effort) -> Part:
    """The part: a row is an operator; every process has to end, with few enough maps."""
    number, rows, checks = len(channels(effort)), [], []
    for padding in Layer(3, 4, SIZE).operators:
        found = in_fresh_processes(effort._replace(repeats=1), "many-shapes", padding)
        rows.append([padding, seconds(found, "seconds"), count(found, "maps")])
        checks.append(at_most(found and found["maps"], MOST_MAPS, f"memory maps of {number} shapes, {padding}"))
    body = table(("operator", "time", "maps"), rows)
    return Part([("Many shapes", f"{ABOUT.format(number=number, size=SIZE)}\n\n{body}")], [] if effort.fast else checks)

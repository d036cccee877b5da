"""How many climbers does a training step need so that no singular value overtakes the one that it follows?

    python benchmarks/watching.py           # all settings; about ten minutes; recorded
    python benchmarks/watching.py --fast    # few steps of one small kernel, nothing recorded

A training step of a circular or unbounded layer follows one frequency, and climbers elsewhere on the torus may take its
place (`jaxsrn/normalization/training/watched_torus.py`). Kernels drift as under Adam: every weight moves by the
learning rate a step, in a direction that changes every 50 steps and has noise on it. The norm of what the step returns,
from SVDs on a fine grid of frequencies in NumPy's float64, must be 1.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from _clock import interleaved
from _report import publish, table
from tqdm import tqdm

import jaxsrn
from jaxsrn.normalization.training import watched_torus

ABOUT = """\
The frequencies of a layer are cut into cells. A climber is a candidate for the leading singular pair in one cell, which
takes over where it is larger. `cells per degree`: how many cells there are on an axis, for each degree of the symbol.
`parts`: the climbers take turns in so many parts, one in each pass.

3x3 taps, unbounded operators, float32, Gaussian kernels of {channels} channels, {steps} steps of {seeds} seeds. `rate`:
by how much every weight moves in a step, where the kernel's own norm is about 2. `excess`: by how much the true norm
exceeds 1, the most of all steps that were looked at (every tenth), and the share of them above 1e-3. The first row of
each setting is the library's choice."""
TIMES = """\
The time of a step of a kernel of {width} channels, with a target, as a multiple of that with the library's climbers
(median of interleaved rounds)."""
OP = jaxsrn.UnboundedConv()
GRID = 48  # frequencies per axis at which norms are taken
ENOUGH = 1e-3


class Watch(NamedTuple):
    """Cells per degree of the symbol in a full turn of an axis, and the parts of the climbers that take turns."""

    cells: int
    parts: int


WATCHES = (Watch(8, 2), Watch(8, 1), Watch(8, 4), Watch(4, 1), Watch(4, 2), Watch(2, 1))
# The target's share of the first kernel's own stable rank; `None` asks for the norm alone.
SETTINGS = [(share, rate) for share in (None, 0.9, 0.5) for rate in (1e-3, 3e-3)]


def watched(watch: Watch, function: Callable) -> Callable:
    """The function, compiled anew with such climbers."""

    @functools.wraps(function)
    def call(*args):
        changes = {"_CELLS_PER_DEGREE": watch.cells, "_MOST_CELLS": 2 * watch.cells, "_PARTS": watch.parts}
        with mock.patch.multiple(watched_torus, **changes):
            jax.clear_caches()
            return function(*args)

    return call


def true_norm(kernel: np.ndarray) -> float:
    spectrum = np.fft.fft2(np.asarray(kernel, np.float64), (GRID, GRID), axes=(0, 1))
    return float(np.max(np.linalg.norm(spectrum[:, : GRID // 2 + 1], 2, axis=(2, 3))))


def kernels(channels: int, rate: float, steps: int, seed: int):
    """A Gaussian kernel, and what becomes of it step by step."""
    rng = np.random.default_rng(seed)
    shape = (3, 3, channels, channels)
    kernel = rng.standard_normal(shape).astype(np.float32) / np.float32(3 * np.sqrt(channels))
    yield kernel
    for step in range(steps):
        if step % 50 == 0:
            direction = rng.standard_normal(shape)
        kernel = kernel - np.float32(rate) * np.sign(direction + 0.7 * rng.standard_normal(shape)).astype(np.float32)
        yield kernel


def excesses(channels: int, share: float | None, rate: float, steps: int, seeds: int) -> np.ndarray:
    """By how much the true norms exceed 1, every tenth step of all seeds."""
    # One program serves all seeds, whose targets differ.
    step = jax.jit(lambda kernel, state, target: jaxsrn.srnc_step(kernel, state, OP, target))
    found = []
    for seed in range(seeds):
        first, *drifting = kernels(channels, rate, steps, seed)
        target = None if share is None else share * np.sum(first.astype(np.float64) ** 2) / true_norm(first) ** 2
        target = None if target is None else np.float32(target)
        state = jaxsrn.srnc_state(jnp.asarray(first), OP, target)
        for i, kernel in enumerate(drifting, 1):
            normalized, state = step(kernel, state, target)
            if i % 10 == 0:
                found.append(true_norm(normalized) - 1)
    return np.array(found)


def started_step(channels: int) -> Callable:
    """A compiled step of one kernel, with its arguments."""
    kernel = next(kernels(channels, 0, 0, 0))
    target = 0.1 * channels
    state = jaxsrn.srnc_state(jnp.asarray(kernel), OP, target)
    step = jax.jit(lambda kernel, state: jaxsrn.srnc_step(kernel, state, OP, target)).lower(kernel, state).compile()
    return functools.partial(step, kernel, state)


def times(channels: int, rounds: int) -> dict[Watch, float]:
    """The time of a step of every watch, as a multiple of that of the first."""
    seconds = interleaved({watch: watched(watch, started_step)(channels) for watch in WATCHES}, rounds)
    return {watch: float(np.median(seconds[watch] / seconds[WATCHES[0]])) for watch in WATCHES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few steps of one small kernel; records nothing")
    fast = parser.parse_args().fast
    channels, steps, seeds, width = ((4,), 20, 1, 8) if fast else ((8, 24), 200, 6, 64)
    relative, rows = times(width, 3 if fast else 31), []
    for share, rate in tqdm(SETTINGS[:1] if fast else SETTINGS, desc="settings"):
        for watch in WATCHES:
            found = [watched(watch, excesses)(each, share, rate, steps, seeds) for each in channels]
            worst = [f"{max(0, each.max()):.1e}" for each in found]
            above = f"{np.mean(np.concatenate(found) > ENOUGH):.1%}"
            asked = "the norm alone" if share is None else f"{share:.0%} of the stable rank"
            rows.append((asked, f"{rate:g}", *watch, *worst, above))
    heads = ("asked", "rate", "cells per degree", "parts", *(f"excess, {each}" for each in channels), "above 1e-3")
    about = ABOUT.format(channels=" and ".join(map(str, channels)), seeds=seeds, steps=steps)
    drift = f"{about}\n\n{table(heads, rows)}"
    clock = table(("cells per degree", "parts", "time"), [(*watch, f"{relative[watch]:.2f}") for watch in WATCHES])
    sections = [("Norms under drift", drift), ("Time", f"{TIMES.format(width=width)}\n\n{clock}")]
    publish("watching", "Climbers of a training step", sections, [], keep=not fast)


if __name__ == "__main__":
    main()

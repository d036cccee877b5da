"""The clock, under which all calls take turns: whatever else the machine does hits all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm


class Timed(NamedTuple):
    """Seconds that a call takes, and what it returned."""

    seconds: float
    result: Any


def timed(call: Callable, repeat: int = 1) -> Timed:
    """The mean time of calls in a row."""
    start = time.perf_counter()
    for _ in range(repeat):
        result = jax.block_until_ready(call())
    return Timed((time.perf_counter() - start) / repeat, result)


def race(calls: dict[str, Callable], rounds: int, seconds: float) -> dict[str, Timed]:
    """The median time of each call, in at most so many rounds, and fewer where a call would take more seconds in all.

    A first round warms up, and counts for none: every call is timed at least once after it, however slow it is.
    """
    first = {name: _alone(call) for name, call in calls.items()}
    own_rounds = {name: max(1, min(rounds, int(seconds / run.seconds))) for name, run in first.items()}
    times = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            if i < own_rounds[name]:
                times[name].append(_alone(call, math.ceil(0.01 / first[name].seconds)).seconds)
    return {name: Timed(float(np.median(times[name])), run.result) for name, run in first.items()}


def _alone(call: Callable, repeat: int = 1) -> Timed:
    """As `timed`, once the threads of other libraries (OpenBLAS above all) have stopped spinning after their call."""
    time.sleep(0.05)
    return timed(call, repeat)


def interleaved(runs: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call in every round, `(rounds,)`: to be compared within a round. The order rotates."""
    for run in runs.values():
        run()
        run()
    names, times = list(runs), {name: [] for name in runs}
    for i in tqdm(range(rounds), desc="rounds", leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timed(runs[name]).seconds)
    return {name: np.array(seconds) for name, seconds in times.items()}

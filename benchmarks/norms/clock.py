"""The clock, under which all calls take turns; and the setting in which it runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from norms.parts import Effort
from norms.peers import DEVICE


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


def race(calls: dict[str, Callable], effort: Effort) -> dict[str, Timed]:
    """The median time of each call, all in turns: whatever else the machine does hits all of them.

    The first round warms up. It counts only for what is too slow to be called again.
    """
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


def describe_setting() -> str:
    """The version and threads of PyTorch, the threads that the environment asks for, and the load."""
    threads = {name: os.environ[name] for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ}
    threads = ", ".join(f"{name}={value}" for name, value in threads.items()) or "default thread settings"
    # Threads of PyTorch wait for each other: another busy process slows it down a hundred times and more.
    load = f"load average {os.getloadavg()[0]:.1f} before the run"
    return f"torch {torch.__version__} with {torch.get_num_threads()} threads on {DEVICE}; {threads}; {load}."

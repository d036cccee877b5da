"""How much longer do calls take on a machine that other programs keep busy, and what helps?

    python benchmarks/shared_machine.py           # every function; about six minutes; recorded
    python benchmarks/shared_machine.py --fast    # one function, nothing recorded

Every cell is a process of its own, beside neighbours that compute in Python without an end, one for each core. The
linear algebra of SciPy, which jaxlib calls for SVDs and Cholesky factorizations, has threads of its own (OpenBLAS).
They wait for each other in loops, so that each of many small factorizations waits until the system lets all of them
run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _clock import race
from _processes import in_process
from _report import duration, publish, table
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv

ABOUT = """\
float32, 3x3 taps, Gaussian kernels whose channels decay as `exp(-i / 32)`, after compilation: the median of three
calls, or of as many as take 20 s at most. `alone`: nothing else runs. `busy`: {neighbours} neighbours. `one thread`:
with `OPENBLAS_NUM_THREADS=1`."""
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
NEIGHBOUR = "while True: pass"


class Call(NamedTuple):
    """A function of a kernel of so many channels, and the operator."""

    function: Callable
    op: jaxsrn.Operator
    channels: int


def halved(kernel, op):
    """`srnc` to half of the stable rank."""
    return jaxsrn.srnc(kernel, op, jaxsrn.stable_rank(kernel, op) / 2).kernel


CALLS = {
    "spectral_norm, circular, 256 channels, n = 14": Call(jaxsrn.spectral_norm, CircularConv((14, 14)), 256),
    "spectral_norm, unbounded, 256 channels": Call(jaxsrn.spectral_norm, UnboundedConv(), 256),
    "spectral_norm, SAME, 256 channels, n = 14": Call(jaxsrn.spectral_norm, ZeroPaddedConv((14, 14)), 256),
    "singular_values, circular, 64 channels, n = 32": Call(jaxsrn.singular_values, CircularConv((32, 32)), 64),
    "srnc, circular, 32 channels, n = 16": Call(halved, CircularConv((16, 16)), 32),
    "spectral_norm, dense, 1,024 by 1,024": Call(jaxsrn.spectral_norm, Dense(), 1024),
}


def measured(name: str) -> float:
    """Seconds of a call."""
    function, op, channels = CALLS[name]
    taps = () if isinstance(op, Dense) else (3, 3)
    decay = np.exp(-np.arange(channels) / 32)[:, None]
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((*taps, channels, channels)) * decay, jnp.float32)
    compiled = jax.jit(lambda kernel: function(kernel, op)).lower(kernel).compile()
    return race({name: lambda: compiled(kernel)}, rounds=3, seconds=20)[name].seconds


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    processes = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def row_of(name: str, busy: int) -> list[str]:
    found = []
    for count in (0, busy):
        with neighbours(count):
            found += [in_process(Path(__file__), "--one", name, **settings) for settings in ({}, ONE_THREAD)]
    alone, alone_one, shared, shared_one = found
    ratios = shared / alone, shared_one / alone_one
    return [name, *map(duration, (alone, alone_one, shared, shared_one)), *(f"{ratio:.1f}" for ratio in ratios)]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one function; nothing is recorded")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measured(args.one)))
        return 0
    busy = os.cpu_count() or 1
    header = ("call", "alone", "one thread", "busy", "busy, one thread", "busy / alone", "with one thread")
    rows = [row_of(name, busy) for name in tqdm([*CALLS][:1] if args.fast else CALLS)]
    body = f"{ABOUT.format(neighbours=busy)}\n\n{table(header, rows)}"
    publish("shared_machine", "A machine that is shared", [("Times", body)], [], keep=not args.fast)
    return 0


if __name__ == "__main__":
    sys.exit(main())

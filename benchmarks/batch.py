"""How much faster is a batch of kernels than a Python loop, and does its memory stay bounded?

    python benchmarks/batch.py           # 1e3 and 1e5 kernels of three taps, 1e3 of 3x3x8x8; records the tables
    python benchmarks/batch.py --fast    # under a minute: fewer kernels, nothing recorded

Compared are the compiled `jaxsrn.srnc` called kernel by kernel, one `jax.vmap` over all kernels, and
`jax.lax.map(..., batch_size=...)`. Each is compiled before the clock starts, then all take turns, so that whatever
else the machine does hits all of them. The script fails where a requirement is not met.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _clock import timed
from _processes import in_process
from _report import publish, table
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv

REQUIRED_RATIO = 10.0
# Linux: writing 5 resets the peak of the resident memory, VmHWM.
CLEAR_REFS = Path("/proc/self/clear_refs")
MEMORY_BATCH = 256
# Growth beyond the outputs that still counts as flat: a copy of 1e5 inputs and outputs, and the allocator's rounding.
FLAT_BYTES = 8e6


class Workload(NamedTuple):
    """Kernels to normalize, and the batch sizes of `jax.lax.map` to try."""

    name: str
    op: CircularConv
    shape: tuple[int, ...]
    count: int
    batch_sizes: tuple[int, ...]
    one_channel: bool


ONE_CHANNEL = ("3 taps, one channel, N = 64", CircularConv((64,)), (3, 1, 1))
SEVERAL = ("3x3, 8 to 8 channels, n = 16", CircularConv((16, 16)), (3, 3, 8, 8))
WORKLOADS = (
    Workload(*ONE_CHANNEL, 1_000, (16, 64, 256), True),
    Workload(*ONE_CHANNEL, 100_000, (16, 64, 256, 1024), True),
    Workload(*SEVERAL, 1_000, (1, 2, 8, 32), False),
)
FAST_WORKLOADS = (Workload(*ONE_CHANNEL, 1_000, (64,), True), Workload(*SEVERAL, 40, (2,), False))


def problems(op, shape, count: int) -> tuple[jax.Array, jax.Array]:
    """Gaussian kernels in float32, each with a target halfway between the lowest stable rank and its own."""
    kernels = jax.random.normal(jax.random.key(0), (count, *shape), jnp.float32)
    low, _ = jaxsrn.stable_rank_range(shape, op)
    ranks = jax.jit(lambda ks: jax.lax.map(lambda k: jaxsrn.stable_rank(k, op), ks, batch_size=64))(kernels)
    return kernels, (low + ranks) / 2


def solve(op, problem):
    return jaxsrn.srnc(problem[0], op, problem[1])


def mapped(op, batch_size: int) -> Callable:
    return lambda xs: jax.lax.map(functools.partial(solve, op), xs, batch_size=batch_size)


# Throughput


def methods(load: Workload, loop_count: int) -> dict[str, tuple[int, Callable]]:
    """`{name: (kernels in a call, call)}`, compiled; the loops run over the first few and count per kernel."""
    xs = problems(load.op, load.shape, load.count)
    some = [(kernel, target) for kernel, target in zip(*(x[:loop_count] for x in xs), strict=True)]
    compiled = jax.jit(functools.partial(solve, load.op))

    def loop(function):
        for problem in some:
            jax.block_until_ready(function(problem))

    calls = {
        "loop over jax.jit(srnc)": (len(some), lambda: loop(compiled)),
        "loop over srnc": (len(some), lambda: loop(functools.partial(solve, load.op))),
        "vmap": (load.count, functools.partial(jax.jit(jax.vmap(functools.partial(solve, load.op))), xs)),
    }
    for size in load.batch_sizes:
        calls[f"lax.map, batch_size={size}"] = (load.count, functools.partial(jax.jit(mapped(load.op, size)), xs))
    for _, call in calls.values():
        jax.block_until_ready(call())
    return calls


def throughput(load: Workload, repetitions: int, loop_count: int, progress) -> dict[str, float]:
    """Kernels per second by method, the median of interleaved repetitions."""
    progress.set_description(f"{load.count} x {load.name}: compiling")
    calls = methods(load, loop_count)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, (count, call) in calls.items():
            progress.set_description(f"{load.count} x {load.name}: {name}")
            times[name].append(timed(call).seconds / count)
        progress.update()
    return {name: 1 / float(np.median(values)) for name, values in times.items()}


# Memory


def forget_peak() -> None:
    """Returns freed memory to the system and resets the peak: compiling takes more of both than running."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")


def peak() -> int:
    """Bytes of resident memory at the peak. Not `getrusage`: that counts the parent process before the fork too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def memory_of_run(count: int, method: str) -> dict[str, float]:
    """Bytes of one run after compilation: inputs, outputs, growth of the process at its peak, XLA's plan."""
    _, op, shape = ONE_CHANNEL
    xs = jax.block_until_ready(problems(op, shape, count))
    function = mapped(op, MEMORY_BATCH) if method == "lax.map" else jax.vmap(functools.partial(solve, op))
    compiled = jax.jit(function).lower(xs).compile()
    forget_peak()
    before = peak()
    result = jax.block_until_ready(compiled(xs))
    growth = peak() - before
    sizes = {name: sum(leaf.nbytes for leaf in tree) for name, tree in (("inputs", xs), ("outputs", result))}
    return {**sizes, "growth": growth, "planned": compiled.memory_analysis().temp_size_in_bytes}


def memory_in_process(count: int, method: str) -> dict[str, float]:
    """The same in a fresh process, so that configurations do not see each other's heap."""
    return in_process(Path(__file__), "--memory", str(count), method)


# Report


def throughput_rows(load: Workload, rates: dict[str, float]) -> list[list[str]]:
    loop, public = rates["loop over jax.jit(srnc)"], rates["loop over srnc"]
    kernels = f"{load.count:.0e}".replace("+0", "") + f" of {load.name}"
    return [
        [kernels, name, f"{rate:,.0f}", f"{rate / loop:.2f}", f"{rate / public:.2f}"] for name, rate in rates.items()
    ]


def ratio_checks(load: Workload, rates: dict[str, float]) -> list[tuple[bool, str]]:
    """The best batch against the faster loop, the one over the compiled function."""
    loop = rates["loop over jax.jit(srnc)"]
    batched = {name: rate / loop for name, rate in rates.items() if not name.startswith("loop")}
    best = max(batched, key=batched.get)
    limit = REQUIRED_RATIO if load.one_channel else 1.0
    text = (
        f"{load.count} kernels, {load.name}: best batch ({best}) {batched[best]:.2f} times the loop, required {limit:g}"
    )
    slow = [f"{name} ({ratio:.2f})" for name, ratio in batched.items() if ratio < 1]
    never = f"{load.count} kernels, {load.name}: no way of batching is slower than the loop"
    return [(batched[best] >= limit, text), (not slow, never + (f"; slower: {', '.join(slow)}" if slow else ""))]


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def memory_report(counts, progress) -> tuple[str, list[tuple[bool, str]]]:
    if not CLEAR_REFS.exists():
        return "Not measured: the peak of one run can be told from that of its compilation on Linux only.", []
    rows, extra = [], []
    for method in ("lax.map", "vmap"):
        for count in counts:
            progress.set_description(f"memory, {method}, {count} kernels")
            found = memory_in_process(count, method)
            label = f"{method}, batch_size={MEMORY_BATCH}" if method == "lax.map" else method
            rows.append([label, f"{count:,}", *(megabytes(size) for size in found.values())])
            if method == "lax.map":
                extra.append(found["growth"] - found["outputs"])
            progress.update()
    header = ("method", "kernels", "inputs", "outputs", "growth at the peak", "XLA's temporaries")
    text = f"lax.map: from {counts[0]:,} to {counts[-1]:,} kernels the peak grows by {megabytes(extra[-1] - extra[0])} "
    return table(header, rows), [
        (extra[-1] - extra[0] <= FLAT_BYTES, text + f"beyond the outputs, at most {megabytes(FLAT_BYTES)}")
    ]


ABOUT = """\
float32, random Gaussian kernels, per-kernel targets halfway down. Kernels per second without compilation; medians of
interleaved repetitions. The ratios are to the two loops: over `jax.jit(srnc)`, the fastest there is, and over `srnc`
as it is imported, which checks its arguments on every call."""

MEMORY = """\
Three taps, one channel. Each line is a process of its own: growth of the resident memory at the peak of the run, after
compilation and with the inputs in place, so outputs included; beside it what XLA plans for temporaries alone."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="fewer kernels, nothing recorded")
    parser.add_argument("--memory", nargs=2, metavar=("COUNT", "METHOD"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.memory:
        print(json.dumps(memory_of_run(int(args.memory[0]), args.memory[1])))
        return
    loads, repetitions, loop_count = (FAST_WORKLOADS, 3, 40) if args.fast else (WORKLOADS, 5, 300)
    counts = (1_000, 10_000) if args.fast else (1_000, 10_000, 100_000)
    rows, checks = [], []
    with tqdm(total=len(loads) * repetitions + 2 * len(counts)) as progress:
        for load in loads:
            rates = throughput(load, repetitions, loop_count, progress)
            rows += throughput_rows(load, rates)
            checks += ratio_checks(load, rates)
        memory, flat = memory_report(counts, progress)
    header = ("kernels", "method", "kernels / s", "ratio to loop, jitted", "ratio to loop")
    sections = [
        ("Throughput", f"{ABOUT}\n\n{table(header, rows)}"),
        ("Memory", f"{MEMORY}\n\n{memory}"),
    ]
    sys.exit(0 if publish("batch", "Batches of kernels", sections, checks + flat, keep=not args.fast) else 1)


if __name__ == "__main__":
    main()

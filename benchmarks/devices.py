"""Does a stack of kernels over several devices take as much less time as there are devices?

    python benchmarks/devices.py           # as many devices as cores, up to 8
    python benchmarks/devices.py --fast    # a few minutes, most of them to compile; nothing recorded

A device is a process of its own, kept to one core (Linux); the processes find each other by `jax.distributed`, as those
of several hosts do. (Virtual devices of one process share its threads, and with them the cores.) A stack of kernels is
sharded over its first axis, and the mapped function compiled for the whole stack: by `jax.jit`, or by `jax.shard_map`,
which tells XLA that the devices have nothing to say to each other. What the machine itself allows is measured beside
it: as many processes at once, each with its part of the stack and a program of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from _report import Checks, publish, table
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, Dense, ZeroPaddedConv

MOST = 8
SHARE = 0.8  # of what the machine allows; required of jax.shard_map
APART, JIT, SHARD_MAP = "independent programs", "jax.jit", "jax.shard_map"


class Effort(NamedTuple):
    """Kernels, rounds in a process, and how often the processes are started."""

    kernels: int
    rounds: int
    starts: int


FAST, FULL = Effort(8, 1, 1), Effort(64, 7, 3)


class Workload(NamedTuple):
    """A function of one kernel and its operator, the operator, and the shape of the kernels."""

    function: Callable
    op: CircularConv | Dense | ZeroPaddedConv
    shape: tuple[int, ...]
    ways: tuple[str, ...] = (APART, JIT, SHARD_MAP)


def normalized(kernel, op):
    return jaxsrn.srnc(kernel, op, 0.7 * jaxsrn.stable_rank(kernel, op)).kernel


WORKLOADS = {
    "singular_values, 3x3x16x16, circular, n = 16": Workload(
        jaxsrn.singular_values, CircularConv((16, 16)), (3, 3, 16, 16)
    ),
    "spectral_norm, 3x3x32x32, circular, n = 32": Workload(
        jaxsrn.spectral_norm, CircularConv((32, 32)), (3, 3, 32, 32)
    ),
    "srnc, 3x3x8x8, circular, n = 16": Workload(normalized, CircularConv((16, 16)), (3, 3, 8, 8)),
    "spectral_norm, 256x256, dense": Workload(jaxsrn.spectral_norm, Dense(), (256, 256)),
    # Compiled by jax.jit alone, XLA gathers the images of convolutions with a kernel each.
    "spectral_norm, 3x3x8x8, zero padding, n = 16": Workload(
        jaxsrn.spectral_norm, ZeroPaddedConv((16, 16)), (3, 3, 8, 8), (APART, SHARD_MAP)
    ),
}


# In a process of its own


def compiled(load: Workload, way: str, kernels: np.ndarray) -> tuple[Callable, jax.Array]:
    """The mapped function, compiled for the whole stack or for this process's part of it, and those kernels."""
    mapped = jax.vmap(lambda kernel: load.function(kernel, load.op))
    if way == APART:
        placed = jax.device_put(np.split(kernels, jax.process_count())[jax.process_index()], jax.local_devices()[0])
    else:
        mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))
        placed = jax.make_array_from_callback(
            kernels.shape, NamedSharding(mesh, P("devices")), lambda index: kernels[index]
        )
        if way == SHARD_MAP:
            mapped = jax.shard_map(mapped, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False)
    return jax.jit(mapped).lower(placed).compile(), placed


def seconds(effort: Effort) -> dict[str, dict[str, list[float]]]:
    """The time of every round of each workload and way; the processes start each at the same moment."""
    found: dict[str, dict[str, list[float]]] = {}
    rng = np.random.default_rng(0)
    for name, load in WORKLOADS.items():
        kernels = rng.standard_normal((effort.kernels, *load.shape), np.float32)
        calls = {way: compiled(load, way, kernels) for way in load.ways}
        for _ in range(effort.rounds + 1):
            for way, (call, placed) in calls.items():
                multihost_utils.sync_global_devices(f"{name}, {way}")
                start = time.perf_counter()
                jax.block_until_ready(call(placed))
                found.setdefault(name, {}).setdefault(way, []).append(time.perf_counter() - start)
    # The first round warms up.
    return {name: {way: times[1:] for way, times in ways.items()} for name, ways in found.items()}


# All processes


def rounds_of(devices: int, effort: Effort, cache: str) -> dict[tuple[str, str], list[float]]:
    """The rounds over so many devices: each takes as long as its slowest process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *(["--fast"] if effort is FAST else [])]
    cores = sorted(os.sched_getaffinity(0))
    children = [
        subprocess.Popen(
            [*command, "--child", str(port), str(devices), str(i)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "JAX_COMPILATION_CACHE_DIR": cache},
            preexec_fn=lambda core=cores[i]: os.sched_setaffinity(0, {core}),
        )
        for i in range(devices)
    ]
    outputs = [child.communicate(timeout=900)[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"a process of {devices} failed: {[child.returncode for child in children]}")
    # Before it the libraries below may have their say.
    runs = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        (name, way): [max(times) for times in zip(*(run[name][way] for run in runs), strict=True)]
        for name, load in WORKLOADS.items()
        for way in load.ways
    }


def measured(effort: Effort) -> tuple[list[int], dict[tuple[str, str, int], float]]:
    """The numbers of devices, and `{(workload, way, devices): seconds}`: medians over starts that take turns."""
    counts = [2**k for k in range(min(len(os.sched_getaffinity(0)), MOST).bit_length())]
    rounds: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for devices in tqdm(counts * effort.starts, desc="devices"):
            for (name, way), times in rounds_of(devices, effort, cache).items():
                rounds.setdefault((name, way, devices), []).extend(times)
    return counts, {key: float(np.median(times)) for key, times in rounds.items()}


def report(counts: list[int], times: dict[tuple[str, str, int], float], effort: Effort) -> tuple[str, Checks]:
    """The text, and what is required; of few kernels in one round nothing is."""
    rows, checks = [], []
    for name, load in WORKLOADS.items():
        one = times[name, APART, 1]
        speed = {(way, n): one / times[name, way, n] for way in load.ways for n in counts}
        rows += [
            [name, way, f"{1e3 * times[name, way, 1]:.0f} ms", *(f"{speed[way, n]:.2f}" for n in counts[1:])]
            for way in load.ways
        ]
        for n in counts[1:] if effort is FULL else []:
            share = speed[SHARD_MAP, n] / speed[APART, n]
            text = f"{name}: {n} devices, {SHARD_MAP}: {share:.0%} of what the machine allows, at least {SHARE:.0%}"
            checks.append((share >= SHARE, text))
    header = ("function", "compiled by", "one device", *(f"{n} devices" for n in counts[1:]))
    about = (
        f"Stacks of {effort.kernels} Gaussian kernels, float32; medians of {effort.rounds * effort.starts} rounds, "
        "compilation apart. How many times as\nfast several devices are as one alone. A device is one core."
    )
    return f"{about}\n\n{table(header, rows)}", checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few kernels, nothing recorded")
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    effort = FAST if args.fast else FULL
    if args.child:
        port, devices, index = args.child
        jax.distributed.initialize(f"localhost:{port}", devices, index)
        print(json.dumps(seconds(effort)))
        return
    scaling, checks = report(*measured(effort), effort)
    sys.exit(0 if publish("devices", "Devices", [("Scaling", scaling)], checks, keep=not args.fast) else 1)


if __name__ == "__main__":
    main()

"""Part `stacks`: is `jax.vmap` over a stack of kernels as fast as a loop over the compiled function?"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from _clock import race
from _report import duration, table
from tqdm import tqdm

from compilation.functions import FUNCTIONS, Layer
from compilation.parts import ABSENT, Effort, Part, in_fresh_processes

ABOUT = """\
Gaussian kernels, float32. One compiled call for the whole stack beside a Python loop over the function compiled for one
kernel, in turns; medians of at most {rounds} rounds, fewer where they would take more than {limit:g} s, compilation
apart. A line is a process of its own (medians of {repeats})."""
NAMES = ("spectral_norm", "bounds.certified", "srnc")
LEAST = 0.95  # from here on the clock cannot tell that it is slower than the loop


def loads(effort: Effort) -> dict[str, tuple[int, Layer]]:
    """`{name: (number of kernels, the layer of each)}`."""
    if effort.fast:
        return {"4 of (8, 4, 3)": (4, Layer(3, 4, 8))}
    return {
        "16 of (32, 8, 3)": (16, Layer(3, 8, 32)),
        "16 of (32, 64, 3)": (16, Layer(3, 64, 32)),
        "6 of (14, 256, 3)": (6, Layer(3, 256, 14)),
    }


def clock(effort: Effort) -> tuple[int, float]:
    """Rounds at most, and seconds at most for each call in all."""
    return (2, 0.5) if effort.fast else (5, 20.0)


def calls(function: Callable, kernels: np.ndarray) -> dict[str, Callable]:
    """The loop over single kernels and the call of the stack, both compiled."""
    single, stack = list(map(jnp.asarray, kernels)), jnp.asarray(kernels)
    one = jax.jit(function).lower(single[0]).compile()
    return {
        "loop": lambda: [jax.block_until_ready(one(kernel)) for kernel in single],
        "vmap": functools.partial(jax.jit(jax.vmap(function)).lower(stack).compile(), stack),
    }


def measure(effort: Effort, load: str, name: str, padding: str) -> dict[str, float]:
    """Seconds of the loop and of the stack."""
    number, layer = loads(effort)[load]
    op = layer.operators[padding]
    kernels = np.random.default_rng(0).standard_normal((number, *layer.shape), np.float32)
    found = race(calls(lambda kernel: FUNCTIONS[name].call(kernel, op), kernels), *clock(effort))
    return {way: run.seconds for way, run in found.items()}


def measured(effort: Effort) -> Part:
    """The part: a row is a function over one stack; no stack may be slower than the loop."""
    rows, checks = [], []
    for load, (_, layer) in tqdm(loads(effort).items(), desc="stacks", leave=False):
        for name in NAMES:
            for padding in layer.operators:
                found = in_fresh_processes(effort, "stacks", load, name, padding)
                case = f"{name}, {load}, {padding}"
                if found is None:
                    rows.append([case, ABSENT, ABSENT, ABSENT])
                    checks.append((False, f"{case}: failed"))
                    continue
                ratio = found["loop"] / found["vmap"]
                rows.append([case, duration(found["loop"]), duration(found["vmap"]), f"{ratio:.2f}"])
                checks.append(
                    (bool(ratio >= LEAST), f"{case}: vmap {ratio:.2f} times as fast as the loop, at least {LEAST:g}")
                )
    rounds, limit = clock(effort)
    about = ABOUT.format(rounds=rounds, limit=limit, repeats=effort.repeats)
    body = table(("function, stack", "loop", "vmap", "loop / vmap"), rows)
    return Part([("Stacks of kernels", f"{about}\n\n{body}")], [] if effort.fast else checks)

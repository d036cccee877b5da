"""Part `generators`: eager calls as XLA compiles them by default, and with the options of the library for CPUs."""

from __future__ import annotations

import time

import jax
from _clock import race
from _report import table
from tqdm import tqdm

from compilation.functions import FUNCTIONS, Layer, layer_of
from compilation.parts import Effort, Part
from jaxsrn._tools.programs import QUICK, QUICKER

ABOUT = """\
Each function is lowered once and compiled three times in one process: with XLA's default options; with the library's
options for eager calls on a CPU, `{quick}`, which name XLA's former code generator; and with those of brief functions,
`{quicker}`, which have LLVM optimize nothing (`jaxsrn/_tools/programs.py` says which functions are brief). Compilation
is timed once, as JAX keeps the program; times of calls are medians of {rounds} that take turns."""
OPTIONS = {"default": None, "former": QUICK, "brief": QUICKER}
ROUNDS = 9
NAMES = ("spectral_norm", "bounds.certified", "srnc_state", "srnc_step")


def layers(effort: Effort) -> tuple[Layer, ...]:
    return (layer_of(effort),) if effort.fast else (layer_of(effort), Layer(3, 256, 14))


def compiled(lowered, options):
    """The program, and the seconds that compiling it takes."""
    start = time.perf_counter()
    program = lowered.compile(compiler_options=options)
    return program, time.perf_counter() - start


def row(layer: Layer, name: str, padding: str) -> list[str]:
    function, op, kernel = FUNCTIONS[name], layer.operators[padding], layer.kernel()
    prepared = function.prepare(kernel, op)
    lowered = jax.jit(function.call, static_argnums=1).lower(kernel, op, *prepared)
    programs = {way: compiled(lowered, options) for way, options in OPTIONS.items()}
    runs = race({way: lambda p=p: p(kernel, *prepared) for way, (p, _) in programs.items()}, ROUNDS, 10.0)
    return [
        f"{name}, {'x'.join(map(str, layer.shape))}, {padding}",
        *(f"{programs[way][1]:.2f} s" for way in OPTIONS),
        *(f"{1e3 * runs[way].seconds:.1f} ms" for way in OPTIONS),
    ]


def measured(effort: Effort) -> Part:
    """The part: a row is a function of one layer."""
    # The proof of a Gaussian kernel of many channels without edges takes seconds in every call.
    pairs = [(layer, way) for layer in layers(effort) for way in layer.operators]
    cases = [(layer, name, way) for layer, way in pairs if layer.channels < 256 or way != "unbounded" for name in NAMES]
    rows = [row(*case) for case in tqdm(cases, desc="generators", leave=False)]
    about = ABOUT.format(quick=QUICK, quicker=QUICKER, rounds=ROUNDS)
    heads = ("function", *(f"compilation, {way}" for way in OPTIONS), *(f"call, {way}" for way in OPTIONS))
    return Part([("Code generators", f"{about}\n\n{table(heads, rows)}")], [])

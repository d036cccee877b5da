"""Part `generators`: eager calls as XLA compiles them by default, and with its former code generator for CPUs."""

from __future__ import annotations

import time

import jax
from _clock import race
from _report import table
from tqdm import tqdm

from compilation.functions import FUNCTIONS, Layer, layer_of
from compilation.parts import Effort, Part
from jaxsrn._tools.programs import QUICK

ABOUT = """\
Each function is lowered once and compiled twice in one process: with XLA's default options, and with the library's
options for eager calls on a CPU, `{options}`, which name XLA's former code
generator. Compilation is timed once, as JAX keeps the program; times of calls are medians of {rounds} that take turns.
Ratios are of the former generator to the default."""
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
    options = {"default": None, "former": QUICK}
    programs = {way: compiled(lowered, chosen) for way, chosen in options.items()}
    runs = race({way: lambda p=p: p(kernel, *prepared) for way, (p, _) in programs.items()}, ROUNDS, 10.0)
    default, former = programs["default"][1], programs["former"][1]
    warm = runs["former"].seconds / runs["default"].seconds
    shape = "x".join(map(str, layer.shape))
    return [
        f"{name}, {shape}, {padding}",
        *(f"{default:.2f} s", f"{former:.2f} s", f"{former / default:.2f}"),
        *(f"{1e3 * runs[way].seconds:.1f} ms" for way in options),
        f"{warm:.2f}",
    ]


def measured(effort: Effort) -> Part:
    """The part: a row is a function of one layer."""
    # The proof of a Gaussian kernel of many channels without edges takes seconds in every call.
    pairs = [(layer, way) for layer in layers(effort) for way in layer.operators]
    cases = [(layer, name, way) for layer, way in pairs if layer.channels < 256 or way != "unbounded" for name in NAMES]
    rows = [row(*case) for case in tqdm(cases, desc="generators", leave=False)]
    about = ABOUT.format(options=QUICK, rounds=ROUNDS)
    heads = ("function", "compilation, default", "former", "ratio", "call, default", "former", "ratio")
    return Part([("Two code generators", f"{about}\n\n{table(heads, rows)}")], [])

"""How large are the programs that the functions compile? StableHLO operations, counted before XLA sees them.

    python benchmarks/compilation.py            # the counts, a minute on one core; records the table and the counts
    python benchmarks/compilation.py --check    # fails where a count is more than a tenth above the recorded one

The time and the memory that XLA takes grow with the operations of a program. The counts are exact: they depend on the
version of JAX, and on nothing else of the machine. The layer is a 3x3 convolution from 64 to 64 channels on 32x32
samples, in float32.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

import jax
import jax.numpy as jnp
from _report import RESULTS, document, record, table

import jaxsrn
from jaxsrn import CircularConv, ZeroPaddedConv, bounds

COUNTS = RESULTS / "compilation.json"
KERNEL = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
OPERATORS = {"circular": CircularConv((32, 32)), "SAME": ZeroPaddedConv((32, 32))}
TARGET = 100.0


def normalized_step(kernel, op):
    """One training step from a state that is an argument, as in training."""
    state = jax.eval_shape(lambda kernel: jaxsrn.srnc_state(kernel, op, TARGET), kernel)
    return (lambda kernel, state: jaxsrn.srnc_step(kernel, state, op, TARGET)), (kernel, state)


def of_kernel(function):
    """A function of `(kernel, op)` as what is lowered, and its arguments."""
    return lambda kernel, op: ((lambda kernel: function(kernel, op)), (kernel,))


FUNCTIONS = {
    "spectral_norm": of_kernel(jaxsrn.spectral_norm),
    "stable_rank": of_kernel(jaxsrn.stable_rank),
    "bounds.certified": of_kernel(bounds.certified),
    "srnc": of_kernel(lambda kernel, op: jaxsrn.srnc(kernel, op, TARGET)),
    "srnc, raising": of_kernel(lambda kernel, op: jaxsrn.srnc(kernel, op, TARGET, raise_rank=True)),
    "srnc_state": of_kernel(lambda kernel, op: jaxsrn.srnc_state(kernel, op, TARGET)),
    "srnc_step": normalized_step,
    "project_spectral_ball": of_kernel(lambda kernel, op: jaxsrn.project_spectral_ball(kernel, op, 1.0)),
}


def operations(name: str, padding: str) -> int:
    """Operations in the StableHLO text of one function; a subroutine that is called twice is written once."""
    function, arguments = FUNCTIONS[name](KERNEL, OPERATORS[padding])
    text = jax.jit(function).lower(*arguments).as_text()
    return len(re.findall(r"^.* = .*(?:stablehlo\.|call @)", text, flags=re.MULTILINE))


def grown(counts: dict[str, int]) -> list[str]:
    """Which counts are more than a tenth above the recorded ones; none where those are of another version of JAX."""
    recorded = json.loads(COUNTS.read_text())
    if recorded["jax"] != jax.__version__:
        return []
    before = recorded["operations"]
    return [
        f"{name}: {count} operations, {before[name]} recorded"
        for name, count in counts.items()
        if 10 * count > 11 * before[name]
    ]


def main() -> None:
    """Counts every function, and records the table or checks it against the record."""
    parser = argparse.ArgumentParser(description="Operations of compiled programs")
    parser.add_argument("--check", action="store_true", help="compare with the recorded counts, record nothing")
    args = parser.parse_args()
    counts = {f"{name}, {padding}": operations(name, padding) for name in FUNCTIONS for padding in OPERATORS}
    rows = [[name, *(f"{counts[f'{name}, {padding}']:,}" for padding in OPERATORS)] for name in FUNCTIONS]
    body = table(["function", *OPERATORS], rows)
    print(body)
    if args.check:
        larger = grown(counts)
        print("\n".join(larger))
        sys.exit(1 if larger else 0)
    COUNTS.write_text(json.dumps({"jax": jax.__version__, "operations": counts}, indent=1) + "\n")
    heading = "StableHLO operations, 3x3, 64 to 64 channels, 32x32 samples, float32"
    record("compilation", document("Program size", "python benchmarks/compilation.py", [(heading, body)]))


if __name__ == "__main__":
    main()

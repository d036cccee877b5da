"""Part `counts`: how large are the programs, in StableHLO operations, counted before XLA sees them?

The time and the memory that XLA takes grow with the operations of a program. The counts are exact: they depend on the
version of JAX, and on nothing else of the machine.
"""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
from _report import RESULTS, table
from tqdm import tqdm

from compilation.functions import FUNCTIONS, Layer, layer_of
from compilation.parts import ABSENT, Effort, Part, at_most

COUNTS = RESULTS / "compilation_counts.json"
MOST = {
    "spectral_norm": (1_000, 1_800),
    "bounds.certified": (1_100, 2_200),
    "srnc": (2_500, 4_000),
    "srnc_state": (2_000, 2_800),
    "srnc_step": (500, 400, 300),
}


def operations(layer: Layer, name: str, padding: str) -> int:
    """Operations in the StableHLO text of one function; a subroutine that is called twice is written once."""
    op, (call, prepare) = layer.operators[padding], FUNCTIONS[name]
    kernel = jax.ShapeDtypeStruct(layer.shape, jnp.float32)
    prepared = jax.eval_shape(lambda kernel: prepare(kernel, op), kernel)
    return operations_in(jax.jit(lambda kernel, prepared: call(kernel, op, *prepared)).lower(kernel, prepared))


def operations_in(lowered: jax.stages.Lowered) -> int:
    """Operations in the StableHLO text of a program that is not compiled yet."""
    return len(re.findall(r"^.* = .*(?:stablehlo\.|call @)", lowered.as_text(), flags=re.MULTILINE))


def grown() -> list[str]:
    """Which programs are a tenth larger than recorded; none where the record is of another version of JAX."""
    recorded, layer = json.loads(COUNTS.read_text()), layer_of(Effort(fast=False, repeats=1))
    if recorded["jax"] != jax.__version__:
        return []
    found = []
    for key, before in recorded["operations"].items():
        name, _, padding = key.rpartition(", ")
        now = operations(layer, name, padding)
        if 10 * now > 11 * before:
            found.append(f"{key}: {now} operations, {before} recorded")
    return found


def counted(layer: Layer) -> dict[str, int]:
    """`{"function, operator": operations}`, without what cannot be traced; the error is printed."""
    counts = {}
    for name in tqdm(FUNCTIONS, desc="counts", leave=False):
        for padding in layer.operators:
            try:
                counts[f"{name}, {padding}"] = operations(layer, name, padding)
            except Exception as error:  # whatever it is, the other programs still have a size
                tqdm.write(f"{name}, {padding}: {type(error).__name__}: {error}")
    return counts


def measured(effort: Effort) -> Part:
    """The part: a row is a function, a column an operator; the counts are also kept for `--check`."""
    layer = layer_of(effort)
    counts = counted(layer)
    columns = list(layer.operators)
    keys = {name: [f"{name}, {padding}" for padding in columns] for name in FUNCTIONS}
    rows = [[name, *(f"{counts[key]:,}" if key in counts else ABSENT for key in keys[name])] for name in FUNCTIONS]
    sections = [(f"StableHLO operations, {layer}", table(("function", *columns), rows))]
    if effort.fast:
        return Part(sections, [])
    COUNTS.write_text(json.dumps({"jax": jax.__version__, "operations": counts}, indent=1) + "\n")
    checks = [
        at_most(counts.get(key), most, f"operations, {key}")
        for name, limits in MOST.items()
        for key, most in zip(keys[name], limits, strict=False)
    ]
    return Part(sections, checks)

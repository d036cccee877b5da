"""Part `first-calls`: seconds and memory maps of the first call of each function, beside a plain layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from _clock import timed
from _report import table
from norms.in_jax import two_liner
from tqdm import tqdm

import jaxsrn
from compilation.functions import FUNCTIONS, Function, layer_of
from compilation.parts import Effort, Part, at_most, count, in_fresh_processes, memory_maps, seconds

ABOUT = """\
{layer}. Functions are called as a user calls them, outside of
`jax.jit`; JAX has been imported and its backend started before the clock starts. `maps`: the memory maps that the
process has more after the first call than before it. Each line is a process of its own (medians of {repeats}), so that
it shares no compiled program with another; `stable_rank` is called after `spectral_norm` on the same layer, and
`srnc_step` after `srnc_state`, which are not counted."""
MOST_AFTER_NORM = 0.3
BATCH = 8


@functools.partial(jax.jit, static_argnums=1)
def gradients(kernel, op, x):
    """The layer, forward and backward."""
    return jax.grad(lambda kernel, x: jnp.sum(op.apply(kernel, x) ** 2), argnums=(0, 1))(kernel, x)


def images(kernel, op) -> tuple[jax.Array]:
    return (jnp.ones((BATCH, *op.in_shape(kernel.shape))),)


def normed(kernel, op) -> tuple:
    """Nothing, once the norm is known."""
    jax.block_until_ready(jaxsrn.spectral_norm(kernel, op))
    return ()


LAYER, TWO_LINES, AFTER = "the layer, forward and backward", "FFT and SVD (two lines, jitted)", "stable_rank after it"
TIMED = {
    LAYER: Function(gradients, images),
    TWO_LINES: Function(jax.jit(two_liner, static_argnums=1)),
    "spectral_norm": FUNCTIONS["spectral_norm"],
    AFTER: Function(jaxsrn.stable_rank, normed),
    "stable_rank alone": FUNCTIONS["stable_rank"],
    **{name: FUNCTIONS[name] for name in ("bounds.certified", "srnc", "srnc_state", "srnc_step")},
}
# The rows that need an image, and that are of circular layers alone.
PADDINGS = {LAYER: ("circular", "SAME"), TWO_LINES: ("circular",)}


def measure(effort: Effort, name: str, padding: str) -> dict[str, float]:
    """Seconds of the first and the second call in this process, and the maps of the first."""
    layer, (call, prepare) = layer_of(effort), TIMED[name]
    kernel, op = layer.kernel(), layer.operators[padding]
    prepared = jax.block_until_ready(prepare(kernel, op))
    before = memory_maps()
    first = timed(lambda: call(kernel, op, *prepared)).seconds
    maps = memory_maps() - before
    return {"first": first, "second": timed(lambda: call(kernel, op, *prepared)).seconds, "maps": maps}


def measured(effort: Effort) -> Part:
    """The part: a row is a function with one operator; a stable rank after a norm may take little more."""
    layer = layer_of(effort)
    rows, checks = [], []
    for name in tqdm(TIMED, desc="first calls", leave=False):
        for padding in PADDINGS.get(name, layer.operators):
            found = in_fresh_processes(effort, "first-calls", name, padding)
            times = seconds(found, "first"), "-" if found is None else f"{1e3 * found['second']:.1f} ms"
            rows.append([f"{name}, {padding}", *times, count(found, "maps")])
            if name == AFTER:
                first = None if found is None else found["first"]
                checks.append(at_most(first, MOST_AFTER_NORM, f"stable_rank after spectral_norm, {padding}", " s"))
    text = ABOUT.format(layer=layer, repeats=effort.repeats)
    body = table(("function", "first call", "second call", "maps"), rows)
    return Part([("First calls", f"{text}\n\n{body}")], [] if effort.fast else checks)

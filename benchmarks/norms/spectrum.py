"""Part `spectrum`: how fast are all singular values, beside the two lines of Sedghi et al. in JAX?"""

from __future__ import annotations

import os

import jax.numpy as jnp
from _clock import race
from _processes import in_process
from _report import duration, table
from tqdm import tqdm

import jaxsrn
from norms.cases import gaussian
from norms.in_jax import all_values, jax_call
from norms.parts import NORMS, TOLERANCE, Effort, Part

# XLA's pool has one thread more than there are cores, OpenBLAS none beside the caller's.
FREE = {"NPROC": str((os.cpu_count() or 1) + 1), "OPENBLAS_NUM_THREADS": "1"}
SPECTRUM = """\
All singular values, sorted, of Gaussian kernels; `difference` relative to the largest. Each kernel in a process of its
own, with {settings}: a batch of jaxlib's SVDs (0.10.2) holds a thread of XLA's
pool while the others work, and OpenBLAS's threads spin against them. By default, with one thread a core, it is chance
which of the two methods has all cores; the last column is the ratio there."""


def spectrum_of_run(n: int, c: int, effort: Effort) -> tuple[float, float, float]:
    """Seconds of the two lines and of `singular_values`, and the largest difference of their values."""
    case = gaussian(n, c, 3)
    calls = {
        name: jax_call(function, case.kernel, case.op)
        for name, function in (("jaxsrn", jaxsrn.singular_values), ("JAX", all_values))
    }
    # The calls are short, so that there is time for more rounds.
    found = race(calls, effort.rounds if effort.fast else 5 * effort.rounds, effort.seconds)
    (own, values), (peer, theirs) = found["jaxsrn"], found["JAX"]
    return peer, own, float(jnp.max(jnp.abs(values - theirs)) / theirs[0])


def spectrum(effort: Effort) -> Part:
    """The part: a row is a kernel, measured with threads set free of each other and by default."""
    sizes = ((8, 4), (9, 6)) if effort.fast else ((32, 16), (32, 64), (33, 32), (56, 64), (64, 32), (112, 16))
    rows, checks = [], []
    for n, c in tqdm(sizes, desc="all singular values", leave=False):
        arguments = ("--spectrum", str(n), str(c), *(["--fast"] if effort.fast else []))
        (peer, own, difference), by_default = (in_process(NORMS, *arguments, **settings) for settings in (FREE, {}))
        name, ratio = f"({n}, {c}, 3)", peer / own
        default_ratio = f"{by_default[0] / by_default[1]:.2f}"
        rows.append([name, duration(peer), duration(own), f"{ratio:.2f}", f"{difference:.1e}", default_ratio])
        if not effort.fast:
            text = (
                f"singular_values, {name}: {ratio:.2f} times the two-liner, required 1.8 ({default_ratio} by default)"
            )
            checks.append((ratio >= 1.8, text))
        difference = max(difference, by_default[2])
        checks.append((difference <= TOLERANCE, f"singular_values, {name}: as the two-liner's, {difference:.1e}"))
    header = ("kernel", "two-liner (JAX)", "jaxsrn.singular_values", "ratio", "difference", "ratio by default")
    text = SPECTRUM.format(settings=" and ".join(f"{name}={value}" for name, value in FREE.items()))
    return Part([("All singular values", f"{text}\n\n{table(header, rows)}")], checks, {})

"""Part `channels`: how does the time of a norm depend on the number of channels?"""

from __future__ import annotations

from _clock import race
from _report import duration, table
from tqdm import tqdm

from jaxsrn import bounds
from norms.cases import gaussian
from norms.figures import lines_figure
from norms.in_jax import jax_call
from norms.methods import CERTIFIED, exact_calls
from norms.parts import Effort, Part


def channels(effort: Effort) -> Part:
    """The part: Figure 1 of Sedghi, Gupta, Long 2019, with a table beside it; nothing is required."""
    counts = (2, 4) if effort.fast else (4, 8, 16, 32, 64, 128)
    times: dict[str, list[float]] = {}
    for c in tqdm(counts, desc="channels", leave=False):
        case = gaussian(16, c, 3)
        calls = exact_calls(case) | {CERTIFIED: jax_call(bounds.certified, case.kernel, case.op)}
        for name, run in race(calls, effort.rounds, effort.seconds).items():
            times.setdefault(name, []).append(run.seconds)
    rows = [[name, *map(duration, values)] for name, values in times.items()]
    text = "Gaussian 3x3 kernels, n = 16, after Figure 1 of Sedghi, Gupta, Long 2019."
    figure = lines_figure(counts, times, "channels", "Gaussian 3x3 kernels, n = 16")
    sections = [("Cost against channels", f"{text}\n\n{table(('channels', *map(str, counts)), rows)}")]
    return Part(sections, [], {"norms_channels": figure})

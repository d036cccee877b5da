"""Part `image-size`: how does the time of a norm, and the width of its interval, depend on the size of the image?"""

from __future__ import annotations

from _clock import race
from _report import duration, table
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, bounds
from norms.cases import Case, gaussian, trained
from norms.figures import lines_figure
from norms.in_jax import jax_call, relative_width, two_liner
from norms.parts import Effort, Part


def image_cases(effort: Effort) -> tuple[list[Case], tuple[int, ...]]:
    """The kernels, and the sizes of the images on which each acts."""
    if effort.fast:
        return [gaussian(7, 4, 3)], (7, 14, 28)
    cases = trained()["ResNet-50 (56, 64, 3)"] if effort.network else [gaussian(56, 64, 3)]
    return cases, (14, 28, 56, 112, 224, 512, 1024)


def image_times(effort: Effort) -> tuple[list[int], dict[str, list[float]], list[float]]:
    """Sizes, `{method: seconds}` (the two-liner only while it takes seconds), and the widths of the interval."""
    cases, sizes = image_cases(effort)
    times: dict[str, list[float]] = {}
    width, limit = [], (0.1 if effort.fast else 5.0)
    for n in tqdm(sizes, desc="image size", leave=False):
        op, calls = CircularConv((n, n)), {}
        for i, case in enumerate(cases):
            calls[f"spectral_norm, kernel {i + 1}"] = jax_call(jaxsrn.spectral_norm, case.kernel, op)
        calls["certified, kernel 1"] = jax_call(bounds.certified, cases[0].kernel, op)
        peer = "two-liner (JAX), kernel 1"
        known = times.get(peer, [])
        if not known or known[-1] * (n / sizes[len(known) - 1]) ** 2 <= limit:
            calls[peer] = jax_call(two_liner, cases[0].kernel, op)
        found = race(calls, effort.rounds, effort.seconds)
        for name, run in found.items():
            times.setdefault(name, []).append(run.seconds)
        width.append(relative_width(found["certified, kernel 1"].result))
    return list(sizes), times, width


def image_size(effort: Effort) -> Part:
    """The part: times at every size, of which the largest may take twice as long as n = 224."""
    sizes, times, width = image_times(effort)
    name = image_cases(effort)[0][0].name
    rows = [[method, *map(duration, values), *["-"] * (len(sizes) - len(values))] for method, values in times.items()]
    rows.append(["certified, kernel 1: width", *(f"{w:.1e}" for w in width)])
    text = (
        f"{name}, circular padding, on images of other sizes than its own too, in turns at each size.\n"
        "`-`: would take more than some seconds."
    )
    checks = []
    for method, values in times.items():
        if not effort.fast and not method.startswith("two-liner"):
            ratio = values[-1] / values[sizes.index(224)]
            checks.append((ratio <= 2, f"{method}: n = 1024 takes {ratio:.2f} times as long as n = 224, at most 2"))
    figure = lines_figure(sizes, times, "image size n", name)
    sections = [("Cost against image size", f"{text}\n\n{table(('n', *map(str, sizes)), rows)}")]
    return Part(sections, checks, {"norms_image_size": figure})

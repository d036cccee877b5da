"""What every part of the benchmark takes and gives back, and how it writes numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from _report import table
from matplotlib.figure import Figure

Checks = list[tuple[bool, str]]
TOLERANCE = 1e-5  # relative error that a float32 norm may have


class Part(NamedTuple):
    """What one part of the benchmark found: sections `(heading, body)`, requirements, pictures by file name."""

    sections: list[tuple[str, str]]
    checks: Checks
    figures: dict[str, Figure]


class Effort(NamedTuple):
    """How much is run."""

    fast: bool  # tiny kernels only
    network: bool  # the kernels of the trained ResNet-50 too
    rounds: int  # at most, for each method and kernel
    seconds: float  # at most, for each method and kernel


def duration(seconds: float) -> str:
    """A time as a table shows it, in seconds or milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{1 if seconds >= 0.01 else 3}f} ms"


def error_table(title: str, errors: dict[str, list[float]]) -> str:
    """A table of relative errors: a row shows how many there are, the worst, and how many exceed the tolerance."""
    rows = [
        [name, len(found), f"{np.max(found):.1e}", sum(not error <= TOLERANCE for error in found)]
        for name, found in errors.items()
        if found
    ]
    return table((title, "kernels", "worst error", "misses"), rows)

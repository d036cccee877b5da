"""What every part of the benchmark takes and gives back, and how it writes errors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from _report import Checks, table
from matplotlib.figure import Figure

NORMS = Path(__file__).parent  # this benchmark, as a script
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


def error_table(title: str, errors: dict[str, list[float]]) -> str:
    """A table of relative errors: a row shows how many there are, the worst, and how many exceed the tolerance."""
    rows = [
        [name, len(found), f"{np.max(found):.1e}", sum(not error <= TOLERANCE for error in found)]
        for name, found in errors.items()
        if found
    ]
    return table((title, "kernels", "worst error", "misses"), rows)

"""What every part of the benchmark takes and gives back, and its measurements in fresh processes."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _processes import in_process
from _report import Checks
from tqdm import tqdm

COMPILATION = Path(__file__).parent  # this benchmark, as a script
MAPS = Path("/proc/self/maps")
ABSENT = "-"


class Effort(NamedTuple):
    """How much is run."""

    fast: bool  # tiny kernels only
    repeats: int  # fresh processes for each measurement


class Part(NamedTuple):
    """What one part of the benchmark found: sections `(heading, body)`, and requirements."""

    sections: list[tuple[str, str]]
    checks: Checks


def memory_maps() -> int:
    """The number of memory maps that this process has now; 0 where the system does not tell."""
    return len(MAPS.read_text().splitlines()) if MAPS.exists() else 0


def in_fresh_processes(effort: Effort, part: str, *arguments: str) -> dict[str, Any] | None:
    """The medians of what `measure` of a part finds, with the wall time of the whole process as `process`.

    Returns:
      `None` where a process fails, as it does where the library runs out of memory maps.
    """
    runs = []
    for _ in tqdm(range(effort.repeats), desc=" ".join((part, *arguments)), leave=False):
        start = time.perf_counter()
        try:
            options = ("--fast",) if effort.fast else ()
            found = in_process(
                COMPILATION, "--measure", part, *arguments, *options, JAX_ENABLE_COMPILATION_CACHE="false"
            )
        except subprocess.CalledProcessError as error:
            tqdm.write(f"{part}, {', '.join(arguments)}: the process ended with {error.returncode}")
            return None
        runs.append(found | {"process": time.perf_counter() - start})
    return {name: np.median([run[name] for run in runs], axis=0) for name in runs[0]}


def seconds(found: dict | None, name: str) -> str:
    """A time as a table shows it, and a dash where there is none."""
    return ABSENT if found is None else f"{found[name]:.2f} s"


def count(found: dict | None, name: str) -> str:
    """A number of things as a table shows it, and a dash where there is none."""
    return ABSENT if found is None else f"{found[name]:,.0f}"


def at_most(value: float | None, limit: float, text: str, unit: str = "") -> tuple[bool, str]:
    """A requirement from above; it is not met where the measurement failed."""
    if value is None:
        return False, f"{text}: failed, at most {limit:g}{unit}"
    shown = f"{value:,.3f}".rstrip("0").rstrip(".") if value == 0 or value >= 1e-3 else f"{value:.1e}"
    return bool(value <= limit), f"{text}: {shown}{unit}, at most {limit:g}{unit}"

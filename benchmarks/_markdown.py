"""Reports in Markdown, of benchmarks and examples alike: the machine, tables, and how a report was made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def machine() -> str:
    """The processor, its cores, the accelerator if there is one, and the versions: no dates, no host names."""
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f", {device.device_kind}"
    return (
        f"{_cpu_model()}, {os.cpu_count()} cores{accelerator}; Python {platform.python_version()}, "
        f"jax {jax.__version__}, numpy {np.__version__}"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal; all but the first column right-aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[j]) for row in [header, *rows])) for j in range(len(header))]

    def line(cells):
        padded = [cell.rjust(w) if j else cell.ljust(w) for j, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = [("-" * (w - 1) + ":") if j else "-" * w for j, w in enumerate(widths)]
    return "\n".join(map(line, [header, rule, *rows]))


def made_by(part: str | None = None) -> str:
    """The command of this run: its script, from the root of the repository, with the options that were given.

    `--output` is left out, as where a report goes changes nothing in it. A report of one `part` names that part, in
    place of all that `--only` was given.
    """
    script = Path(sys.argv[0]).resolve()
    # A folder may be run by its own name or by that of the file in it.
    script = script.parent if script.name == "__main__.py" else script
    options, left_out = iter(sys.argv[1:]), ("--output", "--only") if part else ("--output",)
    kept = ["--only", part] if part else []
    for option in options:
        name, equals, _ = option.partition("=")
        if name not in left_out:
            kept.append(option)
        elif not equals:
            next(options)  # its value
    return shlex.join(["python", Path(os.path.relpath(script, ROOT)).as_posix(), *kept])


def document(title: str, sections: Iterable[tuple[str, str]], part: str | None = None) -> str:
    """The whole report: how it was made, then sections of `(heading, body)`; `part`: as of `made_by`."""
    head = f"# {title}\n\nMade by `{made_by(part)}` on {machine()}.\n"
    return "\n".join([head, *(f"## {heading}\n\n{body}\n" for heading, body in sections)])

"""What the benchmarks share: verdicts, and the Markdown files under `results/`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from _markdown import document, table

__all__ = ["RESULTS", "Checks", "duration", "publish", "table"]

Checks = list[tuple[bool, str]]
RESULTS = Path(__file__).parent / "results"


def duration(seconds: float) -> str:
    """A time as a table shows it, in seconds or milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{1 if seconds >= 0.01 else 3}f} ms"


def verdict(met: bool, text: str) -> str:
    """One requirement, as a line of the report."""
    return f"- **{'met' if met else 'NOT MET'}**: {text}"


def record(name: str, text: str) -> None:
    """Writes `results/<name>.md`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(text)
    print(f"written to {path.relative_to(RESULTS.parents[1])}")


def publish(
    name: str, title: str, sections: Iterable[tuple[str, str]], checks: Checks, keep: bool, part: str | None = None
) -> bool:
    """Prints a report with its requirements, and records it where it is to be kept; returns whether all are met.

    `part` is that of a script which records each of its parts by itself.
    """
    requirements = [("Requirements", "\n".join(itertools.starmap(verdict, checks)))] if checks else []
    text = document(title, [*sections, *requirements], part)
    print(text, flush=True)
    if keep:
        record(name, text)
    return all(met for met, _ in checks)

"""What the benchmarks share: verdicts, and the Markdown files under `results/`."""

from __future__ import annotations

from pathlib import Path

from _markdown import document, table

__all__ = ["RESULTS", "document", "record", "table", "verdict"]

RESULTS = Path(__file__).parent / "results"


def verdict(met: bool, text: str) -> str:
    """One requirement, as a line of the report."""
    return f"- **{'met' if met else 'NOT MET'}**: {text}"


def record(name: str, text: str) -> None:
    """Writes `results/<name>.md`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(text)
    print(f"written to {path.relative_to(RESULTS.parents[1])}")

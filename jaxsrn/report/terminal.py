"""Tables and progress on a terminal: coloured with `rich` where somebody looks, plain lines where a pipe reads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence

from jaxsrn._tools.checks import ensure
from jaxsrn.report.table import aligned

__all__ = ["Progress", "progress_bar", "show_lines", "show_table"]

# How progress is shown: by a function, on the error stream (`True`), not at all (`False`), or by default where that is
# a terminal and rich is installed.
Progress = bool | Callable[[int, int, str], object] | None
# The least that the column of names has on a terminal.
_FIRST_WIDTH = 12


def _console(stream, always: bool = False):
    """A console of `rich` for a stream that is a terminal, or for any; `None` for others, and without rich."""
    if not (always or stream.isatty()):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False)


def show_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    marked: Collection[str] = (),
    left: int = 1,
    dispensable: Sequence[str] = (),
) -> None:
    """A table on the standard output; rows whose first cell is marked are coloured.

    The first `left` columns are left-aligned. On a terminal a column that is the same in all rows is named once below
    the table, and where the terminal is too narrow dispensable columns are left out, the first ones first; all of them
    that have the name.
    """
    console = _console(sys.stdout)
    if console is None:
        print("\n".join(aligned(header, rows, left)))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    constant = [j for j in range(1, len(header)) if len(rows) > 2 and len({row[j] for row in rows}) == 1]
    shown = [j for j in range(len(header)) if j not in constant]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths[0], hidden = max(widths[0], _FIRST_WIDTH), []
    for name in dispensable:
        # Two spaces stand between columns, and one at each end.
        if sum(widths[j] + 3 for j in shown) > console.width and any(header[j] == name for j in shown):
            shown = [j for j in shown if header[j] != name]
            hidden.append(name)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for j in shown:
        table.add_column(
            Text(header[j]),
            justify="left" if j < left else "right",
            overflow="fold",
            no_wrap=j > 0,
            min_width=None if j else _FIRST_WIDTH,
        )
    for row in rows:
        table.add_row(*(Text(row[j]) for j in shown), style="yellow" if row[0] in marked else None)
    console.print(table)
    notes = [f"{header[j]} of all: {rows[0][j]}" for j in constant]
    notes += [f"Left out, as the terminal is narrow: {', '.join(hidden)}"] if hidden else []
    for note in notes:
        console.print(Text(note, style="dim"))


def show_lines(lines: Sequence[str]) -> None:
    """Sentences on the standard output."""
    console = _console(sys.stdout)
    if console is None:
        print("\n".join(lines))
        return
    from rich.text import Text

    for line in lines:
        console.print(Text(line))


@contextlib.contextmanager
def progress_bar(progress: Progress) -> Iterator[Callable[[int, int, str], object]]:
    """A function of `(layers done, layers in all, the name of the next)` that shows them as was asked for."""
    if callable(progress):
        yield progress
        return
    ensure(
        progress is None or isinstance(progress, bool),
        f"progress: got {progress!r}, expected True, False, None or a function of (done, in all, name of the next).",
    )
    console = None if progress is False else _console(sys.stderr, always=bool(progress))
    ensure(progress is not True or console is not None, "progress: got True, which needs rich; pip install rich.")
    if console is None:
        yield lambda done, total, name: None
        return
    from rich import progress as bars

    times = (bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    columns = (bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("layers"), *times)
    name_of_next = bars.TextColumn("{task.description}", markup=False)
    with bars.Progress(*columns, name_of_next, console=console, transient=progress is None) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)

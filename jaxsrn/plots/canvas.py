"""What all pictures share: axes, a legend clear of the curves, and ways to draw that differ without colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsrn._tools.checks import ensure

__all__ = ["COLORS", "as_label", "axes_of", "checked_curves", "every", "size_for", "styles", "with_legend"]

# Perceptually uniform, and the same to most colour-blind readers.
COLORS = colormaps["cividis"]
_LINES = ("-", "--", "-.", ":")
# Their number has no common divisor with that of the lines: 28 pairs come before the first one comes again.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes that are given, or those of a new figure of this size in inches, without a frame above and at right."""
    # A figure that pyplot does not know: it is not shown by itself, and is let go when nobody holds it.
    ax = Figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def size_for(number: int) -> tuple[float, float]:
    """Inches, for a picture of `number` curves and the columns of its legend."""
    return 5.7 + 1.8 * _columns(number), 4.0


def _columns(number: int) -> int:
    return 1 + (number - 1) // 16


def with_legend(ax: Axes, *, below: float | None = None, title: str | None = None) -> Figure:
    """The figure of the axes, with a legend beside them; or below, where a colour bar is beside, at this distance."""
    number = len(ax.get_legend_handles_labels()[0])
    place = ("upper left", (1.0, 1.0)) if below is None else ("upper center", (0.5, -below))
    options = {"frameon": False, "title": title, "alignment": "left", "ncols": _columns(number)}
    ax.legend(loc=place[0], bbox_to_anchor=place[1], **options)
    return ax.figure.figure


def as_label(name) -> str:
    """A name as it is in a legend: matplotlib leaves out those that begin with `_`, and reads formulas between `$`."""
    text = str(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def styles(number: int, lightest: float = 0.75) -> list[dict]:
    """Ways to draw `number` curves: from dark to light, with another line and marker from each to the next."""
    shades = np.linspace(0, lightest, number)
    return [
        {"color": COLORS(shade), "ls": _LINES[i % len(_LINES)], "marker": _MARKERS[i % len(_MARKERS)], "ms": 5}
        for i, shade in enumerate(shades)
    ]


def every(length: int) -> int:
    """The points from one marker to the next: about ten markers on a long curve."""
    return max(1, length // 10)


def checked_curves(curves: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """`{name: 1-D array}`, none of them empty."""
    ensure(isinstance(curves, Mapping), f"{name}: got a {type(curves).__name__}, expected {{label: 1-D array}}.")
    arrays = {key: np.asarray(curve) for key, curve in curves.items()}
    shapes = {key: array.shape for key, array in arrays.items()}
    ensure(bool(arrays), f"{name}: got none, expected at least one.")
    ensure(
        all(array.ndim == 1 and array.size for array in arrays.values()),
        f"{name}: got the shapes {shapes}, expected 1-D arrays with one entry or more.",
    )
    return arrays

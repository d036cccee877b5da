"""Stable ranks within their feasible ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsrn._tools.checks import ensure
from jaxsrn.plots.canvas import as_label, axes_of, styles, with_legend

__all__ = ["stable_ranks"]


def stable_ranks(layers: Any, *, ax: Axes | None = None) -> Figure:
    """The stable rank of every layer, within the stable ranks that kernels of its shape can have.

    Args:
      layers: a `jaxsrn.report.Report`, or any sequence of records with the fields `name`, `stable_rank`,
        `stable_rank_low` and `stable_rank_high`; or `{title: such a sequence}` to compare models of the same layers.
      ax: axes to draw on.

    Returns:
      The figure of the axes.

    Raises:
      ValueError: no layers, or models whose layers have different names.
    """
    models = layers if isinstance(layers, Mapping) else {"stable rank": layers}
    models = {title: list(getattr(records, "layers", records)) for title, records in models.items()}
    names = [[record.name for record in records] for records in models.values()]
    ensure(bool(names) and bool(names[0]), "layers: got none, expected at least one.")
    ensure(all(own == names[0] for own in names), f"layers: got models of the layers {names}, expected the same.")
    places = np.arange(len(names[0]))
    ax = axes_of(ax, (7.5, 1.3 + 0.4 * len(places)))
    records = next(iter(models.values()))
    lows, highs = (np.array([getattr(record, f"stable_rank_{end}") for record in records]) for end in ("low", "high"))
    ax.hlines(places, lows, highs, color="0.85", lw=12, label="feasible")
    # Markers of different models stand below each other, so that none hides another.
    shifts = 0.5 * (np.arange(len(models)) - (len(models) - 1) / 2) / len(models)
    for (title, records), shift, style in zip(models.items(), shifts, styles(len(models)), strict=True):
        ranks = [record.stable_rank for record in records]
        ax.plot(ranks, places + shift, **{**style, "ls": "", "ms": 7, "mec": "black"}, label=as_label(title))
    ax.set(xlabel="stable rank", xscale="log", ylim=(len(places) - 0.5, -0.5))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yticks(places, [as_label(name) for name in names[0]])
    return with_legend(ax)

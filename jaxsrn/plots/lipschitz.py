"""Lipschitz constants: bounds from below and from above, and the histogram of those found on data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from jaxsrn._tools.checks import ensure, static_int
from jaxsrn.plots.canvas import COLORS, as_label, axes_of, checked_curves, size_for, styles, with_legend

__all__ = ["lipschitz_bounds", "lipschitz_histogram"]


def lipschitz_bounds(lower: Mapping[str, Any], upper: Mapping[str, Any], *, ax: Axes | None = None) -> Figure:
    """Bounds of Lipschitz constants, as bars on a logarithmic scale: from below, as found on data, and from above.

    A name may be that of a model, or of a way to find a bound; what has a lower and an upper bound has two bars.

    Args:
      lower: `{name: number}`, empirical: no Lipschitz constant is smaller.
      upper: `{name: number}`, certified: no Lipschitz constant is larger.
      ax: axes to draw on.

    Returns:
      The figure of the axes.

    Raises:
      ValueError: no numbers, or one that is not positive and finite.
    """
    numbers = [float(number) for number in (*lower.values(), *upper.values())]
    ensure(bool(numbers), "lower, upper: got no numbers, expected at least one.")
    ensure(
        all(0 < number < np.inf for number in numbers),
        f"lower, upper: got {numbers}, expected positive finite numbers; leave the others out.",
    )
    names = list(dict.fromkeys((*lower, *upper)))
    ax = axes_of(ax, (7.5, 1.5 + 0.6 * len(names)))
    kinds = (("lower, empirical", lower, 0.75, "//"), ("upper, certified", upper, 0.15, ""))
    for number, (label, bounds, shade, hatch) in enumerate(kinds):
        places = [names.index(name) + (0.4 * number - 0.2) * (name in lower and name in upper) for name in bounds]
        lengths = list(map(float, bounds.values()))
        bars = ax.barh(places, lengths, 0.38, label=label, color=COLORS(shade), hatch=hatch, edgecolor="black")
        ax.bar_label(bars, fmt="%.3g", padding=3)
    # Bars have no natural foot on a logarithmic scale: below the smallest number, and room for the labels above.
    ax.set(xlabel="Lipschitz constant", xscale="log", xlim=(min(numbers) / 2, max(numbers) * 2))
    # Within two decades powers of ten are too few labels, and matplotlib's smaller ones run into each other.
    is_short = max(numbers) < 100 * min(numbers)
    locator = LogLocator(subs=(1, 2, 5)) if is_short else LogLocator(numticks=5)
    ax.xaxis.set(major_locator=locator, major_formatter="{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(range(len(names)), [as_label(name) for name in names])
    return with_legend(ax)


def lipschitz_histogram(
    ratios: Mapping[str, Any], *, bins: int = 40, percentile: float = 95.0, ax: Axes | None = None
) -> Figure:
    """The histogram of empirical Lipschitz constants, eLhist, with a percentile (Sanyal, Torr, Dokania 2020, Figure 2).

    Args:
      ratios: `{name: ratios}`, 1-D: `|f(x) - f(y)| / |x - y|` over pairs of inputs, or norms of Jacobians.
      bins: the number of bins, which all histograms share.
      percentile: the percentile that a vertical line marks.
      ax: axes to draw on.

    Returns:
      The figure of the axes.

    Raises:
      ValueError: no ratios, or some that are not 1-D and finite.
    """
    curves = {name: own.astype(float) for name, own in checked_curves(ratios, "ratios").items()}
    ensure(all(np.isfinite(own).all() for own in curves.values()), "ratios: expected finite numbers; leave others out.")
    edges = np.histogram_bin_edges(np.concatenate(list(curves.values())), static_int(bins, "bins"))
    ax = axes_of(ax, size_for(len(curves)))
    for (name, own), style in zip(curves.items(), styles(len(curves)), strict=True):
        line = {"color": style["color"], "ls": style["ls"]}
        value = np.percentile(own, percentile)
        # Shares, so that models with different numbers of pairs can be compared.
        shares = np.histogram(own, edges)[0] / len(own)
        ax.stairs(shares, edges, lw=1.8, label=f"{as_label(name)}: {value:.3g}", **line)
        ax.axvline(value, lw=1, **line)
    ax.set(xlabel="empirical Lipschitz constant", ylabel="share of the pairs")
    ax.set_ylim(bottom=0)
    return with_legend(ax, title=f"vertical: {percentile:g}th percentile")

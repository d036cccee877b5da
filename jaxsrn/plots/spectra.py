"""Sorted singular values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsrn.plots.canvas import as_label, axes_of, checked_curves, every, size_for, styles, with_legend

__all__ = ["singular_values"]

# Smaller singular values are rounding errors in float32, and would take most of the picture.
_NEGLIGIBLE = 1e-6


def singular_values(values: Mapping[str, Any], *, relative: bool = False, ax: Axes | None = None) -> Figure:
    """Sorted singular values, a curve for each layer, on a logarithmic scale.

    Values below a millionth of the largest lie below the picture.

    Args:
      values: `{name: values}`, 1-D, in any order: those of `jaxsrn.singular_values`, or of `top_singular_values`.
      relative: whether to divide values by the largest one and indices by their number, so that layers of different
        sizes can be compared.
      ax: axes to draw on.

    Returns:
      The figure of the axes.

    Raises:
      ValueError: no values, or some that are not 1-D.
    """
    curves = {name: np.sort(curve.astype(float))[::-1] for name, curve in checked_curves(values, "values").items()}
    ax = axes_of(ax, size_for(len(curves)))
    for (name, curve), style in zip(curves.items(), styles(len(curves)), strict=True):
        index = np.arange(1, len(curve) + 1)
        if relative:
            # The values of a zero layer stay 0.
            index, curve = index / len(curve), curve / (curve[0] or 1.0)
        ax.plot(index, curve, label=as_label(name), markevery=every(len(curve)), **style)
    ax.set(
        xlabel="index / number of singular values" if relative else "index",
        ylabel="singular value / spectral norm" if relative else "singular value",
    )
    norms = [curve[0] for curve in curves.values() if curve[0] > 0]
    if norms:
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(ax.get_ylim()[0], _NEGLIGIBLE * (1.0 if relative else max(norms))))
    return with_legend(ax)

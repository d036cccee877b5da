"""Norms during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsrn._tools.checks import ensure
from jaxsrn.plots.canvas import as_label, axes_of, checked_curves, every, size_for, styles, with_legend

__all__ = ["norms_over_steps"]


def norms_over_steps(
    steps: Any, norms: Mapping[str, Any], *, limit: float | None = None, ax: Axes | None = None
) -> Figure:
    """Spectral norms of layers during training.

    Args:
      steps: the training steps at which norms were taken, 1-D.
      norms: `{name: norms at these steps}`.
      limit: the norm that was asked for, drawn as a horizontal line.
      ax: axes to draw on.

    Returns:
      The figure of the axes.

    Raises:
      ValueError: no norms, or a number of norms other than that of the steps.
    """
    steps, curves = np.asarray(steps), checked_curves(norms, "norms")
    lengths = {name: len(curve) for name, curve in curves.items()}
    ensure(
        steps.ndim == 1 and set(lengths.values()) == {len(steps)},
        f"norms: got {lengths} norms for steps of shape {steps.shape}, expected one for each step.",
    )
    ax = axes_of(ax, size_for(len(curves)))
    for (name, curve), style in zip(curves.items(), styles(len(curves)), strict=True):
        ax.plot(steps, curve, label=as_label(name), markevery=every(len(steps)), **style)
    if limit is not None:
        ax.axhline(limit, color="0.5", lw=0.8, label=f"asked for: {limit:g}", zorder=0)
    ax.set(xlabel="training step", ylabel="spectral norm")
    ax.set_ylim(bottom=0)
    return with_legend(ax)

"""The sphere of kernels of three taps, on which the surrogate of stable rank normalization descends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

from jaxsrn._tools.checks import ensure
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.plots.canvas import as_label, axes_of, styles, with_legend
from jaxsrn.spectra.values import symbol

__all__ = ["camera", "sphere"]

# Light greys, which lines stand out from.
_SHADES = ListedColormap(colormaps["gray"](np.linspace(0.62, 1, 256)))


def camera(azimuth: float = 16.0, elevation: float = 12.0) -> np.ndarray:
    """The view of the sphere from a direction in degrees: rows to the right, upwards, and towards the viewer."""
    az, el = np.radians([azimuth, elevation])
    right = [-np.sin(az), np.cos(az), 0.0]
    towards = [np.cos(el) * np.cos(az), np.cos(el) * np.sin(az), np.sin(el)]
    return np.array([right, np.cross(towards, right), towards])


def sphere(
    op: Operator,
    target: float,
    *,
    paths: Mapping[str, Any] = MappingProxyType({}),
    points: Mapping[str, Any] = MappingProxyType({}),
    view: np.ndarray | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The directions of kernels of three taps: their stable rank in grey, where it is the target, and descents to it.

    Stable rank normalization looks for the point nearest to the kernel on the curves where the stable rank is the
    target (Zheng, Dewil, Facciolo, Arias 2025, section 3.3 and figure 2). The view is orthographic; what lies behind is
    dashed or dotted.

    Args:
      op: a `CircularConv` of one axis, for kernels of one channel.
      target: the stable rank asked for.
      paths: `{name: (records, 3)}`, such as the `points` of `jaxsrn.surrogate.trajectory`, from an open marker, the
        start, to a filled one. Kernels `(3, 1, 1)` in place of vectors will do, of any length but zero.
      points: `{name: (3,) or (number, 3)}`, drawn whether in front or behind.
      view: the rows of `camera(azimuth, elevation)`.
      ax: axes to draw on.

    Returns:
      The figure of the axes.

    Raises:
      ValueError: another operator, or paths and points that are not made of three taps or have no direction.
    """
    ensure(
        isinstance(op, CircularConv) and op.grid == op.input_shape[:1] and op.feature_group_count == 1,
        f"op: got {op}, expected a CircularConv of one axis, without strides and groups.",
    )
    view = camera() if view is None else view
    paths = {name: _on_sphere(path, f"paths[{name!r}]") @ view.T for name, path in paths.items()}
    points = {name: _on_sphere(point, f"points[{name!r}]") @ view.T for name, point in points.items()}
    ax = axes_of(ax, (5.2, 6.0))
    _draw_ball(ax, op, target, view)
    for (name, path), style in zip(paths.items(), styles(len(paths), 0.4), strict=True):
        _draw_path(ax, path, style, name)
    for (name, point), marker in zip(points.items(), itertools.cycle("*PXp"), strict=False):
        ax.plot(*point.T[:2], marker, color="black", mec="white", ms=13, zorder=6, label=as_label(name))
    ax.set(xlim=(-1.2, 1.3), ylim=(-1.1, 1.3), aspect="equal", anchor="N")
    ax.axis("off")
    return with_legend(ax, below=0.0)


def _on_sphere(kernels, name: str) -> np.ndarray:
    """Kernels of three taps as points of the unit sphere, `(number, 3)`."""
    kernels = np.asarray(kernels, float)
    kernels = kernels.reshape(kernels.shape[:-2] if kernels.shape[-2:] == (1, 1) else kernels.shape)
    ensure(kernels.shape[-1:] == (3,), f"{name}: got shape {kernels.shape}, expected vectors of three taps.")
    kernels = kernels.reshape(-1, 3)
    lengths = np.linalg.norm(kernels, axis=-1, keepdims=True)
    ensure(bool((lengths > 0).all()), f"{name}: got a zero or NaN vector, expected vectors that have a direction.")
    return kernels / lengths


def _draw_ball(ax, op, target, view):
    """The stable rank as shades, and where it is the target; what is behind, dashed."""
    # The symbol is linear in the kernel: those of the three unit kernels give all.
    units = np.stack([np.ravel(symbol(unit.reshape(3, 1, 1), op)) for unit in np.eye(3, dtype=np.float32)])
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, 301, dtype=np.float32)])
    depth = np.sqrt(np.maximum(1 - x**2 - y**2, 0))
    for side, style, width, opacity in ((-1, "dashed", 1, 0.6), (1, "solid", 2.2, 1)):
        magnitudes = np.abs(np.stack([x, y, side * depth], -1) @ (view @ units).astype(units.dtype)) ** 2
        ranks = magnitudes.sum(-1) / magnitudes.max(-1)
        inside = np.ma.masked_where(x**2 + y**2 > 1, ranks)
        ax.contour(x, y, inside, [target], colors="black", linewidths=width, linestyles=style, alpha=opacity)
    ax.add_line(Line2D([], [], color="black", lw=2.2, label=f"feasible: stable rank {target:g}"))
    ax.add_line(Line2D([], [], color="black", lw=1, ls="--", alpha=0.6, label="the same, behind"))
    shades = ax.imshow(ranks, _SHADES, extent=(-1, 1, -1, 1), origin="lower", zorder=0)
    shades.set_clip_path(ax.add_patch(Circle((0, 0), 1, fill=False, color="0.4", lw=1)))
    ax.figure.colorbar(shades, ax=ax, label="stable rank", shrink=0.7)
    for i in (1, 2):
        foot = view[:2, i]
        ax.annotate("", 1.15 * foot, foot, arrowprops={"arrowstyle": "->", "color": "0.3", "lw": 1})
        ax.text(*(1.25 * foot), f"$x_{i}$", ha="center", va="center", color="0.3")


def _draw_path(ax, path, style, name):
    """A path as the camera sees it."""
    right, up, towards = path.T
    color, marker = style["color"], style["marker"]
    for visible, line, alpha in ((towards < 0, ":", 0.7), (towards >= 0, "-", 1.0)):
        edge = [withStroke(linewidth=4, foreground="white")] if line == "-" else None
        ax.plot(np.where(visible, right, np.nan), up, line, color=color, lw=2, alpha=alpha, zorder=3, path_effects=edge)
    ax.plot(right[0], up[0], marker, color=color, mfc="white", mew=1.5, ms=8, zorder=4)
    ax.plot(right[-1], up[-1], marker, color=color, mec="white", ms=9, zorder=5, label=as_label(name))

"""The symbol of a convolution over its frequencies."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsrn._tools.checks import Kernel, ensure, kernel_array, static_int
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.plots.canvas import COLORS, axes_of, with_legend
from jaxsrn.spectra.values import symbol

__all__ = ["symbol_norms"]

_ANGLES = (np.pi * np.array([-1, -0.5, 0, 0.5, 1]), ("-π", "-π/2", "0", "π/2", "π"))


def symbol_norms(kernel: Kernel, op: Operator, *, resolution: int = 64, ax: Axes | None = None) -> Figure:
    """The largest singular value of a convolution at each frequency: a curve with one axis, a heat map with two.

    Their maximum is the spectral norm of a circular convolution, and approaches that of an unbounded one from below
    (Sedghi, Gupta, Long 2019, Theorem 8). Frequencies are in radians per output sample, those of a strided layer after
    its subsampling. One SVD is taken at each frequency.

    Args:
      kernel: `(*taps, c_in // groups, c_out)`, with one or two axes of taps.
      op: a `CircularConv`, which has the frequencies of its grid, or an `UnboundedConv`, which has all.
      resolution: the number of frequencies along each axis that are shown of an `UnboundedConv`.
      ax: axes to draw on.

    Returns:
      The figure of the axes.

    Raises:
      ValueError: another operator, three axes, or a kernel that does not fit.
    """
    frequencies, norms = _norms_by_frequency(kernel, op, resolution)
    ax = axes_of(ax, (6.5, 5.0) if norms.ndim == 2 else (7.5, 4.0))
    best = np.unravel_index(np.argmax(norms), norms.shape)
    where = [axis[i] for axis, i in zip(frequencies, best, strict=True)]
    place = f"{abs(where[0]):.2f}" if norms.ndim == 1 else f"({where[0]:.2f}, {where[1]:.2f})"
    label = f"largest: {norms[best]:.4g}\nat ±{place}"
    mark = {"color": "white", "mec": "black", "ms": 11, "ls": "", "label": label}
    if norms.ndim == 1:
        marker = "o" if isinstance(op, CircularConv) else ""
        ax.plot(*frequencies, norms, color=COLORS(0.0), marker=marker, ms=3, label="at each frequency")
        ax.plot(*where, norms[best], "D", **mark)
        ax.set(xlabel="frequency (radians per output sample)", ylabel="largest singular value of the symbol")
        ax.set_ylim(0, 1.1 * norms[best] or 1.0)
    else:
        mesh = ax.pcolormesh(*frequencies[::-1], norms, cmap=COLORS, shading="nearest", rasterized=True)
        ax.figure.colorbar(mesh, ax=ax, label="largest singular value of the symbol")
        ax.plot(*where[::-1], "D", **mark)
        ax.set(xlabel="frequency along axis 1 (radians per output sample)", aspect="equal")
        ax.set(ylabel="frequency along axis 0 (radians per output sample)")
        ax.set_yticks(*_ANGLES)
    ax.set_xticks(*_ANGLES)
    return with_legend(ax, below=0.15 if norms.ndim == 2 else None)


def _norms_by_frequency(kernel, op, resolution) -> tuple[list[np.ndarray], np.ndarray]:
    """The frequencies of every axis, ascending from -π, and the largest singular value of the symbol at each."""
    ensure(
        isinstance(op, (CircularConv, UnboundedConv)),
        f"op: got {op}, expected a CircularConv or an UnboundedConv; other layers have no symbol.",
    )
    kernel = kernel_array(kernel, op)
    ensure(kernel.ndim < 5, f"kernel: got {kernel.ndim - 2} axes of taps, expected one or two; draw slices.")
    if isinstance(op, UnboundedConv):
        strides, side = op._axis_strides(kernel.shape), static_int(resolution, "resolution", 2)
        options = {"kernel_dilation": op.kernel_dilation, "feature_group_count": op.feature_group_count}
        op = CircularConv(tuple(side * stride for stride in strides), strides=strides, **options)
    norms = np.asarray(jnp.linalg.svd(symbol(kernel, op), compute_uv=False)[..., 0])
    if norms.ndim > len(op.grid):
        # A layer with groups is as large as the largest of them.
        norms = norms.max(axis=-1)
    return [2 * np.pi * np.fft.fftshift(np.fft.fftfreq(n)) for n in op.grid], np.fft.fftshift(norms)

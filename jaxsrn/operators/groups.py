"""Kernels of convolutions whose channels are in groups, `(*taps, c_in // groups, c_out)`."""

from __future__ import annotations

from jaxtyping import Array, Shaped

__all__ = ["exchanged", "grouped"]


def grouped(kernel: Shaped[Array, "..."], groups: int) -> Shaped[Array, "..."]:
    """The kernel with an axis for groups, `(*taps, c_in // groups, groups, c_out // groups)`."""
    return kernel.reshape((*kernel.shape[:-1], groups, -1))


def exchanged(kernel: Shaped[Array, "..."], groups: int) -> Shaped[Array, "..."]:
    """The kernel with the inputs and outputs of each group exchanged, as the adjoint has them; taps stay in order."""
    by_group = grouped(kernel, groups).swapaxes(-1, -3)
    return by_group.reshape((*by_group.shape[:-2], -1))

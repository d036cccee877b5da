"""Singular pairs of every operator: the leading one, and what is made of a pair. One table says what differs by kind.

Everything that optimises over pairs needs the same few things of them, whatever the operator: the leading pair, a
leading pair near a given one, a power step, the gradient of its value in the kernel, and its two real vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from jaxtyping import Array, Float

from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra import images
from jaxsrn.spectra.circular import pairs as waves
from jaxsrn.spectra.circular.svd_or_branch_and_bound import leading_wave
from jaxsrn.spectra.dense import leading_of_matrix
from jaxsrn.spectra.padded.leading import leading_of_padded
from jaxsrn.spectra.pair import Pair

__all__ = [
    "leading_pair",
    "nearby",
    "pair_images",
    "pair_of_images",
    "pair_shapes",
    "power_step",
    "value_gradient",
]


class _Kind(NamedTuple):
    """How pairs of an operator are stored, and how the leading one is found (options as `leading_pair`)."""

    stored: ModuleType
    leading: Callable


_KINDS = {
    Dense: _Kind(images, lambda kernel, op, **options: leading_of_matrix(kernel)),
    CircularConv: _Kind(waves, lambda kernel, op, **options: leading_wave(kernel, op)[0]),
    ZeroPaddedConv: _Kind(images, leading_of_padded),
}


def _kind(op: Operator) -> _Kind:
    return next(_KINDS[base] for base in type(op).__mro__ if base in _KINDS)


def leading_pair(kernel: Float[Array, "..."], op: Operator, *, tolerance=None, start=None, proven: bool = True) -> Pair:
    """The leading pair of `T(kernel)`, found without any assumption. The kernel's scale must not be extreme.

    Dense and circular layers have proofs, as have small ones with zero padding, whatever the other arguments; these
    are for larger layers with zero padding.

    Args:
      kernel, op: the layer.
      tolerance: relative residual at which a search stops, by default `search_tolerance`.
      start: an input; the search starts there alone, a fixed random part mixed in.
      proven: static; `False` has small layers with zero padding searched too, without their proof.
    """
    return _kind(op).leading(kernel, op, tolerance=tolerance, start=start, proven=proven)


def nearby(kernel: Float[Array, "..."], op: Operator, pair: Pair, tolerance) -> Pair:
    """The leading pair within reach of `pair`: at its site (circular), or in the Krylov space that it starts."""
    return _kind(op).stored.nearby(kernel, op, pair, tolerance)


def power_step(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Pair:
    """One vector from the other by the adjoint, that one back by the map, both normalised; circular: at their site."""
    return _kind(op).stored.power_step(kernel, op, pair)


def pair_shapes(op: Operator, kernel_shape: tuple[int, ...]) -> Pair:
    """The shapes of a pair's arrays, in their places (static)."""
    return _kind(op).stored.shapes(op, kernel_shape)


def value_gradient(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`grad_K <v, T(K) u>`, so that the value of the pair is `sum(gradient * K)` for every kernel of this shape."""
    return _kind(op).stored.gradient(pair, op, kernel_shape)


def pair_images(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]):
    """The two real unit vectors, `(input, output)`, of `in_shape` and `out_shape`."""
    return _kind(op).stored.images(pair, op, kernel_shape)


def pair_of_images(inputs: Float[Array, "..."], outputs: Float[Array, "..."], op: Operator, kernel_shape) -> Pair:
    """The pair closest to two real vectors: their strongest site (circular), or themselves."""
    return _kind(op).stored.of_images(inputs, outputs, op, kernel_shape)

"""Singular pairs of every operator: how the leading one is found, and what is computed from a pair.

Whatever optimises over pairs needs few things of them: the leading pair, a leading pair near a given one, a power step,
the gradient of a pair's value in the kernel, and its two real vectors. One table says how each kind of operator does
them; the implementations are `image_pairs.py` and `circular/site_pairs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import float_dtype
from jaxsrn._tools.tolerances import search_tolerance
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra import image_pairs
from jaxsrn.spectra.circular import site_pairs
from jaxsrn.spectra.circular.leading import leading_wave
from jaxsrn.spectra.dense import leading_of_dense
from jaxsrn.spectra.padded.leading import leading_of_padded
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "leading_pair",
    "leading_pair_and_excess",
    "nearby",
    "no_pair",
    "pair_as_floats",
    "pair_images",
    "pair_of_floats",
    "pair_of_images",
    "pair_shapes",
    "power_step",
    "value_gradient",
]


class _Kind(NamedTuple):
    """The module that stores pairs of a kind of operator, and the compiled function that finds the leading one.

    The function takes kernels of any scale, has the options of `leading_pair`, and returns what
    `leading_pair_and_excess` does.
    """

    stored: ModuleType
    leading: Callable


_ON_TORUS = _Kind(site_pairs, lambda kernel, op, *_, excess: leading_wave(kernel, op, excess))
_KINDS = {
    Dense: _Kind(image_pairs, lambda kernel, *_, excess: (leading_of_dense(kernel), 0.0)),
    CircularConv: _ON_TORUS,
    UnboundedConv: _ON_TORUS,
    ZeroPaddedConv: _Kind(image_pairs, lambda *args, excess: (leading_of_padded(*args), 0.0)),
}


def _kind(op: Operator) -> _Kind:
    """The table's entry for the operator, or for the nearest base class that has one."""
    return next(_KINDS[base] for base in type(op).__mro__ if base in _KINDS)


def leading_pair(
    kernel: Float[Array, "..."], op: Operator, *, tolerance=None, start=None, proven: bool = True, excess=0.0
) -> Pair:
    """The leading pair of a kernel of any scale and dtype, a constant for derivatives.

    Public functions call this stage before what they make of the pair, so that they share its program: one that was
    called on a shape leaves little to compile to the next. Layers without zero padding have a proof, small layers with
    zero padding unless `proven=False`. `tolerance` and `start` concern searches alone, which have no proof.

    Args:
      kernel, op: the layer.
      tolerance: the relative residual at which a search stops, `search_tolerance` by default.
      start: an input at which the search starts, with a fixed part mixed in, in place of its own starts.
      proven: static; with `False` small layers with zero padding are searched too, without a proof.
      excess: the share by which the norm may exceed the value of the pair, as far as is proven, for layers without
        edges and circular ones. With 1 the pair is the highest peak that climbing finds.
    """
    return leading_pair_and_excess(kernel, op, tolerance=tolerance, start=start, proven=proven, excess=excess)[0]


def leading_pair_and_excess(
    kernel: Float[Array, "..."], op: Operator, *, tolerance=None, start=None, proven: bool = True, excess=0.0
) -> tuple[Pair, float | Float[Array, ""]]:
    """`leading_pair` with the share by which the norm may exceed its value: 0 where it is exact, or searched for."""
    kernel = lax.stop_gradient(kernel.astype(float_dtype(kernel.dtype)))
    # A number is an argument of the compiled search, so that all tolerances share its program.
    tolerance = search_tolerance(kernel.dtype) if tolerance is None else tolerance
    return _kind(op).leading(kernel, op, tolerance, start, proven, excess=excess)


def no_pair(op: Operator, kernel_shape: tuple[int, ...], dtype) -> Pair:
    """Zeros in the place of a pair that is not known yet, of the types of `leading_pair`."""
    # The shapes are plain tuples, in tuples with names.
    shapes = pair_shapes(op, kernel_shape)
    floats = jax.tree.map(lambda shape: jnp.zeros(shape, dtype), shapes, is_leaf=lambda node: type(node) is tuple)
    return pair_of_floats(floats, op, kernel_shape, dtype)


def nearby(kernel: Float[Array, "..."], op: Operator, pair: Pair, tolerance) -> Pair:
    """The leading pair within reach of `pair`: at its site (circular), or in the Krylov space that it starts."""
    return _kind(op).stored.nearby(kernel, op, pair, tolerance)


def power_step(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Pair:
    """A power step of the pair, one product with the map and one with its adjoint, both results normalised."""
    return _kind(op).stored.power_step(kernel, op, pair)


def pair_shapes(op: Operator, kernel_shape: tuple[int, ...]) -> Pair:
    """A `Pair` that holds the shapes of the arrays of `pair_as_floats` (static)."""
    return _kind(op).stored.shapes(op, kernel_shape)


def pair_as_floats(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]) -> Pair:
    """The pair in real floats throughout, the form in which it is kept between steps and which users see."""
    return _kind(op).stored.as_floats(pair, op, kernel_shape)


def pair_of_floats(pair: Pair, op: Operator, kernel_shape: tuple[int, ...], dtype) -> Pair:
    """The pair of `pair_as_floats` for computations in a dtype.

    Averages and casts of pairs are taken too. Their vectors need not have norm 1, and are only near to those of a pair.
    """
    return _kind(op).stored.of_floats(pair, op, kernel_shape, dtype)


def value_gradient(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`grad_K <v, T(K) u>`: the value of the pair is `sum(gradient * K)` for every kernel of this shape."""
    return _kind(op).stored.gradient(pair, op, kernel_shape)


def pair_images(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]):
    """The two real unit vectors `(input, output)`, of `in_shape` and `out_shape`."""
    return _kind(op).stored.images(pair, op, kernel_shape)


def pair_of_images(inputs: Float[Array, "..."], outputs: Float[Array, "..."], op: Operator, kernel_shape) -> Pair:
    """The pair closest to two real vectors: their amplitudes at their strongest site (circular), or themselves."""
    return _kind(op).stored.of_images(inputs, outputs, op, kernel_shape)

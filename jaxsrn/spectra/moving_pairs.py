"""The value of a singular pair as a function of the kernel, and how the pair turns with the kernel.

The value `<v, T(K) u>` is stationary in unit vectors at every singular pair, and over all frequencies in the frequency
too. Its derivative in the kernel therefore holds the pair constant, and a second derivative moves it (`held.py`). A
circular layer has the frequencies of a grid, where the leading one stays. That of an unbounded layer is free.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.held import held, stationary
from jaxsrn._tools.linalg import inner
from jaxsrn.operators.base import Operator
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.sites import ShiftedSite
from jaxsrn.spectra.pairs_by_kind import value_gradient
from jaxsrn.spectra.singular_pair import Pair, of_unit_vectors

__all__ = [
    "moving_with_kernel",
    "pair_value",
    "with_free_frequency",
]


def pair_value(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Float[Array, ""]:
    """`<output, T(K) input>` of a singular pair, as a function of `K` alone.

    At the leading pair it is the spectral norm. The derivative is the outer product of the vectors, which is that of
    the norm. Where singular values coincide it is one of the subgradients, and finite. The second derivative is the
    true one where the value is simple.
    """
    value = functools.partial(_value_of_pair, op)
    return held(value, moving_with_kernel(op), kernel, with_free_frequency(pair, op, kernel.dtype))


def _value_of_pair(op: Operator, kernel: Float[Array, "..."], pair: Pair) -> Float[Array, ""]:
    return inner(value_gradient(pair, op, kernel.shape), kernel)


def moving_with_kernel(op: Operator):
    """The move (`held.py`) of a singular pair of simple value with its kernel; its frequency must be a free one."""
    return stationary(functools.partial(_value_of_pair, op), of_unit_vectors)


def with_free_frequency(pair: Pair, op: Operator, dtype) -> Pair:
    """The pair of an unbounded layer with a frequency that can be differentiated in; other pairs as they are."""
    if not isinstance(op, UnboundedConv) or isinstance(pair.site, ShiftedSite):
        return pair
    index, group = pair.site
    return pair._replace(site=ShiftedSite(index, group, jnp.zeros(index.shape, dtype)))

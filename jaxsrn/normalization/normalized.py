"""The kernel normalized with a given pair: the closed form with norm 1, a function of the kernel and of the pair.

With the functional `E` of the pair, `e = <E, E>_d` and `m = <A, E>_d`, the kernel `A` is `(m / e) E + R` with a rest
`R` orthogonal to `E` (`decomposed` in `closed_form.py`). Both results have the form `E / e + c R`. The kernel rescaled
to `<K, E>_d = 1` has `c = 1 / m`. The closed form has `|c R| = sqrt(r - 1 / e)`, for the stable rank `r`. The smaller
`c` holds: a kernel of a lower stable rank is only rescaled.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.linalg import divisor, safe_sqrt
from jaxsrn._tools.programs import program
from jaxsrn.normalization.closed_form import decomposed, over_weights
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import value_gradient
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["is_only_rescaled", "normalized"]


# Compiled as subroutines, as a training step takes them more than once.
@functools.partial(program, static_argnums=1)
def normalized(a: Float[Array, "..."], op: Operator, target, pair: Pair) -> Float[Array, "..."]:
    """The closed form for one pair, with norm 1; with no target the kernel rescaled."""
    if target is None:
        value = pair_value(a, op, pair)
        return a / divisor(value)
    along, rest, factor, _ = _parts(a, op, target, pair)
    return along + factor * rest


def is_only_rescaled(a: Float[Array, "..."], op: Operator, target, pair: Pair) -> Bool[Array, ""]:
    """Whether the normalized kernel is only the kernel rescaled."""
    if target is None:
        return jnp.asarray(True)
    return _parts(a, op, target, pair)[3]


def _parts(a: Float[Array, "..."], op: Operator, target, pair: Pair):
    """`(E / e, R, c)`, and whether `c = 1 / m`."""
    gradient = value_gradient(pair, op, a.shape)
    weights = op.frobenius_weights(a.shape, a.dtype)
    along, _, inverse, m, rest, squared = decomposed(a, gradient, over_weights(gradient, op), weights)
    # Lengths are compared by their squares, of which one root is taken in the end.
    wanted = jnp.maximum(target - inverse, 0.0)
    # A zero kernel counts as rescaled, and NaN does not.
    squared_m = m * m
    is_rescaled = squared <= squared_m * wanted
    over = jnp.where(is_rescaled, squared_m, squared)
    factor = safe_sqrt(jnp.where(is_rescaled, 1.0, wanted) / divisor(over))
    return along, rest, factor, is_rescaled

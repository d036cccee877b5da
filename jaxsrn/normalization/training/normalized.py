"""The kernel normalized with a given pair: the closed form with norm 1, a function of the kernel and of the pair."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsrn.normalization.closed_form import Problem, closed_form, functional
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.pairs_by_kind import value_gradient
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "normalized_or_rescaled",
    "normalized_with",
]


def normalized_with(a: Float[Array, "..."], op: Operator, target, pair: Pair) -> Float[Array, "..."]:
    """The closed form for one pair, with norm 1."""
    return normalized_or_rescaled(a, op, target, pair)[0]


def normalized_or_rescaled(
    a: Float[Array, "..."], op: Operator, target, pair: Pair
) -> tuple[Float[Array, "..."], Bool[Array, ""]]:
    """The closed form for one pair, with norm 1, and whether it is only the kernel rescaled.

    The kernel is only rescaled where `target` is `None`, and where its own stable rank is not above the target.
    """
    if target is None:
        value = jnp.sum(value_gradient(pair, op, a.shape) * a)
        return a / jnp.where(value == 0, 1.0, value), jnp.asarray(True)
    weights = op.frobenius_weights(a.shape, a.dtype)
    problem = Problem(a, weights, target, jnp.ones((), a.dtype))
    direction = functional(pair, op, weights, a.shape)
    value, squared = problem.inner(a, direction), problem.inner(a, a)
    is_low = (squared <= target * value**2) & (value >= 0)
    scaled = a / jnp.where(value == 0, 1.0, value)
    return jnp.where(is_low, scaled, closed_form(problem, direction).kernel), is_low

"""Exact stable rank normalization of any linear layer (Zheng et al. 2025, eq. 7): the closed form and its iteration.

    minimise ||T(K) - T(A)||_F   subject to   srank(T(K)) = r,   ||T(K)||_2 = M.

In `<A, B>_d = sum_p d_p <A_p, B_p>`, the inner product of `T(A)` and `T(B)`, the constraints are `||K||_d^2 = r M^2`
and `max <K, E>_d = M` over the functionals `E = grad_K <u, T(K) v> / d` of unit pairs. For one pair the constraint
is linear and the optimum has a closed form; taking the leading pair of that optimum and repeating is a
minorise-maximise iteration, so the distance never grows. It stops at `||T(K)||_2 = M`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsrn._tools.linalg import safe_sqrt
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.pair import Pair
from jaxsrn.spectra.pairs import value_gradient

__all__ = [
    "Problem",
    "closed_form",
    "functional",
    "is_feasible",
    "merit",
    "squared_distance",
]


class Problem(NamedTuple):
    """Data of (7): the kernel `A`, the Frobenius weights `d`, the target `r`, the norm `M`."""

    kernel: Float[Array, "..."]
    weights: Float[Array, "..."]
    target: Float[Array, ""]
    norm: Float[Array, ""]

    def inner(self, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, ""]:
        """`<a, b>_d`."""
        return jnp.sum(self.weights * a * b)


class Candidate(NamedTuple):
    """The optimum for one pair: `squared_distance` to `A` where feasible, and the functional's `e = <E, E>_d`."""

    kernel: Float[Array, "..."]
    feasible: Bool[Array, "..."]
    squared_distance: Float[Array, "..."]
    functional_norm: Float[Array, "..."]


def functional(pair: Pair, op: Operator, weights: Float[Array, "..."], kernel_shape) -> Float[Array, "..."]:
    """`E`: `<K, E>_d = <u, T(K) v>` for every kernel; 0 at taps that meet no sample."""
    plain = value_gradient(pair, op, kernel_shape)
    return jnp.where(weights == 0, 0.0, plain / jnp.where(weights == 0, 1.0, weights))


def squared_distance(e, m, target, norm, squared_frobenius):
    """Squared distance of the closed form from `A`, by `e = <E, E>_d` and `m = <A, E>_d`.

    `(rho - |A_perp|)^2 + (M - m)^2 / e` with `A_perp` the part of `A` orthogonal to `E`, and `rho` its new length.
    Free of the cancellation in `r M^2 + a - 2 <K, A>_d`. Decreasing in `e` and in `m` wherever `r <= srank(A)`.
    """
    radius = norm * safe_sqrt(target - 1 / e)
    return (radius - safe_sqrt(squared_frobenius - m**2 / e)) ** 2 + (norm - m) ** 2 / e


def is_feasible(e, target):
    """`e >= 1 / r`, up to rounding: only then `||K||_d^2 = r M^2` and `<K, E>_d = M` can hold together."""
    return e * target >= 1 - 16 * jnp.finfo(target.dtype).eps


def closed_form(problem: Problem, direction: Float[Array, "..."]) -> Candidate:
    """The kernel closest to `A` with `||K||_d^2 = r M^2` and `<K, E>_d = M`, `E = direction`.

    `K = (M / e) E + rho A_perp / |A_perp|`, `rho = M sqrt(r - 1/e)`: the same point of `span(A, E)` as
    `alpha A + beta E`, written so that both constraints hold to rounding also where `A` is nearly parallel to `E`.
    Infeasible: the part along `A_perp` vanishes, which leaves the smallest stable rank that this pair allows.
    """
    e = problem.inner(direction, direction)
    e = jnp.where(e == 0, 1.0, e)
    m = problem.inner(problem.kernel, direction)
    rest = problem.kernel - (m / e) * direction
    rest_norm = safe_sqrt(problem.inner(rest, rest))
    radius = problem.norm * safe_sqrt(problem.target - 1 / e)
    kernel = (problem.norm / e) * direction + radius / jnp.where(rest_norm == 0, 1.0, rest_norm) * rest
    distance = (radius - rest_norm) ** 2 + (problem.norm - m) ** 2 / e
    return Candidate(kernel, is_feasible(e, problem.target), distance, e)


def merit(candidate: Candidate):
    """Sort key, smaller is better: feasible ones by distance, before infeasible ones by stable rank `1 / e`."""
    return jnp.where(candidate.feasible, 0, 1), jnp.where(
        candidate.feasible, candidate.squared_distance, 1 / candidate.functional_norm
    )

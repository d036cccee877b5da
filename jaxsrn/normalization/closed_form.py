"""The closed form, for one singular pair, of exact stable rank normalization of any layer (Zheng et al. 2025, eq. 7).

    minimise ||T(K) - T(A)||_F   subject to   srank(T(K)) = r,   ||T(K)||_2 = M.                              (7)

The inner product of `T(A)` and `T(B)` is `<A, B>_d = sum_p d_p <A_p, B_p>`, where `d_p` counts the outputs at which tap
`p` meets the image (`Operator.frobenius_weights`). The constraints are `||K||_d^2 = r M^2` and `max <K, E>_d = M` over
the functionals `E = grad_K <v, T(K) u> / d` of unit pairs `(u, v)`. One pair alone makes the second constraint linear,
and the optimum lies in the span of `A` and `E`. For a matrix it is the solution of Sanyal et al. 2020 (Theorem 1 with
`k = 1`); otherwise `iteration.py` finds the pair. Zheng et al. pose (7) and descend on a surrogate of it
(`surrogate/`); the closed form is this library's own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxsrn._tools.linalg import divisor, inner, ratio, safe_sqrt
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.pairs_by_kind import value_gradient
from jaxsrn.spectra.singular_pair import Pair, rescaled

__all__ = [
    "INFEASIBLE",
    "INFEASIBLE_FROM",
    "Candidate",
    "Problem",
    "closed_form",
    "decomposed",
    "functional",
    "is_feasible",
    "over_weights",
    "problem_of",
    "scaled_problem",
    "squared_distance",
]


# What the merit of an infeasible candidate is, over its stable rank: more than any squared distance of kernels whose
# largest entry is 1. Merits of at least `INFEASIBLE_FROM` are those of infeasible candidates.
INFEASIBLE, INFEASIBLE_FROM = 1e30, 1e20


class Problem(NamedTuple):
    """The data of (7): the kernel `A`, the Frobenius weights `d`, the target `r`, the norm `M`, and `||A||_d^2`."""

    kernel: Float[Array, "..."]
    weights: Float[Array, "..."]
    target: Float[Array, ""]
    norm: Float[Array, ""]
    squared: Float[Array, ""]

    @property
    def stable_rank(self) -> Float[Array, ""]:
        """That of `A`, 0 for zero kernels."""
        return ratio(self.squared, self.norm**2)

    def distance(self, kernel: Float[Array, "..."]) -> Float[Array, ""]:
        """`||K - A||_d / ||A||_d`, 0 for zero kernels."""
        change = kernel - self.kernel
        return ratio(safe_sqrt(self.inner(change, change)), safe_sqrt(self.squared))

    def inner(self, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, ""]:
        """`<a, b>_d`."""
        return inner(self.weights * a, b)


def problem_of(kernel: Float[Array, "..."], op: Operator, target, norm: Float[Array, ""]) -> Problem:
    """Problem (7) for a kernel of known norm."""
    weights = op.frobenius_weights(kernel.shape, kernel.dtype)
    return Problem(kernel, weights, target, norm, inner(weights * kernel, kernel))


class Candidate(NamedTuple):
    """The optimum for one pair, and its merit, a sort key of candidates: smaller is better.

    The merit of a feasible candidate is its squared distance from `A`. That of an infeasible one is larger, and
    proportional to its stable rank.
    """

    kernel: Float[Array, "..."]
    merit: Float[Array, "..."]

    @property
    def feasible(self) -> Bool[Array, "..."]:
        """Whether the constraints can hold together at this pair."""
        return self.merit < INFEASIBLE_FROM


def scaled_problem(kernel: Shaped[Array, "..."], op: Operator, target, own: Pair) -> tuple[Problem, Float[Array, ""]]:
    """The problem of a kernel with the leading pair `own`, in the scale of `rescaled`, and that scale."""
    a, scale = rescaled(kernel, op)
    return problem_of(a, op, target, pair_value(a, op, own)), scale


def functional(pair: Pair, op: Operator, kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`E`, with `<K, E>_d = <v, T(K) u>` for every kernel `K`; it is 0 at taps that meet no sample."""
    return over_weights(value_gradient(pair, op, kernel_shape), op)


def over_weights(gradient: Float[Array, "..."], op: Operator) -> Float[Array, "..."]:
    """A kernel divided by the Frobenius weights `d`, and 0 at taps that meet no sample."""
    counts = op._tap_counts(gradient.shape)
    # The weights are static: one constant takes the place of a division that looks for zeros.
    inverse = np.where(counts == 0, 0, 1 / np.maximum(counts, 1))
    return gradient * jnp.asarray(inverse, gradient.dtype)


def squared_distance(e, m, problem: Problem):
    """Squared distance of the closed form from `A`, by `e = <E, E>_d` and `m = <A, E>_d`.

    It is `(rho - |A_perp|)^2 + (M - m)^2 / e`, where `A_perp` is the part of `A` orthogonal to `E`, and `rho` its new
    length. The form `r M^2 + a - 2 <K, A>_d` would lose digits to cancellation. The distance decreases in `e` and in
    `m` wherever `r <= srank(A)`.
    """
    radius = problem.norm * safe_sqrt(problem.target - 1 / e)
    return (radius - safe_sqrt(problem.squared - m**2 / e)) ** 2 + (problem.norm - m) ** 2 / e


def is_feasible(e, target):
    """Whether `||K||_d^2 = r M^2` and `<K, E>_d = M` can hold together: `e >= 1 / r`, up to rounding."""
    return e * target >= 1 - 16 * jnp.finfo(target.dtype).eps


class Decomposition(NamedTuple):
    """A kernel `A` as `(m / e) E + A_perp`, with `A_perp` orthogonal to the functional `E` in `<., .>_d`.

    Of a pair, `(u, v)` and `(u, -v)` prescribe the same; the functional is that of the two that has `m >= 0`. It may be
    0, as that of singular vectors of samples that no tap meets, and then all of the kernel is rest.

    Attributes:
      along: `E / e`, 0 where `E = 0`.
      e: `<E, E>_d`.
      inverse: `1 / e`, 0 where `e = 0`.
      m: `<A, E>_d`.
      rest: `A_perp`.
      squared_rest: `||A_perp||_d^2`.
    """

    along: Float[Array, "..."]
    e: Float[Array, ""]
    inverse: Float[Array, ""]
    m: Float[Array, ""]
    rest: Float[Array, "..."]
    squared_rest: Float[Array, ""]


def decomposed(kernel: Float[Array, "..."], gradient: Float[Array, "..."], direction, weights) -> Decomposition:
    """The kernel along a functional and at right angles to it.

    The functional is given as `direction`, and as `gradient`, which is `d` times it; `weights` is `d`.
    """
    e, m = inner(gradient, direction), inner(gradient, kernel)
    inverse = ratio(1.0, e)
    along = inverse * direction
    rest = kernel - m * along
    turned = jnp.where(m < 0, -along, along)
    return Decomposition(turned, e, inverse, jnp.abs(m), rest, inner(weights * rest, rest))


def closed_form(problem: Problem, direction: Float[Array, "..."]) -> Candidate:
    """The kernel closest to `A` with `||K||_d^2 = r M^2` and `<K, E>_d = M`, where `E = direction` or its negative.

    It is `K = (M / e) E + rho A_perp / |A_perp|` with `rho = M sqrt(r - 1/e)`. The form `alpha A + beta E` of the same
    point would miss both constraints by more than rounding where `A` is nearly parallel to `E`. Where the target is
    infeasible the part along `A_perp` vanishes, which leaves the smallest stable rank that this pair allows.
    """
    parts = decomposed(problem.kernel, problem.weights * direction, direction, problem.weights)
    rest_norm = safe_sqrt(parts.squared_rest)
    radius = problem.norm * safe_sqrt(problem.target - parts.inverse)
    kernel = problem.norm * parts.along + radius / divisor(rest_norm) * parts.rest
    distance = (radius - rest_norm) ** 2 + (problem.norm - parts.m) ** 2 * parts.inverse
    merit = jnp.where(is_feasible(parts.e, problem.target), distance, INFEASIBLE * parts.inverse)
    # A functional of 0 prescribes nothing.
    return Candidate(kernel, jnp.where(parts.e == 0, jnp.inf, merit))

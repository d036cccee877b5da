"""`SRNResult`, what every normalization returns, and how its numbers are measured."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsrn._tools.linalg import ratio, safe_sqrt
from jaxsrn.normalization.closed_form import Problem
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.singular_pair import idle_taps

__all__ = [
    "SRNResult",
    "deviation",
    "in_own_scale",
    "in_shape",
    "measured",
    "proven_gap",
]


class SRNResult(NamedTuple):
    """A kernel of prescribed stable rank, and what is known about it.

    The numbers are those of the solution in float32 or wider, before the kernel is rounded to a narrower dtype. Where
    the given kernel has a NaN, the kernel and all floating numbers are NaN and `feasible` is False; the two counts say
    nothing.

    Attributes:
      kernel: the normalized kernel, in the dtype of the input.
      stable_rank: its stable rank.
      spectral_norm: its spectral norm.
      distance: `||T(K) - T(A)||_F / ||T(A)||_F`.
      gap: `distance - gap` is a proven lower bound on the distance of every kernel that meets the constraints. Where no
        bound was found `gap` equals `distance`, which proves nothing. With zero padding above 2**18 entries of the
        explicit matrix the bound relies on the kernel's norm, which is searched without a proof.
      residual: the larger of `|stable_rank / target - 1|` and `|spectral_norm / M - 1|`, over the constraints asked
        for. A kernel that is returned unchanged has in it how far its stable rank is below the target.
      num_steps: minorise-maximise passes taken, or steps of the projections when raising, or of the descent
        (`surrogate.solve`); 0 for matrices.
      num_preserved: leading singular values kept.
      feasible: whether the constraints can hold together where the search ended; `residual` says how far they do. If
        not, the kernel has the lowest stable rank found, or the highest when raising. `False` is no proof that no
        kernel meets the constraints: that is certain for matrices, and for convolutions only where the target is
        outside `stable_rank_range`.
    """

    kernel: Shaped[Array, "..."]
    stable_rank: Float[Array, "..."]
    spectral_norm: Float[Array, "..."]
    distance: Float[Array, "..."]
    gap: Float[Array, "..."]
    residual: Float[Array, "..."]
    num_steps: Int[Array, "..."]
    num_preserved: Int[Array, "..."]
    feasible: Bool[Array, "..."]


def deviation(value, wanted):
    """`|value / wanted - 1|`, 1 where `wanted` is 0."""
    return jnp.abs(ratio(value, wanted) - 1)


def in_own_scale(result: SRNResult, scale, kernel: Shaped[Array, "..."], op: Operator, unchanged) -> SRNResult:
    """The result with the kernel in its own scale and dtype; what is unchanged stays so to the last bit."""
    keep = unchanged | jnp.asarray(idle_taps(op, kernel.shape))
    own = jnp.where(keep, kernel, (result.kernel * scale).astype(kernel.dtype))
    return result._replace(kernel=own, spectral_norm=result.spectral_norm * scale)


def in_shape(result: SRNResult, kernel_shape: tuple[int, ...]) -> SRNResult:
    """The result with the kernel in the shape in which it is stored, for matrices of more than two axes."""
    return result._replace(kernel=result.kernel.reshape(kernel_shape))


def measured(
    kernel: Float[Array, "..."], problem: Problem, norm, distance, gap, num_steps, keep_norm: bool, feasible
) -> SRNResult:
    """The result for a kernel whose norm is known: its stable rank, and how far it misses the constraints."""
    rank = ratio(problem.inner(kernel, kernel), norm**2)
    residual = deviation(rank, problem.target)
    if keep_norm:
        residual = jnp.maximum(residual, deviation(norm, problem.norm))
    # A zero kernel has no stable rank.
    residual = jnp.where(problem.norm == 0, 0.0, residual)
    return SRNResult(
        kernel=kernel,
        stable_rank=rank,
        spectral_norm=norm,
        distance=distance,
        gap=gap,
        residual=residual,
        num_steps=num_steps,
        num_preserved=jnp.asarray(1 if keep_norm else 0, jnp.int32),
        feasible=feasible,
    )


def proven_gap(problem: Problem, bound, distance, keep_norm: bool, feasible, unchanged):
    """How much closer than `distance` (relative) a feasible kernel could be at most; `bound` is a squared distance."""
    squared = problem.squared
    bound = jnp.maximum(bound, 0)
    if not keep_norm:
        # Without the norm any multiple of `K` will do: the closest is `|A| sin` of the angle between `A` and `K` away.
        radius, size = problem.norm * safe_sqrt(problem.target), safe_sqrt(squared)
        versine = ratio(jnp.maximum(bound - (size - radius) ** 2, 0), 2 * radius * size)
        bound = squared * versine * (2 - versine)
    gap = jnp.maximum(distance - ratio(safe_sqrt(bound), safe_sqrt(squared)), 0)
    return jnp.where(unchanged, 0.0, jnp.where(feasible, gap, distance))

"""The true gradient of a training step: the derivative of the converged pair by the implicit function theorem.

A converged pair is a fixed point of the training step at rest, so its derivative solves a linear system whose products
are derivatives of one step. An unbounded layer's frequency is part of the solution: the value of the pair is stationary
in it. Other layers have no frequencies, or the frequencies of a grid, which stay. The system is solved by the kept
`jax.scipy.sparse.linalg.gmres`, inside `lax.custom_root` and `lax.custom_linear_solve`, which give both modes. The
frozen gradient leaves this derivative out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.tolerances import kernel_tolerance
from jaxsrn.normalization.training.normalized import normalized
from jaxsrn.normalization.training.reverse_mode import in_reverse
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import UnboundedConv
from jaxsrn.spectra.circular.boxes import degrees
from jaxsrn.spectra.circular.sites import ShiftedSite, on_grid
from jaxsrn.spectra.pairs_by_kind import power_step, value_gradient
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "moving_pair",
]

# A restart forgets what 40 Krylov vectors have found, and more of them take memory; 20 restarts guard the loop. The
# method "incremental" stops in the midst of a restart, where "batched" always completes it.
_GMRES = {"atol": 0.0, "restart": 40, "maxiter": 20, "solve_method": "incremental"}
# Relative residual up to which a solution is used. It is the error of the gradient where the system is well posed; near
# a singular system, where the two leading values meet, the frozen gradient takes over.
_ACCEPTED_RESIDUAL = 1e-3


def moving_pair(a: Float[Array, "..."], op: Operator, target, pair: Pair) -> Pair:
    """The pair as a function of the kernel: a fixed point of the step on the kernel normalized with the pair."""
    pair = _with_free_frequency(pair, op, a.dtype)
    fixed, rebuild = _real_vector(pair)

    def residual(op: Operator, vector):
        now = rebuild(vector)
        # A matrix has the same pair as its normalized form. It determines the pair where that form, of rank one, does
        # not.
        kernel = a if op._normalization_keeps_pairs else normalized(a, op, target, now)
        new = _aligned(power_step(kernel, op, now), pair)
        return vector - _real_vector(_with_better_frequency(kernel, op, new))[0]

    def tangent_solve(matvec, rhs):
        backward = jax.vjp(functools.partial(residual, in_reverse(op)), fixed)[1]
        return _tangent_solve(matvec, lambda cotangent: backward(cotangent)[0], rhs)

    return rebuild(lax.custom_root(functools.partial(residual, op), fixed, lambda _, vector: vector, tangent_solve))


def _with_free_frequency(pair: Pair, op: Operator, dtype) -> Pair:
    """The pair of an unbounded layer with a frequency that can be differentiated in; other pairs as they are."""
    if not isinstance(op, UnboundedConv):
        return pair
    return pair._replace(site=ShiftedSite(*pair.site, jnp.zeros(pair.site.index.shape, dtype)))


def _with_better_frequency(kernel: Float[Array, "..."], op: Operator, pair: Pair) -> Pair:
    """A step uphill in the frequency, where that is free. The kernel has norm 1, so that the step has about its length.

    Along an axis of a single tap the value is constant, and the frequency is held.
    """
    if not isinstance(op, UnboundedConv):
        return pair

    def value(shift):
        moved = pair._replace(site=pair.site._replace(shift=shift))
        return jnp.sum(value_gradient(moved, op, kernel.shape) * kernel)

    shift = pair.site.shift
    varies = jnp.asarray(degrees(on_grid(op, kernel.shape), kernel.shape)) > 0
    return pair._replace(site=pair.site._replace(shift=jnp.where(varies, shift + jax.grad(value)(shift), 0)))


def _real_vector(pair: Pair):
    """The pair's vectors, and its frequency where that is free, as one real vector; the function that rebuilds it."""
    is_complex = jnp.iscomplexobj(pair.input)
    parts = [part for v in pair[1:] for part in ((v.real, v.imag) if is_complex else (v,))]
    has_frequency = isinstance(pair.site, ShiftedSite)
    parts += [pair.site.shift] if has_frequency else []

    def rebuild(vector):
        sizes = [part.size for part in parts]
        pieces = jnp.split(vector, [sum(sizes[:i]) for i in range(1, len(sizes))])
        site = pair.site._replace(shift=pieces.pop()) if has_frequency else pair.site
        if is_complex:
            pieces = [lax.complex(*pieces[:2]), lax.complex(*pieces[2:])]
        return Pair(site, *(piece.reshape(v.shape) for piece, v in zip(pieces, pair[1:], strict=True)))

    return jnp.concatenate([part.reshape(-1) for part in parts]), rebuild


def _aligned(pair: Pair, reference: Pair) -> Pair:
    """The pair in the phase of the reference: a common phase of both vectors leaves it the same pair."""
    overlap = jnp.vdot(pair.output, reference.output, precision=lax.Precision.HIGHEST)
    size = jnp.sqrt(jnp.where(overlap == 0, 1.0, overlap.real**2 + overlap.imag**2))
    phase = jnp.where(overlap == 0, 1.0, overlap / size.astype(overlap.dtype))
    return Pair(pair.site, pair.input * phase, pair.output * phase)


def _tangent_solve(matvec, transposed, rhs):
    """`matvec^-1 rhs` by GMRES; where that does not converge it is 0, which makes the gradient the frozen one."""

    def solve_guarded(matvec, rhs):
        tolerance = kernel_tolerance(rhs.dtype)
        x, _ = jax.scipy.sparse.linalg.gmres(matvec, rhs, tol=tolerance, **_GMRES)
        error = jnp.linalg.norm(matvec(x) - rhs)
        return jnp.where(error <= _ACCEPTED_RESIDUAL * jnp.linalg.norm(rhs), x, 0.0)

    def solve_transposed(_, rhs):
        return solve_guarded(transposed, rhs)

    return lax.custom_linear_solve(matvec, rhs, solve_guarded, transpose_solve=solve_transposed)

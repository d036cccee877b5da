"""The frequency of a maximum between those of a grid, to all digits, by Newton's method.

Climbing alternates between frequencies and vectors, which is slow where singular values lie close together. It compares
values, which tell a frequency from the maximum down to the square root of rounding. That is enough for the value, but
its gradient is off by as much as the frequency: in float32 by a thousandth. The derivatives of `lambda = sigma^2`, the
largest eigenvalue of `G = S^H S`, know how the vectors turn with the frequency:

    lambda_j  = v^H G_j v
    lambda_jk = v^H G_jk v + 2 Re sum_(m > 1) conj(b_jm) b_km / (lambda_1 - lambda_m),    b_jm = v_m^H G_j v.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex

from jaxsrn._tools.indexing import chosen, picked
from jaxsrn._tools.linalg import einsum, thin_svd
from jaxsrn.spectra.circular.angles import waves
from jaxsrn.spectra.circular.boxes import Grid
from jaxsrn.spectra.circular.climbing import Peak
from jaxsrn.spectra.circular.grams import GramPolynomial

__all__ = ["at_maximum"]

# Steps from a frequency that climbing has found; the digits double with each.
_MOST_STEPS = 8
# The share of the largest second derivative that is added to all of them, which may be singular; it is lost in every
# step.
_RIDGE = 1e-6


def at_maximum(poly: GramPolynomial, grid: Grid, peak: Peak) -> Peak:
    """The maximum near a peak, as long as no step finds a value that is smaller by more than rounding."""
    eps = float(jnp.finfo(peak.value.dtype).eps)
    coefficients = picked(poly.coefficients, peak.group)

    def step(state):
        _, count, index, best = state
        symbol, first, second = _derivatives(coefficients, grid, index, poly.exponents)
        rows, values, columns = thin_svd(symbol)
        here = Peak(index, peak.group, rows[:, 0], columns[0].conj(), values[0])
        gained = (here.value >= (1 - 8 * eps) * best.value) | (count == 0)
        # The value is the largest so far, so that steps cannot lose more than rounding together.
        best = chosen(gained, here._replace(value=jnp.maximum(here.value, best.value)), best)
        radians = _newton_step(symbol, first, second, (rows, values, columns))
        # Where the second-order expansion is not concave the factorization fails, and the frequency stays.
        samples = jnp.asarray(grid.samples).astype(radians.dtype)
        steps = jnp.round(jnp.where(jnp.isfinite(radians), radians, 0) * samples / (2 * math.pi))
        limit = jnp.asarray(grid.sizes).astype(steps.dtype)
        moved = index + jnp.clip(steps, -limit, limit).astype(index.dtype)
        # Smaller steps are rounding.
        return gained & jnp.any(jnp.abs(steps) > 2 * eps * samples), count + 1, moved, best

    start = jnp.asarray(True), jnp.asarray(0), peak.index, peak
    return lax.while_loop(lambda state: state[0] & (state[1] < _MOST_STEPS), step, start)[-1]


def _derivatives(coefficients, grid: Grid, index, exponents: np.ndarray) -> tuple[Complex[Array, "..."], ...]:
    """The symbol, its derivatives, and its second derivatives, the latter two with axes for the angles in front."""
    factors = waves(grid.angles, 2 * index, exponents)
    powers = -1j * jnp.asarray(exponents.T, factors.dtype)
    taps = coefficients.astype(factors.dtype)
    return (
        einsum("t,tio->io", factors, taps),
        einsum("jt,t,tio->jio", powers, factors, taps),
        einsum("jt,kt,t,tio->jkio", powers, powers, factors, taps),
    )


def _newton_step(symbol, first, second, svd):
    """The step in radians to the maximum of the second-order expansion; NaN where that has none."""
    rows, values, columns = svd
    conj_u, v, sigma = rows[:, 0].conj(), columns[0].conj(), values[0]
    images = einsum("jio,o->ji", first, v)
    conj_images = images.conj()
    slopes = 2 * sigma * jnp.real(einsum("i,ji->j", conj_u, images))
    # The conjugate of G_j v, and then its parts along the right singular vectors but the first.
    turned = sigma.astype(v.dtype) * einsum("jio,i->jo", first, conj_u) + einsum("io,ji->jo", symbol, conj_images)
    parts = einsum("mo,jo->jm", columns[1:].conj(), turned)
    squares = values**2
    gaps = jnp.maximum(squares[0] - squares[1:], jnp.finfo(values.dtype).eps * squares[0])
    curvature = 2 * jnp.real(
        sigma.astype(v.dtype) * einsum("i,jki->jk", conj_u, einsum("jkio,o->jki", second, v))
        + einsum("ji,ki->jk", conj_images, images)
        + einsum("jm,km->jk", parts, parts.conj() / gaps.astype(parts.dtype)[None])
    )
    # A direction in which the value does not change, as along an axis of a single tap, has no slope, and stays.
    ridge = _RIDGE * jnp.max(jnp.abs(curvature)) + jnp.finfo(gaps.dtype).tiny
    downwards = ridge * jnp.eye(len(slopes), dtype=slopes.dtype) - curvature
    return jax.scipy.linalg.cho_solve((lax.linalg.cholesky(downwards, symmetrize_input=False), True), slopes)

"""Gram iteration: a guaranteed upper bound of the spectral norm by repeated squaring (Delattre et al. 2023).

The squarings are matrix products alone. Branch and bound (`certified`) also gives a lower end, by SVDs and proofs. The
factor between the frequencies of a coarse grid is the grid certificate (`spectra/circular/grid_certificate.py`), which
is smaller than the usual `1 / (1 - d / m)` with the degree `d` and `m` angles.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form, static_int
from jaxsrn._tools.linalg import gram_bound
from jaxsrn._tools.programs import program
from jaxsrn.bounds.covers import NormInterval, covers, widened
from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.fourier import half_symbol
from jaxsrn.spectra.circular.grid_certificate import on_coarse_grid, overshoot
from jaxsrn.spectra.circular.sites import on_grid
from jaxsrn.spectra.singular_pair import rescaled

__all__ = [
    "gram_iteration",
]


def gram_iteration(kernel: Kernel, op: Operator, *, num_steps: int = 6, oversampling: int = 8) -> Float[Array, ""]:
    """A guaranteed upper bound of the spectral norm by repeated squaring of the symbol's Gram matrices.

    Delattre et al. 2023: `G_0 = S^H S`, `G <- G^H G`, rescaled. The number `||G_t||_F^(1/2^(t+1))` bounds the singular
    values of `S` from above at every `t`. It converges quadratically to the largest one where that is simple; `k` equal
    ones leave a factor `k^(1/2^(t+2))`. The symbol is taken on the layer's own frequencies where they are few, else on
    a coarse grid whose factor bounds all frequencies at once. A zero-padded layer is bounded by its covers.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      num_steps: static; the number of squarings.
      oversampling: static; angles per degree and axis of the coarse grid.

    Returns:
      A scalar in float32 or wider, differentiable; NaN where the kernel has one.

    Raises:
      ValueError: a kernel that does not fit, fewer than one step, an oversampling below 2.
    """
    kernel, op = computed_form(kernel, op)
    num_steps, oversampling = static_int(num_steps, "num_steps"), static_int(oversampling, "oversampling", 2)
    return _gram_iteration(kernel, op, num_steps, oversampling)


@functools.partial(program, static_argnums=(1, 2, 3), brief=True)
def _gram_iteration(kernel, op, num_steps, oversampling):
    kernel, scale = rescaled(kernel, op)
    if isinstance(op, Dense):
        bounds = [gram_bound(kernel[None], num_steps)]
    else:
        bounds = [_bound_of_cover(k, cover, num_steps, oversampling) for k, cover in covers(kernel, op)]
    bound = functools.reduce(jnp.minimum, bounds)
    return widened(NormInterval(bound, bound), kernel, op).upper * scale


def _bound_of_cover(kernel: Float[Array, "..."], op: CircularConv | UnboundedConv, num_steps: int, oversampling: int):
    """The bound on the layer's own grid, or on a coarse grid for all frequencies where that one is smaller."""
    own, coarse = on_grid(op, kernel.shape), on_coarse_grid(op, kernel.shape, oversampling)
    if math.prod(coarse.grid) >= math.prod(own.grid):
        return gram_bound(half_symbol(kernel, own), num_steps)
    return gram_bound(half_symbol(kernel, coarse), num_steps) * overshoot(coarse, kernel.shape)

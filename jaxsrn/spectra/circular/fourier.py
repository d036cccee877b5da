"""The symbol of a circular convolution: one small matrix per frequency, with the singular values of the layer.

`S(w) = sum_p K_p exp(-i <w, p>)` is a `c_in x c_out` matrix at each frequency `w` (Sedghi, Gupta, Long 2019, Theorem
8). Strides are polyphase: taps are sorted by their residue modulo the stride, their **phase**, and each phase has input
channels of its own, on the coarser grid of the output. Groups are a direct sum. Small DFT matrices, one for each axis,
take the place of the padded FFT, as taps are few. `sites.py` defines grids and sites.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, Int, Shaped

from jaxsrn._tools.indexing import picked
from jaxsrn._tools.linalg import einsum
from jaxsrn._tools.programs import program
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.groups import grouped
from jaxsrn.spectra.circular.angles import angles_of, phases, rotations, waves
from jaxsrn.spectra.circular.sites import ShiftedSite, Site, half_grid

__all__ = [
    "axis_exponents",
    "axis_waves",
    "complex_dtype",
    "dft_rows",
    "half_symbol",
    "lags_of",
    "polynomial",
    "polyphase",
    "site_rotations",
    "site_shape",
    "site_symbol",
    "site_waves",
    "squared_phase_sums",
    "symbol_of",
    "symbol_on",
    "taps_by_phase",
    "terms_of",
]

_FREQUENCY_AXES, _PHASE_AXES, _TAP_AXES = "abc", "xyz", "hwd"


def complex_dtype(dtype) -> jnp.dtype:
    """The complex partner of a real dtype."""
    return jnp.dtype(jnp.complex128 if jnp.finfo(dtype).bits == 64 else jnp.complex64)


def polyphase(op: CircularConv, kernel_shape: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per axis, the offset of each tap in whole strides, `(taps,)`, and which phase it is in, `(phases, taps)`."""
    offsets = [np.arange(kernel_shape[j]) * op.kernel_dilation[j] for j in range(op.num_axes)]
    pairs = zip(offsets, op.strides, strict=True)
    return [(offset // s, offset % s == np.arange(s)[:, None]) for offset, s in pairs]


def axis_exponents(op: CircularConv, kernel_shape: tuple[int, ...]) -> list[np.ndarray]:
    """Per axis, the distinct exponents of the symbol, which are tap offsets in whole strides."""
    return [np.unique(exponent) for exponent, _ in polyphase(op, kernel_shape)]


def terms_of(op: CircularConv, kernel_shape: tuple[int, ...]) -> np.ndarray:
    """The exponents of the symbol's terms, `(terms, axes)` (static)."""
    return np.array(list(itertools.product(*axis_exponents(op, kernel_shape))))


def axis_waves(n: int, exponents: np.ndarray) -> np.ndarray:
    """`exp(-i w t)` at the `n` frequencies of an axis, `(n, exponents)`."""
    # The integer angle is reduced first, which keeps full precision on large grids.
    return np.exp(-2j * np.pi * (np.outer(np.arange(n), exponents) % n) / n)


def dft_rows(op: CircularConv, kernel_shape: tuple[int, ...]) -> list[np.ndarray]:
    """Per axis, `(grid, phases, taps)`: `exp(-i w t)` where a tap of that phase has offset `t` in strides, else 0."""
    pairs = zip(op.grid, polyphase(op, kernel_shape), strict=True)
    return [axis_waves(n, exponent)[:, None, :] * in_phase for n, (exponent, in_phase) in pairs]


def _contract(kernel, op: CircularConv, rows: list[np.ndarray], dtype) -> Shaped[Array, "..."]:
    """The kernel with the taps of each axis contracted with that axis's `(points, phases, taps)`.

    Returns:
      `(*points, groups, phases * c_in // groups, c_out // groups)`.
    """
    d = op.num_axes
    axes = ",".join(f + p + t for f, p, t in zip(_FREQUENCY_AXES[:d], _PHASE_AXES[:d], _TAP_AXES[:d], strict=True))
    spec = f"{_TAP_AXES[:d]}igo,{axes}->{_FREQUENCY_AXES[:d]}g{_PHASE_AXES[:d]}io"
    out = einsum(
        spec, grouped(kernel, op.feature_group_count).astype(dtype), *(jnp.asarray(row, dtype) for row in rows)
    )
    return out.reshape((*out.shape[: d + 1], -1, out.shape[-1]))


def symbol_on(kernel: Float[Array, "..."], op: CircularConv, grid: tuple[int, ...]) -> Complex[Array, "..."]:
    """The symbol `(*grid, groups, phases * c_in // groups, c_out // groups)` at the first `grid` frequencies."""
    rows = [row[:m] for row, m in zip(dft_rows(op, kernel.shape), grid, strict=True)]
    return _contract(kernel, op, rows, complex_dtype(kernel.dtype))


def polynomial(kernel: Float[Array, "..."], op: CircularConv) -> tuple[Float[Array, "..."], np.ndarray]:
    """The symbol of each group as a polynomial, `S(w) = sum_t exp(-i <w, t>) C_t`.

    Returns:
      `(coefficients, exponents)`: `C` of shape `(groups, terms, phases * c_in // groups, c_out // groups)`, and the
      static integers `t`, `(terms, axes)`.
    """
    exponents, terms = axis_exponents(op, kernel.shape), terms_of(op, kernel.shape)
    taps = grouped(kernel, op.feature_group_count)
    taps = taps.reshape((-1, *taps.shape[op.num_axes :]))
    if max(op.strides) == 1:
        # Every tap is a term.
        return jnp.moveaxis(taps, -2, 0), terms
    # Each axis refines which tap, if any, is in which phase of a term.
    which = np.zeros((1, 1), int)
    for size, (exponent, in_phase), distinct in zip(
        kernel.shape[: op.num_axes], polyphase(op, kernel.shape), exponents, strict=True
    ):
        here = (exponent == distinct[:, None])[:, None, :] & in_phase
        tap = np.where(here.any(axis=-1), here.argmax(axis=-1), len(taps))
        which = which[:, None, :, None] * size + tap[None, :, None, :]
        which = which.reshape((-1, which.shape[-2] * which.shape[-1]))
    # The axes are now (terms, phases, in, groups, out).
    coefficients = jnp.take(taps, jnp.asarray(which), axis=0, mode="fill", fill_value=0)
    coefficients = jnp.moveaxis(coefficients, -2, 0)
    coefficients = coefficients.reshape((*coefficients.shape[:2], -1, coefficients.shape[-1]))
    return coefficients, terms


def lags_of(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lags between terms, and a number for each term such that differences of these numbers count the lags.

    The lags are a whole rectangle, symmetric about 0 in the middle, so that the lag from term `s` to term `t` is number
    `middle + places[t] - places[s]`. Some of them may have no pair of terms.

    Returns:
      `(lags, places)`, of shapes `(lags, axes)` and `(terms,)`; static.
    """
    axes, places = [], np.zeros(len(exponents), int)
    for column in exponents.T:
        column = column - column.min()
        spacing = max(int(np.gcd.reduce(column)), 1)
        reach = int(column.max()) // spacing
        axes.append(spacing * np.arange(-reach, reach + 1))
        places = places * (2 * reach + 1) + column // spacing
    return np.array(list(itertools.product(*axes))), places


def half_symbol(kernel: Float[Array, "..."], op: CircularConv) -> Complex[Array, "sites in out"]:
    """The symbol at every site of the half grid."""
    out = symbol_on(kernel, op, half_grid(op))
    return out.reshape((-1, *out.shape[-2:]))


def site_shape(op: CircularConv, kernel_shape) -> tuple[int, int]:
    """The shape of the symbol at a site, `(phases * c_in // groups, c_out // groups)`."""
    return math.prod(op.strides) * kernel_shape[-2], kernel_shape[-1] // op.feature_group_count


def site_waves(op: CircularConv, kernel_shape, site: Site | ShiftedSite, dtype) -> Complex[Array, "... terms"]:
    """`exp(-i <w, t>)` of every term of `polynomial` at the frequency of a site, or of several."""
    terms = terms_of(op, kernel_shape)
    factors = waves(angles_of(op.grid, dtype, parts=1), site.index, terms)
    return factors * _turns(site.shift, terms) if isinstance(site, ShiftedSite) else factors


# A subroutine, as a training step takes it twice.
@functools.partial(program, static_argnums=(0, 1, 3))
def site_rotations(op: CircularConv, kernel_shape, index: Int[Array, "... axes"], dtype):
    """`site_waves` at the frequencies of the indices as rotations of real and imaginary parts, `(..., 2, 2, terms)`."""
    return rotations(phases(angles_of(op.grid, dtype, parts=1), index, terms_of(op, kernel_shape)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _turns(shift: Float[Array, " axes"], terms: np.ndarray) -> Complex[Array, " terms"]:
    """`exp(-i <shift, t>)` where the shift is 0: ones, of which the derivatives alone are computed."""
    return jnp.ones(len(terms), complex_dtype(shift.dtype))


@_turns.defjvp
def _turns_jvp(terms, primals, tangents):
    turns = _turns(*primals, terms)
    radians = einsum("j,tj->t", tangents[0], jnp.asarray(terms, tangents[0].dtype))
    return turns, turns * lax.complex(jnp.zeros_like(radians), -radians)


def site_symbol(kernel: Float[Array, "..."], op: CircularConv, site: Site | ShiftedSite) -> Complex[Array, "in out"]:
    """The symbol at one site, `(phases * c_in // groups, c_out // groups)`."""
    factors = site_waves(op, kernel.shape, site, kernel.dtype)
    return symbol_of(factors, picked(polynomial(kernel, op)[0], site.group))


def symbol_of(factors: Complex[Array, " terms"], coefficients: Float[Array, "... terms rows columns"]):
    """The symbol at the frequency of the given waves, of the coefficients of all groups or of one."""
    return lax.complex(*(einsum("t,...trc->...rc", part, coefficients) for part in (factors.real, factors.imag)))


def taps_by_phase(op: CircularConv, kernel_shape: tuple[int, ...]) -> np.ndarray:
    """How many taps, none or one, each term of `polynomial` has in each phase, `(terms, phases)` (static)."""
    axes = zip(polyphase(op, kernel_shape), axis_exponents(op, kernel_shape), strict=True)
    counts = [(exponent == distinct[:, None]) @ in_phase.T.astype(int) for (exponent, in_phase), distinct in axes]
    return functools.reduce(np.kron, counts)


def squared_phase_sums(op: CircularConv, kernel_shape) -> tuple[np.ndarray, np.ndarray]:
    """The number of taps of each phase and, per site, the sum of their squared phase factors `exp(-2i <w, t>)`.

    Returns:
      `(counts, sums)`, of shapes `(phases,)` and `(sites, phases)`; static.
    """
    rows = [row[:m] for row, m in zip(dft_rows(op, kernel_shape), half_grid(op), strict=True)]
    counts = functools.reduce(np.multiply.outer, [np.sum(np.abs(row[0]) ** 2, axis=-1) for row in rows])
    sums = functools.reduce(np.multiply.outer, [np.sum(row**2, axis=-1) for row in rows])
    # The outer product has axes (frequency, phase, frequency, phase, ...); frequencies come first from here on.
    d = op.num_axes
    sums = sums.transpose((*range(0, 2 * d, 2), *range(1, 2 * d, 2))).reshape((-1, counts.size))
    return counts.reshape(-1), np.repeat(sums, op.feature_group_count, axis=0)

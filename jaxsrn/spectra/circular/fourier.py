"""The symbol of a circular convolution, and singular pairs that live at one frequency of it.

`S(w) = sum_p K_p exp(-i <w, p>)` (Sedghi, Gupta, Long 2019), one `c_in x c_out` matrix per frequency. Strides are
polyphase: the taps split by their residue modulo the stride into that many more input channels, on the coarser
output grid. Groups are a direct sum. A **site** is the flat index of one (frequency, group) of the half grid: the
kernel is real, `S(-w) = conj(S(w))`, so half of the last axis suffices.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int, Shaped

from jaxsrn._tools.linalg import einsum
from jaxsrn.operators.maps import CircularConv, ZeroPaddedConv

__all__ = [
    "axis_exponents",
    "axis_waves",
    "complex_dtype",
    "degrees",
    "dft_rows",
    "distinct_sites",
    "grouped",
    "half_grid",
    "half_symbol",
    "is_self_conjugate",
    "locate",
    "multiplicity",
    "overshoot",
    "polynomial",
    "repetitions",
    "same_site",
    "site_at",
    "site_gradient",
    "site_of_images",
    "site_shape",
    "site_symbol",
    "squared_phase_sums",
    "symbol_on",
    "times_modulo",
    "wave",
    "without_idle_axes",
]

_FREQ, _PHASE, _TAP = "abc", "xyz", "hwd"


def complex_dtype(dtype) -> jnp.dtype:
    """The complex partner of a real dtype."""
    return jnp.dtype(jnp.complex128 if jnp.finfo(dtype).bits == 64 else jnp.complex64)


def half_grid(op: CircularConv) -> tuple[int, ...]:
    """Shape of the frequencies that determine all others."""
    return (*op.grid[:-1], op.grid[-1] // 2 + 1)


def without_idle_axes(op: CircularConv, kernel_shape: tuple[int, ...]) -> CircularConv:
    """The same singular values on a smaller image: along an axis of one tap all frequencies are alike."""
    axes = zip(op.input_shape, op.strides, kernel_shape, strict=False)
    return dataclasses.replace(op, input_shape=tuple(s if taps == 1 else n for n, s, taps in axes))


def repetitions(op: CircularConv, layer: CircularConv) -> int:
    """How many times the singular values of the layer without idle axes are those of the whole one."""
    return math.prod(op.grid) // math.prod(layer.grid)


def multiplicity(op: CircularConv) -> np.ndarray:
    """How many frequencies of the full grid each site stands for: 1 or 2."""
    last = np.arange(half_grid(op)[-1])
    # The columns 0 and n/2 already hold both members of their pairs.
    counts = np.where((last == 0) | (2 * last == op.grid[-1]), 1, 2)
    return np.repeat(np.broadcast_to(counts, half_grid(op)), op.feature_group_count)


def distinct_sites(op: CircularConv) -> tuple[np.ndarray, np.ndarray]:
    """Sites of which no two are conjugate, and how many frequencies of the full grid each stands for, 1 or 2."""
    index = np.indices(half_grid(op)).reshape((op.num_axes, -1))
    shape = np.array(op.grid)[:, None]
    own, conjugate = (np.ravel_multi_index(tuple(i), op.grid) for i in (index, -index % shape))
    # Conjugates outside the half grid have a larger last index than the site, those inside have it equal.
    kept = (own <= conjugate) | (2 * index[-1] % op.grid[-1] != 0)
    sites = np.flatnonzero(np.repeat(kept, op.feature_group_count))
    return sites, np.where(is_self_conjugate(op)[sites], 1, 2)


def is_self_conjugate(op: CircularConv) -> np.ndarray:
    """Which sites are at a real frequency, `w = -w` modulo 2 pi on every axis, so that `S(w)` is real."""
    axes = [2 * np.arange(m) % n == 0 for m, n in zip(half_grid(op), op.grid, strict=True)]
    return np.repeat(functools.reduce(np.logical_and.outer, axes), op.feature_group_count)


def _polyphase(op: CircularConv, kernel_shape: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per axis, how many strides each tap lies into its phase, `(taps,)`, and which phase that is, `(phases, taps)`."""
    offsets = [np.arange(kernel_shape[j]) * op.kernel_dilation[j] for j in range(op.num_axes)]
    pairs = zip(offsets, op.strides, strict=True)
    return [(offset // s, offset % s == np.arange(s)[:, None]) for offset, s in pairs]


def axis_exponents(op: CircularConv, kernel_shape: tuple[int, ...]) -> list[np.ndarray]:
    """Per axis the distinct exponents of the symbol, in strides."""
    return [np.unique(exponent) for exponent, _ in _polyphase(op, kernel_shape)]


def degrees(op: CircularConv, kernel_shape: tuple[int, ...]) -> list[int]:
    """The degree of `||S(w) x||^2` in the angle of each axis."""
    return [int(np.ptp(exponent)) for exponent, _ in _polyphase(op, kernel_shape)]


def overshoot(op: CircularConv, kernel_shape: tuple[int, ...]) -> float:
    """The supremum of the singular values over all frequencies is at most this times their maximum on the grid.

    `1 / prod_j cos(pi d_j / (2 n_j))` (M. Riesz); infinite where the grid is too coarse to say anything.
    """
    ratios = [d / n for d, n in zip(degrees(op, kernel_shape), op.grid, strict=True)]
    return 1 / math.prod(math.cos(math.pi * r / 2) for r in ratios) if max(ratios) < 1 else math.inf


def axis_waves(n: int, exponents: np.ndarray) -> np.ndarray:
    """`exp(-i w t)` at the `n` frequencies of an axis, `(n, exponents)`."""
    # Reducing the integer angle first keeps full precision on large grids.
    return np.exp(-2j * np.pi * (np.outer(np.arange(n), exponents) % n) / n)


def dft_rows(op: CircularConv, kernel_shape: tuple[int, ...]) -> list[np.ndarray]:
    """Per axis `(grid, phases, taps)`: `exp(-i w t)` where the tap lies `t` strides into that phase, else 0."""
    pairs = zip(op.grid, _polyphase(op, kernel_shape), strict=True)
    return [axis_waves(n, exponent)[:, None, :] * in_phase for n, (exponent, in_phase) in pairs]


def grouped(kernel: Float[Array, "..."], op: CircularConv | ZeroPaddedConv) -> Float[Array, "..."]:
    """`(*taps, c_in // groups, groups, c_out // groups)`."""
    return kernel.reshape((*kernel.shape[:-1], op.feature_group_count, -1))


def _contract(kernel, op: CircularConv, rows: list[np.ndarray], dtype) -> Shaped[Array, "..."]:
    """The taps of each axis contracted with `(points, phases, taps)`.

    Returns:
      `(*points, groups, phases * c_in // groups, c_out // groups)`.
    """
    d = op.num_axes
    axes = ",".join(f + p + t for f, p, t in zip(_FREQ[:d], _PHASE[:d], _TAP[:d], strict=True))
    spec = f"{_TAP[:d]}igo,{axes}->{_FREQ[:d]}g{_PHASE[:d]}io"
    out = einsum(spec, grouped(kernel, op).astype(dtype), *(jnp.asarray(row, dtype) for row in rows))
    return out.reshape((*out.shape[: d + 1], -1, out.shape[-1]))


def symbol_on(kernel: Float[Array, "..."], op: CircularConv, grid: tuple[int, ...]) -> Complex[Array, "..."]:
    """The symbol `(*grid, groups, phases * c_in // groups, c_out // groups)` at the first frequencies per axis."""
    rows = [row[:m] for row, m in zip(dft_rows(op, kernel.shape), grid, strict=True)]
    return _contract(kernel, op, rows, complex_dtype(kernel.dtype))


def polynomial(kernel: Float[Array, "..."], op: CircularConv) -> tuple[Float[Array, "..."], np.ndarray]:
    """The symbol of each group as a polynomial, `S(w) = sum_t exp(-i <w, t>) C_t`.

    Returns:
      `(coefficients, exponents)`: `C` of shape `(groups, terms, phases * c_in // groups, c_out // groups)`, and the
      static integers `t`, `(terms, axes)`.
    """
    taps = grouped(kernel, op)
    taps = taps.reshape((-1, *taps.shape[op.num_axes :]))
    exponents = axis_exponents(op, kernel.shape)
    # Which tap is in which phase of a term, if any: axis by axis.
    which = np.zeros((1, 1), int)
    for size, (exponent, in_phase), distinct in zip(
        kernel.shape[: op.num_axes], _polyphase(op, kernel.shape), exponents, strict=True
    ):
        here = (exponent == distinct[:, None])[:, None, :] & in_phase
        tap = np.where(here.any(axis=-1), here.argmax(axis=-1), len(taps))
        which = which[:, None, :, None] * size + tap[None, :, None, :]
        which = which.reshape((-1, which.shape[-2] * which.shape[-1]))
    # (terms, phases, in, groups, out)
    coefficients = jnp.take(taps, jnp.asarray(which), axis=0, mode="fill", fill_value=0)
    coefficients = jnp.moveaxis(coefficients, -2, 0)
    coefficients = coefficients.reshape((*coefficients.shape[:2], -1, coefficients.shape[-1]))
    return coefficients, np.array(list(itertools.product(*exponents)))


def half_symbol(kernel: Float[Array, "..."], op: CircularConv) -> Complex[Array, "sites in out"]:
    """The symbol at every site."""
    out = symbol_on(kernel, op, half_grid(op))
    return out.reshape((-1, *out.shape[-2:]))


def site_shape(op: CircularConv, kernel_shape) -> tuple[int, int]:
    """Rows and columns of the symbol at a site: `(phases * c_in // groups, c_out // groups)`."""
    return math.prod(op.strides) * kernel_shape[-2], kernel_shape[-1] // op.feature_group_count


def locate(op: CircularConv, site: Int[Array, ""]) -> tuple[tuple[Int[Array, ""], ...], Int[Array, ""]]:
    """The frequency index per axis and the group of a site."""
    *index, group = jnp.unravel_index(site, (*half_grid(op), op.feature_group_count))
    return tuple(index), group


def site_at(op: CircularConv, index, group: Int[Array, "..."]) -> Int[Array, "..."]:
    """The site of a frequency index per axis and a group."""
    return jnp.ravel_multi_index((*index, group), (*half_grid(op), op.feature_group_count), mode="clip")


def times_modulo(index: Int[Array, "..."], factor: np.ndarray, n: int) -> Int[Array, "..."]:
    """`index * factor % n` for indices in `[0, n)`; bit by bit of the static factor where 32 bits might not hold it."""
    if n * int(np.max(np.abs(factor), initial=0)) < 2**31:
        return index * factor % n
    factor, total = factor % n, jnp.zeros_like(index * factor)
    for bit in range(n.bit_length()):
        total = (total + (factor >> bit & 1) * index) % n
        index = 2 * index % n
    return total


def same_site(op: CircularConv, smaller: CircularConv, site: Int[Array, ""]) -> Int[Array, ""]:
    """The site with the index and group of a site of a layer on a smaller grid."""
    return site_at(op, *locate(smaller, site))


def _site_rows(op: CircularConv, kernel_shape, index, dtype) -> list[Complex[Array, "phases taps"]]:
    return [jnp.asarray(row, dtype)[i] for row, i in zip(dft_rows(op, kernel_shape), index, strict=True)]


def site_symbol(kernel: Float[Array, "..."], op: CircularConv, site: Int[Array, ""]) -> Complex[Array, "in out"]:
    """`S(w)` of one group, `(phases * c_in // groups, c_out // groups)`."""
    d, dtype = op.num_axes, complex_dtype(kernel.dtype)
    index, group = locate(op, site)
    taps = jnp.take(grouped(kernel, op), group, axis=-2).astype(dtype)
    axes = ",".join(p + t for p, t in zip(_PHASE[:d], _TAP[:d], strict=True))
    out = einsum(f"{_TAP[:d]}io,{axes}->{_PHASE[:d]}io", taps, *_site_rows(op, kernel.shape, index, dtype))
    return out.reshape((-1, out.shape[-1]))


def site_gradient(op: CircularConv, kernel_shape, site, u: Complex[Array, " in"], v: Complex[Array, " out"]):
    """`grad_K Re(u^H S_K(w) v)`, of shape `kernel_shape`: the functional of the unit pair `(u, v)` at a site."""
    d, groups = op.num_axes, op.feature_group_count
    index, group = locate(op, site)
    axes = ",".join(p + t for p, t in zip(_PHASE[:d], _TAP[:d], strict=True))
    rows = _site_rows(op, kernel_shape, index, u.dtype)
    u = jnp.conj(u).reshape((*op.strides, -1))
    taps = jnp.real(einsum(f"{axes},{_PHASE[:d]}i,o->{_TAP[:d]}io", *rows, u, v))
    in_group = jnp.arange(groups) == group
    out = taps[..., None, :] * in_group[:, None].astype(taps.dtype).reshape((1,) * (d + 1) + (groups, 1))
    return out.reshape(kernel_shape)


def squared_phase_sums(op: CircularConv, kernel_shape) -> tuple[np.ndarray, np.ndarray]:
    """The taps of each phase and, per site, the sum of their squared phase factors `exp(-2i <w, t>)`.

    Returns `(counts, sums)`: counts `(phases,)`, and sums `(sites, phases)`.
    """
    rows = [row[:m] for row, m in zip(dft_rows(op, kernel_shape), half_grid(op), strict=True)]
    counts = functools.reduce(np.multiply.outer, [np.sum(np.abs(row[0]) ** 2, axis=-1) for row in rows])
    sums = functools.reduce(np.multiply.outer, [np.sum(row**2, axis=-1) for row in rows])
    # Axes arrive as (freq, phase, freq, phase, ...); sites first, then phases.
    d = op.num_axes
    sums = sums.transpose((*range(0, 2 * d, 2), *range(1, 2 * d, 2))).reshape((-1, counts.size))
    return counts.reshape(-1), np.repeat(sums, op.feature_group_count, axis=0)


def wave(op: CircularConv, site: Int[Array, ""], vector: Complex[Array, " c"], positions, strides):
    """The real image `Re(vector exp(i <w, m>))` of one site, at given positions.

    Args:
      op, site: where the wave lives.
      vector: amplitudes `(phases * c // groups,)` of the group's channels; one phase for outputs.
      positions: per axis, static integer positions `t`; position `t` is `t // stride` steps into phase
        `t % stride`.
      strides: `op.strides` for inputs (positions counted from the first tap's reach), ones for outputs.

    Returns:
      `(*positions, c)`, not normalised.
    """
    index, group = locate(op, site)
    phases = [np.asarray(t) % s for t, s in zip(positions, strides, strict=True)]
    image = vector.reshape((*strides, -1))[np.ix_(*phases)]
    for axis, (t, s, n, i) in enumerate(zip(positions, strides, op.grid, index, strict=True)):
        roots = jnp.asarray(np.exp(2j * np.pi * np.arange(n) / n), vector.dtype)
        factor = roots[times_modulo(i, np.asarray(t) // s, n)]
        image = image * jnp.expand_dims(factor, [a for a in range(image.ndim) if a != axis])
    in_group = (jnp.arange(op.feature_group_count) == group).astype(vector.real.dtype)
    shape = (*image.shape[:-1], op.feature_group_count * image.shape[-1])
    in_group = in_group.reshape((1,) * op.num_axes + (-1, 1))
    return (jnp.real(image)[..., None, :] * in_group).reshape(shape)


def site_of_images(op: CircularConv, kernel_shape, right: Float[Array, "..."], left: Float[Array, "..."]):
    """The site at which two images have most of their energy, and their amplitudes there: `(site, u, v)`."""
    d, groups = op.num_axes, op.feature_group_count
    # wave() counts input positions from the first tap's reach.
    x = jnp.roll(right, op.centre(kernel_shape), axis=range(d))
    x = x.reshape((*sum(zip(op.grid, op.strides, strict=True), ()), groups, -1))
    x = x.transpose((*range(0, 2 * d, 2), 2 * d, *range(1, 2 * d, 2), 2 * d + 1))
    spectrum = [jnp.fft.fftn(image, axes=range(d)) for image in (x, left.reshape((*op.grid, groups, -1)))]
    half = tuple(slice(m) for m in half_grid(op))
    size = math.prod(half_grid(op)) * groups
    u, v = (s[half].reshape((size, -1)) for s in spectrum)
    site = jnp.argmax(jnp.linalg.norm(u, axis=-1) * jnp.linalg.norm(v, axis=-1))
    return site, u[site], v[site]

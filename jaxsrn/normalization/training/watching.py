"""What may overtake the leading pair of a circular layer: watched frequencies, and climbers from them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Inexact, Int

from jaxsrn._tools.linalg import einsum, real_times, unit
from jaxsrn._tools.subspaces import orthogonal_part
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import axis_exponents, axis_waves, complex_dtype
from jaxsrn.spectra.circular.grid_certificate import degrees
from jaxsrn.spectra.circular.sites import half_grid, site_at

__all__ = [
    "CLIMBS",
    "Climbers",
    "best_watched",
    "climb_once",
    "unit_rows",
    "watch_step",
    "watched_half",
    "watched_waves",
]

CLIMBS = 2
_KRYLOV_STEPS = 2
# Watched frequencies per axis: all of a small grid, of a large one so many per degree of the symbol. Between them it
# can be higher by 1 / cos(pi / 12), 3.5%, an axis (see `overshoot`): little enough for climbing to do the rest.
_WATCH_ALL = 16
_WATCHED_PER_DEGREE = 6
_NUM_CLIMBERS = 8


class Climbers(NamedTuple):
    """Pairs of vectors on their way up, `(k, rows)` and `(k, columns)`, each in its group."""

    group: Int[Array, " k"]
    left: Complex[Array, "k rows"]
    right: Complex[Array, "k columns"]


def _krylov_step(matvec, rmatvec, start: Inexact[Array, "k n"]):
    """Best pairs in the spaces of `v` and its power steps: in a cluster far closer than the last of those alone.

    `k` maps side by side, in the rows. Returns the right and the left vectors.
    """
    basis, images = [unit_rows(start)], []
    for _ in range(_KRYLOV_STEPS):
        images.append(matvec(basis[-1]))
        basis.append(orthogonal_part(rmatvec(images[-1]), jnp.stack(basis, axis=1)))
    basis, images = jnp.stack(basis, axis=1), jnp.stack([*images, matvec(basis[-1])], axis=1)
    # Largest |T V y| over unit y; the SVD of a Hermitian matrix, as batched eigh is not safe on every CPU.
    weights = jnp.linalg.svd(einsum("kim,kjm->kij", images.conj(), images))[0][..., 0]
    return tuple(unit_rows(einsum("kj,kjn->kn", weights, vectors)) for vectors in (basis, images))


def unit_rows(vectors):
    """Every vector along the last axis with norm 1 (the first basis vector in place of zero)."""
    flat = jax.vmap(unit)(vectors.reshape((-1, vectors.shape[-1])))
    return flat.reshape(vectors.shape)


def watched_half(op: CircularConv, kernel_shape) -> tuple[tuple[int, ...], list[int]]:
    """Watched frequencies per axis, half of the last as the kernel is real; and how many make a full turn."""
    enough = [max(_WATCH_ALL, _WATCHED_PER_DEGREE * d) if d else 1 for d in degrees(op, kernel_shape)]
    counts = [min(n, m) for n, m in zip(op.grid, enough, strict=True)]
    return (*counts[:-1], counts[-1] // 2 + 1), counts


def watched_waves(op: CircularConv, kernel_shape, exponents: np.ndarray, dtype) -> Complex[Array, "points terms"]:
    """`exp(-i <w, t>)` at the watched frequencies."""
    half, counts = watched_half(op, kernel_shape)
    turns = np.array(list(itertools.product(*map(np.arange, half)))) / counts
    return jnp.asarray(np.exp(-2j * np.pi * (turns @ exponents.T)), complex_dtype(dtype))


def watch_step(coefficients, waves, vectors):
    """A power step at every watched frequency: `(S v, S^H S v / |S^H S v|)`; the symbols are never formed."""
    left = einsum("pt,pgtr->pgr", waves, real_times("gtrc,pgc->pgtr", coefficients, vectors))
    back = einsum("pt,pgtc->pgc", waves.conj(), real_times("gtrc,pgr->pgtc", coefficients, left))
    return left, unit_rows(back)


def best_watched(left, watch) -> Climbers:
    """The best watched pair of each of several contiguous parts of the grid: neighbours climb to the same peak."""
    values = jnp.linalg.norm(left, axis=-1).reshape(-1)
    num_parts = min(_NUM_CLIMBERS, values.size)
    size = -(-values.size // num_parts)
    padded = jnp.pad(values, (0, num_parts * size - values.size), constant_values=-1.0).reshape((num_parts, size))
    chosen = jnp.argmax(padded, axis=-1) + size * jnp.arange(num_parts)
    # A part that is padding alone repeats the last frequency.
    chosen = jnp.minimum(chosen, values.size - 1)
    groups = watch.shape[1]
    flat = (unit_rows(vectors).reshape((-1, vectors.shape[-1]))[chosen] for vectors in (left, watch))
    return Climbers(chosen % groups, *flat)


def climb_once(coefficients, op: CircularConv, kernel_shape, candidates: Climbers):
    """Vectors fixed, the best frequency of the half grid; there, better vectors: `(sites, values, candidates)`."""
    group, left, right = candidates
    # One group: the same coefficients for all, and no copies of them.
    own, k = (coefficients[0], "") if len(coefficients) == 1 else (coefficients[group], "k")
    reached = real_times(f"{k}trc,kc->ktr", own, right)
    index, waves = _best_frequency(op, kernel_shape, einsum("kr,ktr->kt", left.conj(), reached))

    def matvec(right):
        return einsum("kt,ktr->kr", waves, real_times(f"{k}trc,kc->ktr", own, right))

    def rmatvec(left):
        return einsum("kt,ktc->kc", waves.conj(), real_times(f"{k}trc,kr->ktc", own, left))

    right, left = _krylov_step(matvec, rmatvec, right)
    values = jnp.linalg.norm(matvec(right), axis=-1)
    sites = site_at(op, index, group.astype(index[0].dtype))
    return sites, values, Climbers(group, left, right)


def _best_frequency(op: CircularConv, kernel_shape, filters: Complex[Array, "k terms"]):
    """Where on the half grid each scalar filter is largest: the indices per axis, and the waves there."""
    rows = _term_rows(op, kernel_shape, filters.dtype)
    values = filters.reshape((len(filters), *(row.shape[1] for row in rows)))
    for row in rows:
        # Each contraction takes the foremost axis of terms and puts its frequencies last.
        values = jnp.tensordot(values, row, axes=((1,), (1,)), precision=lax.Precision.HIGHEST)
    half = half_grid(op)
    index = jnp.unravel_index(jnp.argmax(jnp.abs(values).reshape((len(filters), -1)), axis=-1), half)
    waves = jnp.ones((len(filters), 1), filters.dtype)
    for row, i in zip(rows, index, strict=True):
        waves = (waves[:, :, None] * row[i][:, None, :]).reshape((len(filters), -1))
    return index, waves


def _term_rows(op: CircularConv, kernel_shape, dtype) -> list[Complex[Array, "points terms"]]:
    """Per axis `exp(-i w t)` on the half grid, for the exponents of `polynomial`."""
    axes = zip(op.grid, half_grid(op), axis_exponents(op, kernel_shape), strict=True)
    return [jnp.asarray(axis_waves(n, exponents)[:m], dtype) for n, m, exponents in axes]

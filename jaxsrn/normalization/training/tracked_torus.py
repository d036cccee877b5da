"""The watch of a circular layer: vectors at other frequencies of the torus (defined in `spectra/circular/sites.py`).

**Climbing** (frequency power iteration) alternates: for fixed vectors it takes the best frequency, and for a fixed
frequency better vectors. It would not see another frequency with other vectors overtake. So a coarse grid of
frequencies is watched: one vector at each takes a power step of its own each time. The grid is cut into parts, and the
best watched vector of each part climbs along with the pair of the track. `spectra/circular/climbing.py` climbs from a
cold start, and looks only at frequencies around; here the whole half grid is looked at, in two rounds from a warm
start.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, Inexact, Int

from jaxsrn._tools.linalg import einsum, real_times, unit
from jaxsrn._tools.subspaces import extended, fixed_start, rayleigh_ritz
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.boxes import degrees
from jaxsrn.spectra.circular.fourier import axis_exponents, axis_waves, complex_dtype, polynomial, site_shape
from jaxsrn.spectra.circular.sites import Site, half_grid
from jaxsrn.spectra.singular_pair import Pair

__all__ = ["begin", "follow", "watch_shape"]

# Rounds of "best frequency, better vectors" in a training step, and power steps in each round. More follow a faster
# kernel, and each round costs its products for every climber.
_CLIMBS = 2
_KRYLOV_STEPS = 2
# Watched frequencies per axis: all those of a grid of up to 16, otherwise so many per degree of the symbol. Between
# them the symbol can be larger by 1 / cos(pi / 12), 3.5%, per axis (`grid_certificate.py`), which climbing makes up
# for.
_WATCH_ALL = 16
_WATCHED_PER_DEGREE = 6
# Parts of the watched grid, each of which sends its best: more miss fewer peaks, at the cost of a climb each.
_NUM_CLIMBERS = 8
# Power steps from a random start until the watched vectors are near the leading ones; they need not be exact.
_COLD_STEPS = 30


class _Climbers(NamedTuple):
    """Pairs of vectors that climb, each with its group."""

    group: Int[Array, " k"]
    input: Complex[Array, "k rows"]
    output: Complex[Array, "k columns"]


def watch_shape(op: CircularConv, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the watch: a unit output of the symbol at every watched frequency of every group (static)."""
    watched = math.prod(_watched_half(op, kernel_shape)[0])
    return watched, op.feature_group_count, site_shape(op, kernel_shape)[1]


def begin(kernel: Float[Array, "..."], op: CircularConv, pair: Pair) -> Complex[Array, "..."]:
    """Outputs near the leading ones at every watched frequency; the leading pair takes no part."""
    coefficients, exponents = polynomial(kernel, op)
    waves = _watched_waves(op, kernel.shape, exponents, coefficients.dtype)
    start = fixed_start(watch_shape(op, kernel.shape), coefficients.dtype)
    step = functools.partial(_watch_step, coefficients, waves)
    return lax.fori_loop(0, _COLD_STEPS, lambda _, outputs: step(outputs)[1], _unit_rows(start.astype(waves.dtype)))


def follow(kernel: Float[Array, "..."], op: CircularConv, pair: Pair, watch: Complex[Array, "..."]):
    """The best pair that the track's own and the best watched ones climb to: `(pair, watch)`, a step further."""
    coefficients, exponents = polynomial(kernel, op)
    waves = _watched_waves(op, kernel.shape, exponents, coefficients.dtype)
    inputs, watch = _watch_step(coefficients, waves, watch)
    best = _best_watched(inputs, watch)
    incumbent = _Climbers(pair.site.group, pair.input, pair.output)
    # The track's own pair goes first: argmax takes the first of equal values, so nothing moves without need.
    climbers = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many.astype(one.dtype)]), incumbent, best)
    for _ in range(_CLIMBS):
        sites, values, climbers = _climb_once(coefficients, op, kernel.shape, climbers)
    winner = jnp.argmax(values)
    sides = (_unit_rows(vectors)[winner] for vectors in (climbers.input, climbers.output))
    site = jax.tree.map(lambda leaf, old: leaf[winner].astype(old.dtype), sites, pair.site)
    return Pair(site, *sides), watch


def _unit_rows(vectors: Inexact[Array, "... n"]) -> Inexact[Array, "... n"]:
    """Every vector along the last axis with norm 1, and the first basis vector in place of zero."""
    flat = jax.vmap(unit)(vectors.reshape((-1, vectors.shape[-1])))
    return flat.reshape(vectors.shape)


# The watched frequencies


def _watched_half(op: CircularConv, kernel_shape) -> tuple[tuple[int, ...], list[int]]:
    """Watched frequencies per axis, with half of the last as the kernel is real, and how many make a full turn."""
    enough = [max(_WATCH_ALL, _WATCHED_PER_DEGREE * d) if d else 1 for d in degrees(op, kernel_shape)]
    counts = [min(n, m) for n, m in zip(op.grid, enough, strict=True)]
    return (*counts[:-1], counts[-1] // 2 + 1), counts


def _watched_waves(op: CircularConv, kernel_shape, exponents: np.ndarray, dtype) -> Complex[Array, "points terms"]:
    """`exp(-i <w, t>)` at the watched frequencies."""
    half, counts = _watched_half(op, kernel_shape)
    turns = np.array(list(itertools.product(*map(np.arange, half)))) / counts
    return jnp.asarray(np.exp(-2j * np.pi * (turns @ exponents.T)), complex_dtype(dtype))


def _watch_step(coefficients, waves, outputs):
    """A power step at every watched frequency, `(S v, S^H S v / |S^H S v|)`, without forming the symbols."""
    inputs = einsum("pt,pgtr->pgr", waves, real_times("gtrc,pgc->pgtr", coefficients, outputs))
    back = einsum("pt,pgtc->pgc", waves.conj(), real_times("gtrc,pgr->pgtc", coefficients, inputs))
    return inputs, _unit_rows(back)


def _best_watched(inputs, outputs) -> _Climbers:
    """The best watched pair of each part of the grid; parts are contiguous, as neighbours climb to the same peak."""
    values = jnp.linalg.norm(inputs, axis=-1).reshape(-1)
    num_parts = min(_NUM_CLIMBERS, values.size)
    size = -(-values.size // num_parts)
    padded = jnp.pad(values, (0, num_parts * size - values.size), constant_values=-1.0).reshape((num_parts, size))
    chosen = jnp.argmax(padded, axis=-1) + size * jnp.arange(num_parts)
    # A part that holds nothing but padding repeats the last frequency.
    chosen = jnp.minimum(chosen, values.size - 1)
    groups = outputs.shape[1]
    flat = (_unit_rows(vectors).reshape((-1, vectors.shape[-1]))[chosen] for vectors in (inputs, outputs))
    return _Climbers(chosen % groups, *flat)


# Climbing


def _climb_once(coefficients, op: CircularConv, kernel_shape, climbers: _Climbers):
    """The best frequency of the half grid for each pair, and better vectors there: `(sites, values, climbers)`."""
    group, inputs, outputs = climbers
    # With one group all climbers share the coefficients, and no copies are made.
    own, k = (coefficients[0], "") if len(coefficients) == 1 else (coefficients[group], "k")
    reached = real_times(f"{k}trc,kc->ktr", own, outputs)
    index, waves = _best_frequency(op, kernel_shape, einsum("kr,ktr->kt", inputs.conj(), reached))

    def matvec(outputs):
        return einsum("kt,ktr->kr", waves, real_times(f"{k}trc,kc->ktr", own, outputs))

    def rmatvec(inputs):
        return einsum("kt,ktc->kc", waves.conj(), real_times(f"{k}trc,kr->ktc", own, inputs))

    outputs, inputs = _krylov_step(matvec, rmatvec, outputs)
    values = jnp.linalg.norm(matvec(outputs), axis=-1)
    return Site(jnp.stack(index, axis=-1), group), values, _Climbers(group, inputs, outputs)


def _krylov_step(matvec, rmatvec, start: Inexact[Array, "k n"]):
    """The best pairs in the spaces of `v` and its power steps, for `k` maps side by side in the rows.

    In a cluster of singular values they are closer than the last power step alone. Returns the vectors that `matvec`
    takes, and those that it gives.
    """
    basis, images = _unit_rows(start)[:, None], []
    for _ in range(_KRYLOV_STEPS):
        images.append(matvec(basis[:, -1]))
        basis = jax.vmap(extended)(basis, rmatvec(images[-1]))
    images = jnp.stack([*images, matvec(basis[:, -1])], axis=1)
    # The weights y of the largest |T V y| over unit y.
    weights = rayleigh_ritz(einsum("kim,kjm->kij", images.conj(), images))[1][..., 0, :]
    return tuple(_unit_rows(einsum("kj,kjn->kn", weights, vectors)) for vectors in (basis, images))


def _best_frequency(op: CircularConv, kernel_shape, filters: Complex[Array, "k terms"]):
    """Where on the half grid each scalar filter is largest: the indices of the frequency, and the waves there."""
    rows = _term_rows(op, kernel_shape, filters.dtype)
    values = filters.reshape((len(filters), *(row.shape[1] for row in rows)))
    for row in rows:
        # Each contraction takes the foremost axis of terms and puts the axis of its frequencies last.
        values = jnp.tensordot(values, row, axes=((1,), (1,)), precision=lax.Precision.HIGHEST)
    half = half_grid(op)
    index = jnp.unravel_index(jnp.argmax(jnp.abs(values).reshape((len(filters), -1)), axis=-1), half)
    waves = jnp.ones((len(filters), 1), filters.dtype)
    for row, i in zip(rows, index, strict=True):
        waves = (waves[:, :, None] * row[i][:, None, :]).reshape((len(filters), -1))
    return index, waves


def _term_rows(op: CircularConv, kernel_shape, dtype) -> list[Complex[Array, "points terms"]]:
    """The waves `exp(-i w t)` on the half grid, axis by axis, for the exponents of `polynomial`."""
    axes = zip(op.grid, half_grid(op), axis_exponents(op, kernel_shape), strict=True)
    return [jnp.asarray(axis_waves(n, exponents)[:m], dtype) for n, m, exponents in axes]

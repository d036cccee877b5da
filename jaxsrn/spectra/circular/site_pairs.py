"""Pairs that are stored at one site of the torus, those of circular and of unbounded convolutions.

`spectra/image_pairs.py` has the same functions for all other operators; `spectra/pairs_by_kind.py` chooses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.indexing import first_of, picked, stack_of_one
from jaxsrn._tools.linalg import einsum, real_where_possible, top_pairs, unit
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.circular.angles import angles_of
from jaxsrn.spectra.circular.climbing import best_frequency, filter_of
from jaxsrn.spectra.circular.fourier import polynomial, site_shape, site_symbol
from jaxsrn.spectra.circular.plane_waves import site_gradient, site_of_images, wave
from jaxsrn.spectra.circular.real_floats import amplitudes_of, group_of, indices_of, parts_of, turns_of
from jaxsrn.spectra.circular.sites import Site, on_grid
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "as_floats",
    "gradient",
    "images",
    "nearby",
    "of_floats",
    "of_images",
    "pair_at",
    "pairs_at",
    "power_step",
    "shapes",
]

# The first step of the search nearby as a part of a turn, which halves where the frequency stays, and the number of
# steps. The last one is 1e-8 of a turn if the frequency stays every time. More steps follow in the next pass.
_NEAR, _STEPS = 64, 20


def shapes(op: CircularConv | UnboundedConv, kernel_shape: tuple[int, ...]) -> Pair:
    """A `Pair` that holds the shapes of the arrays of a pair in floats (static)."""
    layer = on_grid(op, kernel_shape)
    rows, columns = site_shape(layer, kernel_shape)
    return Pair(Site((layer.num_axes,), ()), (2 * rows,), (2 * columns,))


def as_floats(pair: Pair, op: CircularConv | UnboundedConv, kernel_shape) -> Pair:
    """The pair as it is kept between steps, in real floats (`real_floats.py`)."""
    layer, dtype = on_grid(op, kernel_shape), pair.output.real.dtype
    site = Site(turns_of(pair.site.index, layer.grid, dtype), pair.site.group.astype(dtype))
    return Pair(site, parts_of(pair.input), parts_of(pair.output))


def of_floats(pair: Pair, op: CircularConv | UnboundedConv, kernel_shape, dtype) -> Pair:
    """The pair of `as_floats` in a dtype, whatever was done to it."""
    layer = on_grid(op, kernel_shape)
    site, *sides = jax.tree.map(lambda leaf: leaf.astype(dtype), pair)
    site = Site(indices_of(site.index, layer.grid), group_of(site.group, op.feature_group_count))
    return Pair(site, *map(amplitudes_of, sides))


def gradient(pair: Pair, op: CircularConv | UnboundedConv, kernel_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`grad_K Re(u^H S_K(w) v)` of the pair's amplitudes `u` and `v`."""
    return site_gradient(on_grid(op, kernel_shape), kernel_shape, pair.site, pair.input, pair.output)


def images(pair: Pair, op: CircularConv, kernel_shape: tuple[int, ...]):
    """The plane waves of the pair as real unit vectors `(input, output)`."""
    # A wave at a real frequency has an image only where its amplitudes are real.
    amplitudes = real_where_possible(pair.input, pair.output)
    reach = [np.arange(n) + c for n, c in zip(op.input_shape, op._centre(kernel_shape), strict=True)]
    inputs = wave(op, pair.site, amplitudes[0], reach, op.strides)
    outputs = wave(op, pair.site, amplitudes[1], [np.arange(n) for n in op.grid], (1,) * op.num_axes)
    return unit(inputs), unit(outputs)


def of_images(inputs: Float[Array, "..."], outputs: Float[Array, "..."], op: CircularConv, kernel_shape) -> Pair:
    """The pair closest to two real images: their amplitudes at the site where they are strongest."""
    site, u, v = site_of_images(op, kernel_shape, inputs, outputs)
    return Pair(site, unit(u), unit(v))


def power_step(kernel: Float[Array, "..."], op: CircularConv | UnboundedConv, pair: Pair) -> Pair:
    """The adjoint of the symbol turns the input into the new output, the symbol turns that into the new input."""
    symbol = site_symbol(kernel, on_grid(op, kernel.shape), pair.site)
    step = unit(einsum("rc,r->c", jnp.conj(symbol), pair.input))
    return Pair(pair.site, unit(einsum("rc,c->r", symbol, step)), step)


def nearby(kernel: Float[Array, "..."], op: CircularConv | UnboundedConv, pair: Pair, tolerance) -> Pair:
    """The leading pair at the same site, by an SVD, so that `tolerance` is not needed.

    An unbounded convolution first takes the frequency nearby at which the pair's value is largest.
    """
    layer = on_grid(op, kernel.shape)
    site = _better_site(kernel, layer, pair) if isinstance(op, UnboundedConv) else pair.site
    return pair_at(kernel, layer, site)


def _better_site(kernel, layer: CircularConv, pair: Pair) -> Site:
    """The site nearby where the value of the pair's vectors is largest."""
    coefficients, exponents = polynomial(kernel, layer)
    filters = filter_of(picked(coefficients, pair.site.group), pair.input, pair.output)
    angles, samples = angles_of(layer.grid, kernel.dtype), jnp.asarray(layer.grid, jnp.int32)
    index = best_frequency(angles, exponents, filters, pair.site.index, samples // _NEAR, _STEPS)
    return Site(lax.rem(index + samples, samples), pair.site.group)


def pair_at(kernel: Float[Array, "..."], op: CircularConv, site: Site) -> Pair:
    """The leading pair at one site."""
    return first_of(pairs_at(kernel, op, stack_of_one(site))[1])


def pairs_at(kernel, op: CircularConv, sites: Site) -> tuple[Float[Array, " k"], Pair]:
    """The leading singular values and pairs at the given sites."""
    matrices = jax.vmap(site_symbol, (None, None, 0))(kernel, op, sites)
    values, rows, columns = top_pairs(matrices)
    return values, Pair(sites, rows, columns)

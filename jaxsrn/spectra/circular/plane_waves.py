"""Plane waves: the images of a singular pair at one site, and the gradient of its value in the kernel.

A pair at frequency `w` has complex amplitudes `u` of the input channels (times phases) and `v` of the output channels.
Its images are `Re(u exp(i <w, m>))` and `Re(v exp(i <w, m>))`, its value is `Re(u^H S(w) v)`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from jaxsrn._tools.indexing import place_of_largest
from jaxsrn._tools.linalg import einsum
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.angles import angles_of, phases
from jaxsrn.spectra.circular.fourier import polynomial, site_waves
from jaxsrn.spectra.circular.sites import ShiftedSite, Site, half_grid

__all__ = [
    "site_gradient",
    "site_of_images",
    "wave",
]


def site_gradient(
    op: CircularConv, kernel_shape, site: Site | ShiftedSite, u: Complex[Array, " in"], v: Complex[Array, " out"]
):
    """`grad_K Re(u^H S_K(w) v)` of a unit pair `(u, v)` at a site, of shape `kernel_shape`."""
    groups, dtype = op.feature_group_count, jnp.finfo(u.dtype).dtype
    turned = einsum("t,c->tc", site_waves(op, kernel_shape, site, dtype), v)
    terms = einsum("r,tc->trc", u.conj(), turned).real[None]
    if groups > 1:
        in_group = (jnp.arange(groups, dtype=jnp.int32) == site.group).astype(dtype)
        terms = in_group[:, None, None, None] * terms
    transpose = jax.linear_transpose(
        lambda kernel: polynomial(kernel, op)[0], jax.ShapeDtypeStruct(kernel_shape, dtype)
    )
    return transpose(terms)[0]


def wave(op: CircularConv, site: Site, vector: Complex[Array, " c"], positions, strides):
    """The real image `Re(vector exp(i <w, m>))` of one site, at given positions.

    Args:
      op, site: the frequency and the group of the wave.
      vector: amplitudes `(phases * c // groups,)` of the group's channels; outputs have one phase.
      positions: per axis, static integer positions `t`; position `t` is `t // stride` steps into phase `t % stride`.
      strides: `op.strides` for inputs, whose positions are counted from the first tap of output 0; ones for outputs.

    Returns:
      `(*positions, c)`, not normalised.
    """
    residues = [np.asarray(t) % s for t, s in zip(positions, strides, strict=True)]
    image = vector.reshape((*strides, -1))
    image = image if math.prod(strides) == 1 else image[np.ix_(*residues)]
    angles = angles_of(op.grid, vector.real.dtype, parts=1)
    for axis, (t, s) in enumerate(zip(positions, strides, strict=True)):
        own = jax.tree.map(lambda part, axis=axis: part[axis : axis + 1], angles)
        turned = phases(own, site.index[axis : axis + 1], (np.asarray(t) // s)[:, None])
        factor = lax.complex(jnp.cos(turned), jnp.sin(turned))
        image = image * factor.reshape((1,) * axis + (-1,) + (1,) * (op.num_axes - axis))
    if op.feature_group_count == 1:
        return jnp.real(image)
    in_group = (jnp.arange(op.feature_group_count, dtype=jnp.int32) == site.group).astype(vector.real.dtype)[:, None]
    image = jnp.real(image)[..., None, :] * in_group.reshape((1,) * op.num_axes + in_group.shape)
    return image.reshape((*image.shape[:-2], -1))


def site_of_images(op: CircularConv, kernel_shape, inputs: Float[Array, "..."], outputs: Float[Array, "..."]):
    """The site where the norms of two images' amplitudes have the largest product, and these: `(site, u, v)`."""
    d, groups = op.num_axes, op.feature_group_count
    # The roll makes position 0 that of the first tap of output 0, as in `wave`.
    x = jnp.roll(inputs, op._centre(kernel_shape), axis=range(d))
    x = x.reshape((*sum(zip(op.grid, op.strides, strict=True), ()), groups, -1))
    x = x.transpose((*range(0, 2 * d, 2), 2 * d, *range(1, 2 * d, 2), 2 * d + 1))
    spectrum = [jnp.fft.fftn(image, axes=range(d)) for image in (x, outputs.reshape((*op.grid, groups, -1)))]
    half = tuple(slice(m) for m in half_grid(op))
    size = math.prod(half_grid(op)) * groups
    u, v = (s[half].reshape((size, -1)) for s in spectrum)
    place = place_of_largest(jnp.linalg.norm(u, axis=-1) * jnp.linalg.norm(v, axis=-1))
    *index, group = jnp.unravel_index(place, (*half_grid(op), groups))
    return Site(jnp.stack(index).astype(jnp.int32), group.astype(jnp.int32)), u[place], v[place]

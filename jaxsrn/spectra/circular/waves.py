"""Plane waves: the images of a singular pair at one site, and the gradient of its value in the kernel.

A pair at frequency `w` has complex amplitudes `u` of the input channels (times phases) and `v` of the output channels.
Its images are `Re(u exp(i <w, m>))` and `Re(v exp(i <w, m>))`, its value is `Re(u^H S(w) v)`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from jaxsrn._tools.linalg import einsum
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.fourier import PHASE_AXES, TAP_AXES, site_rows
from jaxsrn.spectra.circular.sites import half_grid, locate, times_modulo

__all__ = [
    "site_gradient",
    "site_of_images",
    "wave",
]


def site_gradient(op: CircularConv, kernel_shape, site, u: Complex[Array, " in"], v: Complex[Array, " out"]):
    """`grad_K Re(u^H S_K(w) v)` of a unit pair `(u, v)` at a site, of shape `kernel_shape`."""
    d, groups = op.num_axes, op.feature_group_count
    index, group = locate(op, site)
    axes = ",".join(p + t for p, t in zip(PHASE_AXES[:d], TAP_AXES[:d], strict=True))
    rows = site_rows(op, kernel_shape, index, u.dtype)
    u = jnp.conj(u).reshape((*op.strides, -1))
    taps = jnp.real(einsum(f"{axes},{PHASE_AXES[:d]}i,o->{TAP_AXES[:d]}io", *rows, u, v))
    in_group = jnp.arange(groups) == group
    out = taps[..., None, :] * in_group[:, None].astype(taps.dtype).reshape((1,) * (d + 1) + (groups, 1))
    return out.reshape(kernel_shape)


def wave(op: CircularConv, site: Int[Array, ""], vector: Complex[Array, " c"], positions, strides):
    """The real image `Re(vector exp(i <w, m>))` of one site, at given positions.

    Args:
      op, site: the frequency and the group of the wave.
      vector: amplitudes `(phases * c // groups,)` of the group's channels; outputs have one phase.
      positions: per axis, static integer positions `t`; position `t` is `t // stride` steps into phase `t % stride`.
      strides: `op.strides` for inputs, whose positions are counted from the first tap of output 0; ones for outputs.

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
    site = jnp.argmax(jnp.linalg.norm(u, axis=-1) * jnp.linalg.norm(v, axis=-1))
    return site, u[site], v[site]

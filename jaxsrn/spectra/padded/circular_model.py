"""The circular layer with the taps of a zero-padded one on the padded image, and its plane waves as images.

Away from the edges both layers do the same, so the largest waves of the circular layer are near the leading vectors.
The zero-padded map is the circular map restricted to some inputs and some outputs, so that its norm is not larger.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import unit
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.spectra.circular.plane_waves import wave
from jaxsrn.spectra.circular.sites import Site
from jaxsrn.spectra.singular_pair import Pair

__all__ = [
    "circular_layer",
    "windowed",
    "windowed_input",
]


def circular_layer(op: ZeroPaddedConv, kernel_shape: tuple[int, ...], strides: tuple[int, ...]) -> CircularConv:
    """The circular convolution with the same taps on the padded image, enlarged until the strides divide it.

    The image holds at least the extent of the taps, so that none of them falls on another.
    """
    padded = (n + sum(pad) for n, pad in zip(op._dilated_shape, op._pads(kernel_shape), strict=True))
    enough = (max(size, extent) for size, extent in zip(padded, op._extents(kernel_shape), strict=True))
    return CircularConv(
        tuple(-(-n // s) * s for n, s in zip(enough, strides, strict=True)),
        strides=strides,
        kernel_dilation=op.kernel_dilation,
        feature_group_count=op.feature_group_count,
    )


def _window(shape: tuple[int, ...], dtype) -> Float[Array, "... 1"]:
    """A half sine on each axis, the envelope that leading vectors of zero-padded convolutions tend to have."""
    axes = [np.sin(np.pi * (np.arange(n) + 0.5) / n) for n in shape]
    return jnp.asarray(functools.reduce(np.multiply.outer, axes)[..., None], dtype)


def windowed(pair: Pair, layer: CircularConv, op: ZeroPaddedConv, kernel_shape) -> Pair:
    """A pair of the circular layer as images of the zero-padded one, faded out at the edges and normalised."""
    positions = [np.arange(n) for n in op.out_shape(kernel_shape)[:-1]]
    outputs = wave(layer, pair.site, pair.output, positions, (1,) * op.num_axes)
    return Pair(None, windowed_input(pair.site, pair.input, layer, op, kernel_shape), _faded(outputs))


def windowed_input(site: Site, amplitudes, layer: CircularConv, op: ZeroPaddedConv, kernel_shape):
    """The input image of `windowed`, of the wave at a site with these amplitudes."""
    samples = zip(op.input_shape, op.input_dilation, op._pads(kernel_shape), strict=True)
    reach = [np.arange(n) * dilation + low for n, dilation, (low, _) in samples]
    return _faded(wave(layer, site, amplitudes, reach, op.strides))


def _faded(image: Float[Array, "..."]) -> Float[Array, "..."]:
    return unit(image * _window(image.shape[:-1], image.dtype))

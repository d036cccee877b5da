"""Bounds of the spectral norm of a layer: certified and probabilistic intervals, and the bounds of the literature."""

from jaxsrn.bounds.covers import NormInterval
from jaxsrn.bounds.entries import channel_l1, l1, lip_bound
from jaxsrn.bounds.gram import gram_iteration
from jaxsrn.bounds.interval import certified
from jaxsrn.bounds.random_start import probabilistic
from jaxsrn.bounds.reshapings import fantastic_four
from jaxsrn.bounds.tensor import tensor_norm

__all__ = [
    "NormInterval",
    "certified",
    "channel_l1",
    "fantastic_four",
    "gram_iteration",
    "l1",
    "lip_bound",
    "probabilistic",
    "tensor_norm",
]

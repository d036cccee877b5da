"""Bounds of the spectral norm of a layer: a certified interval, and the bounds of the literature."""

from jaxsrn.bounds.covers import NormInterval
from jaxsrn.bounds.interval import certified, gram_iteration
from jaxsrn.bounds.reshapings import channel_l1, fantastic_four, l1, lip_bound, tensor_norm

__all__ = [
    "NormInterval",
    "certified",
    "channel_l1",
    "fantastic_four",
    "gram_iteration",
    "l1",
    "lip_bound",
    "tensor_norm",
]

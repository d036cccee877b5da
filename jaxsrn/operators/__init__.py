"""Which linear map a kernel stands for; what a Flax layer is; the layers of a model by path."""

from jaxsrn.operators.maps import CircularConv, Dense, Operator, ZeroPaddedConv

__all__ = [
    "CircularConv",
    "Dense",
    "Operator",
    "ZeroPaddedConv",
]

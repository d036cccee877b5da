"""Operators: which linear map a kernel stands for, which one a Flax layer is, and the layers of a model by path."""

from jaxsrn.operators.base import Dense, Operator
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.operators.unbounded import UnboundedConv

__all__ = [
    "CircularConv",
    "Dense",
    "Operator",
    "UnboundedConv",
    "ZeroPaddedConv",
]

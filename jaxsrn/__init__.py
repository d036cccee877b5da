"""Singular values, norms and stable rank of layers, convolutions above all.

Every function has the form `f(kernel, op, *, options)`: the kernel in Flax's layout, and the operator that says
which linear map it stands for.
"""

from jaxsrn.normalization import SRNResult, srn, srnc, srnc_tanay
from jaxsrn.norms import SingularTriplet, leading_triplet, spectral_norm
from jaxsrn.operators import CircularConv, Dense, ZeroPaddedConv
from jaxsrn.ranks import stable_rank, stable_rank_range
from jaxsrn.spectra import singular_values, symbol, top_singular_values

__all__ = [
    "CircularConv",
    "Dense",
    "SRNResult",
    "SingularTriplet",
    "ZeroPaddedConv",
    "leading_triplet",
    "singular_values",
    "spectral_norm",
    "srn",
    "srnc",
    "srnc_tanay",
    "stable_rank",
    "stable_rank_range",
    "symbol",
    "top_singular_values",
]

"""Symbol, singular values, norms and stable ranks of every operator, and the leading pair that they are made of."""

from jaxsrn.spectra.norms import SingularTriplet, leading_triplet, spectral_norm
from jaxsrn.spectra.ranks import stable_rank, stable_rank_range
from jaxsrn.spectra.values import singular_values, symbol, top_singular_values

__all__ = [
    "SingularTriplet",
    "leading_triplet",
    "singular_values",
    "spectral_norm",
    "stable_rank",
    "stable_rank_range",
    "symbol",
    "top_singular_values",
]

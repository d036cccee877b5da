"""Spectra: symbol, singular values, norms and stable ranks of every operator, and the leading pair behind them."""

from jaxsrn.spectra.norms import SingularTriplet, leading_triplet, spectral_norm
from jaxsrn.spectra.ranks import StableRankRange, stable_rank, stable_rank_range, target_of_fraction
from jaxsrn.spectra.values import singular_values, symbol, top_singular_values

__all__ = [
    "SingularTriplet",
    "StableRankRange",
    "leading_triplet",
    "singular_values",
    "spectral_norm",
    "stable_rank",
    "stable_rank_range",
    "symbol",
    "target_of_fraction",
    "top_singular_values",
]

"""Singular values, norms and stable rank of layers, convolutions above all.

Every function has the form `f(kernel, op, *, options)`: the kernel in Flax's layout, and the operator that says
which linear map it stands for. The modules `bounds`, `optim`, `penalties`, `sphere` and
`surrogate` are imported when first used.
"""

import importlib

from jaxsrn.normalization.lowering import srnc
from jaxsrn.normalization.matrices import srn
from jaxsrn.normalization.result import SRNResult
from jaxsrn.normalization.tanay import srnc_tanay
from jaxsrn.normalization.training.step import SRNCState, srnc_state, srnc_step
from jaxsrn.operators.base import Dense
from jaxsrn.operators.convolutions import CircularConv, ZeroPaddedConv
from jaxsrn.projections.spectral_ball import ProjectionResult, clip_singular_values, project_spectral_ball
from jaxsrn.spectra.norms import SingularTriplet, leading_triplet, spectral_norm
from jaxsrn.spectra.ranks import stable_rank, stable_rank_range
from jaxsrn.spectra.values import singular_values, symbol, top_singular_values

__all__ = [
    "CircularConv",
    "Dense",
    "ProjectionResult",
    "SRNCState",
    "SRNResult",
    "SingularTriplet",
    "ZeroPaddedConv",
    "bounds",
    "clip_singular_values",
    "leading_triplet",
    "optim",
    "penalties",
    "project_spectral_ball",
    "singular_values",
    "spectral_norm",
    "sphere",
    "srn",
    "srnc",
    "srnc_state",
    "srnc_step",
    "srnc_tanay",
    "stable_rank",
    "stable_rank_range",
    "surrogate",
    "symbol",
    "top_singular_values",
]

_MODULES = ("bounds", "optim", "penalties", "sphere", "surrogate")


def __getattr__(name: str):
    # `import jaxsrn` stays light: optim and surrogate need optax.
    if name in _MODULES:
        return importlib.import_module(f"jaxsrn.{name}")
    raise AttributeError(f"module 'jaxsrn' has no attribute {name!r}")

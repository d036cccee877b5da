"""Singular values, norms and stable rank of layers, convolutions above all.

A function of a layer has the form `f(kernel, op, *, options)`, with a target or a limit before the options: the kernel
is in Flax's layout, and the operator says which linear map it stands for. The modules `bounds`, `lipschitz`, `optim`,
`penalties`, `projections`, `sphere` and `surrogate` are imported when they are first used; `jaxsrn.nnx` and
`jaxsrn.linen`, the wrappers for Flax, `jaxsrn.report`, the tables, and `jaxsrn.plots`, the pictures, are imported by
name.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from jaxsrn.normalization import SRNResult, srn, srnc, srnc_tanay
from jaxsrn.normalization.training import SRNCState, srnc_state, srnc_step
from jaxsrn.operators import CircularConv, Dense, Operator, UnboundedConv, ZeroPaddedConv
from jaxsrn.projections import ProjectionResult, clip_singular_values, project_spectral_ball
from jaxsrn.spectra import (
    SingularTriplet,
    StableRankRange,
    leading_triplet,
    singular_values,
    spectral_norm,
    stable_rank,
    stable_rank_range,
    symbol,
    target_of_fraction,
    top_singular_values,
)

if TYPE_CHECKING:
    from jaxsrn import bounds, lipschitz, optim, penalties, projections, sphere, surrogate

__all__ = [
    "CircularConv",
    "Dense",
    "Operator",
    "ProjectionResult",
    "SRNCState",
    "SRNResult",
    "SingularTriplet",
    "StableRankRange",
    "UnboundedConv",
    "ZeroPaddedConv",
    "bounds",
    "clip_singular_values",
    "leading_triplet",
    "lipschitz",
    "optim",
    "penalties",
    "project_spectral_ball",
    "projections",
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
    "target_of_fraction",
    "top_singular_values",
]

_MODULES = ("bounds", "lipschitz", "optim", "penalties", "projections", "sphere", "surrogate")


def __getattr__(name: str):
    # `import jaxsrn` stays light: optim and surrogate need optax.
    if name in _MODULES:
        return importlib.import_module(f"jaxsrn.{name}")
    if name == "__version__":
        return importlib.metadata.version("jaxsrn")
    raise AttributeError(f"module 'jaxsrn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, those of modules that are not imported yet among them, as interactive shells complete them."""
    return sorted({*globals(), *__all__})

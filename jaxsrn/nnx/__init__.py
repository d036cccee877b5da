"""The wrappers for Flax NNX: layers whose stable rank and spectral norm are constrained while they train.

    import jaxsrn.nnx as jnnx

    self.conv = jnnx.StableRankNorm(nnx.Conv(3, 16, (3, 3), rngs=rngs), 0.5, rngs=rngs)

The wrappers hold no mathematics: every forward calls `jaxsrn.srnc_step` on the layer's kernel. `jaxsrn.linen` is the
same for Flax Linen.
"""

from jaxsrn.nnx.models import constrain, fold, layer_operators, refresh, restart
from jaxsrn.nnx.wrappers import SpectralNorm, StableRankNorm, StableRankState

__all__ = [
    "SpectralNorm",
    "StableRankNorm",
    "StableRankState",
    "constrain",
    "fold",
    "layer_operators",
    "refresh",
    "restart",
]

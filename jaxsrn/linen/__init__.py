"""The wrappers for Flax Linen: layers whose stable rank and spectral norm are constrained while they train.

    import jaxsrn.linen as jlinen

    x = jlinen.StableRankNorm(nn.Conv(16, (3, 3)), 0.5)(x)

    variables = model.init(key, x)
    y, changed = model.apply(variables, x, mutable=["stable_rank"])

They are those of `jaxsrn.nnx`, with the same numbers. The wrappers hold no mathematics: every forward calls
`jaxsrn.srnc_step` on the layer's kernel.
"""

from jaxsrn.linen.models import constrain, fold, layer_operators, refresh, restart
from jaxsrn.linen.wrappers import SpectralNorm, StableRankNorm, StableRankState

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

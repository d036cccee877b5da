"""Differentiable regularisers: a penalty on extreme singular values, batch norm folded in, sums over layers."""

from jaxsrn.penalties.batch_norm import fold_batch_norm
from jaxsrn.penalties.guo_ye import extreme_singular_values
from jaxsrn.penalties.sums import total
from jaxsrn.penalties.tracked_pairs import TrackedPairs, extreme_singular_values_step, init_pairs

__all__ = [
    "TrackedPairs",
    "extreme_singular_values",
    "extreme_singular_values_step",
    "fold_batch_norm",
    "init_pairs",
    "total",
]

"""Differentiable regularisers: singular values drawn together, batch norm folded in, sums over layers."""

from jaxsrn.penalties.guo_ye import (
    TrackedPairs,
    extreme_singular_values,
    extreme_singular_values_step,
    fold_batch_norm,
    init_pairs,
    total,
)

__all__ = [
    "TrackedPairs",
    "extreme_singular_values",
    "extreme_singular_values_step",
    "fold_batch_norm",
    "init_pairs",
    "total",
]

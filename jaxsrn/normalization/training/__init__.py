"""Stable rank normalization in training, while the kernel changes: one cheap pass a step."""

from jaxsrn.normalization.training.step import SRNCState, srnc_state, srnc_step

__all__ = [
    "SRNCState",
    "srnc_state",
    "srnc_step",
]

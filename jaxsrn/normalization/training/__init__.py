"""Stable rank normalization while the kernel changes: one cheap pass a training step."""

from jaxsrn.normalization.training.step import SRNCState, srnc_state, srnc_step

__all__ = [
    "SRNCState",
    "srnc_state",
    "srnc_step",
]

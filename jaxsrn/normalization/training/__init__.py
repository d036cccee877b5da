"""Stable rank normalization in training, while the kernel changes: one cheap pass a step."""

from jaxsrn.normalization.training.start import srnc_state
from jaxsrn.normalization.training.state import SRNCState
from jaxsrn.normalization.training.step import srnc_step

__all__ = [
    "SRNCState",
    "srnc_state",
    "srnc_step",
]

"""Stable rank normalization: of a matrix, of any layer exactly, and the original approximation."""

from jaxsrn.normalization.lowering import SRNResult, srn, srnc, srnc_tanay

__all__ = [
    "SRNResult",
    "srn",
    "srnc",
    "srnc_tanay",
]

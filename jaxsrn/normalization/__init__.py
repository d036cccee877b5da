"""Stable rank normalization: of a matrix, of any layer exactly, and the original approximation."""

from jaxsrn.normalization.lowering import srnc
from jaxsrn.normalization.matrices import srn
from jaxsrn.normalization.result import SRNResult
from jaxsrn.normalization.tanay import srnc_tanay

__all__ = [
    "SRNResult",
    "srn",
    "srnc",
    "srnc_tanay",
]

"""Stable rank normalization of a matrix (`srn`), of any layer exactly (`srnc`), and as once proposed (`srnc_tanay`)."""

from jaxsrn.normalization.lower_stable_rank import srnc
from jaxsrn.normalization.matrices import srn
from jaxsrn.normalization.result import SRNResult
from jaxsrn.normalization.tanay import srnc_tanay

__all__ = [
    "SRNResult",
    "srn",
    "srnc",
    "srnc_tanay",
]

"""What a person reads of a network: the norm and the stable rank of every layer, of a model or of bare weights.

`python -m jaxsrn report FILE` prints the same table.
"""

from jaxsrn.report.analysis import analyze
from jaxsrn.report.kernels import Skipped
from jaxsrn.report.layers import LayerReport
from jaxsrn.report.table import Report

__all__ = ["LayerReport", "Report", "Skipped", "analyze"]

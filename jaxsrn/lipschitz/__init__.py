"""Lipschitz constants of networks, measured and bounded, and the generalization measures that are made of them.

Every number is one of three things, and its docstring says which. A **local constant** is the norm of the Jacobian at a
point. A **lower bound** of the global constant is a ratio `||f(x) - f(y)|| / ||x - y||` that a pair attains: of given
pairs, or of pairs that climb. An **upper bound** is a product of norms of layers.

Data are read a batch at a time: every function takes one batch, and `over_batches` runs it over a data set.
"""

from jaxsrn.lipschitz.batches import over_batches
from jaxsrn.lipschitz.class_margins import margins
from jaxsrn.lipschitz.hidden_layers import jac_norm
from jaxsrn.lipschitz.histograms import Histogram, histogram
from jaxsrn.lipschitz.jacobians import LocalConstant, LocalFrobeniusNorm, local, local_frobenius
from jaxsrn.lipschitz.pairs import Ascent, ascent, pairwise
from jaxsrn.lipschitz.products import certified_upper_bound, upper_bound
from jaxsrn.lipschitz.spectral_measures import norm_2_1, spec_fro, spec_l1

__all__ = [
    "Ascent",
    "Histogram",
    "LocalConstant",
    "LocalFrobeniusNorm",
    "ascent",
    "certified_upper_bound",
    "histogram",
    "jac_norm",
    "local",
    "local_frobenius",
    "margins",
    "norm_2_1",
    "over_batches",
    "pairwise",
    "spec_fro",
    "spec_l1",
    "upper_bound",
]

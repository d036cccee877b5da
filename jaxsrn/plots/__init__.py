"""Pictures for people: singular values, symbols, stable ranks, Lipschitz constants, norms in training, the sphere.

    import jaxsrn.plots as plots

    values = {name: jaxsrn.singular_values(kernels[name], op) for name, op in ops.items()}
    plots.singular_values(values).savefig("values.png")

Every function draws on `ax` where it is given, on axes of a new figure otherwise, and returns the figure. Nothing is
shown, and no setting of matplotlib changes. What differs in colour also differs in line style, marker or hatching, and
colours go from dark to light, so that every picture can be read in grey. Legends stand beside the axes or below.

The package needs matplotlib: `pip install matplotlib`.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("jaxsrn.plots needs matplotlib; install it by pip install matplotlib.") from error

from jaxsrn.plots.lipschitz import lipschitz_bounds, lipschitz_histogram
from jaxsrn.plots.ranks import stable_ranks
from jaxsrn.plots.spectra import singular_values
from jaxsrn.plots.symbols import symbol_norms
from jaxsrn.plots.training import norms_over_steps
from jaxsrn.plots.unit_sphere import camera, sphere

__all__ = [
    "camera",
    "lipschitz_bounds",
    "lipschitz_histogram",
    "norms_over_steps",
    "singular_values",
    "sphere",
    "stable_ranks",
    "symbol_norms",
]

"""Optax transformations: parameters on the unit sphere, layers of bounded norm or stable rank, steepest descent."""

from jaxsrn.optim.constraints import keep_spectral_norm, keep_stable_rank
from jaxsrn.optim.descent import SpectralDescentState, spectral_descent
from jaxsrn.optim.keeping import KeepState
from jaxsrn.optim.riemannian import SphereSGDState, on_sphere, sphere_sgd

__all__ = [
    "KeepState",
    "SpectralDescentState",
    "SphereSGDState",
    "keep_spectral_norm",
    "keep_stable_rank",
    "on_sphere",
    "spectral_descent",
    "sphere_sgd",
]

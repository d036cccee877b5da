"""Optax transformations: parameters on the unit sphere, and layers of bounded spectral norm or stable rank."""

from jaxsrn.optim.keeping import KeepState
from jaxsrn.optim.layers import keep_spectral_norm, keep_stable_rank
from jaxsrn.optim.riemannian import SphereSGDState, on_sphere, sphere_sgd

__all__ = [
    "KeepState",
    "SphereSGDState",
    "keep_spectral_norm",
    "keep_stable_rank",
    "on_sphere",
    "sphere_sgd",
]

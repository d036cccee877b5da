"""Kernels of bounded spectral norm: clipping, the projection on the spectral ball, and steepest descent in it."""

from jaxsrn.projections.spectral_ball import ProjectionResult, clip_singular_values, project_spectral_ball
from jaxsrn.projections.steepest_descent import SteepestResult, steepest

__all__ = [
    "ProjectionResult",
    "SteepestResult",
    "clip_singular_values",
    "project_spectral_ball",
    "steepest",
]

"""Kernels of bounded spectral norm: clipping of singular values, and the projection on the spectral ball."""

from jaxsrn.projections.spectral_ball import ProjectionResult, clip_singular_values, project_spectral_ball

__all__ = [
    "ProjectionResult",
    "clip_singular_values",
    "project_spectral_ball",
]

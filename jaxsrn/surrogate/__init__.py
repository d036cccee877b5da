"""The log-sum-exp surrogate of stable rank normalization, and its descent on the sphere (Zheng et al. 2025)."""

from jaxsrn.surrogate.problem import objective
from jaxsrn.surrogate.smoothed_maximum import form_eigenvalues, forms, log_sum_exp
from jaxsrn.surrogate.solving import Trajectory, solve, trajectory

__all__ = [
    "Trajectory",
    "form_eigenvalues",
    "forms",
    "log_sum_exp",
    "objective",
    "solve",
    "trajectory",
]

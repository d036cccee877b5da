"""`LayerReport`: the numbers of a layer."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import DENSE_SIZE
from jaxsrn.bounds import certified
from jaxsrn.bounds.covers import NormInterval
from jaxsrn.bounds.interval import certified_by_pair
from jaxsrn.operators import Dense, Operator, UnboundedConv, ZeroPaddedConv
from jaxsrn.report.kernels import NamedKernel
from jaxsrn.report.matrices import Numbers, numbers_of_matrix, singular_values_of_matrix
from jaxsrn.spectra import singular_values, stable_rank_range
from jaxsrn.spectra.common_shapes import is_matrix, num_copies
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.ranks import norm_and_rank
from jaxsrn.spectra.singular_pair import has_small_matrices

__all__ = ["LayerReport", "layer_report"]

# Matrices of more rows and columns are searched by compiled functions, which take less time there.
_LAPACK = 1024


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What is known of a layer.

    Attributes:
      name: the layer's name, that of its kernel.
      kernel_shape: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`, Flax's layout, however it was stored.
      operator: the linear map that the numbers are those of.
      rule: how the array was taken for this layer.
      spectral_norm: `||T||_2`.
      norm_interval: the two numbers that are guaranteed to hold the norm between them: of matrices up to 1,024 rows or
        columns what rounding leaves open, of all else those of `bounds.certified`.
      flattened_norm: for contrast, the norm of the kernel reshaped to a matrix `(prod(taps) * c_in // groups, c_out)`,
        the common shortcut.
      stable_rank: `||T||_F^2 / ||T||_2^2`; that per output sample where the operator is unbounded.
      stable_rank_low: the least stable rank that kernels of this shape can have.
      stable_rank_high: the largest one.
      condition_number: the largest singular value over the smallest; `None` where it was not asked for, or where the
        singular values are not listed (unbounded operators, large images).
      effective_rank: the exponential of the entropy of the singular values divided by their sum (Roy, Vetterli 2007,
        "The effective rank: a measure of effective dimensionality"); `None` as before.
      batch_norm: the batch normalization that is folded into the kernel, if there is one.
    """

    name: str
    kernel_shape: tuple[int, ...]
    operator: Operator
    rule: str
    spectral_norm: float
    norm_interval: NormInterval
    flattened_norm: float
    stable_rank: float
    stable_rank_low: float
    stable_rank_high: float
    condition_number: float | None = None
    effective_rank: float | None = None
    batch_norm: str | None = None

    @property
    def share(self) -> float:
        """Where the stable rank is in its range: 0 at the lowest that the shape allows, 1 at the highest; zeros: 0."""
        low, high = self.stable_rank_low, self.stable_rank_high
        if self.stable_rank == 0:
            return 0.0
        return 1.0 if high == low else (self.stable_rank - low) / (high - low)


def layer_report(kernel: NamedKernel, values: np.ndarray, spectra: bool, batch_norm: str | None) -> LayerReport:
    """The record of one layer, from the values of its kernel in the shape that `kernel` says."""
    op = kernel.op
    flat, copies = values.reshape((-1, values.shape[-1])), num_copies(kernel.shape, op)
    if not copies:
        numbers = _compiled_numbers(jnp.asarray(values), op)
    elif min(flat.shape) > _LAPACK:
        numbers = _compiled_numbers(jnp.asarray(flat), Dense())
    else:
        numbers = numbers_of_matrix(flat)
    spectrum = _spectrum_of(values, op) if spectra and _has_spectrum(kernel.shape, op) else _Spectrum(None, None)
    low, high = stable_rank_range(kernel.shape, op)
    return LayerReport(
        name=kernel.name,
        kernel_shape=kernel.shape,
        operator=op,
        rule=kernel.rule,
        spectral_norm=numbers.spectral_norm,
        norm_interval=numbers.norm_interval,
        flattened_norm=numbers.spectral_norm if copies else numbers_of_matrix(flat).spectral_norm,
        # A convolution of one tap does to each sample what a matrix does.
        stable_rank=max(copies, 1) * numbers.stable_rank,
        stable_rank_low=low,
        stable_rank_high=high,
        condition_number=spectrum.condition_number,
        effective_rank=spectrum.effective_rank,
        batch_norm=batch_norm,
    )


# Numbers


def _compiled_numbers(kernel: Shaped[Array, "..."], op: Operator) -> Numbers:
    """The numbers of any layer by the library's own functions."""
    pair = leading_pair(kernel, op)
    # With zero padding the upper end has searches of its own, which are not in the program of a pair.
    padded = isinstance(op, ZeroPaddedConv)
    found = (*norm_and_rank(kernel, op, pair), certified(kernel, op)) if padded else _by_pair(kernel, op, pair)
    norm, rank, interval = jax.tree.map(float, found)
    return Numbers(norm, interval, rank)


@functools.partial(program, brief=True)
def _by_pair(kernel, op, pair):
    """Norm, stable rank and interval in one program, as every shape compiles it."""
    return *norm_and_rank(kernel, op, pair), certified_by_pair(kernel, op, pair)


# Spectra


class _Spectrum(NamedTuple):
    """What all singular values say of a layer, or `None` where they are not listed."""

    condition_number: float | None
    effective_rank: float | None


def _has_spectrum(kernel_shape: tuple[int, ...], op: Operator) -> bool:
    """Whether all singular values of the layer are listed."""
    if isinstance(op, UnboundedConv):
        return is_matrix(kernel_shape, op)
    return has_small_matrices(op, kernel_shape, DENSE_SIZE)


def _spectrum_of(values: np.ndarray, op: Operator) -> _Spectrum:
    # Several copies of a matrix, as with padding, may have zeros among their singular values that it does not have.
    if is_matrix(values.shape, op):
        found = singular_values_of_matrix(values.reshape(values.shape[-2:]))
    else:
        found = np.asarray(singular_values(jnp.asarray(values), op), np.float64)
    if found[0] == 0:
        return _Spectrum(math.nan, 0.0)
    shares = found / found.sum()
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)))
    with np.errstate(divide="ignore"):
        return _Spectrum(float(found[0] / found[-1]), float(np.exp(entropy)))

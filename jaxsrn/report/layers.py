"""`LayerReport`: the numbers of a layer, computed for batches of layers of one shape."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Shaped

from jaxsrn._tools.linalg import ratio
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import DENSE_SIZE, svds_are_dear
from jaxsrn.bounds import certified
from jaxsrn.bounds.covers import NormInterval
from jaxsrn.bounds.interval import certified_by_pair
from jaxsrn.operators import Dense, Operator, UnboundedConv, ZeroPaddedConv
from jaxsrn.spectra import singular_values, stable_rank_range
from jaxsrn.spectra.common_shapes import common_shape, is_matrix, num_copies
from jaxsrn.spectra.pairs_by_kind import leading_pair
from jaxsrn.spectra.ranks import norm_and_rank
from jaxsrn.spectra.singular_pair import matrix_size

__all__ = [
    "LayerReport",
    "Numbers",
    "Spectrum",
    "as_computed",
    "has_spectrum",
    "layer_report",
    "numbers_of",
    "shares_calls",
    "spectra_of",
]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What is known of a layer.

    Attributes:
      name: the layer's name, that of its kernel.
      kernel_shape: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`, Flax's layout, however it was stored.
      operator: the linear map that the numbers are those of.
      rule: how the array was taken for this layer.
      spectral_norm: `||T||_2`.
      norm_interval: the two numbers that are guaranteed to hold the norm between them, by `bounds.certified`.
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


class Numbers(NamedTuple):
    """The numbers of a layer, or of a batch of layers along the first axis."""

    spectral_norm: Float[Array, "..."]
    norm_interval: NormInterval
    stable_rank: Float[Array, "..."]


class Spectrum(NamedTuple):
    """What all singular values say of a layer, or of each of a batch."""

    condition_number: Float[Array, "..."]
    effective_rank: Float[Array, "..."]


def as_computed(kernel_shape: tuple[int, ...], op: Operator, spectra: bool) -> tuple[Operator, tuple[int, ...]]:
    """The operator and the shape with which a layer is computed.

    Convolutions of one tap do to each sample what a matrix does, and a matrix has the singular values of its transpose.
    Large matrices of many sizes share one shape, except where the smallest singular value is asked for.
    """
    # Several copies of a matrix, as with padding, may have zeros among their singular values that it does not have.
    if not (is_matrix(kernel_shape, op) if spectra else num_copies(kernel_shape, op)):
        return op, kernel_shape
    own = min(kernel_shape[-2:]), max(kernel_shape[-2:])
    return Dense(), common_shape(*own) if svds_are_dear(1, own) and not spectra else own


def shares_calls(kernel_shape: tuple[int, ...], op: Operator) -> bool:
    """Whether several layers take less time in one call by `jax.vmap` than one after the other.

    Matrices that are small enough for an SVD do, ten times less for sixteen of 64x64. Searches do not, as all of a
    batch take the steps of the slowest; they share a compiled program anyway.
    """
    return isinstance(op, Dense) and not svds_are_dear(1, kernel_shape)


def numbers_of(kernel: Shaped[Array, "..."], op: Operator) -> Numbers:
    """The numbers of one layer in the form of `as_computed`; `jax.vmap` takes a batch."""
    pair = leading_pair(kernel, op)
    norm, rank = norm_and_rank(kernel, op, pair)
    # With zero padding the upper end has searches of its own.
    padded = isinstance(op, ZeroPaddedConv)
    interval = certified(kernel, op) if padded else certified_by_pair(kernel, op, pair)
    return Numbers(norm, interval, rank)


def flattened_norm(kernel: np.ndarray) -> float:
    """The norm of a kernel reshaped to a matrix `(prod(taps) * c_in, c_out)`, by SciPy.

    Of its smaller Gram matrix in float64 the largest eigenvalue takes less time than a program for every shape.
    """
    matrix = kernel.reshape((-1, kernel.shape[-1])).astype(np.float64)
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    if not np.all(np.isfinite(gram)):
        return math.nan
    last = len(gram) - 1
    return math.sqrt(max(0.0, scipy.linalg.eigvalsh(gram, subset_by_index=(last, last)).item()))


def has_spectrum(kernel_shape: tuple[int, ...], op: Operator) -> bool:
    """Whether `singular_values` lists those of the layer."""
    if isinstance(op, UnboundedConv):
        return False
    return not op._needs_explicit_matrix or matrix_size(op, kernel_shape) <= DENSE_SIZE


def spectra_of(kernel: Shaped[Array, "..."], op: Operator) -> Spectrum:
    """The condition number and the effective rank of one layer; `jax.vmap` takes a batch."""
    return _spectrum(singular_values(kernel, op))


@program
def _spectrum(values: Float[Array, " n"]) -> Spectrum:
    shares = ratio(values, jnp.sum(values))
    logs = jnp.log(jnp.where(shares > 0, shares, 1.0))
    return Spectrum(values[0] / values[-1], jnp.where(values[0] == 0, 0.0, jnp.exp(-jnp.sum(shares * logs))))


def layer_report(
    kernel, values: np.ndarray, op: Operator, numbers: Numbers, spectrum: Spectrum | None, batch_norm
) -> LayerReport:
    """The record of one layer of such values; `kernel` is a `Kernel` of `kernels.py`, the numbers are those of `op`."""
    numbers = jax.tree.map(float, numbers)
    copies = num_copies(kernel.shape, kernel.op) if isinstance(op, Dense) else 1
    low, high = stable_rank_range(kernel.shape, kernel.op)
    return LayerReport(
        name=kernel.name,
        kernel_shape=kernel.shape,
        operator=kernel.op,
        rule=kernel.rule,
        spectral_norm=numbers.spectral_norm,
        norm_interval=numbers.norm_interval,
        flattened_norm=numbers.spectral_norm if isinstance(op, Dense) else flattened_norm(values),
        stable_rank=copies * numbers.stable_rank,
        stable_rank_low=low,
        stable_rank_high=high,
        condition_number=None if spectrum is None else float(spectrum.condition_number),
        effective_rank=None if spectrum is None else float(spectrum.effective_rank),
        batch_norm=batch_norm,
    )

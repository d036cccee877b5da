"""The symbol of a circular convolution and its Gram matrices `S^H S` at any angle, from the kernel's autocorrelation.

A matrix product per pair of taps is done once, and each Gram matrix is then a sum of a few given matrices.

Wide kernels are **reduced** where the frequencies are few. Let `Q` be an orthonormal basis of their leading directions
and `P` the projection on the others. By Cauchy and Schwarz

    sigma_max(S(w))^2 <= sigma_max(S(w) Q)^2 + loss,    loss = terms * ||P (sum_t C_t^T C_t) P||_2 >= ||S(w) P||_2^2,

so that the small matrices `Q^T S^H S Q` suffice to prove that most frequencies are low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, Int

from jaxsrn._tools.indexing import picked, slice_from
from jaxsrn._tools.linalg import einsum, gram_bound, matmul, real_times
from jaxsrn._tools.subspaces import fixed_start, subspace_iteration
from jaxsrn.operators.convolutions import CircularConv
from jaxsrn.spectra.circular.angles import Angles, phases
from jaxsrn.spectra.circular.fourier import lags_of, polynomial, site_shape
from jaxsrn.spectra.circular.sites import half_grid

__all__ = [
    "CHUNK",
    "GramPolynomial",
    "gram_polynomial",
    "grams_at",
    "is_reduced",
    "is_transposed",
    "whole_grams",
    "with_all_directions",
]

# The number of entries of matrices that are worked on at a time. Larger chunks take more memory, and look at boxes that
# an earlier chunk would have shown to be low; smaller ones cost more rounds of the loop.
CHUNK = 2**18
# The number of columns from which kernels are reduced, and the number of entries of the bases. More directions make the
# Gram matrices larger, fewer make the loss larger; the wider the kernel, the fewer directions are enough
# (`python benchmarks/ablations.py`).
_REDUCED_FROM, _BASIS_ENTRIES = 256, 3 * 2**14
# The number of steps of subspace iteration, which tell leading directions from others. Any basis is valid.
_BASIS_STEPS = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GramPolynomial:
    """The symbol of every group, and the Gram matrix of its leading directions, as trigonometric polynomials.

    The columns are the shorter side of the symbol, or the inputs if both are equal, as trained kernels use inputs less
    evenly.

    Attributes:
      coefficients: `S(w) = sum_t exp(-i <w, t>) C_t`, `(groups, terms, rows, columns)`.
      terms: the `t`; static.
      basis: `Q` of each group, or `None` where all directions are kept.
      loss: an upper bound of what the other directions add to the square of a singular value.
      even, odd: `Q^T S^H S Q = sum_l cos<w, l> even_l + i sin<w, l> odd_l`, `(lags, groups, kept, kept)`, with one `l`
        of each opposite pair.
    """

    coefficients: Float[Array, "groups terms rows columns"]
    terms: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    basis: Float[Array, "groups columns kept"] | None
    loss: Float[Array, ""]
    even: Float[Array, "lags groups kept kept"]
    odd: Float[Array, "lags groups kept kept"]

    @property
    def exponents(self) -> np.ndarray:
        """The `t` of the terms, `(terms, axes)` (static)."""
        return np.array(self.terms)

    @property
    def lags(self) -> np.ndarray:
        """The `l` of `even` and `odd`, `(lags, axes)` (static)."""
        return lags_of(self.exponents)[0][-len(self.even) :]


def is_transposed(op: CircularConv, kernel_shape: tuple[int, ...]) -> bool:
    """Whether the rows of the polynomial's symbol are outputs and its columns inputs, against those of `fourier.py`."""
    rows, columns = site_shape(op, kernel_shape)
    return rows <= columns


def is_reduced(op: CircularConv, kernel_shape: tuple[int, ...]) -> bool:
    """Whether the kernel is wide, and its frequencies so few that a whole Gram matrix at each would not cost much.

    The limit is three frequencies for each product of the whole autocorrelation, which has one for each pair of terms.
    """
    terms = math.prod(kernel_shape[: op.num_axes])
    few = math.prod(half_grid(op)) <= 3 * terms * (terms + 1) // 2
    return few and min(site_shape(op, kernel_shape)) >= _REDUCED_FROM


def gram_polynomial(kernel: Float[Array, "..."], op: CircularConv, reduced: bool) -> GramPolynomial:
    """The polynomials of a kernel, reduced or not."""
    coefficients, exponents = polynomial(kernel, op)
    if is_transposed(op, kernel.shape):
        coefficients = coefficients.mT
    basis, loss, kept = None, jnp.zeros((), coefficients.dtype), coefficients
    if reduced:
        basis, loss = _leading_directions(coefficients)
        kept = matmul(coefficients, basis[:, None])
    terms = tuple(tuple(term.tolist()) for term in exponents)
    return GramPolynomial(coefficients, terms, basis, loss, *_autocorrelation(kept, exponents))


def _leading_directions(coefficients: Float[Array, "groups terms rows columns"]):
    """The basis of each group, by subspace iteration from a fixed start, and the largest loss of all groups."""
    groups, terms, _, columns = coefficients.shape
    stacked = coefficients.reshape((groups, -1, columns))
    energy = matmul(stacked.mT, stacked)
    start = fixed_start((1, min(columns // 2, _BASIS_ENTRIES // columns), columns), energy.dtype)
    start = jnp.broadcast_to(start, (groups, *start.shape[1:]))
    basis = subspace_iteration(lambda rows: matmul(rows, energy), start, _BASIS_STEPS).mT
    rest = energy - matmul(basis, matmul(basis.mT, energy))
    rest = rest - matmul(matmul(rest, basis), basis.mT)
    # The projections leave rounding errors of a few units, which the loss has to cover.
    slack = 4 * jnp.finfo(energy.dtype).eps * jnp.linalg.norm(energy, axis=(-2, -1))
    return basis, terms * (gram_bound(rest, 4) + jnp.max(slack))


def _autocorrelation(coefficients: Float[Array, "groups terms rows columns"], exponents: np.ndarray):
    """`(even, odd)` of the Gram matrices: sums over the pairs of terms that lie one lag apart.

    Of both orders of a pair one is computed, `C_s^T C_t`, as the other one is its transpose.
    """
    groups, terms, rows, columns = coefficients.shape
    lags, places = lags_of(exponents)
    # With the terms in a circle, each one and the next half of them make every pair once.
    count = terms // 2 + 1
    nexts = (np.arange(terms)[:, None] + np.arange(count)) % terms
    half = len(lags) // 2
    which = jnp.asarray(half + places[nexts] - places[:, None], jnp.int32)
    # Of an even number of terms those that lie opposite meet twice.
    shares = np.where(2 * np.arange(count) == terms, 0.5, 1.0).reshape((-1, 1, 1, 1))
    circle = jnp.moveaxis(coefficients, 1, 2)
    circle = jnp.concatenate([circle, circle[:, :, : count - 1]], axis=2)

    def add(place, sums):
        """Adds the products of one term with itself and the next ones, by a single large product."""
        window = slice_from(circle, place, count, axis=2)
        products = matmul(window[:, :, 0].mT, window.reshape((groups, rows, count * columns)))
        products = jnp.moveaxis(products.reshape((groups, columns, count, columns)), 2, 0)
        products = products * jnp.asarray(shares, products.dtype) if terms % 2 == 0 else products
        return sums.at[picked(which, place)].add(products, mode="drop", wrap_negative_indices=False)

    sums = jnp.zeros((len(lags), groups, columns, columns), coefficients.dtype)
    sums = lax.fori_loop(np.int32(0), np.int32(terms), add, sums)
    later = sums[half:] + sums[half::-1].mT
    return (later + later.mT).at[0].set(sums[half]), later.mT - later


def grams_at(poly: GramPolynomial, angles: Angles, doubled) -> Complex[Array, "points groups kept kept"]:
    """`Q^T S^H S Q` of every group at halves of the doubled indices (`boxes.py` has centres between frequencies)."""
    turned = phases(angles, doubled, poly.lags)
    parts = ((jnp.cos(turned), poly.even), (jnp.sin(turned), poly.odd))
    return lax.complex(*(einsum("pl,lgij->pgij", wave, part) for wave, part in parts))


def whole_grams(symbol: Complex[Array, "groups rows columns"]) -> Complex[Array, "groups columns columns"]:
    """`S^H S` of every group, not reduced."""
    cross = matmul(symbol.real.mT, symbol.imag)
    stacked = jnp.concatenate([symbol.real, symbol.imag], axis=-2)
    return lax.complex(matmul(stacked.mT, stacked), cross - cross.mT)


def with_all_directions(poly: GramPolynomial, group: Int[Array, ""], column: Complex[Array, " kept"]):
    """A vector of the leading directions of a group as a vector of all its columns."""
    return column if poly.basis is None else real_times("ck,k->c", picked(poly.basis, group), column)

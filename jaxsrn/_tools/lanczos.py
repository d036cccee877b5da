"""The Lanczos method with thick restarts, for the leading singular vectors of a map that is known by its products.

The method builds an orthonormal basis of the Krylov space of `T^T T`, with full reorthogonalisation. This is the side
of the inputs in the bidiagonalization of Golub and Kahan 1965. Where there are fewer outputs than inputs, the basis is
that of `T T^T`. A full basis is restarted from its leading Ritz vectors (thick restart, Wu and Simon 2000).

It differs from `jax.experimental.sparse.linalg.lobpcg_standard` in two ways. That function asks for more than five
rows for each vector; this one takes maps of any size. That one remembers only the current and the last block of
vectors; this one remembers a basis of many, which nearly equal singular values need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsrn._tools.indexing import picked, put_from
from jaxsrn._tools.linalg import divisor, matmul
from jaxsrn._tools.subspaces import direction_of, fixed_start, projected_out, rayleigh_ritz

__all__ = ["LONGEST_BASIS", "SingularVectors", "leading_singular_vectors", "top_singular_vectors"]

# The most vectors of a basis: more of them save steps, and cost memory and reorthogonalisation.
LONGEST_BASIS = 20
# The number of Ritz vectors that a restart carries: they resolve nearly equal leading values, and leave less room for
# new vectors (`python benchmarks/ablations.py`).
_KEPT = 8
# The number of steps after which the residual is looked at: every look takes a small SVD, and late looks take steps in
# vain.
_BETWEEN_CHECKS = 4
# The most restarts, after which the search ends, converged or not; its residual says which. Those of long sequences in
# float64 take more than 200, as their leading singular values are close.
_MAX_RESTARTS, _MAX_RESTARTS_IN_FLOAT64 = 200, 1000


class SingularVectors(NamedTuple):
    """A singular value of a map, its unit vectors, and the relative residual `||T^T output - value input|| / value`.

    Of a map with fewer outputs than inputs the residual is `||T input - value output|| / value`. The output is 0 where
    the map is zero.
    """

    value: Float[Array, ""]
    input: Float[Array, " in"]
    output: Float[Array, " out"]
    residual: Float[Array, ""]


class _Basis(NamedTuple):
    """A Krylov basis: `T^T T V^T = V^T P` for the rows `V` in use, but for the coupling of the last one to the next.

    All rows take part in every product, since XLA would copy slices; the rows not yet in use are zero.
    """

    vectors: Float[Array, "rows in"]
    projected: Float[Array, "rows rows"]
    coupling: Float[Array, ""]


class _State(NamedTuple):
    """The basis, the number of its vectors in use, the leading Ritz vector's weights, and the restarts so far."""

    basis: _Basis
    used: Int[Array, ""]
    leading: Float[Array, " rows"]
    residual: Float[Array, ""]
    restarts: Int[Array, ""]


def _extend(gram: Callable, j: Int[Array, ""], basis: _Basis) -> _Basis:
    """One step: row and column `j` of the projection, and the next vector, which is 0 where the space is exhausted."""
    vectors, projected, coupling = basis
    places = np.arange(len(vectors), dtype=np.int32)
    # The first vector couples with none, so that any may stand before it.
    vector, before = picked(vectors, j), picked(vectors, jnp.maximum(j - 1, 0))
    image = gram(vector)
    # The three-term recurrence is the first pass; a pass with all rows would read the whole basis once more.
    own = matmul(vector, image)
    rest, row = projected_out(image - own * vector - coupling * before, vectors)
    row = row + jnp.where(places == j, own, jnp.where(places == j - 1, coupling, 0))
    projected = jnp.where(places == j, row[:, None], put_from(projected, j, row[None]))
    # The image of a vector in a nearly null direction is the rounding of the largest ones, which is no new direction.
    # The largest entry of the projection is on its diagonal, and near to the largest eigenvalue.
    following, coupling = direction_of(rest, jnp.max(projected))
    return _Basis(put_from(vectors, j + 1, following[None]), projected, coupling)


def _restarted(basis: _Basis, values, weights, kept: int) -> _Basis:
    """A thick restart: the basis of the `kept` leading Ritz vectors, followed by the next vector of the full one."""
    rows = jnp.concatenate([matmul(weights[:kept], basis.vectors), basis.vectors[-1:]])
    vectors = jnp.pad(rows, ((0, len(values) - len(rows)), (0, 0)))
    # The next vector couples with every kept one; its own step computes these couplings.
    return _Basis(vectors, jnp.diag(jnp.pad(values[:kept], (0, len(values) - kept))), jnp.zeros_like(basis.coupling))


def leading_singular_vectors(
    matvec: Callable,
    rmatvec: Callable,
    start: Float[Array, " in"],
    out_size: int,
    tolerance: float | Float[Array, ""],
    first_check: int | Int[Array, ""] = LONGEST_BASIS,
) -> SingularVectors:
    """The leading singular triplet of the map `matvec`.

    Args:
      matvec, rmatvec: the map and its transpose on flat vectors.
      start: any non-zero input that is not orthogonal to the answer. It is the first vector of the Krylov space, or its
        image is, where there are fewer outputs than inputs.
      out_size: length of an output.
      tolerance: the relative residual at which the search stops.
      first_check: steps before the first look at the residual. The default is a whole basis, as a start near another
        singular vector could pass for the leading one earlier.
    """
    if out_size < start.size:
        # Reorthogonalisation takes most of the time and the memory where the basis is on the larger side.
        found = leading_singular_vectors(rmatvec, matvec, matvec(start), start.size, tolerance, first_check)
        return found._replace(input=found.output, output=found.input)
    # A basis of one vector more than the inputs exhausts the space, and the last coupling is exactly zero.
    size = min(LONGEST_BASIS, start.size + 1)
    most = _MAX_RESTARTS_IN_FLOAT64 if start.dtype == jnp.float64 else _MAX_RESTARTS
    kept, places = min(_KEPT, size // 2), np.arange(size + 1, dtype=np.int32)
    extend = functools.partial(_extend, lambda x: rmatvec(matvec(x)))

    def advance(state: _State) -> _State:
        steps = jnp.where(state.used == 0, first_check, _BETWEEN_CHECKS)
        used = jnp.minimum(state.used + steps, size)
        basis = lax.fori_loop(state.used, used, extend, state.basis)
        values, weights = rayleigh_ritz(basis.projected)
        # This is `||T^T T v - theta v|| / theta` for the leading Ritz vector `v` and its Ritz value `theta`.
        last = jnp.sum(jnp.where(places == used - 1, jnp.abs(weights[0]), 0))
        residual = basis.coupling * last / divisor(values[0])
        # A restart puts the leading Ritz vector first.
        full = used == size
        basis, leading = lax.cond(
            full,
            lambda: (_restarted(basis, values, weights, kept), jnp.asarray(places == 0, start.dtype)),
            lambda: (basis, weights[0]),
        )
        return _State(basis, jnp.where(full, kept, used), leading, residual, state.restarts + full.astype(jnp.int32))

    def unfinished(state: _State):
        return (state.residual > tolerance) & (state.restarts < most)

    vectors = jnp.pad(direction_of(start)[0][None], ((0, size), (0, 0)))
    zero, none = np.zeros((), start.dtype), np.zeros((), np.int32)
    basis = _Basis(vectors, jnp.zeros((size + 1, size + 1), start.dtype), zero)
    state = _State(basis, none, jnp.zeros(size + 1, start.dtype), zero + np.inf, none)
    state = lax.while_loop(unfinished, advance, state)
    best = matmul(state.leading, state.basis.vectors)
    image = matvec(best)
    output, value = direction_of(image)
    return SingularVectors(value, best, output, state.residual)


def top_singular_vectors(
    matvec: Callable, rmatvec: Callable, in_size: int, out_size: int, k: int, tolerance, dtype
) -> tuple[Float[Array, "k in"], Float[Array, "k out"]]:
    """The `k` leading pairs of singular vectors, each found at right angles to the pairs before it (deflation).

    The Krylov space of one vector holds each singular value once. Deflation leaves the other copies of a repeated one.
    Where the pairs before leave nothing but rounding, which is where `k` exceeds the rank, the vectors are 0.
    """

    def find(i: Int[Array, ""], found):
        first, inputs, outputs = found

        def apart(vector, basis):
            return projected_out(vector, basis)[0]

        new = leading_singular_vectors(
            lambda x: apart(matvec(apart(x, inputs)), outputs),
            lambda y: apart(rmatvec(apart(y, outputs)), inputs),
            apart(fixed_start((in_size,), dtype, seed=i), inputs),
            out_size,
            tolerance,
        )
        # A second pass removes what rounding leaves of the first.
        entry = direction_of(apart(new.input, inputs))[0]
        result, value = direction_of(apart(apart(matvec(entry), outputs), outputs), first)
        entry = jnp.where(value > 0, entry, 0)
        return jnp.maximum(first, value), inputs.at[i].set(entry), outputs.at[i].set(result)

    nothing = jnp.zeros((), dtype), jnp.zeros((k, in_size), dtype), jnp.zeros((k, out_size), dtype)
    return lax.fori_loop(0, k, find, nothing)[1:]

"""Functions whose derivative holds an argument, such as singular vectors, constant, and what second derivatives do.

The value of a singular pair is stationary in its vectors. So the derivative of a norm holds them constant and is exact,
at the cost of one product. The vectors turn with the kernel all the same, and the derivative of that derivative must
see it. `held` leaves this to a **move**, a function of the first argument whose value is the argument that is held.
Nothing of a move is computed until a derivative is differentiated again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.linalg import by_largest, matmul, unit
from jaxsrn._tools.minres import minres
from jaxsrn._tools.tolerances import system_tolerance, vector_tolerance

__all__ = [
    "gmres",
    "held",
    "is_inexact",
    "moving",
    "real_vector",
    "refusing",
    "stationary",
]

# The most unknowns of systems that are solved by their eigenvectors, which also serve where the system is singular.
_FEW_UNKNOWNS = 512
# A restart forgets what 40 Krylov vectors have found, and more of them take memory; 20 restarts guard the loop. The
# method "incremental" stops in the midst of a restart, where "batched" always completes it.
_GMRES = {"atol": 0.0, "restart": 40, "maxiter": 20, "solve_method": "incremental"}
# A guard of the loop, and twice the number of unknowns where that is more. The steps grow with the norm over the
# distance of the value from the next singular value; for the largest value with the root of that.
_MINRES_STEPS = 1000
# Relative residual up to which a solution is used. It is the error of the derivative where the system is well
# posed; near a singular system, where two leading values meet, there is none.
_ACCEPTED_RESIDUAL = 1e-3


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def held(function: Callable, move: Callable, x, z):
    """`function(x, z)`, whose derivative is that in `x` alone; second derivatives see `z` as `move(x, z)`.

    So a second derivative is the derivative of the first one, whether or not that one is exact.

    Args:
      function: a function of two trees of arrays. It must not refer to arrays in any other way, and neither may `move`.
      move: `move(x, z)` has the value `z` and the derivative in `x` that `z` has. It may refuse to be differentiated.
      x: what is differentiated in.
      z: what is held; integers in it have no derivative.
    """
    return function(x, z)


@held.defjvp
def _held_jvp(function, move, primals, tangents):
    x, z = primals
    z = moving(move, x, z)
    return jax.jvp(lambda x: function(x, z), (x,), (tangents[0],))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def moving(move: Callable, x, z):
    """`z` with the derivative of `move(x, z)`, which is not computed before that derivative is taken."""
    return z


@moving.defjvp
def _moving_jvp(move, primals, tangents):
    x, z = primals
    z = moving(move, x, z)
    return z, jax.jvp(lambda x: move(x, z), (x,), (tangents[0],))[1]


# Moves


def refusing(message: str) -> Callable:
    """A move that raises `ValueError(message)`, where a second derivative is not known."""

    def move(x, z):
        raise ValueError(message)

    return move


def _as_units(z):
    return jax.tree.map(unit, z)


def stationary(value: Callable, onto: Callable = _as_units) -> Callable:
    """The move of a `z` that stays the stationary point of a scalar `value(x, onto(z))`, by the implicit function.

    The second derivative of this function in `z` is symmetric. Directions in which it vanishes are left out: those
    along which `onto` does not change, and those of values that coincide. Up to `_FEW_UNKNOWNS` unknowns are found by
    eigenvectors. Larger systems are solved by MINRES, and the derivative is NaN where that does not converge, which is
    where values nearly coincide.

    Args:
      value: real; the arrays of `z` may be complex.
      onto: the constraint of `z`, by default that every array is a unit vector.
    """

    @jax.custom_jvp
    def move(x, z):
        return onto(z)

    @move.defjvp
    def move_jvp(primals, tangents):
        x, z = primals
        start, rebuild = real_vector(z)

        def slope(x, vector):
            return jax.grad(lambda vector: value(x, onto(rebuild(vector))))(vector)

        def second(vector):
            return jax.jvp(functools.partial(slope, x), (start,), (vector,))[1]

        # The slope stays 0.
        change = jax.jvp(lambda x: slope(x, start), (x,), (tangents[0],))[1]
        return jax.jvp(lambda vector: onto(rebuild(vector)), (start,), (-_symmetric_solve(second, change),))

    return move


def is_inexact(leaf: jax.Array) -> bool:
    """Whether an array is real or complex floating (static)."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def real_vector(tree) -> tuple[Float[Array, " n"], Callable]:
    """The real and complex arrays of a tree as one real vector, and the function that rebuilds the tree from one."""
    leaves, structure = jax.tree.flatten(tree)
    are_parts = [is_inexact(leaf) for leaf in leaves]
    is_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]
    parts = [
        part
        for leaf, is_part, pair in zip(leaves, are_parts, is_complex, strict=True)
        if is_part
        for part in ((leaf.real, leaf.imag) if pair else (leaf,))
    ]

    def rebuild(vector):
        sizes = [part.size for part in parts]
        pieces = jnp.split(vector, [sum(sizes[:i]) for i in range(1, len(sizes))])
        shaped = (piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True))
        rebuilt = [
            (lax.complex(next(shaped), next(shaped)) if pair else next(shaped)) if is_part else leaf
            for leaf, is_part, pair in zip(leaves, are_parts, is_complex, strict=True)
        ]
        return jax.tree.unflatten(structure, rebuilt)

    return jnp.concatenate([part.reshape(-1) for part in parts]), rebuild


# Linear systems


def _symmetric_solve(matvec: Callable, rhs: Float[Array, " n"]):
    """`matvec^-1 rhs` of a symmetric system."""
    solve = _by_pseudo_inverse if rhs.size <= _FEW_UNKNOWNS else _by_minres
    return lax.custom_linear_solve(matvec, rhs, solve, symmetric=True)


def _by_pseudo_inverse(matvec: Callable, rhs: Float[Array, " n"]) -> Float[Array, " n"]:
    """The solution without a part along eigenvectors whose values are 0 to rounding."""
    columns = jax.vmap(matvec)(jnp.eye(rhs.size, dtype=rhs.dtype))
    # By an SVD: batches of `eigh` crash some hosts (docs/troubleshooting.md).
    return matmul(jnp.linalg.pinv(columns, rtol=vector_tolerance(rhs.dtype)), rhs)


def _by_minres(matvec: Callable, rhs: Float[Array, " n"]) -> Float[Array, " n"]:
    """The solution in the range of the system; NaN where the steps do not lead to it."""
    # The squares of very small or large numbers are no numbers of the dtype.
    direction, size = by_largest(rhs)
    _, scale = by_largest(matvec(direction))
    x, outside = minres(
        lambda vector: matvec(vector) / scale,
        direction,
        tolerance=system_tolerance(rhs.dtype),
        most_steps=max(_MINRES_STEPS, 2 * rhs.size),
    )
    return _accepted(matvec(x) / scale + outside, direction, x, jnp.nan) * (size / scale)


def gmres(matvec: Callable, rhs: Float[Array, " n"], *, otherwise) -> Float[Array, " n"]:
    """`matvec^-1 rhs` by GMRES, and `otherwise` where that does not converge."""
    x, _ = jax.scipy.sparse.linalg.gmres(matvec, rhs, tol=system_tolerance(rhs.dtype), **_GMRES)
    return _accepted(matvec(x), rhs, x, otherwise)


def _accepted(reached: Float[Array, " n"], rhs: Float[Array, " n"], x: Float[Array, " n"], otherwise):
    """The solution `x` where what it reaches is close to the right-hand side, else `otherwise`."""
    error = jnp.linalg.norm(reached - rhs)
    return jnp.where(error <= _ACCEPTED_RESIDUAL * jnp.linalg.norm(rhs), x, otherwise)

"""The tensor norm of a kernel, an upper bound of the spectral norm, by the higher-order power method.

The symbol is the kernel contracted with one wave per tap axis. The tensor norm lets any complex unit vector take the
place of a wave (Grishina, Gorbunov, Rakhuba 2024). The higher-order power method (De Lathauwer, De Moor, Vandewalle
2000) improves one vector at a time while it holds all others; each update is exact, so the value never falls. The
published method takes one step per vector and sweep. The method here takes two on the channels and two on the taps,
because a contraction with all taps costs more than they do, and runs several starts side by side. A matrix has a global
method (`leading_singular_vectors` in `_tools/lanczos.py`); a tensor of higher order has none.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from jaxsrn._tools.checks import Kernel, computed_form, static_int
from jaxsrn._tools.held import held, stationary
from jaxsrn._tools.indexing import picked, place_of_largest
from jaxsrn._tools.linalg import einsum, inner, unit
from jaxsrn._tools.programs import program
from jaxsrn._tools.subspaces import fixed_start
from jaxsrn.bounds.coefficients import matrix_norm, num_terms, smallest_over_covers
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.circular.fourier import complex_dtype

__all__ = [
    "tensor_norm",
]

# Steps on the channels, and on the taps, in each sweep. The contraction of the kernel with all taps costs as much as
# `taps` steps on the channels, so a second step is cheap. More steps would solve a part whose other vectors still move.
_CHANNEL_STEPS = 2
_TAP_STEPS = 2


def tensor_norm(kernel: Kernel, op: Operator, *, num_starts: int = 8, num_steps: int = 50) -> Float[Array, ""]:
    """TN, `sqrt(q) ||K||_sigma`, by the higher-order power method: an estimate from below of an upper bound.

    Grishina, Gorbunov, Rakhuba 2024: the spectral norm `||K||_sigma` of the kernel as a tensor, over **complex** unit
    vectors on every tap axis and both channel axes, satisfies

        ||K||_sigma <= sup_w ||S(w)|| <= sqrt(q) ||K||_sigma,       q = number of taps,

    so TN bounds the spectral norm at every image size, with circular and with zero padding. A strided layer is bounded
    by its polyphase kernel, whose taps are counted (and filled up with zeros) on each axis separately. A grouped layer
    takes its largest group. Dense layers and 1x1 kernels give the spectral norm itself.

    **Not a guarantee**: the power method can stop at a local maximum, where TN is too small and may even be below the
    spectral norm. Each start is a plane wave on the taps (the first one constant), so its value is at least what power
    steps reach at that frequency. Use `certified` where the bound must hold.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      num_starts: static; starts of the power method, the best of which counts.
      num_steps: static; the most sweeps over all vectors. They stop when no value grows by more than rounding.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one. The gradient is the outer product of the maximising
      vectors, held constant: finite always. It and the second derivative are exact where the sweeps have converged to
      an isolated maximum.

    Raises:
      ValueError: a kernel that does not fit, or fewer than one start or step.
    """
    kernel, op = computed_form(kernel, op)
    return _tensor_norm(kernel, op, static_int(num_starts, "num_starts"), static_int(num_steps, "num_steps"))


@functools.partial(program, static_argnums=(1, 2, 3), brief=True)
def _tensor_norm(kernel, op, num_starts, num_steps):
    def bound(tensor):
        if num_terms(tensor) == 1:
            return matrix_norm(tensor.reshape((-1, *tensor.shape[-2:])))
        vectors = jax.vmap(lambda one: _best_vectors(one, num_starts, num_steps))(lax.stop_gradient(tensor))
        values = jax.vmap(lambda one, vectors: held(_value, stationary(_value), one, vectors))(tensor, vectors)
        return math.sqrt(num_terms(tensor)) * jnp.max(values)

    return smallest_over_covers(bound, kernel, op)


def _value(tensor: Float[Array, "..."], vectors) -> Float[Array, ""]:
    """The real part of the inner product of the tensor with the outer product of a unit vector per axis."""
    *factors, row, column = vectors
    outer = einsum("q,i,o->qio", _outer([factor[None] for factor in factors])[0], row, column)
    return inner(jnp.real(outer).reshape(tensor.shape), tensor)


def _best_vectors(tensor: Float[Array, "..."], num_starts: int, num_steps: int) -> list[Complex[Array, " _"]]:
    """A unit vector per axis, with an outer product whose inner product with the tensor is the norm that is found."""
    terms, channels = tensor.shape[:-2], tensor.shape[-2:]
    flat = tensor.reshape((-1, *channels))
    waves = _plane_waves(terms, num_starts, tensor.dtype)
    # The start is drawn in float32 for every dtype, because the local maximum that it leads to depends on it.
    column = fixed_start((2, num_starts, channels[1]), jnp.float32).astype(tensor.dtype)
    column = jax.vmap(unit)(lax.complex(column[0], column[1]))

    def sweep(state):
        factors, column, _, values, count = state
        row, column = _channel_vectors(_on_taps(flat, _outer(factors)), column)
        on_channels = _on_channels(flat, row, column)
        factors = _tap_vectors(on_channels.reshape((-1, *terms)), factors)
        new = jnp.abs(jnp.sum(on_channels * _outer(factors), axis=-1))
        return factors, column, values, new, count + 1

    def unfinished(state):
        _, _, before, values, count = state
        # A growth of a few roundings is noise: the values are sums of many products.
        moves = values - before > 10 * jnp.finfo(values.dtype).eps * values
        return (count < num_steps) & ((count < 2) | jnp.any(moves))

    zeros = jnp.zeros(num_starts, tensor.dtype)
    factors, column, *_ = lax.while_loop(unfinished, sweep, (waves, column, zeros, zeros, jnp.asarray(0)))
    matrices = _on_taps(flat, _outer(factors))
    # The last step is one on the columns, so that the values are real: the real part of the tensor carries all of them.
    row, column = _channel_vectors(matrices, column)
    values = einsum("si,si->s", row, einsum("sio,so->si", matrices, column)).real
    factors, row, column = picked((factors, row, column), place_of_largest(values))
    return [*factors, row, column]


def _plane_waves(terms: tuple[int, ...], num_starts: int, dtype) -> list[Complex[Array, "starts _"]]:
    """One unit vector `exp(i w t)` per tap axis and start: frequency 0 first, then fixed random frequencies."""
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (num_starts, len(terms)))
    angles[0] = 0
    waves = (
        np.exp(1j * np.outer(angle, np.arange(k))) / math.sqrt(k) for angle, k in zip(angles.T, terms, strict=True)
    )
    return [jnp.asarray(wave, complex_dtype(dtype)) for wave in waves]


def _outer(factors: list[Complex[Array, "starts _"]]) -> Complex[Array, "starts taps"]:
    """The outer product of the axes' vectors, flat over all taps."""
    flat = factors[0]
    for factor in factors[1:]:
        flat = (flat[:, :, None] * factor[:, None, :]).reshape((flat.shape[0], -1))
    return flat


def _on_taps(flat: Float[Array, "taps rows columns"], taps: Complex[Array, "starts taps"]):
    """The matrices `sum_t taps_t C_t`. The kernel is real, so two real products do the work of a complex one."""
    parts = einsum("psq,qio->psio", jnp.stack([taps.real, taps.imag]), flat)
    return lax.complex(parts[0], parts[1])


def _on_channels(flat: Float[Array, "taps rows columns"], row, column) -> Complex[Array, "starts taps"]:
    """The value `sum_io C_tio u_i v_o` of each tap `t`, with `u` the row vector and `v` the column vector."""
    parts = einsum("qio,pso->psqi", flat, jnp.stack([column.real, column.imag]))
    return einsum("sqi,si->sq", lax.complex(parts[0], parts[1]), row)


def _channel_vectors(matrices: Complex[Array, "starts rows columns"], column: Complex[Array, "starts columns"]):
    """Power steps towards the unit vectors `(u, v)` that maximise `|sum_io A_io u_i v_o|`."""
    for _ in range(_CHANNEL_STEPS):
        row = jax.vmap(unit)(jnp.conj(einsum("sio,so->si", matrices, column)))
        column = jax.vmap(unit)(jnp.conj(einsum("sio,si->so", matrices, row)))
    return row, column


def _tap_vectors(values: Complex[Array, "..."], factors: list[Complex[Array, "starts _"]]):
    """Alternating steps, one axis at a time, towards the unit vectors that maximise `|sum_t A_t x_t1 y_t2 ...|`."""
    letters = "hwd"[: len(factors)]
    factors = list(factors)
    for _ in range(_TAP_STEPS if len(factors) > 1 else 1):
        for axis, letter in enumerate(letters):
            others = [(f"s{name}", factors[j]) for j, name in enumerate(letters) if j != axis]
            spec = ",".join([f"s{letters}", *(name for name, _ in others)]) + f"->s{letter}"
            factors[axis] = jax.vmap(unit)(jnp.conj(einsum(spec, values, *(factor for _, factor in others))))
    return factors

"""The tensor norm: the kernel as a tensor, its vectors on each axis free of each other (Grishina et al. 2024)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from jaxsrn._tools.checks import Kernel, kernel_array, static_int
from jaxsrn._tools.linalg import einsum, unit
from jaxsrn._tools.subspaces import random_start
from jaxsrn.bounds.coefficients import matrix_norm, num_terms, smallest_over_covers
from jaxsrn.operators.base import Operator
from jaxsrn.spectra.circular.fourier import complex_dtype

__all__ = [
    "tensor_norm",
]

# Power steps on the channels for each contraction with all taps, which costs as much as `taps` such steps.
_CHANNEL_STEPS = 2
_TAP_STEPS = 2


def tensor_norm(kernel: Kernel, op: Operator, *, num_starts: int = 8, num_steps: int = 50) -> Float[Array, ""]:
    """TN, `sqrt(q) ||K||_sigma`, by the higher-order power method: an estimate from below of an upper bound.

    Grishina, Gorbunov, Rakhuba 2024: the spectral norm `||K||_sigma` of the kernel as a tensor, over **complex** unit
    vectors on every tap axis and both channel axes, satisfies

        ||K||_sigma <= sup_w ||S(w)|| <= sqrt(q) ||K||_sigma,       q = number of taps,

    so TN bounds the spectral norm at every image size, with circular and with zero padding. Strides: of the polyphase
    kernel, whose taps are counted (and filled up with zeros) on each axis by itself. Groups: the largest. Dense layers
    and 1x1 kernels: the spectral norm itself.

    **Not a guarantee**: the power method can stop at a local maximum, where TN is too small and may even be below the
    spectral norm. Each start is a plane wave on the taps (the first one constant), so what it finds is at least what
    power steps find at that frequency. Use `certified` where the bound must hold.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      num_starts: static; the best one counts.
      num_steps: static; at most so many sweeps over all vectors. They stop where nothing changes any more.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one. The gradient is the outer product of the maximising
      vectors, held constant: finite always.

    Raises:
      ValueError: a kernel that does not fit, or fewer than one start or step.
    """
    kernel = kernel_array(kernel, op)
    return _tensor_norm(kernel, op, static_int(num_starts, "num_starts"), static_int(num_steps, "num_steps"))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _tensor_norm(kernel, op, num_starts, num_steps):
    def bound(tensor):
        if num_terms(tensor) == 1:
            return matrix_norm(tensor.reshape((-1, *tensor.shape[-2:])))
        outer = jax.vmap(lambda one: _rank_one(one, num_starts, num_steps))(lax.stop_gradient(tensor))
        return math.sqrt(num_terms(tensor)) * jnp.max(jnp.sum(outer * tensor, axis=range(1, tensor.ndim)))

    return smallest_over_covers(bound, kernel, op)


def _rank_one(tensor: Float[Array, "..."], num_starts: int, num_steps: int) -> Float[Array, "..."]:
    """The real part of the best rank-one tensor of norm 1 found: `sum(result * tensor)` is the tensor's norm."""
    terms, channels = tensor.shape[:-2], tensor.shape[-2:]
    flat = tensor.reshape((-1, *channels))
    waves = _plane_waves(terms, num_starts, tensor.dtype)
    right = random_start((2, num_starts, channels[1]), jnp.float32).astype(tensor.dtype)
    right = jax.vmap(unit)(lax.complex(right[0], right[1]))

    def sweep(state):
        factors, right, _, values, count = state
        left, right = _channel_vectors(_on_taps(flat, _outer(factors)), right)
        on_channels = _on_channels(flat, left, right)
        factors = _tap_vectors(on_channels.reshape((-1, *terms)), factors)
        new = jnp.abs(jnp.sum(on_channels * _outer(factors), axis=-1))
        return factors, right, values, new, count + 1

    def unfinished(state):
        _, _, before, values, count = state
        moves = values - before > 10 * jnp.finfo(values.dtype).eps * values
        return (count < num_steps) & ((count < 2) | jnp.any(moves))

    zeros = jnp.zeros(num_starts, tensor.dtype)
    factors, right, *_ = lax.while_loop(unfinished, sweep, (waves, right, zeros, zeros, jnp.asarray(0)))
    taps = _outer(factors)
    matrices = _on_taps(flat, taps)
    left, right = _channel_vectors(matrices, right)
    values = einsum("sio,si,so->s", matrices, left, right)
    best = jnp.argmax(jnp.abs(values))
    size = jnp.abs(values[best])
    turn = jnp.where(size == 0, 1.0, jnp.conj(values[best]) / jnp.where(size == 0, 1.0, size).astype(values.dtype))
    return jnp.real(einsum("q,i,o->qio", turn * taps[best], left[best], right[best])).reshape(tensor.shape)


def _plane_waves(terms: tuple[int, ...], num_starts: int, dtype) -> list[Complex[Array, "starts _"]]:
    """Unit vectors on the axes' taps: `exp(i w t)` at frequency 0, then at fixed random ones."""
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (num_starts, len(terms)))
    angles[0] = 0
    waves = (
        np.exp(1j * np.outer(angle, np.arange(k))) / math.sqrt(k) for angle, k in zip(angles.T, terms, strict=True)
    )
    return [jnp.asarray(wave, complex_dtype(dtype)) for wave in waves]


def _outer(factors: list[Complex[Array, "starts _"]]) -> Complex[Array, "starts taps"]:
    """The products of the axes' vectors, on all taps."""
    flat = factors[0]
    for factor in factors[1:]:
        flat = (flat[:, :, None] * factor[:, None, :]).reshape((flat.shape[0], -1))
    return flat


def _on_taps(flat: Float[Array, "taps rows columns"], taps: Complex[Array, "starts taps"]):
    """The matrices `sum_t taps_t C_t`; as products of real matrices, twice as fast as complex ones."""
    parts = einsum("psq,qio->psio", jnp.stack([taps.real, taps.imag]), flat)
    return lax.complex(parts[0], parts[1])


def _on_channels(flat: Float[Array, "taps rows columns"], left, right) -> Complex[Array, "starts taps"]:
    """The values `sum_io C_tio u_i v_o` on the taps."""
    parts = einsum("qio,pso->psqi", flat, jnp.stack([right.real, right.imag]))
    return einsum("sqi,si->sq", lax.complex(parts[0], parts[1]), left)


def _channel_vectors(matrices: Complex[Array, "starts rows columns"], right: Complex[Array, "starts columns"]):
    """Power steps towards the unit vectors of the largest `|sum_io A_io u_i v_o|`."""
    for _ in range(_CHANNEL_STEPS):
        left = jax.vmap(unit)(jnp.conj(einsum("sio,so->si", matrices, right)))
        right = jax.vmap(unit)(jnp.conj(einsum("sio,si->so", matrices, left)))
    return left, right


def _tap_vectors(values: Complex[Array, "..."], factors: list[Complex[Array, "starts _"]]):
    """Alternating steps towards the unit vectors of the largest `|sum_t A_t x_t1 y_t2 ...|`."""
    letters = "hwd"[: len(factors)]
    factors = list(factors)
    for _ in range(_TAP_STEPS if len(factors) > 1 else 1):
        for axis, letter in enumerate(letters):
            others = [(f"s{name}", factors[j]) for j, name in enumerate(letters) if j != axis]
            spec = ",".join([f"s{letters}", *(name for name, _ in others)]) + f"->s{letter}"
            factors[axis] = jax.vmap(unit)(jnp.conj(einsum(spec, values, *(factor for _, factor in others))))
    return factors

"""Bounds of the spectral norm that read the kernel as a tensor or as a matrix, and never look at the image.

The symbol of every layer, strided ones after the polyphase split, is `S(w) = sum_t exp(-i <w, t>) C_t` over a box of
terms `t`; its supremum over all `w` bounds the layer at every image size, circular or zero-padded. `exp(-i <w, t>)`
is a product of one unimodular factor per axis. Letting other vectors of the same length take its place gives the
tensor norm, and forgetting more of its structure the norms of reshapings: each is larger than the one before.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from jaxsrn._tools.checks import Kernel, float_dtype, kernel_array, static_int
from jaxsrn._tools.linalg import einsum, matmul, safe_sqrt, top_pairs, unit
from jaxsrn._tools.subspaces import default_tolerance, leading_singular_vectors, random_start
from jaxsrn.bounds.covers import NormInterval, covers, widened
from jaxsrn.operators.maps import CircularConv, Dense, Operator
from jaxsrn.spectra import pairs as _pairs
from jaxsrn.spectra.circular import fourier as _fourier
from jaxsrn.spectra.leading import leading

__all__ = ["channel_l1", "fantastic_four", "l1", "lip_bound", "tensor_norm"]

# Of matrices whose smaller side is at most this an SVD is as fast as Lanczos, and quicker to compile.
_SVD_SIDE = 64
# Power steps on the channels for each contraction with all taps, which costs as much as `taps` such steps.
_CHANNEL_STEPS = 2
_TAP_STEPS = 2


def _tensors(kernel: Float[Array, "..."], op: Operator) -> list[Float[Array, "..."]]:
    """The coefficients `(groups, *terms, rows, columns)` of symbols whose suprema bound the layer."""
    if isinstance(op, Dense):
        return [kernel[None]]
    return [_tensor(k, cover) for k, cover in covers(kernel, op, False)]


def _tensor(kernel: Float[Array, "..."], op: CircularConv) -> Float[Array, "..."]:
    coefficients, _ = _fourier.polynomial(kernel, op)
    terms = [len(exponents) for exponents in _fourier.axis_exponents(op, kernel.shape)]
    return coefficients.reshape((coefficients.shape[0], *terms, *coefficients.shape[-2:]))


def _num_terms(tensor: Float[Array, "..."]) -> int:
    return math.prod(tensor.shape[1:-2])


def _smallest(bound, kernel: Float[Array, "..."], op: Operator, *, guaranteed: bool = False) -> Float[Array, ""]:
    """The smallest of the bounds by the tensors of a layer; where `guaranteed`, with room for rounding."""
    kernel, scale = _pairs.rescaled(kernel.astype(float_dtype(kernel.dtype)), op)
    value = functools.reduce(jnp.minimum, [bound(tensor) for tensor in _tensors(kernel, op)])
    if guaranteed:
        value = widened(NormInterval(value, value), kernel, may_cancel=False).upper
    return value * scale


# Norms of real matrices


def _leading_vectors(matrix: Float[Array, "rows columns"], num_steps: int | None):
    """The leading singular vectors `(u, v)`: by an SVD or Lanczos, or so many steps of the power method."""
    # The same numbers in every dtype: what few steps find depends on them.
    start = random_start((matrix.shape[1],), jnp.float32).astype(matrix.dtype)
    if num_steps is not None:

        def step(_, pair):
            left = unit(matmul(matrix, pair[1]))
            return left, unit(matmul(left, matrix))

        return lax.fori_loop(0, num_steps, step, (jnp.zeros(matrix.shape[0], matrix.dtype), unit(start)))
    if min(matrix.shape) <= _SVD_SIDE:
        _, left, right = top_pairs(matrix[None])
        return left[0], right[0]
    tolerance = default_tolerance(matrix.dtype)
    _, left, right, _ = leading_singular_vectors(
        lambda x: matmul(matrix, x), lambda y: matmul(y, matrix), start, matrix.shape[0], tolerance
    )
    return unit(left), unit(right)


def _matrix_norm(matrices: Float[Array, "groups rows columns"], num_steps: int | None = None) -> Float[Array, ""]:
    """The largest spectral norm of a stack of matrices, its vectors held constant."""
    left, right = jax.vmap(lambda matrix: _leading_vectors(matrix, num_steps))(lax.stop_gradient(matrices))
    return _largest_form(left, matrices, right)


def _largest_form(left, matrices: Float[Array, "groups rows columns"], right) -> Float[Array, ""]:
    """The largest `u^T A v` of a stack."""
    return jnp.max(einsum("gi,gio,go->g", left, matrices, right))


# The tensor norm


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
        if _num_terms(tensor) == 1:
            return _matrix_norm(tensor.reshape((-1, *tensor.shape[-2:])))
        outer = jax.vmap(lambda one: _rank_one(one, num_starts, num_steps))(lax.stop_gradient(tensor))
        return math.sqrt(_num_terms(tensor)) * jnp.max(jnp.sum(outer * tensor, axis=range(1, tensor.ndim)))

    return _smallest(bound, kernel, op)


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
    return [jnp.asarray(wave, _fourier.complex_dtype(dtype)) for wave in waves]


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


# Norms of reshapings


def fantastic_four(kernel: Kernel, op: Operator, *, num_steps: int | None = None) -> Float[Array, ""]:
    """F4, `sqrt(q)` times the smallest spectral norm of the kernel's reshapings to a matrix: an upper bound.

    Singla, Feizi 2021: for two axes the four matrices `c_in x c_out h w`, `c_in h x c_out w`, `c_in w x c_out h` and
    `c_in h w x c_out`; in general `2^axes`. It bounds the spectral norm at every image size, with circular and with
    zero padding, and is never below the exact tensor norm. Strides: of the polyphase kernel. Groups: the largest.
    Dense layers and 1x1 kernels: the spectral norm itself.

    By default the norms are computed to rounding, by SVDs or Lanczos, and the bound is **guaranteed** as far as
    Lanczos from a random start is. With `num_steps` they come from so many steps of the power method, as published:
    then it is an **estimate from below** of the bound, which can be below the spectral norm.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      num_steps: static; power steps, or `None` for converged norms.

    Returns:
      A scalar in float32 or wider; NaN where the kernel has one. The gradient is the outer product of the singular
      vectors of the smallest matrix norm, held constant: finite always.

    Raises:
      ValueError: a kernel that does not fit, or fewer than one step.
    """
    kernel = kernel_array(kernel, op)
    return _fantastic_four(kernel, op, num_steps if num_steps is None else static_int(num_steps, "num_steps"))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fantastic_four(kernel, op, num_steps):
    def bound(tensor):
        norms = [_matrix_norm(matrix, num_steps) for matrix in _reshapings(tensor)]
        return math.sqrt(_num_terms(tensor)) * functools.reduce(jnp.minimum, norms)

    return _smallest(bound, kernel, op)


def _reshapings(tensor: Float[Array, "..."]) -> list[Float[Array, "groups rows columns"]]:
    """All matrices with the rows and some axes of the taps on one side, the columns and the others on the other."""
    *taps, rows, columns = range(1, tensor.ndim)
    # An axis of one tap is on both sides at once.
    axes = [axis for axis in taps if tensor.shape[axis] > 1]
    single = [axis for axis in taps if tensor.shape[axis] == 1]
    matrices = []
    for chosen in itertools.product((True, False), repeat=len(axes)):
        with_rows = [axis for axis, is_chosen in zip(axes, chosen, strict=True) if is_chosen]
        others = [axis for axis in axes if axis not in with_rows]
        order = (0, *single, *with_rows, rows, *others, columns)
        height = math.prod(tensor.shape[axis] for axis in [*with_rows, rows])
        matrices.append(tensor.transpose(order).reshape((tensor.shape[0], height, -1)))
    return matrices


# Frobenius norms of the symbol


def lip_bound(kernel: Kernel, op: Operator, *, oversampling: int = 8) -> Float[Array, ""]:
    """LipBound, the largest Frobenius norm of the symbol, from a grid: a guaranteed upper bound of the spectral norm.

    Araujo et al. 2021, as in their code: `max_w ||S(w)||_F` over a grid of `m` angles per axis, over `1 - d / m` (two
    axes of degree `d`; in general the product over the axes of `sqrt(1 - d_j / m_j)`), bounds all frequencies, hence
    every image size, circular or zero-padded. It exceeds the norm by up to the root of the number of channels. The
    factor is sufficient where `m >= 2 d`, as here; that of `certified` is smaller. Zero padding: of the circular
    layers that cover it. The cost does not depend on the channels but for one Gram matrix of the taps.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.
      oversampling: static; angles per degree and axis of the grid, at least 2.

    Returns:
      A scalar in float32 or wider, differentiable (finite also at zero); NaN where the kernel has one.

    Raises:
      ValueError: a kernel that does not fit, or an oversampling below 2.
    """
    kernel = kernel_array(kernel, op)
    return _lip_bound(kernel, op, static_int(oversampling, "oversampling", 2))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _lip_bound(kernel, op, oversampling):
    def bound(tensor):
        terms = tensor.shape[1:-2]
        flat = tensor.reshape((tensor.shape[0], _num_terms(tensor), -1))
        gram = einsum("gqc,gpc->gqp", flat, flat)
        sizes = [oversampling * max(k - 1, 1) for k in terms]
        rows = [_fourier.axis_waves(m, np.arange(k)) for m, k in zip(sizes, terms, strict=True)]
        waves = jnp.asarray(functools.reduce(np.kron, rows, np.ones((1, 1))), _fourier.complex_dtype(gram.dtype))
        squares = einsum("wq,gqp,wp->gw", waves, gram.astype(waves.dtype), jnp.conj(waves))
        factor = math.prod(math.sqrt(1 - (k - 1) / m) for m, k in zip(sizes, terms, strict=True))
        return safe_sqrt(jnp.max(jnp.real(squares))) / factor

    return _smallest(bound, kernel, op, guaranteed=True)


# Sums of absolute values


def l1(kernel: Kernel, op: Operator) -> Float[Array, ""]:
    """`sum |K|` over the taps that meet the image: a guaranteed upper bound of the norm, the loosest and cheapest.

    Sedghi, Gupta, Long 2019, Proposition 6 (one channel) and the right end of Proposition 11 (several). Equal to the
    norm of a circular convolution with one channel, stride 1 and a non-negative kernel (Proposition 7); never below
    `channel_l1`.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A scalar in float32 or wider, widened for rounding; NaN where the kernel has one. The gradient is the sign.

    Raises:
      ValueError: a kernel that does not fit.
    """
    return _l1(kernel_array(kernel, op), op)


@jax.jit
def _l1(kernel, op):
    return _smallest(lambda tensor: jnp.sum(jnp.abs(tensor)), kernel, op, guaranteed=True)


def channel_l1(kernel: Kernel, op: Operator) -> Float[Array, ""]:
    """`||B||_2` of the channel matrix `B_cd = sum_p |K_cdp|`: a guaranteed upper bound of the spectral norm.

    Instead of Proposition 11 of Sedghi, Gupta, Long 2019, whose middle term `sqrt(sum_c max_d B_cd^2)` is no bound: a
    1x1 kernel that is the 2x2 matrix of ones has norm 2, the formula gives 1.414. Every entry of `S(w)` is at most
    that of `B`, so `||S(w)|| <= ||B||_2`, and

        ||B||_2 <= sqrt(||B||_1 ||B||_inf),     ||B||_2 <= ||B||_F <= sum |K| = l1.

    For one channel it is Proposition 6. It is the norm where all entries are non-negative (circular, stride 1).
    Strides: `B` of the polyphase kernel. Groups: the largest. Dense layers: the norm of `|K|`.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator.

    Returns:
      A scalar in float32 or wider, widened for rounding; NaN where the kernel has one. The gradient holds the singular
      vectors of `B` constant: finite always.

    Raises:
      ValueError: a kernel that does not fit.
    """
    return _channel_l1(kernel_array(kernel, op), op)


@jax.jit
def _channel_l1(kernel, op):
    def bound(tensor):
        matrices = jnp.sum(jnp.abs(tensor), axis=range(1, tensor.ndim - 2))
        # With a proof, as a bound must not be found from below.
        pairs = jax.vmap(lambda matrix: leading(matrix, Dense()))(lax.stop_gradient(matrices))
        return _largest_form(pairs.right, matrices, pairs.left)

    return _smallest(bound, kernel, op, guaranteed=True)

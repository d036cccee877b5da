"""The probabilistic interval: two numbers that hold the norm between them unless a random vector is very unlucky.

The Lanczos method never finds more than the norm. It finds much less only where its start has nearly no part along the
leading singular vector. For a random start the probability of that is known, whatever the map is (Kuczynski,
Wozniakowski 1992, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start").

Let `A = T^T T` have the eigenvalues `l_i`, and let `w_i` be the squared part of the unit start along the eigenvectors
of `l_i`. The steps of the method are the recurrence of polynomials `p_0, ..., p_k` of degrees 0 to `k` that are
orthonormal in the measure with the masses `w_i` at `l_i`. No such mass exceeds `1 / sum_j p_j(l_i)^2`, the Christoffel
function. So where the leading mass is at least `d^2`, the leading eigenvalue `l` has `sum_j p_j(l)^2 <= 1 / d^2`. The
sum grows above the largest root of `p_k`, so that this is an upper bound of `l`. Hochstenbach 2013, "Probabilistic
upper bounds for the matrix two-norm", takes the last term alone, `p_k(l) = 1 / d`, which gives a larger bound.

The sum is at least the square of any polynomial of degree `k` whose size on `[0, l]` is at most 1. Chebyshev's says how
many steps reach a given resolution, before any is taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsrn._tools.checks import Kernel, computed_form, ensure, static_share
from jaxsrn._tools.linalg import ratio, unit
from jaxsrn._tools.loops import one_by_one
from jaxsrn._tools.programs import program
from jaxsrn.bounds.covers import NormInterval, widened
from jaxsrn.operators.base import Operator
from jaxsrn.operators.unbounded import UnboundedConv
from jaxsrn.spectra.image_pairs import flat_products
from jaxsrn.spectra.ranks import squared_frobenius_norm
from jaxsrn.spectra.singular_pair import rescaled

__all__ = ["probabilistic"]

# More halvings of an interval than float64 has digits.
_HALVINGS = 60


def probabilistic(
    kernel: Kernel, op: Operator, *, key: jax.Array, resolution: float = 0.01, failure: float = 1e-9
) -> NormInterval:
    """An interval that holds the spectral norm of `T(kernel)` with a probability of at least `1 - failure`.

    It is the interval for large layers with zero padding, whose `certified` one holds without exception but is wide on
    small images. It takes a fixed number of Lanczos steps from a random start, each a product with the layer and one
    with its adjoint: 97 with the defaults and 200,000 inputs, in proportion to `1 / sqrt(resolution)`. The lower end is
    a value that the map attains. The upper end fails only where the start is nearly orthogonal to the leading singular
    vector, and the probability of that does not depend on the kernel. Whatever the start is, the upper end exceeds the
    norm by at most `resolution` and the room for rounding. As a rule it is far closer, since the guarantee is for the
    worst spectrum. The room grows with the steps: in float32 a resolution below 2e-4 makes the interval wider.

    The bound is that of Hochstenbach 2013 ("Probabilistic upper bounds for the matrix two-norm") with the whole
    Christoffel function in place of its last term, which makes it smaller.

    Both ends are widened for rounding. Equal keys give equal intervals. Two intervals with the same key do not fail
    independently.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      op: its operator, one with an image.
      key: a key of `jax.random` that the kernel does not depend on.
      resolution: static; by what share the upper end may exceed the norm.
      failure: static; the probability that the upper end is allowed to be below the norm.

    Returns:
      A `NormInterval` in float32 or wider; NaN where the kernel has one. It is a constant for derivatives.

    Raises:
      ValueError: a kernel that does not fit, an `UnboundedConv`, which `certified` takes, a key that is none or a
        batch of keys, for which there is `jax.vmap`, or a resolution or failure outside (0, 1].

    Examples:
      >>> import jax
      >>> from jaxsrn import ZeroPaddedConv, bounds
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 64, 64))
      >>> lower, upper = bounds.probabilistic(kernel, ZeroPaddedConv((8, 8)), key=jax.random.key(1))
      >>> bool(lower < upper < 1.01 * lower)
      True
    """
    kernel, op = computed_form(kernel, op)
    ensure(
        not isinstance(op, UnboundedConv),
        f"op: got {op!r}, expected an operator with an image; bounds.certified takes one without.",
    )
    is_key = isinstance(key, jax.Array) and key.ndim == (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)
    ensure(
        is_key,
        f"key: got {jnp.shape(key) if hasattr(key, 'shape') else key!r}, expected one key, such as jax.random.key(0); "
        "use jax.vmap over several.",
    )
    resolution, failure = static_share(resolution, "resolution"), static_share(failure, "failure")
    return _probabilistic(lax.stop_gradient(kernel), key, op, resolution, failure)


@functools.partial(program, static_argnums=(2, 3, 4))
@functools.partial(one_by_one, static_argnums=(2, 3, 4))
def _probabilistic(kernel, key, op: Operator, resolution: float, failure: float) -> NormInterval:
    kernel, scale = rescaled(kernel, op)
    matvec, rmatvec, size, _ = flat_products(kernel, op)
    start = unit(jax.random.normal(key, (size,), kernel.dtype))
    # The density of a coordinate of a random unit vector is at most `sqrt(size / (2 pi))`.
    smallest_part = min(failure * math.sqrt(math.pi / (2 * size)), 1.0)
    num_steps = _num_steps(smallest_part, resolution)
    recurrence = _lanczos(lambda x: rmatvec(matvec(x)), start, num_steps)
    # The leading eigenvalue is at least any Rayleigh quotient, and at most the trace.
    within = recurrence.diagonal[0], squared_frobenius_norm(kernel, op)
    lower, _ = _halved(recurrence, -jnp.inf, *within)
    _, upper = _halved(recurrence, -2 * math.log(smallest_part), *within)
    # Beside the rounding of the products each step has its own, and these add up.
    slack = num_steps * float(jnp.finfo(kernel.dtype).eps)
    interval = NormInterval(jnp.sqrt(lower) * (1 - slack), jnp.sqrt(upper) * (1 + slack))
    wide = widened(interval, kernel, op)
    return NormInterval(wide.lower * scale, wide.upper * scale)


def _num_steps(smallest_part: float, resolution: float) -> int:
    """Steps after which the upper end exceeds the norm by at most the resolution, whatever the start is (static)."""
    # Chebyshev's polynomial of degree `k` for `[0, 1]` is `cosh(2 k asinh(sqrt(x)))` at `1 + x`.
    excess = (1 + resolution) ** 2 - 1
    return max(1, math.ceil(math.acosh(1 / smallest_part) / (2 * math.asinh(math.sqrt(excess)))))


class _Recurrence(NamedTuple):
    """`coupling_j p_(j+1)(x) = (x - diagonal_j) p_j(x) - coupling_(j-1) p_(j-1)(x)`."""

    diagonal: Float[Array, " steps"]
    coupling: Float[Array, " steps"]


def _lanczos(gram: Callable, start: Float[Array, " n"], num_steps: int) -> _Recurrence:
    """The recurrence of a unit start.

    No basis is kept, and in the end the vectors are not orthogonal to those long before. The coefficients are then
    those of a map with more eigenvalues, in tight clusters around the ones of this map, and a cluster has the mass of
    the one eigenvalue (Greenbaum 1989, "Behavior of slightly perturbed Lanczos and conjugate-gradient recurrences").
    """

    def step(state, _):
        before, vector, coupling = state
        image = gram(vector) - coupling * before
        own = jnp.sum(vector * image)
        rest = image - own * vector
        coupling = jnp.linalg.norm(rest)
        return (vector, ratio(rest, coupling), coupling), _Recurrence(own, coupling)

    return lax.scan(step, (jnp.zeros_like(start), start, jnp.zeros_like(start[0])), length=num_steps)[1]


def _log_sum(recurrence: _Recurrence, x: Float[Array, ""]) -> Float[Array, ""]:
    """The logarithm of `sum_j p_j(x)^2` above the largest root of all `p_j`, and minus infinity elsewhere."""

    def step(state, row):
        diagonal, coupling, coupling_before = row
        quotient, log, log_sum = state
        # The quotients `p_(j+1) / p_j` neither overflow nor vanish, and all are positive above the largest root alone.
        quotient = (x - diagonal - coupling_before / quotient) / coupling
        log = jnp.where(quotient > 0, log + jnp.log(quotient), jnp.nan)
        return (quotient, log, jnp.logaddexp(log_sum, 2 * log)), None

    rows = *recurrence, jnp.pad(recurrence.coupling[:-1], (1, 0))
    nothing = jnp.zeros_like(x)
    (_, _, log_sum), _ = lax.scan(step, (jnp.ones_like(x), nothing, nothing), rows)
    return jnp.where(jnp.isnan(log_sum), -jnp.inf, log_sum)


def _halved(recurrence: _Recurrence, log_limit: float, low: Float[Array, ""], high: Float[Array, ""]):
    """Two neighbouring numbers of `[low, high]`: the sum of the recurrence exceeds the limit at the larger one."""

    def halve(_, ends):
        middle = jnp.sqrt(ends[0] * ends[1])
        exceeds = _log_sum(recurrence, middle) > log_limit
        return jnp.where(exceeds, ends[0], middle), jnp.where(exceeds, middle, ends[1])

    return lax.fori_loop(0, _HALVINGS, halve, (low, high))

"""`srnc_step`: stable rank normalization while the kernel changes, one cheap pass a training step.

The leading pair of the normalized kernel is carried from one step to the next in a state (`state.py`), as spectral
normalization carries its vectors, and takes a power step each time (Sanyal et al. 2020, Algorithm 2, for matrices).
`srnc` iterates to the end instead, from several starts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxsrn._tools.checks import Kernel, check_choice, ensure, static_int
from jaxsrn._tools.programs import program
from jaxsrn._tools.tolerances import MAX_PASSES
from jaxsrn.normalization.implicit import moving_pair, normalized_holding_pair
from jaxsrn.normalization.normalized import is_only_rescaled, normalized
from jaxsrn.normalization.training.passes import followed
from jaxsrn.normalization.training.start import checked, follows_own
from jaxsrn.normalization.training.state import SRNCState, as_floats, of_floats
from jaxsrn.normalization.training.tracking import track_shapes
from jaxsrn.operators.base import Operator
from jaxsrn.operators.convolutions import ZeroPaddedConv
from jaxsrn.spectra.common_shapes import as_matrix
from jaxsrn.spectra.moving_pairs import pair_value
from jaxsrn.spectra.singular_pair import idle_taps, rescaled

__all__ = [
    "check_gradient",
    "srnc_step",
]

_GRADIENTS = ("frozen", "implicit")
# Power steps, except with zero padding and a target where the kernel's own norm is not followed: there each takes
# several products with images. For the norm alone the leading singular values may lie close together, and one step
# lags.
_SEVERAL_STEPS = 2


def srnc_step(
    kernel: Kernel,
    state: SRNCState,
    op: Operator,
    target,
    *,
    norm=1.0,
    cap: bool = False,
    gradient: str = "frozen",
    num_steps: int | None = None,
) -> tuple[Kernel, SRNCState]:
    """Stable rank normalization in training: `(normalized kernel, new state)`, at the cost of a few images.

    A warm power step leads from the pair of the state to a pair `(u, v)`. The result is the kernel closest to `kernel`
    with `||T(K)||_F^2 = target * norm^2` and `<v, T(K) u> = norm`, by the closed form of `srnc`. Both constraints hold
    where the pair is the leading one of the result, and the pair follows the kernel as that changes. A kernel whose own
    stable rank is not above the target is only rescaled to the norm. Where the pair allows no such kernel (an
    infeasible target), the result has the lowest stable rank for that pair.

    Dense layers, and convolutions without edges whose kernel has one tap, take Algorithm 2 of Sanyal, Torr, Dokania
    2020, with two power steps for its one. Any other layer takes passes of the iteration of `srnc` for Zheng et al.
    2025, eq. 7: two, or with zero padding one unless another pair takes over. Its power step is one on the kernel
    normalized with the stored pair, and its state also has vectors that may overtake that pair. The steps of circular
    and unbounded layers need no image. Without a target every layer takes two power steps, and the state of dense
    layers has such vectors too.

    Problem (7) is not convex, and the step follows a local solution. Where the kernel's own stable rank falls just
    below the target, a result that meets both constraints may stay for a while although the kernel itself would do. The
    function is pure and has no randomness: a caller that keeps the old state has only read it.

    A state may be far from its kernel: of other weights, which were loaded since, or an average of states. The step
    sees that by the singular value that its first pass finds, which is then more than 5% above what the state knew of.
    It goes on with passes until one raises the value by less than 1e-5, up to 500. The constraints hold at the pair
    that it ends with. After a jump to an unrelated kernel that may not be the leading pair yet, and then the norm is
    larger than asked for, for one or several steps. `srnc_state` starts anew.

    Args:
      kernel: `(c_in, c_out)` or `(*taps, c_in // groups, c_out)`.
      state: from `srnc_state`, with the same `op`, `norm` and `cap`, or from the last step.
      op: its operator.
      target: the stable rank; traced. `None` normalizes the norm alone, which allows aliased taps.
      norm: the spectral norm of the result; traced, so that it can be learned. `None` keeps the kernel's own.
      cap: static. Whether the norm is only reduced, to the smaller of `norm` and the kernel's own. With a cap, or with
        `norm=None`, a kernel that meets norm and target is returned as it is, with the derivative of the identity, so
        that zero kernels train.
      gradient: static. `"frozen"` holds the singular vectors constant, as every spectral normalization does: it is
        exact for the norm, and for the kernel it leaves out how the vectors turn. `"implicit"` is the derivative of the
        converged step by the implicit function theorem. It takes a linear system in the vectors, each product a further
        power step, and is the frozen one where that system is singular (the two leading values meet). A second
        derivative is that of the gradient that was asked for, of the converged step. With `"implicit"`, and without a
        target, it is the true one; with `"frozen"` and a target it is not symmetric, and NaN where that system is
        singular.
      num_steps: static. Power steps of the pair before the kernel is normalized with it. The default is one with zero
        padding and a target if the kernel's own norm need not be followed (`norm` is a number and `cap` is `False`),
        because each takes products with images. Otherwise it is two. More follow where the state is far from the
        kernel. A number that is given is kept to, except that one step is followed by a second one where another pair
        takes over.

    Returns:
      The kernel in its dtype, with taps that meet no sample as they were, and the new state. Derivatives go through the
      kernel, `target` and `norm`; the state is constant.

    Raises:
      ValueError: a kernel, target, norm, gradient or number of steps that does not fit; a state of another layer;
        aliased taps.

    Examples:
      A kernel that an optimizer moves, held at norm 1 and stable rank 50:

      >>> import jax, jaxsrn
      >>> kernel, op = jax.random.normal(jax.random.key(0), (3, 3, 4, 8)), jaxsrn.ZeroPaddedConv((8, 8))
      >>> state = jaxsrn.srnc_state(kernel, op, 50.0)
      >>> for key in jax.random.split(jax.random.key(1), 5):
      ...     kernel += 0.01 * jax.random.normal(key, kernel.shape)
      ...     normalized, state = jaxsrn.srnc_step(kernel, state, op, 50.0)
      >>> print(f"{jaxsrn.spectral_norm(normalized, op):.2f} {jaxsrn.stable_rank(normalized, op):.1f}")
      1.00 50.0
    """
    kernel, target, norm = checked(kernel, op, target, norm, cap)
    shape = kernel.shape
    kernel, op = as_matrix(kernel, op)
    check_gradient(gradient)
    needs_own = follows_own(op, target, norm, cap)
    few = target is not None and not needs_own and isinstance(op, ZeroPaddedConv)
    least, most = (1 if few else _SEVERAL_STEPS, MAX_PASSES) if num_steps is None else (num_steps, num_steps)
    steps = static_int(least, "num_steps"), static_int(most, "num_steps")
    own = track_shapes(op, kernel.shape, True) if needs_own else None
    expected = SRNCState(track_shapes(op, kernel.shape, target is None), own)
    ensure(
        jax.tree.map(jnp.shape, state) == expected,
        f"state: it does not fit a kernel of shape {kernel.shape} with {op}, {norm=}, {cap=}; take it from "
        "srnc_state with the same arguments.",
    )
    stepped, state = _srnc_step(kernel, state, op, target, norm, bool(cap), gradient, steps)
    return stepped.reshape(shape), state


def check_gradient(gradient: str) -> None:
    """Raises `ValueError` unless `gradient` is the name of one."""
    check_choice(gradient, "gradient", _GRADIENTS)


@functools.partial(program, static_argnums=(5, 6, 7))
def _srnc_step(kernel, state, op, target, norm, cap, gradient, steps):
    a, scale = rescaled(kernel, op)
    fixed, known, state = lax.stop_gradient((a, target, of_floats(state, op, kernel.shape, a.dtype)))

    # The power step comes first, on this kernel: the stored pair is that of the kernel before the optimizer's step.
    track, own = state = followed(fixed, op, known, state, steps)
    # Where the norm alone is asked for, the frozen gradient is the true one.
    pair = track.pair if gradient == "frozen" or target is None else moving_pair(a, op, target, track.pair)
    unchanged = jnp.asarray(idle_taps(op, kernel.shape))
    is_used = jnp.asarray(True)
    if norm is None or cap:
        own_norm = scale * pair_value(a, op, (own or track).pair)
        norm = own_norm if norm is None else jnp.minimum(norm, own_norm)
        # Where the normalized kernel is not used, the map is the identity. The product below has the same value there,
        # but no derivative at a zero kernel, where both of its factors vanish.
        is_used = ~(is_only_rescaled(a, op, target, pair) & (own_norm <= norm))
        unchanged |= ~is_used
    # The solution is proportional to the norm and does not depend on the scale of the kernel.
    if gradient == "frozen":
        unit_kernel = normalized_holding_pair(a, op, target, pair, is_used)
    else:
        unit_kernel = normalized(a, op, target, pair)
    normalized_kernel = jnp.where(unchanged, kernel, (norm * unit_kernel).astype(kernel.dtype))
    return normalized_kernel, as_floats(state, op, fixed)

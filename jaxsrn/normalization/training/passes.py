"""Passes: how a state follows a kernel, in a training step and where it starts."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsrn.normalization.normalized import normalized
from jaxsrn.normalization.training.state import SRNCState, without_pair_of_zero
from jaxsrn.normalization.training.tracking import follow
from jaxsrn.operators.base import Operator

__all__ = ["followed"]

# A pass that raises the largest value by this share says that the state knows little of the kernel, whose weights were
# loaded or moved far. Then passes go on until one raises it by less than the second share.
_FAR, _AT_REST = 0.05, 1e-5


class _Passes(NamedTuple):
    """The passes of a step so far; whether another pair took over in the last, and whether the state is still far."""

    count: Int[Array, ""]
    turned: Bool[Array, ""]
    far: Bool[Array, ""]
    state: SRNCState


def followed(a: Float[Array, "..."], op: Operator, target, state: SRNCState, steps: tuple[int, int]) -> SRNCState:
    """The state after steps of its tracks: on the kernel normalized with the pair of the first, and on the kernel.

    `steps` are the least and the most of them. More than the least follow where the state is far from the kernel, until
    it is at rest.
    """
    least, most = steps
    # Without a target, and for matrices, the normalized kernel has the same pairs as the kernel itself.
    keeps_pairs = target is None or op._normalization_keeps_pairs

    def one_pass(passes: _Passes) -> _Passes:
        track, own = passes.state
        kernel = a if keeps_pairs else normalized(a, op, target, track.pair)
        turn = passes.count if most > 1 else None
        track, step = follow(kernel, op, track, turn)
        # The closed form gives the value 1 to the pair with which it was made.
        rise, turned = _rise(step.before if keeps_pairs else 1.0, step.after), step.turned
        if own is not None:
            own, step_of_own = follow(a, op, own, turn)
            rise = jnp.maximum(rise, _rise(step_of_own.before, step_of_own.after))
            turned |= step_of_own.turned
        far = rise > jnp.where(passes.far, _AT_REST, _FAR)
        return _Passes(passes.count + 1, turned, far, SRNCState(track, own))

    def unfinished(passes: _Passes):
        # Where another pair takes over, the kernel normalized with that pair is another one, which no step has seen.
        enough = least if least > 1 else jnp.where(passes.turned, 2, least)
        return passes.count < (jnp.where(passes.far, most, enough) if most > 1 else enough)

    no = jnp.asarray(False)
    state = lax.while_loop(unfinished, one_pass, _Passes(jnp.asarray(0, jnp.int32), no, no, state)).state
    return state if target is None else state._replace(normalized=without_pair_of_zero(a, state.normalized))


def _rise(before, after):
    """By which share a singular value that a pass found is larger than before, for kernels in the scale of `rescaled`.

    Their norm is about 1 or larger, so that a value below 1 stands for 1; else rounding would rise in zero kernels.
    """
    return (after - before) / jnp.maximum(after, 1.0)

"""`while_loop`: a loop whose parts are compiled one by one where it is called eagerly."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.core
from jax import lax

__all__ = ["while_loop"]


def while_loop(unfinished: Callable, step: Callable, state):
    """`lax.while_loop(unfinished, step, state)`, as a loop of Python where all values are concrete.

    The programs that a step is made of are then the same as in other eager calls. In one loop of one program all of
    them would be compiled again. Every step waits for its result.
    """
    while not _is_traced(state):
        if not unfinished(state):
            return state
        following = step(state)
        # Then something else that the step refers to is traced.
        if _is_traced(following):
            break
        state = following
    return lax.while_loop(unfinished, step, state)


def _is_traced(tree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))

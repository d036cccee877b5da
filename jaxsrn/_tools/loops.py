"""Loops: `while_loop`, whose parts are compiled one by one where it is called eagerly, and batches one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.core
from jax import lax

__all__ = ["is_traced", "one_by_one", "while_loop"]

# Elements with fewer numbers are computed side by side: large batches of them take less than a loop over them.
_WORTH_A_LOOP = 2**9


def while_loop(unfinished: Callable, step: Callable, state):
    """`lax.while_loop(unfinished, step, state)`, as a loop of Python where all values are concrete.

    The programs that a step is made of are then the same as in other eager calls. In one loop of one program all of
    them would be compiled again. Every step waits for its result.
    """
    while not is_traced(state):
        if not unfinished(state):
            return state
        following = step(state)
        # The state was concrete and the result is not, so the step refers to an array that is traced.
        if is_traced(following):
            break
        state = following
    return lax.while_loop(unfinished, step, state)


def is_traced(tree) -> bool:
    """Whether an array of a tree is part of a larger program or of a transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def one_by_one(function: Callable, *, static_argnums: tuple[int, ...] = ()) -> Callable:
    """The function, whose batches under `jax.vmap` are computed one after another where that is faster.

    Side by side, all loops of a batch take the steps of the slowest, and convolutions whose kernels differ take a slow
    path of XLA on a CPU. A GPU works on few small arrays at a time badly, so that batches stay side by side there.

    Args:
      function: what is computed, of arrays or trees of them; its arguments are positional.
      static_argnums: the positions of its static arguments.
    """

    @functools.wraps(function)
    def call(*args):
        arrays = [None if i in static_argnums else arg for i, arg in enumerate(args)]
        # Outside of transformations the function's own programs are shared with other eager calls.
        if not is_traced(arrays):
            return function(*args)

        # JAX says by a tree of booleans which arrays are batches, and the library's own trees hold arrays alone.
        leaves, structure = jax.tree.flatten(arrays)
        # The rule for batches outlives this call, and must not hold its tracers.
        found, static = [], {i: args[i] for i in static_argnums}

        def of_leaves(*leaves):
            own = jax.tree.unflatten(structure, leaves)
            result = function(*(static.get(i, array) for i, array in enumerate(own)))
            results, found[:] = jax.tree.leaves(result), [jax.tree.structure(result)]
            return results

        results = _in_turn(of_leaves)(*leaves)
        return jax.tree.unflatten(found[0], results)

    return call


def _in_turn(function: Callable) -> Callable:
    """The function of arrays, which returns a list of them, with the rule of `one_by_one` for `jax.vmap`."""
    one = jax.custom_batching.custom_vmap(function)

    @one.def_vmap
    def many(axis_size, in_batched, *leaves):
        stacks = [leaf for leaf, own in zip(leaves, in_batched, strict=True) if own]
        is_large = sum(stack.size for stack in stacks) >= axis_size * _WORTH_A_LOOP
        in_turn = is_large and jax.default_backend() == "cpu"

        def element(rows):
            rows = iter(rows)
            merged = [next(rows) if own else leaf for leaf, own in zip(leaves, in_batched, strict=True)]
            return (one if in_turn else function)(*merged)

        results = lax.map(element, stacks) if in_turn else jax.vmap(element)(stacks)
        return results, [True] * len(results)

    return one

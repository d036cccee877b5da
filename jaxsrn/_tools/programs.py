"""`program`: `jax.jit` for the library's own functions, with a bound on what their compiled programs hold.

On Linux a compiled CPU program holds memory maps, and XLA aborts a process that has more than its limit of 65,530. A
function under `jax.jit` keeps a program for every shape that it has seen, and can only let go all of them at once.
Here every function has one `jax.jit` of its own for each shape. Nothing else in JAX holds a program, or what was
derived from it by `grad` and `vmap`, once its `jax.jit` is gone. So the programs that were not used for the longest
time can be let go one by one, before the process has too many maps. A shape that is seen again is compiled again.

What a user jits is the user's and is never let go. While it lives, it holds the traces of the functions that it
contains, and with them the programs of eager calls of the same functions and shapes.

Programs of eager calls are compiled by XLA's former code generator on a CPU, which takes two thirds of the time and
gives searches of the same speed. A function is **brief** if it runs for less time than LLVM takes to optimize its
program. Functions of one small layer are brief; searches on large images and projections are not. LLVM does not
optimize eager calls of a brief function, which compile in a third of the time and run up to three times as long, the
start of a state without edges five times (`python benchmarks/compilation --only generators`). In a function that a user
jits, the user's choice holds.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import jax
import jaxlib.version

from jaxsrn._tools.loops import is_traced

__all__ = ["program"]

# Maps of the whole process at which old programs go: less than half of Linux's limit, so that the user's own programs
# have room too.
MOST_MAPS = 25_000
# More than a program adds: 1,900 maps are the most that were measured, one for about five StableHLO operations.
MAPS_OF_A_PROGRAM = 2_000
# The latest programs stay even where the user's own take all the room, or no call would find its programs again.
ALWAYS_KEPT = 16
# How XLA compiles eager calls on a CPU, and those of brief functions. It stops at an option that it does not know: the
# former code generator is gone from 0.12, and what later versions know is not known here.
_VERSION = jaxlib.version.__version__
QUICK = {"xla_cpu_use_fusion_emitters": False} if _VERSION.startswith("0.10.") else {}
QUICKER = QUICK | ({"xla_backend_optimization_level": 0} if _VERSION.startswith(("0.10.", "0.11.", "0.12.")) else {})


def num_maps() -> int:
    """Memory maps of this process; 0 where the system does not say, since only Linux has the limit."""
    try:
        with open("/proc/self/maps", "rb") as lines:
            return lines.read().count(b"\n")
    except OSError:
        return 0


class _Entry(NamedTuple):
    jitted: Callable
    seen: set  # The kinds of arguments with which it was called, each of which has programs of its own.


class Programs:
    """The `jax.jit` of every function and shape, the least recently used one first.

    Args:
      most_maps: how many maps the process may have before old ones go.
    """

    def __init__(self, most_maps: int = MOST_MAPS):
        self._most_maps = most_maps
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._not_counted = 0
        # What is let go may run finalizers, and they may call the library.
        self._lock = threading.RLock()

    def jitted(self, function: Callable, static: tuple[int, ...], args: tuple, options: dict | None = None) -> Callable:
        """The `jax.jit` of the function for arguments like these; the caller's reference keeps it for the call.

        Eager calls on a CPU are compiled with the options.

        The key decides only what is let go together. All else that tells programs apart, such as shardings, weak types
        and context managers, is left to `jax.jit`.
        """
        leaves, structure = jax.tree.flatten([arg for i, arg in enumerate(args) if i not in static])
        types = tuple((getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        # JAX takes options for outermost programs alone.
        eager = not (is_traced(leaves) or _is_in_a_program())
        options = options if eager and options and jax.default_backend() == "cpu" else None
        key = (function, tuple(args[i] for i in static), structure, types, eager)
        # `grad` and `vmap` of an eager call make further programs; their arguments are tracers of their own types.
        kind = frozenset(map(type, leaves))
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or kind not in entry.seen:
                self._make_room()
                entry = self._entries.setdefault(key, _Entry(_own_jit(function, static, options), set()))
                entry.seen.add(kind)
            self._entries.move_to_end(key)
        return entry.jitted

    def _make_room(self) -> None:
        """Lets the oldest programs go where the process has too many maps."""
        # Reading takes 1 ms for 1,000 maps, so it waits until new programs may have reached the limit.
        self._not_counted -= 1
        if self._not_counted > 0:
            return
        while (maps := num_maps()) > self._most_maps and len(self._entries) > ALWAYS_KEPT:
            surplus = len(self._entries) - ALWAYS_KEPT
            for _ in range(min(surplus, 1 + len(self._entries) // 8)):
                self._entries.popitem(last=False)
        self._not_counted = (self._most_maps - maps) // MAPS_OF_A_PROGRAM


def _is_in_a_program() -> bool:
    """Whether the caller is being traced, where every operation gives a tracer, that of a constant too."""
    return is_traced(jax.lax.stop_gradient(0.0))


def _own_jit(function: Callable, static: tuple[int, ...], options: dict | None) -> Callable:
    # JAX's caches refer weakly to the function that was jitted, so each `jax.jit` gets a new one.
    @functools.wraps(function)
    def own(*args):
        return function(*args)

    return jax.jit(own, static_argnums=static, compiler_options=options)


_programs = Programs()


def program(
    function: Callable,
    *,
    static_argnums: int | tuple[int, ...] = (),
    brief: bool | Callable[..., bool] = False,
) -> Callable:
    """The function compiled as by `jax.jit`; its programs are let go before the process has too many memory maps.

    Args:
      function: what to compile; its arguments are positional.
      static_argnums: the positions of its static arguments, as in `jax.jit`.
      brief: whether it is brief, or a function that says so of the arguments.

    Returns:
      A function that does what `jax.jit(function, static_argnums=static_argnums)` does.
    """
    static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)

    @functools.wraps(function)
    def call(*args):
        is_brief = brief(*args) if callable(brief) else brief
        return _programs.jitted(function, static, args, QUICKER if is_brief else QUICK)(*args)

    return call

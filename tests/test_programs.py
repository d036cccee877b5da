"""Programs are let go before the process has too many memory maps, and all else is as with `jax.jit`."""

import gc
import re
import threading
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsrn
from jaxsrn._tools import programs
from jaxsrn._tools.programs import Programs, num_maps, program

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux has the limit, and says the number")
KEPT = 2
ALLOWED = 100


@pytest.fixture
def tight(monkeypatch):
    """A table of programs that is always over its limit, so that only the last two stay."""
    monkeypatch.setattr(programs, "ALWAYS_KEPT", KEPT)
    monkeypatch.setattr(programs, "num_maps", lambda: 1)
    monkeypatch.setattr(programs, "_programs", Programs(most_maps=0))


class Traced:
    """A function that counts how often it is traced, since nothing else runs its Python code."""

    def __init__(self):
        self.count = 0
        self.program = program(self._function)

    def _function(self, x):
        self.count += 1
        return jnp.sum(jnp.tanh(x) ** 2)


def of_size(n: int) -> jax.Array:
    return jnp.linspace(-1.0, 1.0, n)


def expected(n: int) -> float:
    return np.sum(np.tanh(np.linspace(-1, 1, n)) ** 2)


def called_in_all_ways(function, n: int) -> None:
    x = of_size(n)
    function(x)
    jax.grad(function)(x)
    jax.vmap(function)(x[None])


def traces(function: Traced, *sizes: int) -> list[int]:
    """How many traces each call made."""
    made = []
    for n in sizes:
        before = function.count
        np.testing.assert_allclose(
            function.program(of_size(n)), np.sum(np.tanh(np.linspace(-1, 1, n)) ** 2), rtol=1e-12
        )
        made.append(function.count - before)
    return made


def test_a_shape_compiles_once():
    assert traces(Traced(), 3, 4, 3, 4, 3) == [1, 1, 0, 0, 0]


def test_the_least_recently_used_goes_first(tight):
    """A new program makes room before it comes, so three stay: here 3, 4, 5, then 3, 5, 6 since 4 is the oldest."""
    assert traces(Traced(), 3, 4, 5, 3, 6, 3, 5, 6, 4, 3) == [1, 1, 1, 0, 1, 0, 0, 0, 1, 1]


def test_nothing_goes_below_the_limit(monkeypatch):
    monkeypatch.setattr(programs, "ALWAYS_KEPT", KEPT)
    monkeypatch.setattr(programs, "num_maps", lambda: 1)
    monkeypatch.setattr(programs, "_programs", Programs(most_maps=1))
    assert traces(Traced(), *range(3, 9), *range(3, 9)) == [1] * 6 + [0] * 6


def test_what_is_let_go_is_free_at_once(tight):
    """No cache of JAX and no cycle of references keeps an old `jax.jit`, after derivatives and batches too."""
    function, alive = Traced(), []
    gc.collect()
    gc.disable()
    try:
        for n in range(3, 8):
            called_in_all_ways(function.program, n)
            alive.append(weakref.ref(programs._programs.jitted(function._function, (), (of_size(n),))))
        # Two programs stay: that of the last eager call, and that of its derivatives and batches.
        assert [reference() is not None for reference in alive] == [False] * 4 + [True]
    finally:
        gc.enable()


@pytest.mark.parametrize("brief", [False, True, lambda x: True])
def test_a_call_with_constants_is_part_of_the_function_that_makes_it(brief):
    """JAX refuses the compiler's options of eager calls inside of another program."""
    function = program(Traced()._function, brief=brief)
    function(of_size(3))

    def constant(x):
        return x + function(of_size(3))

    np.testing.assert_allclose(jax.jit(constant)(1.0), 1 + expected(3), rtol=1e-12)
    np.testing.assert_allclose(jax.lax.map(constant, jnp.ones(2)), 1 + expected(3), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(constant)(jnp.ones(2)), 1 + expected(3), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(constant)(1.0), 1.0)


def test_eager_calls_of_brief_functions_are_not_optimized(monkeypatch):
    """Only eager calls on a CPU have options, and a brief function may say so of its arguments."""
    chosen, own_jit = [], programs._own_jit

    def recorded(function, static, options):
        chosen.append(options)
        return own_jit(function, static, options)

    monkeypatch.setattr(programs, "_own_jit", recorded)
    function = program(Traced()._function, brief=lambda x: x.size <= 3)
    for n in (3, 4):
        np.testing.assert_allclose(function(of_size(n)), expected(n), rtol=1e-12)
        np.testing.assert_allclose(jax.jit(function)(of_size(n)), expected(n), rtol=1e-12)
    on_cpu = jax.default_backend() == "cpu"
    brief, other = [(on_cpu and options) or None for options in (programs.QUICKER, programs.QUICK)]
    assert chosen == [brief, None, other, None]


@linux
def test_maps_stay_bounded(monkeypatch):
    """The maps of twelve shapes and their derivatives, which exceed the limit without a bound, stay below it."""

    def function(x):
        return jnp.sum(jnp.tanh(jnp.outer(x, x)) @ x)

    monkeypatch.setattr(programs, "ALWAYS_KEPT", KEPT)
    called_in_all_ways(program(function), 2)
    limit = num_maps() + ALLOWED
    monkeypatch.setattr(programs, "_programs", Programs(limit))
    bounded, unbounded, most = program(function), jax.jit(function), 0
    for n in range(3, 15):
        called_in_all_ways(bounded, n)
        most = max(most, num_maps())
    for n in range(15, 27):
        called_in_all_ways(unbounded, n)
    # The program that was just compiled is not counted yet.
    assert most < limit + ALLOWED
    assert num_maps() > limit + 2 * ALLOWED


@linux
def test_maps_are_counted():
    before = num_maps()
    assert before == pytest.approx(len(Path("/proc/self/maps").read_text().splitlines()), abs=5)
    jax.jit(lambda x: jnp.sort(x @ x))(jnp.ones((5, 5)))
    assert num_maps() > before


def test_a_system_without_a_list_of_maps_has_no_limit(monkeypatch):
    def missing(*args):
        raise FileNotFoundError(args[0])

    monkeypatch.setattr(programs, "open", missing, raising=False)
    assert num_maps() == 0


def test_maps_are_seldom_counted(monkeypatch):
    """Counting takes time: far below the limit, many new programs come before it is done again."""
    counted = []
    monkeypatch.setattr(programs, "num_maps", lambda: counted.append(1) or 0)
    monkeypatch.setattr(programs, "_programs", Programs(10 * programs.MAPS_OF_A_PROGRAM))
    traces(Traced(), *range(3, 13))
    assert len(counted) == 1
    traces(Traced(), *range(3, 13))
    assert len(counted) == 2


def test_a_program_that_comes_back_gives_the_same_numbers(tight):
    kernels = [np.random.default_rng(n).standard_normal((3, n, 2)) for n in (1, 2, 3)]
    op = jaxsrn.CircularConv((6,))
    first = [jaxsrn.spectral_norm(kernel, op) for kernel in kernels]
    again = [jaxsrn.spectral_norm(kernel, op) for kernel in kernels]
    assert len(programs._programs._entries) <= KEPT + 1
    dense = [np.linalg.norm(op.to_dense(kernel), 2) for kernel in kernels]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, dense, rtol=1e-10)


def test_a_program_may_go_during_its_own_call(tight):
    """Tracing it makes programs of other functions, more than stay."""
    inner = Traced()
    outer = program(lambda x: sum(inner.program(x[:n]) for n in range(2, 8)))
    terms = np.cumsum(np.tanh(np.linspace(-1, 1, 9)) ** 2)
    for _ in range(2):
        np.testing.assert_allclose(outer(of_size(9)), np.sum(terms[1:7]), rtol=1e-12)


def test_what_the_user_jits_stays(tight):
    """Neither the user's own functions nor those that contain the library's are traced or compiled again."""
    own, library = [], Traced()

    @jax.jit
    def user(x):
        own.append(1)
        return library.program(x) + 1

    x, before = of_size(20), user(of_size(20))
    inside = library.count
    traces(library, *range(3, 9))
    assert user(x) == before
    assert (len(own), library.count - 6, user._cache_size()) == (1, inside, 1)


def test_a_traced_call_is_one_subroutine():
    """Inside a user's `jit` it is what a jitted function is there, written once for two calls."""

    @program
    def subroutine(x):
        return jnp.tanh(x)

    text = jax.jit(lambda x: subroutine(subroutine(x))).lower(of_size(3)).as_text()
    assert len(re.findall(r"func.func private @subroutine\(", text)) == 1
    assert len(re.findall(r"call @subroutine\(", text)) == 2


def scaled(x, y, power):
    return {"scaled": x**power * y, "fraction": x / 3}


ARGUMENTS = {
    "float64": (np.ones(3), np.ones(3)),
    "float32": (np.ones(3, np.float32), np.ones(3, np.float32)),
    "weak": (2, 2.0),
    "weak and strong": (jnp.ones(3, jnp.float32), 2.0),
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_types_are_those_of_jit(arguments):
    """All kinds in one table, with equal keys for some: the value of a static argument, the dtype and weak types."""
    ours, theirs = program(scaled, static_argnums=2), jax.jit(scaled, static_argnums=2)
    for power in (1, 2, True, 1.0):
        for kind in (arguments, *ARGUMENTS):
            got, wanted = ours(*ARGUMENTS[kind], power), theirs(*ARGUMENTS[kind], power)
            assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, wanted)
            jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_context_managers_are_heeded():
    """The same array under each of them: the program that was compiled before is not the one to run."""
    x = jnp.asarray([-1.0, 1.0])
    logarithm = program(jnp.log)
    assert np.isnan(logarithm(x)[0])
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        logarithm(x)
    widths = program(lambda x: x + jnp.zeros(2).dtype.itemsize)
    single = x.astype(jnp.float32)
    assert widths(single)[1] == 9
    with jax.enable_x64(False):
        assert widths(single)[1] == 5
    counted = Traced()
    with jax.disable_jit():
        assert traces(counted, 3, 3) == [1, 1]


def test_threads(tight):
    """Several threads at once, each of which makes the programs of the others go."""
    function, wrong = Traced(), []

    def work(sizes):
        for n in sizes:
            if not np.isclose(function.program(of_size(n)), expected(n), rtol=1e-12):
                wrong.append(n)

    rng = np.random.default_rng(0)
    threads = [threading.Thread(target=work, args=(rng.integers(3, 9, size=20),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert function.count > 6


def test_the_library_has_one_way_to_compile():
    """Programs that are not used are let go of, and `jax.jit` keeps its own."""
    source = Path(jaxsrn.__file__).parent
    users = {path.name for path in source.rglob("*.py") if re.search(r"(@|partial\(|= )jax\.jit", path.read_text())}
    assert users == set()

"""Strict numerics for every test: float64 where it is meant, no silent promotion of dtypes or ranks."""

import gc
import os
from pathlib import Path

import jaxlib.version

# Nearly all of the time of these tests is tracing, lowering and compilation. Without most of XLA's optimizations, with
# its former code generator and with one LLVM module for a program, compilation takes less than half as long.
# `JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles as users do. JAX reads all of these when it is imported; XLA aborts at a
# flag that it does not know, and later versions may not know these.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and jaxlib.version.__version__.startswith("0.10."):
    flags = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
# Lowering writes no stack of Python calls beside each operation.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# jaxlib's batched SVDs hold a thread of XLA's pool each while they wait for others to work (0.10.2): where one program
# runs as many at once as there are threads, on two cores two, all wait for ever. XLA takes the size of its pool here.
os.environ.setdefault("NPROC", "8")

# Threads of OpenBLAS wait for each other in loops, which takes many times as long where two processes run the tests
# (`python benchmarks/shared_machine.py`).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jaxtyping
import pytest

# JAX keeps hundreds of thousands of objects, which the collector need not walk at every few hundred new ones.
gc.freeze()
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Tests that take longest, a name a line. Nearly every one is one of several cases of a test whose others always run.
SLOW = set(Path(__file__).with_name("slow.txt").read_text().split("\n"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests of slow.txt too")


def pytest_collection_modifyitems(config, items):
    """Leaves out the slow tests, unless they were asked for."""
    if config.getoption("--slow"):
        return
    # Names are relative to the root, wherever the tests are started.
    left_out = [item for item in items if f"tests/{item.nodeid.rpartition('tests/')[2]}" in SLOW]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def no_type_checks():
    """Switches off the annotation checks that only tests have, to see what users see of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def as_users_have_it():
    """float32 and JAX's own promotion rules: Flax and optax rely on them."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def standard_promotion():
    """JAX's own promotion rules, for optax's Adam: its bias correction raises a float to an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def released_programs():
    """Compiled programs hold memory maps, and XLA crashes where a process has too many.

    They stay from module to module until there are so many that the library would begin to count them.
    """
    yield
    # The plugin of jaxtyping 0.3.0 refuses packages that are imported before the tests.
    from jaxsrn._tools.programs import MOST_MAPS, num_maps

    if num_maps() > MOST_MAPS // 3:
        jax.clear_caches()

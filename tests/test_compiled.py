"""What XLA makes of programs whose order matters: read from the compiled program, not from its results."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxsrn.operators.layers import _after
from jaxsrn.spectra.dense import leading_of_matrix

SVD = "lapack_dgesdd_ffi"


def compiled(function, *args) -> str:
    return jax.jit(function).lower(*args).compile().as_text()


def entry(text: str) -> str:
    """The computation at which the program starts; loops are others, that it calls."""
    return text[text.index("\nENTRY ") :]


def later_needs_earlier(text: str) -> bool:
    """Whether one of two SVDs of the entry computation is computed from the other."""
    operands, svds = {}, []
    for line in entry(text).splitlines():
        name, *used = re.findall(r"%[\w.-]+", line.split(", metadata=")[0]) or [None]
        operands[name] = used
        svds += [name] if SVD in line else []

    def reaches(name, wanted) -> bool:
        return name == wanted or any(reaches(used, wanted) for used in operands.get(name, ()))

    first, second = svds
    return reaches(first, second) or reaches(second, first)


def in_turn(wait):
    def program(x, y):
        first = jnp.linalg.svd(x, compute_uv=False)
        return first, jnp.linalg.svd(wait(y, first[0, 0]), compute_uv=False)

    return compiled(program, jnp.ones((4, 5, 5)), jnp.ones((4, 6, 6)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="names of LAPACK")
def test_work_in_turn_is_in_turn_when_compiled():
    """By a value; an optimization barrier is gone by then, and what it kept apart is independent."""
    assert later_needs_earlier(in_turn(_after))
    barred = in_turn(lambda y, value: jax.lax.optimization_barrier((y, value))[0])
    assert "opt-barrier" not in barred
    assert not later_needs_earlier(barred)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="names of LAPACK")
def test_the_svd_of_a_large_matrix_is_computed_only_where_no_proof_is_found():
    """It stays in the loop that runs where the proof fails, although nothing in it changes."""

    def whole(text):
        return [line for line in text.splitlines() if SVD in line and re.search(r"(140,130|130,140)\]", line)]

    text = compiled(leading_of_matrix, jnp.ones((140, 130)))
    assert whole(text)
    assert not whole(entry(text))


def test_programs_do_not_grow():
    """No program is a tenth larger than recorded; `python benchmarks/compilation --only counts` records anew."""
    script = Path(__file__).parent.parent / "benchmarks" / "compilation"
    run = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

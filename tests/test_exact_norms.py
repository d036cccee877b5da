"""The exact norms that other libraries can test against: the file, its checker, and jaxsrn's own answers."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsrn import bounds, spectral_norm

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "data"))
import check_exact_norms
import make_exact_norms
from _peers import operator_of

CASES = check_exact_norms.read()


@jax.jit
def norm_and_interval(kernel, op):
    return spectral_norm(kernel, op), bounds.certified(kernel, op)


@pytest.mark.parametrize("name", CASES)
def test_norm_is_that_of_the_file(name):
    case = CASES[name]
    norm, interval = norm_and_interval(jnp.asarray(case["kernel"]), operator_of(case))
    np.testing.assert_allclose(norm, case["norm"], rtol=1e-10)
    assert interval.lower <= case["norm"] <= interval.upper


def test_the_file_is_what_the_script_makes():
    made = [make_exact_norms.finished(case) for case in make_exact_norms.cases()]
    assert [case["name"] for case in made] == list(CASES)
    for case in made:
        stored = CASES[case["name"]] | {"kernel": CASES[case["name"]]["kernel"].tolist()}
        np.testing.assert_allclose(case.pop("norm"), stored.pop("norm"), rtol=case["accuracy"])
        assert case == stored


def test_norms_are_right_in_another_way():
    assert check_exact_norms.check_file(CASES) == []
    # The check can fail.
    case = CASES["same-2d-stride"]
    assert check_exact_norms.check_file({"scaled": case | {"norm": case["norm"] * (1 + 1e-9)}}) == ["scaled"]
    case = CASES["unbounded-2d"]
    assert check_exact_norms.check_file({"scaled": case | {"norm": case["norm"] * (1 + 1e-3)}}) == ["scaled"]


def test_closed_cases():
    assert CASES["circular-2d-identity"]["norm"] == pytest.approx(1, rel=1e-14)
    # Proposition 7 of Sedghi, Gupta, Long 2019.
    positive = CASES["circular-2d-positive"]
    assert positive["norm"] == pytest.approx(positive["kernel"].sum(), rel=1e-14)
    # |1 - exp(i w)| at the highest frequency of seven samples.
    assert CASES["circular-1d-edges"]["norm"] == pytest.approx(2 * np.cos(np.pi / 14), rel=1e-14)


def test_every_floating_point_format_holds_the_kernels():
    for case in CASES.values():
        for dtype in (jnp.float16, jnp.bfloat16):
            np.testing.assert_array_equal(np.asarray(jnp.asarray(case["kernel"], dtype), np.float64), case["kernel"])


def test_verdicts(tmp_path):
    """The checker as others run it: in a process of its own, on answers in JSON."""
    answers = {name: CASES[name]["norm"] * factor for name, factor in (("dense", 1 + 1e-6), ("same-1d", 1.25))}
    path = tmp_path / "answers.json"

    def run(answers, *options):
        path.write_text(json.dumps(answers))
        command = [sys.executable, check_exact_norms.__file__, path, *options]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line.split(maxsplit=1) for line in process.stdout.splitlines()[:-1]]
        return dict(lines), process

    verdicts, process = run(answers)
    assert verdicts["dense"] == "right"
    assert verdicts["same-1d"] == "bound +25.0%"
    assert verdicts["circular-1d"] == "not offered"
    assert process.returncode == 0
    verdicts, process = run(answers, "--exact")
    assert verdicts["same-1d"] == "wrong +25.0%"
    assert process.returncode == 1
    verdicts, process = run({"dense": 0.5 * CASES["dense"]["norm"], "same-1d": float("nan")})
    assert verdicts["dense"] == "wrong -50.0%"
    assert verdicts["same-1d"] == "wrong +nan%"
    assert process.returncode == 1
    _, process = run({"no such case": 1.0})
    assert process.returncode == 1
    assert "expected names of cases" in process.stderr


def test_the_checker_needs_numpy_alone():
    code = "import sys, check_exact_norms as c; c.read(); print(*sorted({n.split('.')[0] for n in sys.modules}))"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(
        command, cwd=check_exact_norms.FILE.parent, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "numpy" in modules
    assert not {"jax", "jaxsrn", "scipy", "flax"} & set(modules)

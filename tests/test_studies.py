"""What examples and benchmarks share: runs that are kept, how a report says that it was made, and fair times."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import _studies
import reproduce_grishina2024
from _clock import race
from _markdown import ROOT, made_by


@pytest.mark.parametrize(
    ("arguments", "part", "expected"),
    [
        (["examples/a.py"], None, "python examples/a.py"),
        (["examples/a.py", "--fast", "--output", "x", "--seeds", "1"], None, "python examples/a.py --fast --seeds 1"),
        (["examples/a.py", "--output=x"], None, "python examples/a.py"),
        (["benchmarks/b/__main__.py", "--only", "c", "--only", "d"], "d", "python benchmarks/b --only d"),
        (["benchmarks/b", "--rounds", "9"], "d", "python benchmarks/b --only d --rounds 9"),
    ],
)
def test_a_report_names_the_command_that_made_it(arguments, part, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / arguments[0]), *arguments[1:]])
    assert made_by(part) == expected


def test_runs_of_other_data_are_not_taken_up(tmp_path):
    """A run is kept with its setting and with what else it depends on; a file of anything else ends the study."""
    calls = []

    def run(seed, rate):
        calls.append(seed)
        return {"end": rate + seed}

    def study(made_with, seeds=2, rate=0.5):
        return _studies.runs_of({"plain": {"rate": rate}}, seeds, tmp_path, run, made_with)

    assert study({"data": "real"}) == {"plain": [{"end": 0.5}, {"end": 1.5}]}
    assert study({"data": "real"}, seeds=3)["plain"][2] == {"end": 2.5}
    assert calls == [0, 1, 2]
    for other in (lambda: study({"data": "stand-in"}), lambda: study({"data": "real"}, rate=0.1)):
        with pytest.raises(SystemExit, match="remove it, or give another --output"):
            other()


def test_every_call_is_timed_after_a_first_one(monkeypatch):
    """Also one that is too slow to be called often: what it does once does not count."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    counts = {"slow": 0, "quick": 0}

    def call(name, seconds):
        def run():
            clock[0] += 2 * seconds if counts[name] == 0 else seconds
            counts[name] += 1
            return np.zeros(())

        return run

    found = race({"slow": call("slow", 3.0), "quick": call("quick", 0.1)}, rounds=5, seconds=1.0)
    assert found["slow"].seconds == pytest.approx(3.0)
    assert found["quick"].seconds == pytest.approx(0.1)
    assert counts["slow"] == 2


def test_bounds_below_the_norm_and_bounds_that_are_tighter_are_reported():
    class Layer:
        name, num_taps = "layer", 9

    values = {"TN": 1.2, "F4": 1.3, "LipBound": 4.0, "Gram": 1.1}
    sound = reproduce_grishina2024.Bounds(Layer, 1.0, 0.999, 1.05, values, {})
    assert reproduce_grishina2024.violations(sound) == []
    for name, value, words in (("Gram", 0.5, "Gram is below the norm"), ("Gram", 1.01, "Gram is tighter")):
        assert words in " ".join(reproduce_grishina2024.violations(sound._replace(values=values | {name: value})))
    assert "outside" in " ".join(reproduce_grishina2024.violations(sound._replace(upper=0.9)))

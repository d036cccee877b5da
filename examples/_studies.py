"""What the studies share: runs that are kept, seeds with their spread and differences, and whether a target is met.

A study trains one network for each of its settings and seeds. Every run is one file of JSON in the study's folder. A
study that was stopped goes on with the runs that are missing.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats
from _report import table
from tqdm import tqdm

__all__ = [
    "UNCORRECTED",
    "compared",
    "cost_table",
    "curve",
    "mean_and_spread",
    "mean_difference",
    "misses_target",
    "of_layers",
    "p_value",
    "runs_of",
]

# The share by which a layer may miss what was asked of it.
TOLERANCE = 0.01
# What stands beside every p-value.
UNCORRECTED = "The p-values are not corrected for the number of tests."


def runs_of(
    settings: dict[str, dict], num_seeds: int, folder: Path, run: Callable[..., dict], made_with: dict
) -> dict[str, list[dict]]:
    """The results of `run(seed=..., **setting)` by setting, one for each seed; those that are kept are read.

    The seeds come one after the other and all settings within a seed, so that a study that is stopped has whole seeds.
    `run` returns what JSON holds. `made_with` is, by name, what the results depend on beside setting and seed: which
    data they are of above all, and the size where no setting holds it. A file that was made with something else ends
    the study.
    """
    found = {name: [] for name in settings}
    tasks = [(seed, name) for seed in range(num_seeds) for name in settings]
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in tqdm(tasks, desc=folder.name, unit="run"):
        found[name].append(_kept(folder / f"{name}-{seed}.json", settings[name] | {"seed": seed}, run, made_with))
    return found


def _kept(file: Path, setting: dict, run: Callable[..., dict], made_with: dict) -> dict:
    """The result in the file; or that of the run, written there once it is complete."""
    # As JSON reads it back.
    key = json.loads(json.dumps({"setting": setting, "made_with": made_with}))
    if file.exists():
        kept = json.loads(file.read_text())
        result = kept.pop("result")
        if kept != key:
            sys.exit(f"{file} is of {kept}, not of {key}: remove it, or give another --output.")
        return result
    result = run(**key["setting"])
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(key | {"result": result}))
    partial.replace(file)
    return result


def curve(runs: list[dict], name: str) -> np.ndarray:
    """A number of the `points` of each run, `(seeds, measurements)`."""
    return np.array([[point[name] for point in run["points"]] for run in runs])


def of_layers(runs: list[dict], entry: str | int) -> np.ndarray:
    """A number of every layer at the `points` of each run, `(seeds, measurements, layers)`."""
    return np.array([[[layer[entry] for layer in point["layers"].values()] for point in run["points"]] for run in runs])


def mean_and_spread(values, form: str = ".3f") -> str:
    """The mean and the standard deviation over seeds, as `1.234 ± 0.056`; the mean alone where there is no spread.

    One seed has none, and seeds of which one is infinite.
    """
    values = np.asarray(values, float)
    has_spread = values.size > 1 and np.all(np.isfinite(values))
    spread = f" ± {np.std(values, ddof=1):{form}}" if has_spread else ""
    return f"{np.mean(values):{form}}{spread}"


def compared(values, others) -> tuple[float, float]:
    """The mean difference of two settings over the same seeds, and its p-value: the paired t-test, two-sided.

    The seed fixes the data, the first weights and the order of the batches of both, hence pairs. One seed is no test,
    and has NaN in place of the p-value.
    """
    difference = np.subtract(values, others)
    p = scipy.stats.ttest_rel(values, others).pvalue if len(difference) > 1 else np.nan
    return float(np.mean(difference)), float(p)


def p_value(p: float) -> str:
    """A p-value as a table shows it; nothing where there is none."""
    return "" if np.isnan(p) else f"{p:.1g}"


def mean_difference(values, others, form: str) -> str:
    """The mean difference with its p-value, as `+1.23 (p = 0.041)`; the difference alone where there is no p-value."""
    mean, p = compared(values, others)
    return f"{mean:+{form}}" + ("" if np.isnan(p) else f" (p = {p:.2g})")


def misses_target(value: float, asked: float, *, at_most: bool = False) -> bool:
    """Whether a number is more than 1% from what was asked; with `at_most`, more than 1% above it. NaN misses."""
    excess = value / asked - 1
    return not (excess if at_most else abs(excess)) <= TOLERANCE


def cost_table(seconds: dict[str, np.ndarray], header: tuple[str, str, str]) -> str:
    """The median time of a step by `interleaved`, and the median of its ratio to the plain one in the same round."""
    plain = np.asarray(seconds["plain"])
    rows = [
        (name, f"{1e3 * np.median(own):.1f} ms", f"{np.median(np.asarray(own) / plain):.2f}")
        for name, own in seconds.items()
    ]
    return table(header, rows)

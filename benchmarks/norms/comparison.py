"""Part `norms`: time and error of every exact, bounding and estimating method on each kernel, with circular padding."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from _clock import Timed, race
from _report import duration, table
from tqdm import tqdm

from norms.cases import Case, gaussian, trained
from norms.figures import error_figure
from norms.in_jax import ends
from norms.methods import CERTIFIED, EXACT_PEERS, GUARANTEED, NORM, approximate_calls, exact_calls
from norms.parts import TOLERANCE, Checks, Effort, Part

EXACT = """\
One spectral norm with circular padding at (n, c, k): an n x n image, c to c channels, k x k taps. Medians of
{rounds} interleaved rounds, fewer where they would take more than {seconds:g} s (one for many of NumPy's), after one
that warms up. NumPy works in complex128, JAX and PyTorch in complex64 on float32 kernels. Kernels with strides go to
the peers split by phase, with the same singular values. Times of several kernels are sums; the ratios say how many
times longer the peer takes."""
ERRORS = """\
Relative errors against NumPy's SVDs in float64, the largest of the row's kernels:"""
APPROXIMATE = """\
The same kernels in the same rounds. `ratio`: to the fastest exact peer. `error`: relative and signed, the worst of the
row's kernels; of an interval both ends. `guaranteed`: on which side of the norm the result is, in exact arithmetic or
where rounding is accounted for. Gram iteration and power iteration are written from the papers (Delattre et al. 2023,
Ryu et al. 2019) and their authors' code, the former on half of the frequencies; numbers are iterations from a cold
start. flax.nnx.SpectralNorm does not estimate this norm but that of the flattened kernel."""


class Entry(NamedTuple):
    """A row of the tables, in which the times of its kernels are summed."""

    name: str
    cases: tuple[Case, ...]
    # How many times longer than ours the fastest exact peer has to take.
    exact: float | None = None
    certified: float | None = None


@functools.cache
def entries(effort: Effort) -> list[Entry]:
    """The rows: Gaussian kernels, then the trained network by stage, all its 3x3 kernels, and its stem."""
    if effort.fast:
        cases = [gaussian(8, 4, 3), gaussian(9, 6, 3), gaussian(12, 3, 7, strides=2)]
        return [Entry(case.name, (case,)) for case in cases]
    required = {(32, 64, 3): (3, 10), (56, 64, 3): (8, 30), (224, 16, 7): (20, 50)}
    rows = []
    for size in ((16, 16, 3), (32, 64, 3), (56, 64, 3), (32, 128, 3), (224, 16, 7)):
        case = gaussian(*size)
        rows.append(Entry(case.name, (case,), *required.get(size, ())))
    if not effort.network:
        return rows
    stages = [Entry(name, tuple(cases)) for name, cases in trained().items()]
    square = [stage._replace(name=f"{stage.name}, all {len(stage.cases)}") for stage in stages if len(stage.cases) > 1]
    sixteen = Entry("ResNet-50, all sixteen 3x3", sum((stage.cases for stage in square), ()), 30)
    return [*rows, *square, sixteen, *(stage for stage in stages if len(stage.cases) == 1)]


@functools.cache
def raced(case: Case, effort: Effort) -> dict[str, Timed]:
    """The race of every exact and approximate method on one kernel."""
    return race(exact_calls(case) | approximate_calls(case), effort.rounds, effort.seconds)


def relative_errors(entry: Entry, name: str, effort: Effort) -> np.ndarray:
    """The signed errors of a method, relative to the norm: a row is a kernel, a column an end of the interval."""
    found = [np.array(ends(raced(case, effort)[name].result)) / case.norm - 1 for case in entry.cases]
    return np.array(found)


def total(entry: Entry, name: str, effort: Effort) -> float:
    """Seconds that a method takes for all kernels of a row."""
    return sum(raced(case, effort)[name].seconds for case in entry.cases)


def fastest_peer(entry: Entry, effort: Effort) -> float:
    """Seconds of the fastest exact peer for all kernels of a row."""
    return min(total(entry, peer, effort) for peer in EXACT_PEERS)


def exact_row(entry: Entry, effort: Effort) -> list[str]:
    own = total(entry, NORM, effort)
    peers = [total(entry, peer, effort) for peer in EXACT_PEERS]
    ratios = [f"{peer / own:.1f}" for peer in (*peers, min(peers))]
    return [entry.name, *map(duration, (*peers, own)), *ratios, f"{entry.exact:g}" if entry.exact else ""]


def error_row(entry: Entry, effort: Effort) -> list[str]:
    worst = (np.max(np.abs(relative_errors(entry, name, effort))) for name in (*EXACT_PEERS, NORM))
    return [entry.name, *(f"{error:.1e}" for error in worst)]


def approximate_rows(entry: Entry, effort: Effort) -> list[list[str]]:
    rows = []
    for name, known in GUARANTEED.items():
        if name in raced(entry.cases[0], effort):
            seconds, errors = total(entry, name, effort), relative_errors(entry, name, effort)
            interval = name == CERTIFIED
            worst = [end[np.argmax(np.abs(end))] for end in (errors.T if interval else errors.T[:1])]
            width = f"{np.max(np.diff(1 + errors)):.1e}" if interval else ""
            ratio = fastest_peer(entry, effort) / seconds
            text = " / ".join(f"{error:+.1e}" for error in worst)
            rows.append([entry.name, name, duration(seconds), f"{ratio:.1f}", text, width, known])
    return rows


def exact_checks(rows: list[Entry], effort: Effort) -> Checks:
    checks = []
    for entry in rows:
        if entry.exact:
            own = total(entry, NORM, effort)
            ratio, to_numpy = fastest_peer(entry, effort) / own, total(entry, "NumPy", effort) / own
            text = f"spectral_norm, {entry.name}: {ratio:.1f} times the fastest exact peer, required {entry.exact:g}"
            checks.append((ratio >= entry.exact, f"{text} ({to_numpy:.0f} times NumPy)"))
    worst = max(np.max(np.abs(relative_errors(entry, NORM, effort))) for entry in rows)
    checks.append((worst <= TOLERANCE, f"spectral_norm on all of these: error {worst:.1e}, at most {TOLERANCE:g}"))
    return checks


def certified_checks(rows: list[Entry], effort: Effort) -> Checks:
    checks = []
    for entry in rows:
        if entry.certified:
            ratio = fastest_peer(entry, effort) / total(entry, CERTIFIED, effort)
            text = f"certified, {entry.name}: {ratio:.1f} times the fastest exact peer, required {entry.certified:g}"
            checks.append((ratio >= entry.certified, text))
    errors = np.concatenate([relative_errors(entry, CERTIFIED, effort) for entry in rows])
    inside = bool(np.all((errors[:, 0] <= 0) & (errors[:, 1] >= 0)))
    return [*checks, (inside, "certified holds the float64 norm of each of these kernels")]


def comparison(effort: Effort) -> Part:
    """The part: two tables of exact norms, one of bounds and estimates, and a picture of time against error."""
    rows = entries(effort)
    for case in tqdm([case for entry in rows for case in entry.cases], desc="norms", leave=False):
        raced(case, effort)
    header = ("kernel", *EXACT_PEERS, "jaxsrn", *(f"{peer} / jaxsrn" for peer in EXACT_PEERS), "fastest", "required")
    exact = table(header, (exact_row(entry, effort) for entry in rows))
    errors = table(("kernel", *EXACT_PEERS, "jaxsrn"), (error_row(entry, effort) for entry in rows))
    columns = ("kernel", "method", "time", "ratio", "error", "width", "guaranteed")
    approximate = table(columns, (row for entry in rows for row in approximate_rows(entry, effort)))
    about = EXACT.format(rounds=effort.rounds, seconds=effort.seconds)
    sections = [
        ("Exact", f"{about}\n\n{exact}\n\n{ERRORS}\n\n{errors}"),
        ("Approximate and bounds", f"{APPROXIMATE}\n\n{approximate}"),
    ]
    checks = exact_checks(rows, effort) + certified_checks(rows, effort)
    pictured = rows[1].cases[0]
    return Part(sections, checks, {"norms_error": error_figure(pictured, raced(pictured, effort))})

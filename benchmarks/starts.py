"""How near is the state that a training step starts from: to the constraints, and to the solution of `srnc`?

    python benchmarks/starts.py           # random kernels of all kinds of convolutions; about three minutes; recorded
    python benchmarks/starts.py --fast    # small kernels of one kind, nothing recorded

`srnc_state` promises that its first step satisfies the constraints. Problem (7) is not convex, so that the step may be
at another local solution than the one that `srnc` finds. Without a target there is the norm alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _report import publish, table
from tqdm import tqdm

import jaxsrn
from jaxsrn import CircularConv, Operator, UnboundedConv, ZeroPaddedConv

ABOUT = """\
Gaussian kernels in float32, {seeds} of every shape, and targets of {fractions} of the largest stable rank where they
are below the kernel's own. `farther`: by how much the kernel of the first step is farther from the given one than that
of `srnc`, relative. `norm`: by how much its `spectral_norm` exceeds 1. Shares are those of kernels above {enough:g}."""
FRACTIONS = (0.05, 0.15, 0.22)
ENOUGH = 1e-3
SMALL, WIDE, LONG = [(3, 3, 3, 16), (3, 3, 16, 16), (5, 5, 8, 8)], [(3, 3, 64, 64), (3, 3, 128, 128)], [(7, 4, 6)]


class Kind(NamedTuple):
    """An operator for images of a shape, which unbounded layers do not need, and the shapes of its kernels."""

    operator: Callable[[tuple[int, ...]], Operator]
    shapes: list[tuple[int, ...]]


KINDS = {
    "unbounded": Kind(lambda _: UnboundedConv(), SMALL + LONG),
    "unbounded, strides 2": Kind(lambda _: UnboundedConv(strides=2), SMALL + LONG),
    "unbounded, wide": Kind(lambda _: UnboundedConv(), WIDE),
    "circular": Kind(CircularConv, SMALL + LONG),
    "circular, wide": Kind(CircularConv, WIDE),
    "SAME": Kind(ZeroPaddedConv, SMALL + LONG),
}
IMAGES = {1: (64,), 2: (16, 16)}  # By the number of axes.


class Start(NamedTuple):
    """How much farther the first step is than `srnc` (0 without a target), and how much its norm exceeds 1."""

    farther: float
    excess: float


def distance(kernel: jax.Array, other: jax.Array, op) -> float:
    """`||T(K) - T(A)||_F / ||T(A)||_F`, in NumPy's float64."""
    weights = np.asarray(op.frobenius_weights(kernel.shape), np.float64)
    kernel, other = (np.asarray(each, np.float64) for each in (kernel, other))
    return float(np.sqrt(np.sum(weights * (other - kernel) ** 2) / np.sum(weights * kernel**2)))


def first_step(kernel: jax.Array, op, fraction: float | None) -> Start | None:
    """How good the start is; `None` where the kernel itself, or no kernel that `srnc` finds, would do."""
    target = None if fraction is None else jaxsrn.target_of_fraction(fraction, kernel.shape, op)
    if target is not None and jaxsrn.stable_rank(kernel, op) <= target:
        return None
    stepped, _ = jaxsrn.srnc_step(kernel, jaxsrn.srnc_state(kernel, op, target), op, target)
    excess = float(jaxsrn.spectral_norm(stepped, op)) - 1
    if target is None:
        return Start(0.0, excess)
    best = jaxsrn.srnc(kernel, op, target)
    if not best.feasible:
        return None
    # `srnc` keeps the kernel's norm, the step has norm 1.
    return Start(distance(kernel, best.spectral_norm * stepped, op) / float(best.distance) - 1, excess)


def starts(kind: Kind, fractions: tuple, seeds: int) -> list[Start]:
    """All starts of a kind of layer."""
    found = []
    for shape in kind.shapes:
        op = kind.operator(IMAGES[len(shape) - 2])
        low, high = jaxsrn.stable_rank_range(shape, op)
        for seed in range(seeds):
            kernel = jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))
            # A fraction that is infeasible for a shape is left out.
            feasible = (fraction for fraction in fractions if fraction is None or fraction * high > low)
            found += [first_step(kernel, op, fraction) for fraction in feasible]
    return [start for start in found if start]


def row(name: str, asked: str, found: list[Start]) -> tuple:
    farther, excess = np.array(found).T
    worst = [f"{max(0.0, each.max()):.1e}" for each in (farther, excess)]
    shares = [f"{np.mean(each > ENOUGH):.1%}" for each in (farther, excess)]
    if asked == "the norm alone":
        worst[0] = shares[0] = ""
    return name, asked, len(found), worst[0], shares[0], worst[1], shares[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="small kernels of one kind; records nothing")
    fast = parser.parse_args().fast
    seeds = 1 if fast else 6
    kinds = {"unbounded": KINDS["unbounded"]._replace(shapes=LONG)} if fast else KINDS
    rows = []
    for name, kind in tqdm(kinds.items(), desc="kinds"):
        rows.append(row(name, "a stable rank", starts(kind, FRACTIONS, seeds)))
        rows.append(row(name, "the norm alone", starts(kind, (None,), seeds)))
    heads = ("convolution", "asked", "kernels", "farther, worst", "share", "norm, worst", "share")
    about = ABOUT.format(seeds=seeds, fractions=", ".join(map(str, FRACTIONS)), enough=ENOUGH)
    sections = [("First steps", f"{about}\n\n{table(heads, rows)}")]
    publish("starts", "Where training steps start", sections, [], keep=not fast)


if __name__ == "__main__":
    main()

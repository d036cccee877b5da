"""What every number of a layer promises, on drawn geometries, against the explicit float64 matrix.

A drawn shape compiles programs, which is what takes time, so that a stack of kernels of many families goes through each
of them. `test_properties.py` draws a few geometries; this draws as many as wanted, and goes on where it was stopped:

    python -m tests.properties --cases 20000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# As a module of the root the folder of the tests is not on the path yet.
sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: F401  (XLA's flags, before JAX is imported)
import jax
import jax.numpy as jnp
from cases import dense, shapes, weights

import jaxsrn
from jaxsrn import CircularConv, Dense, UnboundedConv, ZeroPaddedConv, bounds

# Explicit matrices have at most so many entries, and kernels too: more would leave time for fewer cases.
MOST_ENTRIES, MOST_WEIGHTS = 1600, 200
# Relative errors that the library promises, of norms and of constraints, and what the oracle itself may be off.
NORM = {np.float32: 1e-5, np.float64: 1e-10}
CONSTRAINT = {np.float32: 1e-4, np.float64: 1e-8}
ORACLE = 1e-13
BOUNDS = (bounds.fantastic_four, bounds.gram_iteration, bounds.lip_bound, bounds.l1, bounds.channel_l1)


class Geometry(NamedTuple):
    """A layer, and the shape and the dtype of its kernels."""

    op: Dense | CircularConv | ZeroPaddedConv
    kernel_shape: tuple[int, ...]
    dtype: type


# What is drawn


@st.composite
def drawn_layers(draw, kinds=("dense", "circular", "padded")) -> dict:
    """The arguments of `geometry_of`: the checks of types in operators use random numbers, which no strategy may."""
    dtype, kind = draw(st.sampled_from([np.float64, np.float32])), draw(st.sampled_from(kinds))
    num_axes = draw(st.sampled_from([1, 1, 1, 2, 2, 3]))
    most = {1: 9, 2: 4, 3: 3}[num_axes]
    per_axis = st.tuples(*num_axes * [st.integers(1, most)])
    steps = st.tuples(*num_axes * [st.sampled_from([1, 1, 1, 2, 3])])
    pair = st.tuples(st.integers(-1, 3), st.integers(-1, 3))
    return {
        "kind": kind,
        "dtype": dtype,
        "matrix": draw(st.tuples(st.integers(1, 16), st.integers(1, 16))),
        "image": draw(per_axis),
        "taps": draw(per_axis),
        "channels": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "groups": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "strides": draw(steps),
        "dilations": (draw(steps), draw(steps)),
        "padding": draw(st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(*num_axes * [pair]))),
    }


def geometry_of(drawn: dict) -> Geometry:
    """The layer: even, odd, non-square, taps beyond the image, axes of one sample or one tap, groups."""
    kind, dtype, image, taps = (drawn[name] for name in ("kind", "dtype", "image", "taps"))
    if kind == "dense":
        return Geometry(Dense(), drawn["matrix"], dtype)
    (c_in, c_out), groups, strides = drawn["channels"], drawn["groups"], drawn["strides"]
    options = {"strides": strides, "kernel_dilation": drawn["dilations"][0], "feature_group_count": groups}
    if kind == "circular":
        op = CircularConv(tuple(n * s for n, s in zip(image, strides, strict=True)), **options)
    elif isinstance(drawn["padding"], str):
        op = ZeroPaddedConv(image, padding=drawn["padding"], **options)
    else:
        op = ZeroPaddedConv(image, padding=drawn["padding"], input_dilation=drawn["dilations"][1], **options)
    geometry = Geometry(op, (*taps, c_in, groups * c_out), dtype)
    if _is_valid(geometry):
        return geometry
    # What has no output is refused, and what is too large for the oracle is made smaller.
    image = tuple(min(n, {1: 9, 2: 3, 3: 2}[len(image)]) for n in image)
    op = CircularConv(image) if kind == "circular" else ZeroPaddedConv(image)
    return Geometry(op, (*(min(t, 3) for t in taps), min(c_in, 2), min(c_out, 2)), dtype)


def _is_valid(geometry: Geometry) -> bool:
    op, shape, _ = geometry
    in_shape, out_shape = shapes(shape, op)
    if min(out_shape) < 1 or math.prod(shape) > MOST_WEIGHTS:
        return False
    return math.prod(in_shape) * math.prod(out_shape) <= MOST_ENTRIES


def families(shape: tuple[int, ...], count: int, number: int, scale: float) -> dict[str, np.ndarray]:
    """Stacks of `count` kernels, by what is hard about them; norms are of the order of `scale` to its inverse."""
    rng = np.random.default_rng(number)
    taps, (c_in, c_out) = shape[:-2], shape[-2:]

    def normal(*size):
        return rng.standard_normal((count, *size))

    def at_tap(matrices):
        kernel = np.zeros((count, math.prod(taps), c_in, c_out))
        kernel[np.arange(count), rng.integers(math.prod(taps), size=count)] = matrices
        return kernel.reshape((count, *shape))

    left, right = (np.linalg.qr(normal(n, min(c_in, c_out)))[0] for n in (c_in, c_out))
    orthogonal = left @ np.swapaxes(right, 1, 2)
    gaussian = normal(*shape)
    low_rank = np.einsum("nt,ni,no->ntio", normal(math.prod(taps)), normal(c_in), normal(c_out))
    silent = gaussian.copy()
    silent[..., rng.integers(c_in), :] = 0
    exponents = rng.uniform(-1, 1, (count,) + (1,) * len(shape))
    return {
        "gaussian": gaussian,
        "rank one": low_rank.reshape(gaussian.shape),
        "orthogonal tap": at_tap(orthogonal),
        "one weight": at_tap(orthogonal * (rng.permuted(np.arange(c_in * c_out)) == 0).reshape((c_in, c_out))),
        "channel zero": silent,
        "nearly equal values": at_tap(orthogonal) + 1e-4 * gaussian,
        "signs": np.sign(gaussian),
        "smooth": np.abs(gaussian),
        # Sums of nearly equal products lose digits where they are added one after another.
        "alike": 1 + 1e-3 * gaussian,
        "alternating": (-1.0) ** np.indices(shape).sum(axis=0) + 1e-3 * gaussian,
        "scaled": gaussian * scale**exponents,
    }


# The oracle


class Oracle:
    """Explicit matrices of stacks of kernels, by the linear map from kernels to matrices."""

    def __init__(self, geometry: Geometry):
        self.op, self.shape = geometry.op, geometry.kernel_shape
        size = math.prod(self.shape)
        self.basis = np.stack([dense(row.reshape(self.shape), self.op) for row in np.eye(size)])
        self.weights = weights(self.shape, self.op)

    def matrices(self, kernels) -> np.ndarray:
        flat = np.asarray(kernels, np.float64).reshape((len(kernels), -1))
        return np.tensordot(flat, self.basis, 1)

    def values(self, kernels) -> np.ndarray:
        """All singular values of each, the largest first."""
        return np.linalg.svd(self.matrices(kernels), compute_uv=False)

    def frobenius(self, kernels) -> np.ndarray:
        return np.linalg.norm(self.matrices(kernels).reshape((len(kernels), -1)), axis=1)


def relative(a, b):
    """`|a - b|` in units of the larger of `b` and nothing at all."""
    return np.abs(a - b) / np.where(b == 0, 1, b)


def require(holds, what: str, geometry: Geometry, names) -> None:
    """Every kernel of the stack; the first that breaks the property is named."""
    holds = np.asarray(holds)
    if not holds.all():
        bad = np.flatnonzero(~holds)
        raise AssertionError(f"{what}: {len(bad)} of {len(holds)}, first of family {names[bad[0]]!r}, {geometry}")


def stacked(geometry: Geometry, count: int, number: int):
    """`(kernels, the family of each)`; scales leave room for what float32 can hold."""
    found = families(geometry.kernel_shape, count, number, 1e30 if geometry.dtype == np.float64 else 1e15)
    names = np.repeat(list(found), count)
    return np.concatenate(list(found.values())).astype(geometry.dtype), names


# The properties


@jax.jit
def _numbers(kernels, op):
    def one(kernel):
        norm, gradient = jax.value_and_grad(jaxsrn.spectral_norm)(kernel, op)
        return norm, gradient, jaxsrn.stable_rank(kernel, op)

    return jax.vmap(one)(kernels)


@jax.jit
def _proven(kernels, op):
    return jax.vmap(lambda kernel: (bounds.certified(kernel, op), [bound(kernel, op) for bound in BOUNDS]))(kernels)


def check_norms(geometry: Geometry, count: int, number: int) -> tuple[int, int]:
    """Norm, its gradient, stable rank, interval and bounds. Returns how many kernels and certificates were checked."""
    kernels, names = stacked(geometry, count, number)
    oracle, exact = Oracle(geometry), NORM[geometry.dtype]
    values, frobenius = oracle.values(kernels), oracle.frobenius(kernels)
    true = values[:, 0]
    norm, gradient, rank = jax.tree.map(np.asarray, _numbers(jnp.asarray(kernels), geometry.op))
    interval, others = jax.tree.map(np.asarray, _proven(jnp.asarray(kernels), geometry.op))
    # Taps that cancel (circular, around the image) leave rounding of the kernel's own size.
    size = np.abs(kernels.astype(np.float64)).reshape((len(kernels), -1)).sum(axis=1)
    floor = np.where(true < 1e-3 * size, 4 * np.finfo(geometry.dtype).eps * size, 0)
    require(np.abs(norm - true) <= exact * true + floor, "norm", geometry, names)
    wanted = np.where(true == 0, 0, (frobenius / np.where(true == 0, 1, true)) ** 2)
    require((relative(rank, wanted) <= 10 * exact) | (floor > 0), "stable rank", geometry, names)
    require(interval.lower <= true * (1 + ORACLE), "lower end", geometry, names)
    require(interval.upper >= true * (1 - ORACLE), "upper end", geometry, names)
    for bound, value in zip(BOUNDS, others, strict=True):
        require(value >= true * (1 - ORACLE), f"bound {bound.__name__}", geometry, names)
        require(np.isfinite(value), f"finite {bound.__name__}", geometry, names)
    axes = tuple(range(1, kernels.ndim))
    require(np.isfinite(gradient).all(axis=axes), "finite gradient", geometry, names)
    # Euler: the norm is homogeneous of degree 1.
    along = np.sum(gradient.astype(np.float64) * kernels, axis=axes)
    require(np.abs(along - true) <= 10 * exact * true + 10 * floor, "gradient along the kernel", geometry, names)
    _check_slope(geometry, oracle, kernels, names, gradient, values)
    return len(kernels), len(kernels)


def _check_slope(geometry, oracle, kernels, names, gradient, values) -> None:
    """The gradient along a random direction against central differences, where the leading value is simple."""
    simple = (values[:, 0] > 0) & (values[:, 1:2] < 0.99 * values[:, :1]).all(axis=1)
    size = values[:, 0].reshape((-1,) + (1,) * (kernels.ndim - 1))
    direction = np.random.default_rng(0).standard_normal(kernels.shape)
    step = 1e-6
    ahead, behind = (oracle.values(kernels + sign * step * size * direction)[:, 0] for sign in (1, -1))
    size = np.where(values[:, 0] == 0, 1, values[:, 0])
    slope = (ahead - behind) / (2 * step * size)
    found = np.sum(gradient * direction, axis=tuple(range(1, kernels.ndim)))
    close = np.abs(found - slope) <= (1e-3 if geometry.dtype == np.float32 else 1e-4) * (1 + np.abs(slope))
    require(close | ~simple, "gradient against differences", geometry, names)


@jax.jit
def _normalized(kernels, op, shares):
    low = jaxsrn.stable_rank_range(kernels.shape[1:], op).low

    def one(kernel, share):
        target = low + share * jnp.maximum(jaxsrn.stable_rank(kernel, op) - low, 0)

        def distance(kernel):
            result = jaxsrn.srnc(kernel, op, target)
            return result.distance, result

        gradient, result = jax.grad(distance, has_aux=True)(kernel)
        return target, result, gradient

    # One after the other: in a batch all take the steps of the slowest.
    return jax.lax.map(lambda pair: one(*pair), (kernels, shares))


def check_srnc(geometry: Geometry, count: int, number: int) -> tuple[int, int]:
    """Both constraints, the distance, the proven gap, and the flag, for targets from the lowest up to the kernel's."""
    op, shape, dtype = geometry
    if not isinstance(op, Dense) and op._distinct_shape(shape) != shape:
        return 0, 0
    kernels, names = stacked(geometry, count, number)
    oracle, exact = Oracle(geometry), CONSTRAINT[dtype]
    shares = np.random.default_rng(number).uniform(0.05, 1.1, len(kernels)).astype(dtype)
    target, result, gradient = jax.tree.map(np.asarray, _normalized(jnp.asarray(kernels), op, jnp.asarray(shares)))
    true, before = oracle.values(kernels)[:, 0], oracle.frobenius(kernels)
    norm, after = oracle.values(result.kernel)[:, 0], oracle.frobenius(result.kernel)
    rank = np.where(norm == 0, 0, (after / np.where(norm == 0, 1, norm)) ** 2)
    numbers = np.stack([result.stable_rank, result.spectral_norm, result.distance, result.gap, result.residual])
    require(np.isfinite(numbers).all(axis=0), "finite numbers", geometry, names)
    for array in (result.kernel, gradient):
        require(np.isfinite(array).reshape((len(kernels), -1)).all(axis=1), "finite arrays", geometry, names)
    require(relative(result.spectral_norm, norm) <= exact, "norm of the result", geometry, names)
    require(relative(result.stable_rank, rank) <= exact, "stable rank of the result", geometry, names)
    moved = oracle.frobenius(result.kernel.astype(np.float64) - kernels) / np.where(before == 0, 1, before)
    require(np.abs(result.distance - moved) <= exact * (1 + moved), "distance", geometry, names)
    own = np.where(true == 0, 0, (before / np.where(true == 0, 1, true)) ** 2)
    met = (relative(rank, target) <= 10 * exact) & (relative(norm, true) <= 10 * exact)
    unchanged = own <= target * (1 + exact)
    require(met | unchanged | ~result.feasible, "constraints", geometry, names)
    require((moved <= exact) | (own > target * (1 - exact)), "unchanged", geometry, names)
    require((result.gap >= 0) & (result.gap <= result.distance + exact), "gap", geometry, names)
    if not isinstance(op, ZeroPaddedConv):
        require(result.feasible, "feasible within the range", geometry, names)
    return len(kernels), 0


@jax.jit
def _projected(kernels, op, shares):
    def one(kernel, share):
        norm = jaxsrn.spectral_norm(kernel, op)
        limit = share * jnp.where(norm == 0, 1.0, norm).astype(kernel.dtype)
        return limit, jaxsrn.project_spectral_ball(kernel, op, limit)

    # One after the other: in a batch all take the steps of the slowest.
    return jax.lax.map(lambda pair: one(*pair), (kernels, shares))


def check_projection(geometry: Geometry, count: int, number: int) -> tuple[int, int]:
    """In the ball, never farther than the scaled kernel, and the variational inequality against points of the ball."""
    op, shape, dtype = geometry
    if not isinstance(op, Dense) and op._distinct_shape(shape) != shape:
        return 0, 0
    kernels, names = stacked(geometry, count, number)
    oracle, exact = Oracle(geometry), CONSTRAINT[dtype]
    shares = np.random.default_rng(number).uniform(0.1, 1.2, len(kernels)).astype(dtype)
    limit, result = jax.tree.map(np.asarray, _projected(jnp.asarray(kernels), op, jnp.asarray(shares)))
    size, limit = oracle.frobenius(kernels), limit.astype(np.float64)
    size = np.where(size == 0, 1, size)
    norm = oracle.values(result.kernel)[:, 0]
    require(np.isfinite(result.kernel).reshape((len(kernels), -1)).all(axis=1), "finite", geometry, names)
    require(norm <= limit * (1 + NORM[dtype]), "in the ball", geometry, names)
    point = result.kernel.astype(np.float64)
    moved = oracle.frobenius(point - kernels)
    scaled = np.maximum(1 - limit / np.where(norm == 0, 1, oracle.values(kernels)[:, 0]), 0) * size
    require(moved <= scaled * (1 + exact) + exact * size, "no farther than scaling", geometry, names)
    require((result.gap >= 0) & np.isfinite(result.gap), "gap", geometry, names)
    # Kernels of the ball: other kernels of the stack, scaled to its boundary.
    other = np.roll(kernels, 1, axis=0).astype(np.float64)
    other_norm = oracle.values(other)[:, 0]
    factor = (limit / np.where(other_norm == 0, 1, other_norm)).reshape((-1,) + (1,) * (kernels.ndim - 1))
    inside = np.where(factor < np.inf, factor, 0) * other
    far = oracle.frobenius(inside - kernels)
    lower = np.maximum(moved - result.gap * size, 0)
    require((lower <= far * (1 + exact) + exact * size) | (other_norm == 0), "the proven distance", geometry, names)
    return len(kernels), 0


def check_unbounded(geometry: Geometry, count: int, number: int) -> tuple[int, int]:
    """What is proven without edges holds at the drawn image, circular or zero-padded."""
    op = geometry.op
    # In three axes a proof for a flat spectrum looks at too many boxes.
    if isinstance(op, Dense) or max(op.input_dilation) > 1 or op.num_axes > 2:
        return 0, 0
    kernels, names = stacked(geometry, count, number)
    options = {"strides": op.strides, "kernel_dilation": op.kernel_dilation}
    layer = UnboundedConv(**options, feature_group_count=op.feature_group_count)
    interval, others = jax.tree.map(np.asarray, _proven(jnp.asarray(kernels), layer))
    image = Oracle(geometry).values(kernels)[:, 0]
    require(interval.upper >= image * (1 - ORACLE), "upper end without edges", geometry, names)
    # The interval is a hundredth wide, and so the lower end is at most that much below every norm.
    require(interval.lower * 1.011 >= image * (1 - ORACLE), "lower end without edges", geometry, names)
    require(interval.lower <= interval.upper, "interval without edges", geometry, names)
    for bound, value in zip(BOUNDS, others, strict=True):
        require(value >= image * (1 - ORACLE), f"bound {bound.__name__} without edges", geometry, names)
    return len(kernels), len(kernels)


CHECKS = {"norms": check_norms, "unbounded": check_unbounded, "srnc": check_srnc, "projection": check_projection}
# Kernels of each family that go through the programs of one geometry in the large run.
COUNTS = {"norms": 400, "unbounded": 20, "srnc": 4, "projection": 8}


# The large run


def _one_round(name: str, number: int) -> tuple[int, int, list[str]]:
    """One drawn geometry: kernels and certificates checked, and what was violated."""
    done, violations = [], []

    @seed(number)
    # The first examples are the simplest; the last one counts.
    @settings(max_examples=10, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HealthCheck)
    @given(drawn_layers())
    def draw(drawn):
        done.append(geometry_of(drawn))

    draw()
    try:
        counts = CHECKS[name](done[-1], COUNTS[name], number)
    except AssertionError as error:
        violations.append(f"{name}, round {number}: {error}")
        counts = (0, 0)
    jax.clear_caches()
    return *counts, violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="kernels to check, those of earlier runs included")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the next run goes on")
    parser.add_argument("--state", type=Path, default=Path("build/properties.json"), help="where the counts are kept")
    parser.add_argument("--only", choices=CHECKS, help="one of the checks; by default they take turns")
    args = parser.parse_args()
    state = {"rounds": 0, "violations": [], **{f"{name} {kind}": 0 for name in CHECKS for kind in ("cases", "shapes")}}
    state |= {"certificates": 0} | (json.loads(args.state.read_text()) if args.state.exists() else {})
    args.state.parent.mkdir(parents=True, exist_ok=True)
    names, start = [args.only] if args.only else list(CHECKS), time.monotonic()

    def cases() -> int:
        return sum(state[f"{name} cases"] for name in CHECKS)

    while cases() < args.cases and time.monotonic() - start < 60 * args.minutes:
        name = names[state["rounds"] % len(names)]
        checked, certificates, violations = _one_round(name, state["rounds"])
        state["rounds"] += 1
        state[f"{name} cases"] += checked
        state[f"{name} shapes"] += checked > 0
        state["certificates"] += certificates
        state["violations"] += violations
        args.state.write_text(json.dumps(state, indent=1) + "\n")
        print(
            f"{cases():,} cases, {state['certificates']:,} certificates, {len(state['violations'])} violations",
            *violations,
        )
    print(json.dumps(state, indent=1))
    sys.exit(bool(state["violations"]))


if __name__ == "__main__":
    main()

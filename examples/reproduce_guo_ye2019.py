"""The experiments of Guo and Ye (2019), with their Theorem 2.1 drawn in and the barrier that they saw explained.

"On Regularization of Convolutional Kernels in Neural Networks" draws the singular values of a zero-padded convolution
together by gradient descent on R_alpha = ||M^T M - alpha I||. This repeats Examples 1 and 2 (figures 3.1 and 3.2) with
their Algorithm 2.1, `jaxsrn.penalties.extreme_singular_values_step`, measures every iterate by an SVD of the explicit
matrix, and compares the paper's Gram matrix M^T M with the smaller one of M^T M and M M^T.

    pip install -e ".[examples]"
    python examples/reproduce_guo_ye2019.py           # about a minute; writes report.md and figures to guo_ye2019/
    python examples/reproduce_guo_ye2019.py --fast    # half of it: smaller images

Exits with code 1 where Theorem 2.1 is violated, or the barrier is not where it must be.
"""

import functools
import sys
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from _report import command_line, paragraphs, prepared, save, steps_of, table, write
from tqdm import tqdm

from jaxsrn import ZeroPaddedConv, penalties

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

# Section 3 of the paper.
SHAPES = ((3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3))
ALPHAS = (0.1, 1.0, 5.0, 10.0)
BARRED = (3, 3, 3, 1)
RATE = 0.01
POWER_STEPS = 2
PUBLISHED_STEPS = 20
NUM_STEPS = 40
# Relative to the start: what counts as converged, about what a figure with a linear axis resolves.
SETTLED = 0.02
# From Okabe and Ito's palette, safe for colour-blind readers.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


class Run(NamedTuple):
    """A descent: after each number of steps, what an SVD of the explicit matrix says, and what the method believed.

    Attributes:
      alpha, gram: of the penalty.
      values: `(steps, min(in, out))`, all singular values.
      penalty: `(steps,)`, R_alpha on the side of `gram`, by its definition.
      tracked: `(steps,)`, the method's own value of it.
      slope: `(steps,)`, norm of the gradient that it followed.
    """

    alpha: float
    gram: str
    values: np.ndarray
    penalty: np.ndarray
    tracked: np.ndarray
    slope: np.ndarray

    @property
    def largest(self):
        return self.values[:, 0]

    @property
    def smallest(self):
        return self.values[:, -1]


def uniform_kernel(shape) -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 1, shape)


def exact_penalty(matrix, alpha: float, gram: str) -> float:
    """R_alpha by its definition: the norm of the Gram matrix of the explicit matrix, less alpha."""
    small = gram == "small" and matrix.shape[0] < matrix.shape[1]
    product = matrix @ matrix.T if small else matrix.T @ matrix
    return float(np.max(np.abs(np.linalg.eigvalsh(product) - alpha)))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def value_and_gradient(kernel, pairs, alpha, op, gram: str, exact: bool):
    """`((R_alpha, stepped pairs), gradient)`: from tracked pairs, or exactly."""

    def value_and_pairs(kernel):
        if exact:
            return penalties.extreme_singular_values(kernel, op, alpha=alpha, gram=gram), pairs
        return penalties.extreme_singular_values_step(kernel, pairs, op, alpha=alpha, gram=gram, num_steps=POWER_STEPS)

    return jax.value_and_grad(value_and_pairs, has_aux=True)(kernel)


@functools.partial(jax.jit, static_argnums=1)
def dense(kernel, op):
    return op.to_dense(kernel)


def descend(shape, size: int, alpha: float, gram: str, *, exact: bool = False) -> Run:
    """Gradient descent from the uniform kernel: Algorithm 2.1, or with the exact gradient at every step."""
    op, kernel = ZeroPaddedConv((size, size)), jax.numpy.asarray(uniform_kernel(shape))
    pairs = None if exact else penalties.init_pairs(kernel, op, alpha=alpha, gram=gram)
    records = []
    for _ in range(NUM_STEPS + 1):
        (tracked, pairs), gradient = value_and_gradient(kernel, pairs, alpha, op, gram, exact)
        matrix = np.asarray(dense(kernel, op))
        values, penalty = np.linalg.svd(matrix, compute_uv=False), exact_penalty(matrix, alpha, gram)
        records.append((values, penalty, float(tracked), float(np.linalg.norm(gradient))))
        kernel = kernel - RATE * gradient
    return Run(alpha, gram, *map(np.array, zip(*records, strict=True)))


# What must hold


def violations(run: Run, is_barred: bool) -> list[str]:
    """Theorem 2.1 at every iterate; on the input side of `c_in > c_out` never below alpha, for the other side below."""
    found = []
    share = run.penalty / run.alpha * (1 + 1e-9)
    holds = share <= 1
    if not is_barred or run.gram == "small":
        low, high = np.sqrt(np.maximum(1 - share, 0) * run.alpha), np.sqrt((1 + share) * run.alpha)
        if np.any(holds & ((run.smallest <= low) | (run.largest >= high))):
            found.append(f"Theorem 2.1 fails at alpha = {run.alpha:g}, {run.gram} side")
    if is_barred and run.gram == "input" and np.any(run.penalty < run.alpha * (1 - 1e-9)):
        found.append(f"the input side is below alpha = {run.alpha:g}")
    return found


def failures(first: dict, tracked: dict, exact: dict, small: dict) -> list[str]:
    """Of everything that must hold, what does not."""
    bad = [text for (shape, _), run in first.items() for text in violations(run, shape[2] > shape[3])]
    bad += [text for runs in (tracked, exact, small) for run in runs.values() for text in violations(run, True)]
    reached = [alpha for alpha, run in exact.items() if run.penalty.min() <= alpha * (1 + 1e-9)]
    bad += [] if set(reached) >= {1.0, 5.0, 10.0} else [f"the barrier is reached only at alpha = {reached}"]
    for alpha in reached:
        run = exact[alpha]
        stays = np.isclose(run.penalty[-1], alpha, rtol=1e-9) and run.slope[-1] == 0
        bad += [] if stays else [f"alpha = {alpha:g}: the input side does not end at alpha with gradient 0"]
        bad += [] if small[alpha].penalty.min() < alpha else [f"alpha = {alpha:g}: the small side stays above alpha"]
    published = {named(shape): run for (shape, gram), run in first.items() if gram == "input"}
    late = [name for name, run in published.items() if settled_after(run.penalty) > PUBLISHED_STEPS]
    bad += [f"not settled within {PUBLISHED_STEPS} iterations: {name}" for name in late]
    return bad


def settled_after(values) -> int:
    """From which step on the values stay, relative to the start, close to where the descent ends (its last quarter)."""
    end = np.median(values[-len(values) // 4 :])
    away = np.flatnonzero(np.abs(values - end) > SETTLED * values[0])
    return 0 if not len(away) else int(away[-1]) + 1


# The report


def named(shape) -> str:
    return "x".join(map(str, shape))


def range_of(values, digits: int = 2) -> str:
    return f"{values[0]:.{digits}f} to {values[PUBLISHED_STEPS]:.{digits}f}"


def row_of(name, run: Run) -> list[str]:
    with np.errstate(divide="ignore"):
        condition = run.largest / run.smallest
    return [
        name,
        run.gram,
        f"{run.penalty[0]:.1f}",
        f"{run.penalty[PUBLISHED_STEPS]:.3f}",
        f"{run.penalty[-1]:.3f}",
        f"{settled_after(run.penalty)}",
        range_of(run.largest),
        range_of(run.smallest, 3),
        range_of(condition, 1),
    ]


HEADER = (
    "kernel",
    "side",
    "R at 0",
    f"at {PUBLISHED_STEPS}",
    f"at {NUM_STEPS}",
    "settled after",
    "sigma_max",
    "sigma_min",
    "condition",
)


def report_first(runs: dict, size: int) -> str:
    rows = [row_of(named(shape), run) for (shape, _), run in runs.items()]
    published = [settled_after(run.penalty) for (_, gram), run in runs.items() if gram == "input"]
    return paragraphs(
        f"Kernels on {size}x{size} samples, zero padding, entries uniform in [0, 1], alpha = 1, lambda = {RATE:g}, "
        f"Algorithm 2.1 with {POWER_STEPS} power steps. `R`: R_1 on the given side, from the explicit matrix; "
        f"singular values at step 0 and step {PUBLISHED_STEPS}.",
        table(HEADER, rows),
        f"`settled after`: from which step on R stays within {SETTLED:.0%} of its first value of where it ends. On the "
        f"paper's side that is {min(published)} to {max(published)} steps (the paper: all converge well within "
        f"{PUBLISHED_STEPS}); what is left falls slowly. As in the paper R and the condition number fall with "
        "sigma_max, while sigma_min moves much less.",
        "![Values of the penalty, and the two ends of the singular values, over the iterations](figure1.png)",
    )


def report_second(tracked: dict, exact: dict, small: dict) -> str:
    rows = []
    for alpha in ALPHAS:
        run, sharp, other = tracked[alpha], exact[alpha], small[alpha]
        rows.append(
            [
                f"{alpha:g}",
                f"{run.tracked.min() / alpha:.4f}",
                f"{run.penalty.min() / alpha:.4f}",
                f"{sharp.penalty.min() / alpha:.4f}",
                f"{sharp.slope[-1]:.1e}",
                f"{other.penalty.min() / alpha:.4f}",
                f"{other.slope[-1]:.1e}",
                f"{range_of(run.largest)}",
                f"{range_of(run.smallest, 3)}",
            ]
        )
    dips = {a: int(run.tracked.argmin()) for a, run in tracked.items() if run.tracked.min() < a * (1 - 1e-9)}
    listed = ", ".join(f"{alpha:g} (least at iteration {i})" for alpha, i in dips.items())
    unreached = [alpha for alpha in ALPHAS if exact[alpha].penalty.min() > alpha * (1 + 1e-9)]
    header = ("alpha", "tracked R / alpha", "R / alpha", "exact gradient", "its end", "small side", "its end")
    return paragraphs(
        f"The {named(BARRED)} kernel with each alpha. Lowest R / alpha on the way: as Algorithm 2.1 tracks it, and as "
        "it is; following the exact gradient of the input side, with the norm of the last gradient; following that of "
        f"the small side, with the same. Then the singular values of Algorithm 2.1 at step 0 and {PUBLISHED_STEPS}.",
        table((*header, "sigma_max", "sigma_min"), rows),
        "M has more columns than rows, so M^T M is singular: R = max(sigma_max^2 - alpha, alpha) is alpha as soon as "
        "sigma_max^2 <= 2 alpha, and its gradient, that of ||M v||^2 with M v = 0, is exactly 0. This is the barrier "
        "that the paper observed. Values below alpha are impossible; Algorithm 2.1 reports some at alpha = "
        f"{listed or 'none'}, where its power steps have not yet found the null space: such are the dips of the "
        "paper's Figure 3.2, at iterations 6 and 4 for alpha = 5 and 10. With M M^T there is no null space, R falls "
        "below alpha, and Theorem 2.1 says something about the smallest singular value. "
        f"Not reached in {NUM_STEPS} steps: alpha = {', '.join(f'{a:g}' for a in unreached) or 'none'}.",
        "![The same for every alpha](figure2.png)",
        "![The barrier: the penalty over alpha, and the norm of its gradient](figure3.png)",
    )


# Figures


def draw_run(ax, run: Run, title: str):
    """Singular values, condition number (left), R (right), and the interval of Theorem 2.1."""
    steps = np.arange(PUBLISHED_STEPS + 1)
    shown = slice(0, PUBLISHED_STEPS + 1)
    low, high = np.sqrt(np.maximum(run.alpha - run.penalty, 0)), np.sqrt(run.alpha + run.penalty)
    band = ax.fill_between(steps, low[shown], high[shown], color=GREEN, alpha=0.15, lw=0)
    with np.errstate(divide="ignore"):
        condition = run.largest / run.smallest
    (one,) = ax.plot(steps, run.largest[shown], color=BLUE, lw=1.8)
    (two,) = ax.plot(steps, run.smallest[shown], color=BLUE, lw=1.8, ls="--")
    (three,) = ax.plot(steps, condition[shown], color=BLUE, lw=1.5, ls=":")
    right = ax.twinx()
    (four,) = right.plot(steps, run.penalty[shown], color=RED, lw=1.8)
    right.axhline(run.alpha, color=RED, lw=0.8, ls="--")
    ax.set(title=title, xlabel="iterations", xlim=(0, PUBLISHED_STEPS), yscale="log")
    ax.set_xticks(range(0, PUBLISHED_STEPS + 1, 5))
    right.set_ylim(0, None)
    right.tick_params(axis="y", colors=RED)
    right.spines["right"].set_visible(True)
    return {
        r"$\sigma_{\max}$": one,
        r"$\sigma_{\min}$": two,
        r"$\kappa$": three,
        r"$R_\alpha$ (right; dashed: $\alpha$)": four,
        "interval of Theorem 2.1": band,
    }


def draw_runs(runs: dict[str, Run], path):
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ax, (title, run) in zip(axes.flat, runs.items(), strict=True):
        lines = draw_run(ax, run, title)
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines), frameon=False)
    save(figure, path, dpi=110)


def draw_barrier(tracked: dict, exact: dict, small: dict, path):
    """R / alpha and the gradient: on the input side as tracked and exactly, and on the small side."""
    figure, axes = plt.subplots(2, len(ALPHAS), figsize=(13, 5.6), layout="constrained", sharex=True, sharey="row")
    for (top, bottom), alpha in zip(axes.T, ALPHAS, strict=True):
        curves = (
            ("input side, Algorithm 2.1's own value", tracked[alpha].tracked, tracked[alpha].slope, GREY, "-"),
            ("input side, exact", exact[alpha].penalty, exact[alpha].slope, RED, "-"),
            ("small side, exact", small[alpha].penalty, small[alpha].slope, BLUE, "-"),
        )
        for label, penalty, slope, color, style in curves:
            top.plot(penalty / alpha, color=color, ls=style, lw=1.8, label=label)
            # A gradient of exactly 0 has no place on a logarithmic axis: the line ends.
            bottom.plot(np.where(slope == 0, np.nan, slope), color=color, ls=style, lw=1.8)
        top.axhline(1, color="0.3", lw=0.8, ls="--")
        top.set(title=rf"$\alpha = {alpha:g}$", yscale="log", ylim=(0.1, 1000), xlim=(0, NUM_STEPS))
        bottom.set(xlabel="iterations", yscale="log")
    axes[0, 0].set_ylabel(r"$R_\alpha / \alpha$")
    axes[1, 0].set_ylabel("norm of the gradient")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    save(figure, path, dpi=110)


# All of it


def main():
    args = command_line(__doc__, "smaller images", "guo_ye2019").parse_args()
    size, output = 7 if args.fast else 15, prepared(args.output)

    first, tracked, exact, small = {}, {}, {}, {}
    with tqdm(total=len(SHAPES) + len(ALPHAS)) as progress:
        tick = steps_of(progress)
        for shape in SHAPES:
            tick(f"Example 1, {named(shape)}")
            sides = ("input", "small") if shape[2] > shape[3] else ("input",)
            first |= {(shape, gram): descend(shape, size, 1.0, gram) for gram in sides}
        for alpha in ALPHAS:
            tick(f"Example 2, alpha = {alpha:g}")
            tracked[alpha] = descend(BARRED, size, alpha, "input")
            exact[alpha] = descend(BARRED, size, alpha, "input", exact=True)
            small[alpha] = descend(BARRED, size, alpha, "small", exact=True)
        progress.update()
    draw_runs({f"{named(shape)}": first[shape, "input"] for shape in SHAPES}, output / "figure1.png")
    draw_runs({rf"$\alpha = {alpha:g}$": tracked[alpha] for alpha in ALPHAS}, output / "figure2.png")
    draw_barrier(tracked, exact, small, output / "figure3.png")

    bad = failures(first, tracked, exact, small)
    sections = {
        "Example 1 (the paper's 3.1)": report_first(first, size),
        "Example 2 (the paper's 3.2) and the barrier": report_second(tracked, exact, small),
        "Requirement": f"Theorem 2.1 at every iterate; on the input side of {named(BARRED)} R >= alpha, and where that "
        "is reached it stays, with gradient exactly 0, while the small side falls below alpha (alpha = 1, 5, 10 at "
        f"least); settled within {PUBLISHED_STEPS}: "
        f"{'; '.join(bad) if bad else 'all hold'}.",
    }
    write(output, "The experiments of Guo and Ye (2019)", sections)
    if bad:
        sys.exit("; ".join(bad))


if __name__ == "__main__":
    main()

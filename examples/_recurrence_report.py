"""Tables and figures of the study of recurrent denoising (`stable_recurrence.py`).

`runs` holds for each constraint the results of its seeds.
"""

import matplotlib
import numpy as np
from _report import save, table
from _studies import mean_and_spread, mean_difference

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = [
    "FAILURE",
    "WINDOW",
    "conclusion",
    "draw_curves",
    "draw_worst",
    "failed_at",
    "has_failed",
    "norm_table",
    "psnr_table",
    "worst_table",
]

# Okabe, Ito: distinguishable with any colour vision.
BLUE, RED = "#0072B2", "#D55E00"
PLAIN, FLATTENED = "plain", "flattened-SN"
SIZES = ("same", "other")


# Decibels below the short sequence, on average over so many frames in a row, that count as a failure.
FAILURE, WINDOW = 3.0, 10


# Numbers


def number(value) -> float:
    """Of what JSON holds, where `None` is what was not finite."""
    return float("inf") if value is None else value


def failed_at(played: dict) -> int | None:
    """The number of frames of a long sequence after which it has failed, if it has."""
    values = [np.nan if value is None else value for value in played["psnr"]]
    means = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
    bad = np.flatnonzero(~(means >= played["short"] - FAILURE))
    return int(bad[0]) + WINDOW if bad.size else None


def has_failed(result: dict) -> bool:
    """Whether a run failed on either long sequence."""
    return any(failed_at(result[size]) is not None for size in SIZES)


# Tables


def conclusion(runs: dict[str, list[dict]], exact: list[str]) -> str:
    """Whether the claim held; `exact` names the settings with an exact constraint."""
    counts = {name: sum(map(has_failed, results)) for name, results in runs.items()}
    failed = {name: f"{name} ({count} of {len(runs[name])})" for name, count in counts.items() if count}
    others = [text for name, text in failed.items() if name not in exact]
    bad = [text for name, text in failed.items() if name in exact]
    return (
        f"Seeds that fail on a long sequence, without an exact constraint: {', '.join(others) or 'none'}. With an "
        f"exact one: {', '.join(bad) or f'none, with none of the {len(exact)} settings, at neither size'}."
    )


def failures(results: list[dict], size: str) -> str:
    """How many seeds failed, and at which frame the first did."""
    found = [at for result in results if (at := failed_at(result[size])) is not None]
    return f"{len(found)} of {len(results)}" + (f" ({min(found)})" if found else "")


def last(results: list[dict], size: str) -> str:
    """The PSNR of the last period, and of seeds that have left every scale only that."""
    values = [result[size]["last"] for result in results]
    finite = [value for value in values if value is not None]
    lost = len(values) - len(finite)
    return ", ".join([mean_and_spread(finite, ".2f")] * bool(finite) + [f"{lost} beyond float32"] * bool(lost))


def difference(results: list[dict], others: list[dict], part: str) -> str:
    """That of the PSNR at the other size, with its p-value; nothing where a run is beyond float32."""
    values, baseline = ([result["other"][part] for result in each] for each in (results, others))
    if results is others or None in values + baseline:
        return ""
    return mean_difference(values, baseline, ".2f")


def psnr_table(runs: dict[str, list[dict]]) -> str:
    rows = []
    for name, results in runs.items():
        short = mean_and_spread([result["other"]["short"] for result in results], ".2f")
        cells = [cell for size in SIZES for cell in (last(results, size), failures(results, size))]
        against = difference(results, runs[PLAIN], "short"), difference(results, runs[FLATTENED], "last")
        rows.append((name, short, against[0], *cells, against[1]))
    long = ("long, training size", "failed", "long, other size", "failed", f"against {FLATTENED}")
    return table(("loop", "short", f"against {PLAIN}", *long), rows)


def norm_table(runs: dict[str, list[dict]]) -> str:
    def spread(values, form):
        return f"{min(values):{form}} to {max(values):{form}}"

    rows = []
    for name, results in runs.items():
        layers = [layer for result in results for layer in result["layers"]]
        gains = [result["gain"] for result in results]
        rows.append(
            (
                name,
                spread([layer["norm"] for layer in layers], ".4f"),
                spread([layer["stable_rank"] / layer["high"] for layer in layers], ".4f"),
                *(f"{max(result[key] for result in results):.4f}" for key in ("bound_at_size", "bound")),
                "yes" if max(result["bound"] for result in results) < 1 else "no",
                f"{max(map(number, gains)):.1f}",
            )
        )
    header = ("loop", "norms", "stable ranks / largest", "L, training size", "L, every size", "L < 1", "gain")
    return table(header, rows)


def worst_table(runs: dict[str, list[dict]]) -> str:
    rows = []
    for name, results in runs.items():
        found = [result["worst"] for result in results]
        length = len(found[0]["remembered"]) // 10
        rows.append(
            (
                name,
                f"{max(number(worst['reached']) / number(worst['usual']) for worst in found):.3g}",
                *(f"{max(number(worst['remembered'][at]) for worst in found):.2g}" for at in (length - 1, -1)),
                f"{max(number(worst['loss'][0]) for worst in found):.2f}",
                f"{max(np.mean([number(value) for value in worst['loss'][-length:]]) for worst in found):.2f}",
            )
        )
    remembered = (f"remembered after {length}", f"after {10 * length}")
    header = ("loop", "largest feature / usual", *remembered, "PSNR lost at once", "lost at the end")
    return table(header, rows)


# Figures


def draw_curves(runs, preset, path) -> None:
    columns = 4
    lines = -(-len(runs) // columns)
    shared = {"sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(lines, columns, figsize=(13, 2.7 * lines), squeeze=False, **shared)
    for ax, (name, results) in zip(axes.flat, runs.items(), strict=False):
        for size, color, style in (("same", BLUE, "-"), ("other", RED, "--")):
            for result in results:
                values = np.clip([-40 if value is None else value for value in result[size]["psnr"]], -40, None)
                # Means over ten frames in a row: noise and content differ from frame to frame.
                smooth = np.convolve(values, np.ones(10) / 10, "valid")
                ax.plot(np.arange(len(smooth)) + 10, smooth, color=color, ls=style, lw=1.2)
        ax.axhline(results[0]["same"]["noisy"], color="0.6", lw=1, ls=":")
        failed = sum(failed_at(result[size]) is not None for result in results for size in SIZES)
        verdict = f"{failed} of {2 * len(results)} fail" if failed else "none fails"
        ax.set_title(f"{name}: {verdict}", fontsize=10, color=RED if failed else "black")
        ax.set(xscale="log", ylim=(-15, 30))
    for ax in axes.flat[len(runs) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("PSNR (dB)")
    for ax in axes[-1]:
        ax.set_xlabel("frame")
    lines = [
        plt.Line2D([], [], color=BLUE, label=f"{preset.size}x{preset.size}, as in training"),
        plt.Line2D([], [], color=RED, ls="--", label=f"{preset.other}x{preset.other}"),
        plt.Line2D([], [], color="0.6", ls=":", label="the noisy video"),
    ]
    figure.legend(handles=lines, frameon=False, loc="outside upper center", ncols=3)
    save(figure, path, dpi=100)


def draw_worst(runs, path) -> None:
    """Left: what is left of the worst case, the worst seed. Right: PSNR of short sequences against the bound."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    colors = [*plt.get_cmap("tab10").colors, (0, 0, 0)]
    for color, (name, results) in zip(colors, runs.items(), strict=False):
        curves = np.array([[number(value) for value in result["worst"]["remembered"]] for result in results])
        left.plot(1 + np.arange(curves.shape[1]), np.maximum(curves.max(0), 1e-7), color=color, label=name)
        for result in results:
            marker = {"marker": "x"} if has_failed(result) else {"marker": "o", "mec": "white"}
            right.plot(result["bound"], result["other"]["short"], color=color, ls="", ms=8, **marker)
    right.axvline(1, color="0.6", lw=1, ls=":")
    left.set(title="share of the worst case's state that is left", xlabel="frames after the worst case", yscale="log")
    left.set_ylim(1e-7, 1e4)
    right.set(title="crosses: fails on the long sequence", xlabel="L at every size")
    right.set(ylabel="PSNR of short sequences (dB)")
    right.set_xscale("log")
    right.set_xticks([1, 2, 3, 4, 6], ["1", "2", "3", "4", "6"])
    right.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside right center")
    save(figure, path, dpi=100)

"""`Report`: the layers of a network with their numbers, and the forms in which people read it."""

from __future__ import annotations

import csv
import dataclasses
import decimal
import html
import importlib
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jaxsrn.operators import Dense
from jaxsrn.report.kernels import GUESSED, OF_MODEL, Skipped
from jaxsrn.report.layers import LayerReport
from jaxsrn.report.not_kernels import OF_WRAPPER

__all__ = ["Report", "aligned", "counted", "digits"]

# A layer stands out by this factor: a half or the double is common among the layers of one trained network.
_FACTOR = 3.0
RULE = (
    f"A layer stands out if its norm is more than {_FACTOR:g} times the median norm or less than the median over "
    f"{_FACTOR:g}, if its share of the range of stable ranks is less than the median share over {_FACTOR:g}, if it is "
    "zero, or if a number of it is not finite."
)
_ASSUMED = (
    "Weights do not say the strides of a convolution, and not always its groups. Where none is told (strides and"
    " groups) it has stride 1 and one group, whose norm bounds that of the layer."
)
_RAW = (
    "Wrapped layers are reported by their raw kernels, and compute with others: analyze the model itself, or save what "
    "fold(model) returns."
)
_HEADER = ("layer", "kernel", "operator", "norm", "certified", "flattened", "stable rank", "range", "share")
_SPECTRA = ("condition", "effective rank")


@dataclasses.dataclass(frozen=True)
class Report:
    """The norms and stable ranks of the layers of a network.

    `print(report)` writes a table, and a notebook shows one.

    Attributes:
      source: what was analyzed: the name of a file, or the class of a model.
      layers: a `LayerReport` of every layer.
      skipped: the arrays that are no layer, each `(name, shape, reason)`. All arrays are in one of the two.
    """

    source: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]

    @property
    def product_of_norms(self) -> float:
        """The product of the spectral norms; infinite beyond the range of floats, NaN where a norm is.

        It is a Lipschitz bound of a network that is a chain of these layers and of activations that are 1-Lipschitz.
        With skip connections, attention, normalizations that are not folded or a layer used twice it is none.
        """
        logarithm = self.log10_product_of_norms
        return math.inf if logarithm >= 308 else 10.0**logarithm

    @property
    def log10_product_of_norms(self) -> float:
        """The decimal logarithm of `product_of_norms`, which does not overflow."""
        norms = [layer.spectral_norm for layer in self.layers]
        # `math.fsum` refuses to add infinities of both signs.
        logarithms = (math.log10(norm) if norm > 0 else -math.inf if norm == 0 else math.nan for norm in norms)
        return sum(logarithms, start=0.0)

    @property
    def sum_of_stable_ranks(self) -> float:
        """The sum of the stable ranks, which generalization bounds contain (Sanyal, Torr, Dokania 2020, section 3)."""
        return math.fsum(layer.stable_rank for layer in self.layers)

    @property
    def outliers(self) -> dict[str, str]:
        """`{name: why}` of the layers that stand out, by the rule that `summary` states."""
        sound = [layer for layer in self.layers if _is_finite(layer) and layer.spectral_norm > 0]
        norm = statistics.median(layer.spectral_norm for layer in sound) if sound else 0.0
        share = statistics.median(layer.share for layer in sound) if sound else 0.0
        found = {layer.name: _stands_out(layer, norm, share) for layer in self.layers}
        return {name: why for name, why in found.items() if why}

    def to_dict(self) -> dict[str, Any]:
        """The report in lists, dictionaries, strings and numbers, as JSON takes them (NaN and infinity as strings)."""
        return _plain(
            {
                "source": self.source,
                "layers": [_row_of(layer) for layer in self.layers],
                "product_of_norms": self.product_of_norms,
                "log10_product_of_norms": self.log10_product_of_norms,
                "sum_of_stable_ranks": self.sum_of_stable_ranks,
                "outliers": self.outliers,
                "skipped": [skipped._asdict() for skipped in self.skipped],
            }
        )

    def to_csv(self) -> str:
        """One line for every layer, after a line of names; numbers have all their digits."""
        text = io.StringIO()
        rows = [_row_of(layer) for layer in self.layers]
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table in Markdown, then the numbers of the network and what was skipped."""
        header, rows = self.cells()
        rule = ["---", "---", "---", *["---:"] * (len(header) - 3)]
        lines = [f"| {' | '.join(map(_in_markdown, row))} |" for row in (header, rule, *rows)]
        return "\n".join([*lines, "", *(f"- {line}" for line in self.summary())]) + "\n"

    def __str__(self) -> str:
        header, rows = self.cells()
        return "\n".join([self.source, "", *aligned(header, rows), "", *self.summary()])

    def _repr_html_(self) -> str:
        header, rows = self.cells()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        notes = "".join(f"<li>{html.escape(line)}</li>" for line in self.summary())
        return (
            f"<h4>{html.escape(self.source)}</h4><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table><ul>{notes}</ul>"
        )

    def plot(self):
        """The stable ranks within their ranges as a matplotlib figure, `jaxsrn.plots.stable_ranks(report)`.

        Raises:
          ImportError: matplotlib is missing.
        """
        # The module of pictures needs matplotlib.
        return importlib.import_module("jaxsrn.plots").stable_ranks(self)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the table, as text."""
        with_spectra = any(layer.condition_number is not None for layer in self.layers)
        header = [*_HEADER, *(_SPECTRA if with_spectra else ())]
        return header, [_cells_of(layer, with_spectra) for layer in self.layers]

    def summary(self) -> list[str]:
        """The numbers of the network, the layers that stand out, and what was skipped, in sentences."""
        logarithm = self.log10_product_of_norms
        lines = [
            f"{counted(len(self.layers), 'layer')}. Product of norms: {_power_of_ten(logarithm)}, a Lipschitz bound "
            "where the network is a chain of these layers and 1-Lipschitz activations, without skips.",
            f"Sum of stable ranks: {digits(self.sum_of_stable_ranks)}.",
        ]
        if any(layer.rule != OF_MODEL and not isinstance(layer.operator, Dense) for layer in self.layers):
            lines.append(_ASSUMED)
        guessed = [layer.name for layer in self.layers if layer.rule.endswith(GUESSED)]
        if guessed:
            lines.append(
                f"Taken for depthwise by shapes alone: {', '.join(guessed)}. Where one is not, its norm is larger; say "
                "its groups."
            )
        if any(skipped.reason == OF_WRAPPER for skipped in self.skipped):
            lines.append(_RAW)
        outliers = self.outliers
        lines += [f"Stands out: {name}: {why}." for name, why in outliers.items()] or ["No layer stands out."]
        lines.append(RULE)
        return lines + _summary_of(self.skipped)


def _in_markdown(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _summary_of(skipped: Sequence[Skipped]) -> list[str]:
    """The skipped arrays by their reasons, the first few by name."""
    if not skipped:
        return ["No array was skipped."]
    lines = []
    for reason, count in Counter(entry.reason for entry in skipped).most_common():
        names = [entry.name for entry in skipped if entry.reason == reason]
        shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
        lines.append(f"Skipped {count}: {reason} ({shown}).")
    return lines


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 3) -> list[str]:
    """The lines of a plain table, the first `left` columns left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[:left] = [cell.ljust(width) for cell, width in zip(row[:left], widths[:left], strict=True)]
        return "  ".join(cells).rstrip()

    return [line(header), *(line(row) for row in rows)]


def _cells_of(layer: LayerReport, with_spectra: bool) -> list[str]:
    cells = [
        layer.name + (" (+ BatchNorm)" if layer.batch_norm else ""),
        "x".join(map(str, layer.kernel_shape)),
        repr(layer.operator),
        digits(layer.spectral_norm),
        f"{digits(layer.norm_interval.lower)} to {digits(layer.norm_interval.upper)}",
        digits(layer.flattened_norm),
        digits(layer.stable_rank),
        f"{digits(layer.stable_rank_low, 3)} to {digits(layer.stable_rank_high, 3)}",
        f"{100 * layer.share:.1f}%",
    ]
    if with_spectra:
        more = (layer.condition_number, layer.effective_rank)
        cells += ["" if number is None else digits(number) for number in more]
    return cells


# The columns of a record in plain numbers and strings.
_COLUMNS: dict[str, Callable[[LayerReport], Any]] = {
    "name": lambda layer: layer.name,
    "kernel_shape": lambda layer: "x".join(map(str, layer.kernel_shape)),
    "operator": lambda layer: repr(layer.operator),
    "rule": lambda layer: layer.rule,
    "spectral_norm": lambda layer: layer.spectral_norm,
    "norm_lower": lambda layer: layer.norm_interval.lower,
    "norm_upper": lambda layer: layer.norm_interval.upper,
    "flattened_norm": lambda layer: layer.flattened_norm,
    "stable_rank": lambda layer: layer.stable_rank,
    "stable_rank_low": lambda layer: layer.stable_rank_low,
    "stable_rank_high": lambda layer: layer.stable_rank_high,
    "share": lambda layer: layer.share,
    "condition_number": lambda layer: layer.condition_number,
    "effective_rank": lambda layer: layer.effective_rank,
    "batch_norm": lambda layer: layer.batch_norm,
}


def _row_of(layer: LayerReport) -> dict[str, Any]:
    return {name: value(layer) for name, value in _COLUMNS.items()}


def _plain(value) -> Any:
    """The value with numbers that JSON does not have as strings, and tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_finite(layer: LayerReport) -> bool:
    return all(map(math.isfinite, (layer.spectral_norm, layer.stable_rank, *layer.norm_interval)))


def _stands_out(layer: LayerReport, norm: float, share: float) -> str:
    """Why a layer stands out beside the medians of norm and share; empty where it does not."""
    if not _is_finite(layer):
        return "a number of it is not finite"
    if layer.spectral_norm == 0:
        return "it is zero"
    reasons = []
    if layer.spectral_norm > _FACTOR * norm or layer.spectral_norm < norm / _FACTOR:
        reasons.append(f"norm {digits(layer.spectral_norm)}, the median is {digits(norm)}")
    if layer.share < share / _FACTOR:
        reasons.append(f"{100 * layer.share:.1f}% of the range of stable ranks, the median is {100 * share:.1f}%")
    return " and ".join(reasons)


def digits(number: float, count: int = 5) -> str:
    """A number with `count` significant digits, without an exponent where it is neither small nor large."""
    if not math.isfinite(number) or number == 0:
        return f"{number:g}"
    exponent = math.floor(math.log10(abs(number)))
    if -4 <= exponent < 7:
        return f"{number:.{max(0, count - 1 - exponent)}f}"
    return f"{number:.{count - 1}e}"


def _power_of_ten(logarithm: float) -> str:
    """`10**logarithm` with three digits, also beyond the range of floats."""
    if not math.isfinite(logarithm):
        return "0" if logarithm < 0 else f"{logarithm:g}"
    exponent = math.floor(logarithm)
    if -4 <= exponent < 7:
        return digits(10**logarithm, 3)
    return f"{decimal.Decimal(10) ** decimal.Decimal(logarithm):.2e}"


def counted(number: int, noun: str) -> str:
    """As `1 layer` and `2 layers`."""
    return f"{number} {noun}{'s' * (number != 1)}"

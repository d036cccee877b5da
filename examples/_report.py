"""What the experiments share: tables, figures of moderate size, and the report that says how it was made."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import resnet50
from _clock import interleaved
from _markdown import document, table

__all__ = [
    "command_line",
    "interleaved",
    "paragraphs",
    "prepared",
    "requirement",
    "resnet50",
    "run_parts",
    "save",
    "steps_of",
    "table",
    "write",
]


def paragraphs(*texts: str) -> str:
    """Tables as they are, all else in lines of moderate length."""
    return "\n\n".join(text if text.startswith("|") else textwrap.fill(" ".join(text.split()), 118) for text in texts)


def save(figure, path, dpi):
    """With 256 colours: a third of the size."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def write(output: Path, title: str, sections: dict[str, str], part: str | None = None) -> None:
    """Prints the report and writes it to `report.md`, or to the file of the part."""
    text = document(title, sections.items(), part)
    print(text)
    (output / f"{part or 'report'}.md").write_text(text)
    print(f"Figures and this report are in {output}.")


def command_line(about: str, fast: str, output: str) -> argparse.ArgumentParser:
    """The options that every experiment has; `fast` says what --fast does."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help=fast)
    parser.add_argument("--output", default=output, help="directory to write to (default: %(default)s)")
    return parser


def prepared(output: str) -> Path:
    """The directory to write to, made where it is missing; and the style of all figures."""
    path = Path(output)
    path.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    return path


def run_parts(about: str, parts: dict[str, Callable], fast_parts: Iterable[str], output: str) -> None:
    """The command line of an experiment in parts, each `(fast, output) -> what is wrong`; exits with all of that."""
    parser = command_line(about, "small random kernels, no download", output)
    parser.add_argument("--only", action="append", choices=parts, help="this part; may be repeated")
    args = parser.parse_args()
    output, names = prepared(args.output), fast_parts if args.fast else args.only or parts
    wrong = [text for name in names for text in parts[name](args.fast, output)]
    if wrong:
        sys.exit("; ".join(wrong))


def requirement(text: str, wrong: list[str]) -> dict[str, str]:
    """The section that says whether what is required holds."""
    return {"Requirement": f"{text[0].upper()}{text[1:]}: {'; '.join(wrong) if wrong else 'holds'}."}


def steps_of(progress):
    """A function that names the part that begins, and counts the one that has ended."""

    def tick(name):
        if progress.desc:
            progress.update()
        progress.set_description(name)

    return tick

"""What the experiments share: tables, figures of moderate size, and the report that says how it was made."""

import argparse
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}"
    return f"{cpu}, {os.cpu_count()} cores; {versions}"


def table(header, rows) -> str:
    """Markdown, padded so that it also reads well in a terminal."""
    lines = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [c.rjust(w) if j else c.ljust(w) for j, (c, w) in enumerate(zip(line, widths, strict=True))] for line in lines
    ]
    rule = [("-" * (w - 1) + ":") if j else "-" * w for j, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [padded[0], rule, *padded[1:]])


def paragraphs(*texts: str) -> str:
    """Tables as they are, all else in lines of moderate length."""
    return "\n\n".join(text if text.startswith("|") else textwrap.fill(" ".join(text.split()), 118) for text in texts)


def save(figure, path, dpi):
    """With 256 colours: a third of the size."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def write(output: Path, title: str, command: str, sections: dict[str, str], name: str = "report.md") -> None:
    """Prints the report and writes it to the file `name`."""
    head = f"# {title}\n\nMade by `{command}` on {machine()}.\n"
    text = "\n".join([head, *(f"## {heading}\n\n{body}\n" for heading, body in sections.items())])
    print(text)
    (output / name).write_text(text)
    print(f"Figures and this report are in {output}.")


def run_parts(about: str, parts: dict[str, Callable], fast_parts: Iterable[str], output: str) -> None:
    """The command line of an experiment in parts, each `(fast, output) -> what is wrong`; exits with all of that."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="small random kernels, no download")
    parser.add_argument("--only", action="append", choices=parts, help="this part; may be repeated")
    parser.add_argument("--output", default=output, help="directory to write to (default: %(default)s)")
    args = parser.parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    wrong = [
        text for name in (fast_parts if args.fast else args.only or parts) for text in parts[name](args.fast, output)
    ]
    if wrong:
        sys.exit("; ".join(wrong))


def requirement(text: str, wrong: list[str]) -> dict[str, str]:
    """The section that says whether what is required holds."""
    return {"Requirement": f"{text[0].upper()}{text[1:]}: {'; '.join(wrong) if wrong else 'holds'}."}


def trained_resnet50() -> dict:
    """The convolutions of a trained ResNet-50 by name, with their geometry; fetched once."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import resnet50

    return resnet50.load()


def steps_of(progress):
    """A function that names the part that begins, and counts the one that has ended."""

    def tick(name):
        if progress.desc:
            progress.update()
        progress.set_description(name)

    return tick

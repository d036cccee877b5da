"""The command line: `python -m jaxsrn report FILE`, `normalize FILE`, `compare FILE FILE`.

Exit codes: 0 done; 2 the arguments are wrong; 3 a file is missing; 4 a file cannot be read or written; 5 no kernels
were found; 6 a library is missing. Every error is one line on the error stream.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path

__all__ = ["main"]

# What matplotlib draws everywhere.
_PICTURES = ".png", ".pdf", ".svg"
_FILE = "a .safetensors or .npz file, an index *.safetensors.index.json, or the folder of an Orbax checkpoint"
WRONG_ARGUMENTS, MISSING_FILE, BROKEN_FILE, NO_KERNELS, MISSING_LIBRARY = 2, 3, 4, 5, 6


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(WRONG_ARGUMENTS, f"{self.prog}: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "\n\n").split("\n\n")[1].replace("\n", " ")
    parser = _Parser("jaxsrn", description="Spectral norms and stable ranks of the layers of a network.", epilog=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    reading = _how_files_are_read()
    for add in (_add_report, _add_normalize, _add_compare):
        add(commands, reading)
    return parser


def _how_files_are_read() -> argparse.ArgumentParser:
    """The options that all commands share."""
    from jaxsrn.report.layouts import LAYOUTS

    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument(
        "--input-shape",
        type=int,
        nargs="+",
        metavar="N",
        help="the image size at which convolutions of as many axes are taken, with zero padding SAME; by default the "
        "numbers are those that hold at every size",
    )
    reading.add_argument(
        "--layout", choices=LAYOUTS, help="the axes of all kernels; by default names and shapes say it"
    )
    for option, what in (("--groups", "feature groups"), ("--strides", "stride")):
        text = f"{what} of a kernel; may be repeated"
        reading.add_argument(option, action="append", default=[], type=_count, metavar="NAME=N", help=text)
    stacked = "arrays whose names begin so hold several layers along their first axis; may be repeated"
    reading.add_argument("--stacked", action="append", default=[], metavar="START", help=stacked)
    return reading


def _add_report(commands, reading) -> None:
    report = commands.add_parser("report", parents=[reading], help="a table of norms and stable ranks")
    report.add_argument("file", type=Path, metavar="FILE", help=_FILE)
    report.add_argument("--spectra", action="store_true", help="condition numbers and effective ranks where possible")
    report.add_argument("--fold-batch-norm", action="store_true", help="fold batch normalizations into their kernels")
    report.add_argument("--json", type=Path, metavar="OUT", help="write the report as JSON")
    report.add_argument("--csv", type=Path, metavar="OUT", help="write the table as CSV")
    report.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the stable ranks within their ranges")
    report.set_defaults(run=_report)


def _add_normalize(commands, reading) -> None:
    what = "bring every kernel to a share of its largest stable rank"
    normalize = commands.add_parser("normalize", parents=[reading], help=what)
    normalize.add_argument("file", type=Path, metavar="FILE", help=_FILE)
    share = "the share of each kernel's largest stable rank, in (0, 1]"
    normalize.add_argument("--fraction", type=float, required=True, metavar="F", help=share)
    normalize.add_argument("--norm", type=float, metavar="M", help="scale kernels down to this norm afterwards")
    names = "change kernels of such names alone, 'conv*'"
    normalize.add_argument("--only", action="append", metavar="PATTERN", help=names)
    normalize.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write, in the same format")
    normalize.set_defaults(run=_normalize)


def _add_compare(commands, reading) -> None:
    compare = commands.add_parser("compare", parents=[reading], help="two checkpoints beside each other")
    compare.add_argument("first", type=Path, metavar="FILE", help=_FILE)
    compare.add_argument("second", type=Path, metavar="FILE", help="the other one")
    compare.set_defaults(run=_compare)


def _count(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    if not name or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=N, such as conv1.weight=32")
    return name, int(count)


def _check_outputs(*paths: Path | None, replaced: bool = False) -> None:
    """Nothing is computed for a file that cannot be written.

    What is `replaced` may be a folder, and is moved into its place when it is complete.
    """
    from jaxsrn.report.files import BrokenFile

    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise BrokenFile(f"{path}: cannot be written, as there is no folder {path.parent}.")
        if path.is_dir() and not replaced:
            raise BrokenFile(f"{path}: cannot be written, as it is a folder.")
        if not os.access(path if path.exists() and not replaced else path.parent, os.W_OK):
            raise BrokenFile(f"{path}: cannot be written, as its permissions do not allow that.")


def _once(counts: list[tuple[str, int]], option: str) -> dict[str, int]:
    """The counts by name; raises `ValueError` for a name that has two."""
    names = [name for name, _ in counts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{option}: got {name!r} twice, expected once.")
    return dict(counts)


def _how_to_read(args) -> dict:
    return {
        "layout": args.layout,
        "input_shape": args.input_shape,
        "groups": _once(args.groups, "--groups"),
        "strides": _once(args.strides, "--strides"),
        "stacked": tuple(args.stacked),
    }


def _report(args) -> None:
    from jaxsrn.report import analyze
    from jaxsrn.report.rewriting import NoKernels
    from jaxsrn.report.table import counted
    from jaxsrn.report.terminal import show_lines, show_table

    _check_outputs(args.json, args.csv, args.plot)
    files = [path.resolve() for path in (args.file, args.json, args.csv, args.plot) if path]
    if len(set(files)) < len(files):
        raise ValueError("--json, --csv, --plot: got a file twice, expected others than FILE and than each other.")
    if args.plot and args.plot.suffix.lower() not in _PICTURES:
        raise ValueError(f"--plot: got {args.plot}, expected a name that ends in {', '.join(_PICTURES)}.")
    report = analyze(args.file, spectra=args.spectra, fold_batch_norm=args.fold_batch_norm, **_how_to_read(args))
    if not report.layers:
        reasons = sorted({entry.reason for entry in report.skipped})
        arrays = f"among {counted(len(report.skipped), 'array')}: {'; '.join(reasons)}" if reasons else "and no arrays"
        raise NoKernels(f"{args.file}: no kernels found {arrays}.")
    show_lines([report.source, ""])
    header, rows = report.cells()
    dispensable = ("range", "certified", "operator", "flattened", "kernel")
    # The row of a folded layer says so after the name.
    marked = {row[0] for row, layer in zip(rows, report.layers, strict=True) if layer.name in report.outliers}
    show_table(header, rows, marked, left=3, dispensable=dispensable)
    show_lines(["", *report.summary()])
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if args.csv:
        args.csv.write_text(report.to_csv())
    if args.plot:
        report.plot().savefig(args.plot, dpi=150, bbox_inches="tight")


def _normalize(args) -> None:
    from jaxsrn.report.rewriting import normalize
    from jaxsrn.report.table import counted, digits
    from jaxsrn.report.terminal import show_lines, show_table

    _check_outputs(args.out, replaced=True)
    options = {"norm": args.norm, "only": args.only or ("*",), **_how_to_read(args)}
    changes, skipped = normalize(args.file, args.out, args.fraction, **options)
    header = ("layer", "target", "stable rank", "new rank", "norm", "new norm", "distance")
    rows = [
        [
            change.name,
            *map(
                digits, (change.target, change.stable_rank_before, change.stable_rank, change.norm_before, change.norm)
            ),
            f"{100 * change.distance:.2f}%" if change.distance else "unchanged",
        ]
        for change in changes
    ]
    moved = {change.name for change in changes if change.distance}
    show_table(header, rows, moved, dispensable=("target",))
    kept = f" Of {counted(len(skipped), 'other array')} {args.out} has the same bits." if skipped else ""
    show_lines(["", f"{len(moved)} of {len(changes)} kernels changed.{kept}"])
    lowest = [change.name for change in changes if change.is_lowest]
    if lowest:
        show_lines(
            [
                f"The shapes of these allow no stable rank of {args.fraction:g} of the largest, and the target is the "
                f"lowest that they allow; --only leaves kernels out: {', '.join(lowest)}."
            ]
        )


def _compare(args) -> None:
    from jaxsrn.report.comparing import compare
    from jaxsrn.report.rewriting import NoKernels
    from jaxsrn.report.table import digits
    from jaxsrn.report.terminal import show_lines, show_table

    found = compare(args.first, args.second, **_how_to_read(args))
    if not found.layers:
        raise NoKernels(
            f"{args.first}, {args.second}: no kernels of the same name; the first has {len(found.only_first)}, the "
            f"second {len(found.only_second)}."
        )
    norms, ranks = ("norm", "second norm", "norm ratio"), ("stable rank", "second rank", "rank ratio")
    header = ("layer", "kernel", *norms, *ranks, "distance")
    rows = []
    for first, second, distance in found.layers:
        numbers = []
        for a, b in ((first.spectral_norm, second.spectral_norm), (first.stable_rank, second.stable_rank)):
            numbers += [digits(a), digits(b), digits(b / a, 4) if a else "-"]
        rows.append([first.name, "x".join(map(str, first.kernel_shape)), *numbers, f"{100 * distance:.2f}%"])
    moved = {pairing.first.name for pairing in found.layers if pairing.distance}
    show_table(header, rows, moved, left=2, dispensable=("kernel", "norm ratio", "rank ratio"))
    for path, names in ((args.first, found.only_first), (args.second, found.only_second)):
        if names:
            show_lines([f"In {path} alone: {', '.join(names)}."])


def _message(error: BaseException) -> str:
    """What an error says; those of the system name their file first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # Names of arrays may have letters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from jaxsrn.report.files import BrokenFile
    from jaxsrn.report.rewriting import NoKernels

    codes = {
        FileNotFoundError: MISSING_FILE,
        BrokenFile: BROKEN_FILE,
        NoKernels: NO_KERNELS,
        ValueError: WRONG_ARGUMENTS,
        ImportError: MISSING_LIBRARY,
        OSError: BROKEN_FILE,
    }
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has read enough, as `head` does. The interpreter would try to flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except tuple(codes) as error:
        print(f"jaxsrn: {' '.join(_message(error).split())}", file=sys.stderr)
        return next(code for kind, code in codes.items() if isinstance(error, kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())

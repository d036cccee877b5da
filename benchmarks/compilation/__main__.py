"""What does jaxsrn cost before anything is compiled, beside two lines of NumPy and JAX and beside plain layers?

    python benchmarks/compilation                # everything, on 2 quiet cores; records every part
    python benchmarks/compilation --only counts  # one part of it (may be repeated); this one renews the file of counts
    python benchmarks/compilation --check        # fails where a program is a tenth larger than recorded
    python benchmarks/compilation --fast         # tiny kernels, a few minutes, no download, nothing recorded

Every time is that of a fresh process without JAX's persistent compilation cache, the median of three (`--repeats`).
A measurement whose process fails has a dash in the table, and its error is printed. Memory maps are lines of
/proc/self/maps: XLA's programs hold some, and a process may have 65,530. The script fails where a requirement is not
met.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

# The folder is run as a script; its files are imported as `compilation`, beside the other benchmarks.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _report import publish

from compilation.parts import Effort

# Files, which are imported only where they are run: what one part imports is no part of another's cold start.
PARTS = ("counts", "first-calls", "network", "wrapping", "stacks", "many-shapes", "generators")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/compilation", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a measurement (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare counts with the recorded ones, record nothing")
    parser.add_argument("--fast", action="store_true", help="tiny kernels, one process each, nothing recorded")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def module_of(part: str):
    return importlib.import_module(f"compilation.{part.replace('-', '_')}")


def run(name: str, effort: Effort) -> bool:
    """Prints one part and records it where it is to be kept. Returns whether all its requirements are met."""
    part = module_of(name).measured(effort)
    file = f"compilation_{name.replace('-', '_')}"
    return publish(file, f"Cold starts: {name}", part.sections, part.checks, keep=not effort.fast, part=name)


def main() -> None:
    args = parse()
    effort = Effort(args.fast, 1 if args.fast else args.repeats)
    if args.measure:
        part, *arguments = args.measure
        print(json.dumps(module_of(part).measure(effort, *arguments)))
    elif args.check:
        larger = module_of("counts").grown()
        print("\n".join(larger))
        sys.exit(1 if larger else 0)
    else:
        met = [run(name, effort) for name in args.only or PARTS]
        sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()

"""How fast and how exact are the norms, beside everything else that computes, bounds or estimates them?

    python benchmarks/norms                 # everything, some 20 minutes on 2 quiet cores; records every part
    python benchmarks/norms --only memory   # one part of it (may be repeated)
    python benchmarks/norms --no-network    # without the trained ResNet-50: no download, nothing recorded
    python benchmarks/norms --fast          # tiny kernels, a minute or two, no download, nothing recorded

Peers: the two lines of Sedghi, Gupta, Long 2019 in NumPy, JAX and PyTorch; Gram iteration and real-operator power
iteration in PyTorch; orthogonium; flax.nnx.SpectralNorm. They need

    pip install -e ".[bench]" torch==2.13.0 orthogonium==0.0.4

Each method is compiled before the clock starts, then all take turns, so that whatever else the machine does hits all
of them. Errors are measured against NumPy's SVDs in float64. The script fails where a requirement is not met.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

# The folder is run as a script; its files are imported as `norms`, beside the other benchmarks.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if importlib.util.find_spec("torch") is None:
    raise SystemExit("The peers need PyTorch: pip install torch")

from _report import publish

from norms.channels import channels
from norms.comparison import comparison
from norms.correctness import correctness
from norms.figures import save
from norms.image_size import image_size
from norms.many_taps import many_taps
from norms.memory import memory, memory_of_run
from norms.parts import Effort
from norms.setting import describe_setting
from norms.spectrum import spectrum, spectrum_of_run
from norms.widths import widths
from norms.zero_padding import zero_padding

PARTS = {
    "norms": comparison,
    "widths": widths,
    "correctness": correctness,
    "image-size": image_size,
    "channels": channels,
    "memory": memory,
    "spectrum": spectrum,
    "zero-padding": zero_padding,
    "many-taps": many_taps,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/norms", description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="tiny kernels, no download, nothing recorded")
    parser.add_argument("--no-network", action="store_true", help="without the trained ResNet-50, nothing recorded")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--memory", nargs=3, metavar=("METHOD", "N", "C"), help=argparse.SUPPRESS)
    parser.add_argument("--spectrum", nargs=2, type=int, metavar=("N", "C"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.memory:
        method, n, c = args.memory
        print(json.dumps(memory_of_run(method, int(n), int(c))))
        return
    keep = not (args.fast or args.no_network)
    full = Effort(fast=False, network=not args.no_network, rounds=5, seconds=0.5)
    effort = Effort(fast=True, network=False, rounds=2, seconds=0.1) if args.fast else full
    if args.spectrum:
        print(json.dumps(spectrum_of_run(*args.spectrum, effort)))
        return
    met = [run(name, effort, keep) for name in args.only or PARTS]
    sys.exit(0 if all(met) else 1)


def run(name: str, effort: Effort, keep: bool) -> bool:
    """Prints one part and records it where it is to be kept. Returns whether all its requirements are met."""
    setting = describe_setting()
    part = PARTS[name](effort)
    pictures = [("Pictures", "\n\n".join(f"![{figure}]({figure}.png)" for figure in part.figures))]
    sections = [("Setting", setting), *part.sections, *(pictures if part.figures else [])]
    save(part.figures, keep)
    return publish(f"norms_{name.replace('-', '_')}", f"Norms: {name}", sections, part.checks, keep, name)


if __name__ == "__main__":
    main()

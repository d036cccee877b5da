"""Who computes the right norm of a layer? Every geometry, asked of every library that gives a number for it.

The layers and their exact norms are those of `data/exact_norms.json`: `data/check_exact_norms.py`, which needs NumPy
alone, lets any other library be asked as well. Kernels are given in float64, and iterations are let converge. A number
is right to a relative error of 1e-5. A larger one is a bound where a bound is what the library promises, and is wrong
where it promises a norm; a smaller one is wrong. "Not offered" is what the library does not claim to do.

    pip install jaxsrn torch orthogonium deel-torchlip weightwatcher
    python examples/compare_with_peers.py           # what is installed of these; writes peers.md
    python examples/compare_with_peers.py --fast    # jaxsrn, NumPy and Flax, on every sixth case

Exits with code 1 where jaxsrn is not right.
"""

import argparse
import contextlib
import importlib.metadata
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import _peers
import jax
from _peers import CIRCULAR_GRAM_STEPS, PADDED_GRAM_STEPS, POWER_STEPS, check_exact_norms
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from _markdown import document, table

jax.config.update("jax_enable_x64", True)

FAST_PACKAGES, FAST_STEP = ("jaxsrn", "numpy", "flax"), 6


HOW_TO_READ = (
    "Kernels are in float64; `examples/data/exact_norms.json` holds them. `right`: the norm to a relative error "
    "of 1e-5. `bound`: so much above it, from a library that promises a bound. `wrong`: so much above or below it "
    "from a library that promises no bound, or below it from one that does. A library that computes another norm, "
    "and says so, is not in error; its number is not the norm of the layer. `not offered`: what the library does "
    "not claim to do, or does not accept."
)


class Peer(NamedTuple):
    """A library, or a formula, that gives a number for the norm of a layer."""

    name: str
    package: str
    computes: str
    ask: Callable[[dict], float | None]
    promises_bound: bool = False
    # The number that is right, where a library promises one about a layer of its own making.
    truth: Callable[[dict], float] = lambda case: case["norm"]

    def version(self) -> str | None:
        """The installed version, or None."""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(self.package)
        return None


PEERS = (
    Peer(
        "jaxsrn",
        "jaxsrn",
        "`spectral_norm(kernel, op)`, the norm of the layer that the operator describes.",
        _peers.ask_jaxsrn,
    ),
    Peer(
        "two lines",
        "numpy",
        "NumPy's `fft2` and `svd` as in the two lines of Sedghi, Gupta and Long (2019), on any number of axes: all "
        "singular values of a circular layer with stride 1. `fft2` cuts off the taps that reach beyond the image.",
        _peers.ask_two_lines,
    ),
    Peer(
        "reshaped",
        "numpy",
        "NumPy's SVD of the kernel reshaped into a matrix of `(taps * c_in, c_out)`: the norm of a layer whose patches "
        "do not overlap, and of a dense layer.",
        _peers.ask_reshaped,
    ),
    Peer(
        "flax",
        "flax",
        f"`nnx.SpectralNorm(layer, n_steps={POWER_STEPS})`: the number that it divides the kernel by. Its "
        'documentation says that it flattens kernels "in their leading dimensions", so it is the norm of the reshaped '
        "kernel, by power iteration.",
        _peers.ask_flax,
    ),
    Peer(
        "torch",
        "torch",
        f"`torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations={POWER_STEPS})`: the number that "
        'it divides the weight by. Its documentation says that the weight "is reshaped to 2D in power iteration '
        'method", so it is the norm of the reshaped kernel.',
        _peers.ask_torch,
    ),
    Peer(
        "orthogonium",
        "orthogonium",
        "`get_conv_sv(layer, n_iter, imsize=...)`: Gram iteration, a bound that falls to the norm of a circular layer "
        f"(Delattre et al. 2023, {CIRCULAR_GRAM_STEPS} iterations) or to the supremum over all image sizes with zero "
        f"padding (2024, {PADDED_GRAM_STEPS} iterations, as its kernels double with each); the norm of the "
        "reshaped kernel where the stride is the size of the taps. Two axes and square taps only, circular square "
        "images only. It is written for orthogonium's own layers, and reads no stride and no dilation of others: a "
        "layer without them has no smaller norm. Over groups it returns the product of their norms (the norm is the "
        "largest of them; `agg_groups=False` returns the list).",
        _peers.ask_orthogonium,
        promises_bound=True,
    ),
    Peer(
        "torchlip layer",
        "deel-torchlip",
        "`SpectralLinear`, `SpectralConv1d`, `SpectralConv2d`, `SpectralConvTranspose2d`: the layer that is made of "
        f"the kernel by the norm of the reshaped kernel ({POWER_STEPS} power steps), Bjorck's orthonormalization and a "
        "factor for the overlap of the taps promises a norm of at most 1. The number compared with 1 is the exact norm "
        "of that layer, at the size and padding of the case: `bound +50%` says that it is 1 / 1.5. Groups, and with "
        'two axes dilation, "have to be one".',
        _peers.ask_torchlip_layer,
        promises_bound=True,
        truth=_peers.truth_of_torchlip_layer,
    ),
    Peer(
        "torchlip Jacobian",
        "deel-torchlip",
        '`utils.evaluate_lip_const(layer, x, "jacobian_norm")`: the SVD of the Jacobian at `x`, which of a layer is '
        "its explicit matrix. It is the norm for whatever PyTorch can run, in memory and time that only small images "
        "allow.",
        _peers.ask_torchlip_jacobian,
    ),
    Peer(
        "weightwatcher",
        "weightwatcher",
        "`WeightWatcher(model).analyze(min_evals=1, conv2d_norm=False)`, the square root of `spectral_norm`, which is "
        "an eigenvalue of W^T W (by default divided by 2 with two axes): the largest over the matrices of single taps "
        "with two axes, of single output channels with one.",
        _peers.ask_weightwatcher,
    ),
)


def verdict(peer: Peer, case: dict) -> str:
    """What the peer's number is, as a cell of the table."""
    try:
        answer = peer.ask(case)
    except Exception as error:  # The failure of a library is a result here.
        tqdm.write(f"{peer.name} fails on {case['name']}: {error}")
        return f"fails ({type(error).__name__})"
    if answer is None:
        return "not offered"
    if not math.isfinite(answer):
        return f"wrong ({answer})"
    return check_exact_norms.verdict(answer, peer.truth(case), promises_norm=not peer.promises_bound)


def summary(peer: Peer, cells: list[str]) -> tuple:
    """The row of a peer: how many cases are what, and the worst of the wrong ones."""
    kinds = Counter(cell.split()[0] for cell in cells)
    wrong = [float(cell.split()[1].rstrip("%")) for cell in cells if cell.startswith("wrong") and "%" in cell]
    extremes = [f"{share:+.1f}%" for share in (min(wrong), max(wrong))] if wrong else ["-", "-"]
    return (peer.name, *(kinds[kind] for kind in ("right", "bound", "wrong", "fails", "not")), *extremes)


def report(asked: Sequence[Peer], cases: dict[str, dict], found: dict[str, list[str]]) -> dict[str, str]:
    """The sections of the report; `found` has the cells of those that are installed."""
    peers = [peer for peer in asked if peer.name in found]
    who = [
        f"- **{peer.name}** ({peer.package} {peer.version()}): {peer.computes}"
        if peer.name in found
        else f"- **{peer.name}** is not installed: `pip install {peer.package}`"
        for peer in asked
    ]
    head = ["", "right", "bound", "wrong", "fails", "not offered", "lowest wrong", "highest wrong"]
    columns = [found[peer.name] for peer in peers]
    rows = [[name, f"{case['norm']:.6g}", *cells] for (name, case), *cells in zip(cases.items(), *columns, strict=True)]
    return {
        "Who is asked for what": "\n".join(who),
        "How to read it": HOW_TO_READ,
        "Summary": table(head, [summary(peer, found[peer.name]) for peer in peers]),
        "Case by case": table(["case", "norm", *(peer.name for peer in peers)], rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="jaxsrn, NumPy and Flax, on every sixth case")
    parser.add_argument("--output", type=Path, default=Path("peers.md"), help="file to write (default: %(default)s)")
    args = parser.parse_args()
    cases = check_exact_norms.read()
    asked = PEERS
    if args.fast:
        cases = dict(list(cases.items())[::FAST_STEP])
        asked = [peer for peer in PEERS if peer.package in FAST_PACKAGES]
    found = {
        peer.name: [verdict(peer, case) for case in tqdm(cases.values(), peer.name)] for peer in asked if peer.version()
    }
    text = document("Who computes the right norm?", report(asked, cases, found).items())
    print(text)
    args.output.write_text(text)
    print(f"written to {args.output}")
    not_right = [name for name, cell in zip(cases, found["jaxsrn"], strict=True) if cell != "right"]
    if not_right:
        sys.exit(f"jaxsrn is not right on {not_right}")


if __name__ == "__main__":
    main()

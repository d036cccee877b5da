"""Does a library compute the right spectral norm of a layer? Exact norms to compare with; needs NumPy alone.

`exact_norms.json`, beside this file, holds small layers of every geometry, each with its kernel and its spectral norm,
the largest singular value of the layer as a linear map of images. Compute the norms of its cases with the library in
question, write them as JSON, `{"circular-1d": 3.2, ...}`, and ask (cases that are left out, or null, count as not
offered; other keys are an error):

    python check_exact_norms.py answers.json            # right, bound or wrong, and by how much
    python check_exact_norms.py answers.json --exact    # answers that promise the norm itself: too much is wrong too
    python check_exact_norms.py                         # is the file right? computes every norm again

Exits with code 1 where an answer is wrong.

The file is JSON, which every language reads without a library; kernels are nested lists, as they are small. Their
entries are multiples of 1/32 below 4 in size, so that float64, float32, float16 and bfloat16 hold the same kernel.

A case is a cross-correlation, channels last: with the image x of shape `(*input_shape, c_in)`

    y[o, co] = sum over taps t and channels ci of the group of co:  K[t, ci, co] * z[o * strides + t * kernel_dilation]

where z is x after `input_dilation - 1` zeros were put between neighbouring samples and `padding` samples, `[low, high]`
for each axis, at its ends: zeros, or the image continued around itself where `boundary` is "circular". A dense layer
has no axes: `K` of shape `(c_in, c_out)`. The fields of a case:

    name, about       what it is called, and what it tests
    boundary          "zeros", "circular", or "none": an image without edges, all of the integer lattice
    input_shape       samples on each axis (null without edges)
    padding           [low, high] for each axis; its name in JAX and Flax, if it has one, is padding_name
    strides, input_dilation, kernel_dilation    one number for each axis
    groups            channels are split into so many groups; group g of the input feeds group g of the output
    kernel_shape      (*taps, c_in / groups, c_out); PyTorch's layout is transpose(-1, -2, *taps)
    norm              the exact spectral norm, float64
    accuracy          its relative error is not above this
    kernel            nested lists of kernel_shape

Norms are those of the explicit matrix of the layer. That without edges is the supremum over the torus of frequencies,
and no image size and no padding has a larger one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("exact_norms.json")
# Frequencies on each axis for images without edges, by the number of axes.
GRID = {1: 2**14, 2: 2**8, 3: 2**5}


def read(path: Path = FILE) -> dict[str, dict]:
    """The cases by name, their kernels as float64 arrays."""
    cases = json.loads(path.read_text())["cases"]
    return {case["name"]: case | {"kernel": np.array(case["kernel"]).reshape(case["kernel_shape"])} for case in cases}


def verdict(answer: float, norm: float, *, promises_norm: bool = False, tolerance: float = 1e-5) -> str:
    """`right`, `bound +x%` or `wrong -x%`; an answer that is too large is wrong where the norm itself was promised."""
    excess = answer / norm - 1
    if abs(excess) <= tolerance:
        return "right"
    word = "bound" if excess > 0 and not promises_norm else "wrong"
    return f"{word} {100 * excess:+.{1 if abs(excess) > 1e-3 else 4}f}%"


def applied(case: dict, images: np.ndarray) -> np.ndarray:
    """The layer on a batch of images `(batch, *input_shape, c_in)`: pad, then add up the taps."""
    kernel, axes = case["kernel"], range(len(case["strides"]))
    padded = images
    for j in axes:
        padded = _padded(padded, 1 + j, case["input_dilation"][j], *case["padding"][j], case["boundary"])
    steps = list(zip(case["strides"], case["kernel_dilation"], kernel.shape, strict=False))
    sizes = [(padded.shape[1 + j] - (k - 1) * dilation - 1) // s + 1 for j, (s, dilation, k) in enumerate(steps)]
    output = np.zeros((len(images), *sizes, kernel.shape[-1]))
    for tap in np.ndindex(*(k for _, _, k in steps)):
        window = tuple(
            slice(t * dilation, t * dilation + (size - 1) * s + 1, s)
            for t, size, (s, dilation, _) in zip(tap, sizes, steps, strict=True)
        )
        for ins, outs in _groups(case):
            output[..., outs] += padded[(slice(None), *window)][..., ins] @ kernel[tap][:, outs]
    return output


def _padded(images, axis, dilation, low, high, boundary):
    n = images.shape[axis]
    if boundary == "circular":
        return np.take(images, np.arange(-low, n + high) % n, axis)
    shape = list(images.shape)
    shape[axis] = low + (n - 1) * dilation + 1 + high
    padded = np.zeros(shape)
    padded[(slice(None),) * axis + (slice(low, low + (n - 1) * dilation + 1, dilation),)] = images
    return padded


def _groups(case: dict) -> list[tuple[slice, slice]]:
    """The input and output channels of each group."""
    width, outs = case["kernel_shape"][-2], case["kernel_shape"][-1] // case["groups"]
    return [(slice(g * width, (g + 1) * width), slice(g * outs, (g + 1) * outs)) for g in range(case["groups"])]


def matrix_norm(case: dict) -> float:
    """The norm of the explicit matrix, whose columns are the layer on the images with a single one."""
    in_shape = (*case["input_shape"], case["kernel_shape"][-2] * case["groups"])
    images = np.eye(int(np.prod(in_shape))).reshape(-1, *in_shape)
    return np.linalg.norm(applied(case, images).reshape(len(images), -1), 2)


def torus_interval(case: dict) -> tuple[float, float]:
    """Two numbers that hold the norm without edges between them: the largest on a grid, and what may lie beside it.

    A stride of s maps s frequencies of the input on one of the output. For a unit x, ||S(w) x||^2 is a trigonometric
    polynomial whose degree d on an axis is the reach of the taps, so by M. Riesz's inequality the largest value on a
    grid of m angles is not less than the product of cos(pi d / (2 m)) over the axes times the supremum.
    """
    *taps, _, _ = case["kernel_shape"]
    axes, strides, m = tuple(range(len(taps))), case["strides"], GRID[len(taps)]
    reach = [(k - 1) * dilation for k, dilation in zip(taps, case["kernel_dilation"], strict=True)]
    spread = np.zeros((*(r + 1 for r in reach), *case["kernel_shape"][-2:]))
    spread[tuple(slice(None, None, dilation) for dilation in case["kernel_dilation"])] = case["kernel"]
    symbol = np.fft.fftn(spread, [m * s for s in strides], axes=axes)
    # Frequency j + m k of the input is seen at frequency j of the output, for every k below the stride.
    symbol = symbol.reshape([n for s in strides for n in (s, m)] + [*symbol.shape[-2:]])
    aliases, outputs = [2 * j for j in axes], [2 * j + 1 for j in axes]
    symbol = symbol.transpose(*outputs, *aliases, -2, -1).reshape(m ** len(axes), np.prod(strides), *symbol.shape[-2:])
    largest = max(
        np.linalg.norm(symbol[..., outs].reshape(len(symbol), -1, outs.stop - outs.start), 2, (1, 2)).max()
        for _, outs in _groups(case)
    ) / np.sqrt(np.prod(strides))
    return largest, largest / np.prod([np.cos(np.pi * (r // s) / (2 * m)) for r, s in zip(reach, strides, strict=True)])


def norm_of(case: dict) -> float:
    """The norm of a case with whatever kernel; without edges to the accuracy of `torus_interval`."""
    return matrix_norm(case) if case["boundary"] != "none" else sum(torus_interval(case)) / 2


def check_file(cases: dict[str, dict]) -> list[str]:
    """Computes every norm again; the names of those that the file has wrong."""
    wrong = []
    for name, case in cases.items():
        if case["boundary"] == "none":
            low, high = torus_interval(case)
            good, found = (
                low * (1 - case["accuracy"]) <= case["norm"] <= high * (1 + case["accuracy"]),
                f"{low} to {high}",
            )
        else:
            found = matrix_norm(case)
            good = abs(found / case["norm"] - 1) <= case["accuracy"]
        print(f"{name:32} {case['norm']:<20} {'right' if good else f'WRONG, it is {found}'}")
        wrong += [] if good else [name]
    return wrong


def check_answers(cases: dict[str, dict], answers: dict[str, float], exact: bool, tolerance: float) -> list[str]:
    """Prints the verdict on every answer; the names of those that are wrong."""
    unknown = sorted(set(answers) - set(cases))
    if unknown:
        sys.exit(f"answers: got {unknown}, expected names of cases; {FILE.name} holds {sorted(cases)}")
    wrong = []
    for name, case in cases.items():
        text = "not offered"
        if answers.get(name) is not None:
            text = verdict(answers[name], case["norm"], promises_norm=exact, tolerance=tolerance)
        print(f"{name:32} {text}")
        # A NaN has no sign: it is wrong as well.
        wrong += [name] if text.startswith("wrong") else []
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", nargs="?", type=Path, help="JSON of your norms by the name of the case")
    parser.add_argument("--exact", action="store_true", help="the answers promise the norm: too much is wrong too")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative error of what is right (%(default)s)")
    args = parser.parse_args()
    cases = read()
    if args.answers is None:
        wrong = check_file(cases)
    else:
        wrong = check_answers(cases, json.loads(args.answers.read_text()), args.exact, args.tolerance)
    print(f"{len(cases)} cases, {len(wrong)} wrong.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

"""Makes `exact_norms.json`: small layers of every geometry with their exact spectral norms. Needs NumPy alone.

    python make_exact_norms.py

`check_exact_norms.py` describes the file, and computes the norms again in another way. Here a layer is the product of
one table for each axis, `meets[output, tap, sample]`, which says whether a tap meets a sample at an output position.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

# The relative rounding error of the norm of a matrix of a few hundred rows, with room.
ROUNDING = 1e-13
# The supremum without edges is proven to this.
UNBOUNDED = 1e-12


def conv(name, about, taps, channels, size, padding, *, groups=1, strides=1, input_dilation=1, kernel_dilation=1, draw):
    """A case without its norm; `channels` are those of the whole input and output, and ints stand for every axis."""
    axes = len(taps)
    strides, input_dilation, kernel_dilation = (
        [value] * axes if isinstance(value, int) else list(value)
        for value in (strides, input_dilation, kernel_dilation)
    )
    extents = [(k - 1) * d + 1 for k, d in zip(taps, kernel_dilation, strict=True)]
    kernel_shape = [*taps, channels[0] // groups, channels[1]]
    return {
        "name": name,
        "about": about,
        "boundary": {"CIRCULAR": "circular", "UNBOUNDED": "none"}.get(str(padding), "zeros"),
        "input_shape": None if size is None else list(size),
        "padding_name": padding if isinstance(padding, str) and padding != "UNBOUNDED" else None,
        "padding": None if size is None else [list(pair) for pair in pairs(padding, size, extents, strides)],
        "strides": strides,
        "input_dilation": input_dilation,
        "kernel_dilation": kernel_dilation,
        "groups": groups,
        "kernel_shape": kernel_shape,
        "kernel": draw(kernel_shape, name),
    }


def pairs(padding, size, extents, strides) -> list[tuple[int, int]]:
    """The padding of each axis by its name in JAX and Flax, or as it is."""
    if padding == "CIRCULAR":
        return [((e - 1) // 2, e // 2) for e in extents]
    if padding == "VALID":
        return [(0, 0) for _ in extents]
    if padding == "CAUSAL":
        return [(e - 1, 0) for e in extents]
    if padding == "SAME":
        # So many samples that ceil(n / stride) outputs fit; the odd one is put at the end.
        totals = [max((-(-n // s) - 1) * s + e - n, 0) for n, e, s in zip(size, extents, strides, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return padding


# Kernels: multiples of 1/32, which every floating-point format holds.


def gaussian(shape, name) -> np.ndarray:
    """Gaussian entries, determined by the name of the case."""
    rng = np.random.default_rng(list(name.encode()))
    return np.clip(np.round(32 * rng.standard_normal(shape)), -127, 127) / 32


def positive(shape, name) -> np.ndarray:
    """Without a negative entry; the norm of a circular layer of one channel is its sum."""
    return np.abs(gaussian(shape, name))


def decaying(shape, name) -> np.ndarray:
    """Output channels of less and less weight, so that one singular value is far above the others."""
    return np.round(32 * gaussian(shape, name) * 0.5 ** np.arange(shape[-1])) / 32


def identity(shape, name) -> np.ndarray:
    """The identity of the image: all singular values are 1."""
    *taps, c_in, _ = shape
    kernel = np.zeros(shape)
    kernel[tuple((k - 1) // 2 for k in taps)] = np.eye(c_in)
    return kernel


def edges(shape, name) -> np.ndarray:
    """The difference of neighbours: largest at the highest frequency, which odd images do not have."""
    kernel = np.zeros(shape)
    kernel[0], kernel[1] = 1.0, -1.0
    return kernel


def cases() -> list[dict]:
    """All cases without their norms."""
    table = [
        ("dense", "a matrix", (), (12, 7), (), []),
        ("dense-square", "a square matrix", (), (9, 9), (), []),
        # Circular.
        ("circular-1d", "one axis", (3,), (3, 4), (16,), "CIRCULAR"),
        ("circular-1d-even-taps", "taps without a middle, odd image", (4,), (3, 2), (9,), "CIRCULAR"),
        ("circular-1d-edges", "odd image without the highest frequency", (2,), (1, 1), (7,), "CIRCULAR", edges),
        ("circular-2d", "two axes", (3, 3), (3, 4), (8, 8), "CIRCULAR"),
        ("circular-2d-more-inputs", "more input than output channels", (3, 3), (5, 2), (8, 8), "CIRCULAR"),
        ("circular-2d-oblong", "image and taps that are not square", (3, 2), (2, 3), (6, 9), "CIRCULAR"),
        ("circular-2d-positive", "the norm is the sum of the entries", (3, 3), (1, 1), (8, 8), "CIRCULAR", positive),
        ("circular-2d-identity", "all singular values are 1", (3, 3), (3, 3), (6, 6), "CIRCULAR", identity),
        ("circular-2d-decaying", "one strong output channel", (3, 3), (4, 4), (8, 8), "CIRCULAR", decaying),
        ("circular-2d-large-taps", "taps as large as the image", (7, 7), (1, 2), (7, 7), "CIRCULAR"),
        ("circular-3d", "three axes", (2, 3, 3), (2, 2), (4, 4, 5), "CIRCULAR"),
        ("circular-1d-stride", "stride", (3,), (3, 4), (16,), "CIRCULAR", {"strides": 2}),
        ("circular-2d-stride", "stride", (3, 3), (3, 4), (8, 8), "CIRCULAR", {"strides": 2}),
        ("circular-2d-strides", "another stride on each axis", (3, 3), (2, 3), (6, 8), "CIRCULAR", {"strides": (3, 2)}),
        ("circular-1d-dilation", "dilation that divides the image", (3,), (3, 4), (16,), "CIRCULAR", DILATED),
        ("circular-2d-dilation", "dilation that divides the image", (3, 3), (3, 4), (8, 8), "CIRCULAR", DILATED),
        ("circular-2d-dilation-coprime", "dilation, odd image", (3, 3), (2, 3), (7, 7), "CIRCULAR", DILATED),
        ("circular-2d-groups", "groups", (3, 3), (4, 6), (8, 8), "CIRCULAR", {"groups": 2}),
        ("circular-2d-depthwise", "one channel a group", (3, 3), (4, 4), (8, 8), "CIRCULAR", {"groups": 4}),
        ("circular-1d-tiny-image", "image smaller than the kernel", (7,), (2, 3), (3,), "CIRCULAR"),
        ("circular-2d-tiny-image", "image smaller than the kernel", (5, 5), (2, 2), (3, 3), "CIRCULAR"),
        ("circular-2d-dilation-around", "dilated taps fall on each other", (3, 3), (2, 3), (4, 4), "CIRCULAR", DILATED),
        # Zero padding.
        ("same-1d", "one axis", (3,), (3, 4), (16,), "SAME"),
        ("same-1d-odd-image", "one axis, odd image", (5,), (2, 3), (9,), "SAME"),
        ("same-1d-even-taps", "padded more at the end", (4,), (2, 3), (10,), "SAME"),
        ("same-2d", "two axes", (3, 3), (3, 4), (8, 8), "SAME"),
        ("same-2d-odd-image", "odd image", (3, 3), (3, 4), (7, 7), "SAME"),
        ("same-2d-even-taps", "padded more at the end", (2, 2), (3, 4), (7, 7), "SAME"),
        ("same-2d-positive", "less than the sum of the entries", (3, 3), (1, 1), (8, 8), "SAME", positive),
        ("same-2d-identity", "all singular values are 1", (3, 3), (3, 3), (6, 6), "SAME", identity),
        ("same-2d-large-taps", "taps as large as the image", (7, 7), (1, 2), (7, 7), "SAME"),
        ("same-2d-one-tap", "a matrix at each sample", (1, 1), (5, 4), (6, 6), "SAME"),
        ("same-2d-stride", "stride", (3, 3), (3, 4), (8, 8), "SAME", {"strides": 2}),
        ("same-2d-stride-odd-image", "stride, odd image", (3, 3), (3, 4), (7, 7), "SAME", {"strides": 2}),
        ("same-2d-one-tap-stride", "a shortcut with stride", (1, 1), (4, 5), (6, 6), "SAME", {"strides": 2}),
        ("same-2d-dilation", "kernel dilation", (3, 3), (3, 4), (8, 8), "SAME", DILATED),
        ("same-2d-groups", "groups", (3, 3), (4, 6), (7, 7), "SAME", {"groups": 2}),
        ("same-2d-depthwise", "one channel a group", (3, 3), (4, 4), (7, 7), "SAME", {"groups": 4}),
        ("same-2d-multiplier", "two outputs a channel", (3, 3), (3, 6), (6, 6), "SAME", {"groups": 3}),
        ("same-2d-tiny-image", "image smaller than the kernel", (5, 5), (2, 3), (2, 3), "SAME"),
        ("same-2d-one-sample", "of 3x3 taps one counts", (3, 3), (4, 3), (1, 1), "SAME"),
        ("same-3d", "three axes", (3, 3, 3), (2, 2), (4, 4, 4), "SAME"),
        ("valid-1d", "no padding", (3,), (3, 4), (12,), "VALID"),
        ("valid-2d", "no padding", (3, 3), (3, 4), (8, 8), "VALID"),
        ("valid-2d-stride", "no padding, stride", (3, 3), (3, 4), (9, 9), "VALID", {"strides": 2}),
        ("valid-2d-patches", "patches that do not overlap", (2, 2), (3, 8), (8, 8), "VALID", {"strides": 2}),
        ("valid-2d-one-output", "image as large as the kernel", (3, 3), (2, 3), (3, 3), "VALID"),
        ("causal-1d", "padded at the beginning", (3,), (3, 4), (16,), "CAUSAL"),
        (
            "causal-1d-dilation",
            "and dilated",
            (3,),
            (3, 4),
            (16,),
            "CAUSAL",
            {"kernel_dilation": 4},
        ),
        ("pairs-2d-asymmetric", "padding that differs by side", (3, 3), (2, 3), (6, 7), [(2, 0), (0, 1)]),
        ("pairs-2d-wide", "more padding than the taps reach", (2, 2), (2, 3), (5, 5), [(3, 2), (2, 3)]),
        # The adjoints of convolutions with stride: PyTorch's ConvTranspose with padding 1.
        ("transposed-1d", "stride 2", (4,), (4, 3), (8,), [(2, 2)], {"input_dilation": 2}),
        ("transposed-2d", "stride 2", (4, 4), (4, 2), (4, 4), [(2, 2)] * 2, {"input_dilation": 2}),
        ("transposed-2d-odd-taps", "stride 2", (3, 3), (4, 3), (4, 4), [(1, 1)] * 2, {"input_dilation": 2}),
        # Without edges.
        ("unbounded-1d", "one axis", (5,), (2, 3), None, "UNBOUNDED"),
        ("unbounded-2d", "two axes", (3, 3), (3, 4), None, "UNBOUNDED"),
        ("unbounded-2d-stride", "stride", (4, 4), (2, 3), None, "UNBOUNDED", {"strides": 2}),
        ("unbounded-2d-groups", "groups", (3, 3), (4, 4), None, "UNBOUNDED", {"groups": 2}),
    ]
    return [_case(*row) for row in table]


DILATED = {"kernel_dilation": 2}


def _case(name, about, taps, channels, size, padding, *more):
    options = {"draw": gaussian}
    for extra in more:
        options |= extra if isinstance(extra, dict) else {"draw": extra}
    return conv(name, about, taps, channels, size, padding, **options)


# Norms.


def matrix(case: dict) -> np.ndarray:
    """The explicit matrix of a layer, rows the outputs and columns the inputs, by its definition."""
    *taps, width, c_out = case["kernel_shape"]
    # The channels of the input that each output channel reads, the others being 0.
    product = np.zeros((*taps, width * case["groups"], c_out))
    for out in range(c_out):
        group = out // (c_out // case["groups"])
        product[..., group * width : (group + 1) * width, out] = case["kernel"][..., out]
    for j in range(len(taps)):
        # The first axis is always the next tap: it is replaced by an output and a sample, which go to the end.
        product = np.tensordot(product, meets(case, j), axes=(0, 1))
    order = [*range(2, product.ndim, 2), 1, *range(3, product.ndim, 2), 0]
    rows = int(np.prod(product.shape[2::2])) * c_out
    return product.transpose(order).reshape(rows, -1)


def meets(case: dict, axis: int) -> np.ndarray:
    """`[output, tap, sample]`: 1 where this tap meets this sample at this output position."""
    n, (low, high), k = case["input_shape"][axis], case["padding"][axis], case["kernel_shape"][axis]
    s, input_dilation, kernel_dilation = (case[f][axis] for f in ("strides", "input_dilation", "kernel_dilation"))
    num_outputs = ((n - 1) * input_dilation + 1 + low + high - (k - 1) * kernel_dilation - 1) // s + 1
    table = np.zeros((num_outputs, k, n))
    for output, tap in itertools.product(range(num_outputs), range(k)):
        place = output * s + tap * kernel_dilation - low
        if case["boundary"] == "circular":
            table[output, tap, place % n] = 1
        elif place % input_dilation == 0 and 0 <= place // input_dilation < n:
            table[output, tap, place // input_dilation] = 1
    return table


def supremum(case: dict) -> float:
    """The norm without edges: the supremum over the torus of the largest singular value of the symbol, proven.

    Of a cell of half-widths h around w, arccos(sigma(w) / U) says how much the cell can hold: it changes by at most
    sum_j d_j h_j / 2 (Bernstein and Szegoe), with U any bound of the supremum and d_j the reach of the taps. Cells that
    hold no more than what was found are dropped, and the others are halved on each axis.
    """
    width = case["kernel_shape"][-1] // case["groups"]
    kernels = [case["kernel"][..., g * width : (g + 1) * width] for g in range(case["groups"])]
    return max(_supremum(kernel, case["strides"], case["kernel_dilation"]) for kernel in kernels)


def _supremum(kernel, strides, dilation) -> float:
    *taps, c_in, c_out = kernel.shape
    places = np.array(list(np.ndindex(*taps))) * dilation
    offsets, phases = places // strides, np.ravel_multi_index((places % strides).T, strides)
    # The taps of each phase of the stride read input channels of their own.
    rows = np.zeros((len(places), np.prod(strides), c_in, c_out))
    rows[np.arange(len(places)), phases] = kernel.reshape(-1, c_in, c_out)
    rows = rows.reshape(len(places), -1)

    def sigma(w):
        symbols = np.exp(-1j * w @ offsets.T) @ rows
        return np.linalg.svd(symbols.reshape(len(w), -1, c_out), compute_uv=False)[:, 0]

    reach, m = offsets.max(axis=0), 16
    half = np.pi / m
    w = (np.array(list(np.ndindex(*(m,) * len(taps)))) + 0.5) * 2 * half
    values = sigma(w)
    # The grid certificate of the first grid.
    upper = values.max() / np.prod(np.cos(np.pi * reach / (2 * m)))
    found = values.max()
    while upper > found * (1 + UNBOUNDED / 2):
        angle = np.arccos(np.minimum(values / upper, 1)) - half * reach.sum() / 2
        bounds = upper * np.cos(np.maximum(angle, 0))
        w, upper = w[bounds > found], max(bounds.max(), found)
        half /= 2
        corners = np.array(list(itertools.product((-half, half), repeat=len(taps))))
        w = (w[:, None] + corners).reshape(-1, len(taps))
        values = sigma(w)
        found = max(found, values.max())
    return found


def finished(case: dict) -> dict:
    """The case with its norm and the accuracy of it, the kernel last and as lists."""
    kernel, unbounded = case.pop("kernel"), case["boundary"] == "none"
    measured = case | {"kernel": kernel}
    norm = supremum(measured) if unbounded else np.linalg.norm(matrix(measured), 2)
    return case | {"norm": float(norm), "accuracy": UNBOUNDED if unbounded else ROUNDING, "kernel": kernel.tolist()}


def main() -> None:
    about = "Spectral norms of layers, exact. check_exact_norms.py, beside this file, describes the fields."
    lines = ",\n".join(json.dumps(finished(case)) for case in cases())
    path = Path(__file__).with_name("exact_norms.json")
    path.write_text(f'{{"about": {json.dumps(about)},\n"cases": [\n{lines}\n]}}\n')
    print(f"written to {path}")


if __name__ == "__main__":
    main()

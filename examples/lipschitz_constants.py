"""Lipschitz constants and generalization measures of two networks for the digits: plain, and with constrained layers.

The networks are those of `quickstart.py`, trained with true labels. The table goes from what is measured on data to
what is guaranteed: ratios of pairs of images, pairs that climb, norms of the Jacobian, and products of the layers'
norms. Below are the three measures of sample complexity of Sanyal, Torr, Dokania 2020.

    pip install -e ".[examples]"
    python examples/lipschitz_constants.py          # 80 seconds of one core, on 512 images
    python examples/lipschitz_constants.py --fast   # one convolution, fewer epochs, half of the images

Writes to lipschitz_constants/.
"""

import itertools
import math
from pathlib import Path

import numpy as np
from _report import command_line, paragraphs, prepared, save, table, write
from flax import nnx
from matplotlib.figure import Figure
from quickstart import constrained, digits, folded, train

import jaxsrn.nnx as jnnx
from jaxsrn import lipschitz, plots

BATCH, NORM, FRACTION = 256, 3.0, 0.2
LOWER, UPPER = "pairs that climb in [0, 1], largest (from below)", "certified, 8x8 images (from above)"


class Network(nnx.Module):
    """Convolutions on 8x8 images and a dense layer; with the default strides the network of `quickstart.py`."""

    def __init__(self, rngs: nnx.Rngs, strides=(1, 2, 2)):
        channels = [1] + [32] * len(strides)
        self.convolutions = nnx.List(
            nnx.Conv(before, after, (3, 3), strides=stride, rngs=rngs)
            for (before, after), stride in zip(itertools.pairwise(channels), strides, strict=True)
        )
        self.dense = nnx.Linear((8 // math.prod(strides)) ** 2 * 32, 10, rngs=rngs)

    def __call__(self, x, tap=lambda h: h):
        """The outputs, the hidden layers passed through `tap`."""
        for conv in self.convolutions:
            x = tap(nnx.relu(conv(x)))
        return self.dense(x.reshape(len(x), -1))


def function_of(model):
    """The network as `f(params, x, tap)`."""
    graph = nnx.graphdef(model)
    return lambda params, x, *tap: nnx.merge(graph, params)(x, *tap)


def over(function, *data):
    return lipschitz.over_batches(function, *data, batch_size=BATCH)


def numbers_of(f, model, images, labels):
    """What the table shows of a network, by name; and the ratios of pairs of images."""
    params = nnx.state(model)
    at_size, at_every_size = jnnx.layer_operators(model, images[:1]), jnnx.layer_operators(model)
    others = images[np.random.default_rng(0).permutation(len(images))]
    ratios = over(lambda x, y: lipschitz.pairwise(f, params, x, y), images, others)
    pairs = lipschitz.histogram(ratios)
    climbed = over(lambda x, y: lipschitz.ascent(f, params, x, y, box=(0, 1)).ratio, images, others)
    local = over(lambda x: lipschitz.local(f, params, x).value, images)
    frobenius = over(lambda x: lipschitz.local_frobenius(f, params, x).value, images)
    margins = over(lambda x, y: lipschitz.margins(f(params, x), y), images, labels)
    margin = np.percentile(margins, 10)
    jac_norms = over(lambda x, y: lipschitz.jac_norm(f, params, x, y, margin=margin), images, labels)
    logs = [measure(at_size, params, margin, log=True) for measure in (lipschitz.spec_fro, lipschitz.spec_l1)]
    numbers = {
        "pairs of images, 95th percentile": pairs.percentile,
        "pairs of images, largest (from below)": pairs.largest,
        LOWER: climbed.max(),
        "norm of the Jacobian at the images, median": np.median(local),
        "norm of the Jacobian at the images, largest (from below)": local.max(),
        "its Frobenius norm, median": np.median(frobenius),
        "product of norms, 8x8 images (from above)": lipschitz.upper_bound(at_size, params),
        UPPER: lipschitz.certified_upper_bound(at_size, params),
        "certified, images of every size (from above)": lipschitz.certified_upper_bound(at_every_size, params),
        "margin, 10th percentile": margin,
        "Spec-Fro, log10": logs[0] / np.log(10),
        "Spec-L1, log10": logs[1] / np.log(10),
        "Jac-Norm, median": np.median(jac_norms),
    }
    return numbers, ratios


def draw(found: dict, path: Path) -> None:
    """The best bounds of both sides at left, the pairs of images at right."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    bounds = ({name: numbers[side] for name, (numbers, _) in found.items()} for side in (LOWER, UPPER))
    plots.lipschitz_bounds(*bounds, ax=left)
    plots.lipschitz_histogram({name: ratios for name, (_, ratios) in found.items()}, ax=right)
    save(figure, path, 100)


def main():
    parser = command_line(__doc__, "one convolution, fewer epochs, 256 images", "lipschitz_constants")
    args = parser.parse_args()
    output, fast = prepared(args.output), args.fast

    data, strides, epochs = digits(seed=0, share=0.0), (2,) if fast else (1, 2, 2), 10 if fast else 20
    # Of one architecture, so that both share one function and its compiled programs.
    models, found, scores = {"plain": Network(nnx.Rngs(0), strides)}, {}, []
    models["constrained"] = constrained(Network(nnx.Rngs(0), strides), NORM, FRACTION)
    f, count = function_of(models["plain"]), BATCH if fast else 2 * BATCH
    for name, model in models.items():
        scores.append(f"{name} {train(model, data, epochs, seed=0, name=name)[-1].test:.1%}")
        found[name] = numbers_of(f, folded(model), data.x_train[:count], data.y_train[:count])
    draw(found, output / "bounds.png")
    rows = [(what, *(f"{numbers[what]:.4g}" for numbers, _ in found.values())) for what in found["plain"][0]]
    about = f"""{len(strides)} convolutions and a dense layer, {epochs} epochs, {count} images, one seed. In the
        constrained network every layer has norm {NORM:g}, and at most {FRACTION:.0%} of the largest stable rank, at
        every image size. Test accuracies: {", ".join(scores)}. Pairs of images do not attain the constant; pairs that
        climb come nearer to it, and none is above what is certified."""
    picture = "![Bounds of the Lipschitz constants, and ratios of pairs of images](bounds.png)"
    parts = paragraphs(about, table(("", *models), rows))
    sections = {"Lipschitz constants and generalization measures": f"{parts}\n\n{picture}"}
    write(output, "Lipschitz constants of two networks", sections)


if __name__ == "__main__":
    main()

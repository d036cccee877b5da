"""Lipschitz constants and generalization measures of two networks for the digits: plain, and with constrained layers.

The networks are those of `quickstart.py`. The table goes from what is measured on data to what is guaranteed: ratios of
pairs of images, pairs that climb, norms of the Jacobian, and products of the layers' norms. Below are the three
measures of sample complexity of Sanyal, Torr, Dokania 2020.

    pip install "jaxsrn[examples]"
    python examples/lipschitz_constants.py          # some minutes, on 512 images
    python examples/lipschitz_constants.py --fast   # one convolution, fewer epochs, half of the images
"""

import argparse
import itertools
import math

import numpy as np
from flax import nnx
from quickstart import constrained, digits, folded, print_table, train

import jaxsrn.nnx as jnnx
from jaxsrn import lipschitz

BATCH = 256


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
    """What is printed of a network, by name."""
    params = nnx.state(model)
    at_size, at_every_size = jnnx.layer_operators(model, images[:1]), jnnx.layer_operators(model)
    others = images[np.random.default_rng(0).permutation(len(images))]
    pairs = lipschitz.histogram(over(lambda x, y: lipschitz.pairwise(f, params, x, y), images, others))
    climbed = over(lambda x, y: lipschitz.ascent(f, params, x, y, box=(0, 1)).ratio, images, others)
    local = over(lambda x: lipschitz.local(f, params, x).value, images)
    frobenius = over(lambda x: lipschitz.local_frobenius(f, params, x).value, images)
    margins = over(lambda x, y: lipschitz.margins(f(params, x), y), images, labels)
    margin = np.percentile(margins, 10)
    jac_norms = over(lambda x, y: lipschitz.jac_norm(f, params, x, y, margin=margin), images, labels)
    logs = [measure(at_size, params, margin, log=True) for measure in (lipschitz.spec_fro, lipschitz.spec_l1)]
    return {
        "pairs of images, 95th percentile": pairs.percentile,
        "pairs of images, largest (from below)": pairs.largest,
        "pairs that climb in [0, 1], largest (from below)": climbed.max(),
        "norm of the Jacobian at the images, median": np.median(local),
        "norm of the Jacobian at the images, largest (from below)": local.max(),
        "its Frobenius norm, median": np.median(frobenius),
        "product of norms, 8x8 images (from above)": lipschitz.upper_bound(at_size, params),
        "certified, 8x8 images (from above)": lipschitz.certified_upper_bound(at_size, params),
        "certified, images of every size (from above)": lipschitz.certified_upper_bound(at_every_size, params),
        "margin, 10th percentile": margin,
        "Spec-Fro, log10": logs[0] / np.log(10),
        "Spec-L1, log10": logs[1] / np.log(10),
        "Jac-Norm, median": np.median(jac_norms),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one convolution, fewer epochs, 256 images")
    fast = parser.parse_args().fast

    data = digits(seed=0, share=0.0)
    # Of one architecture, so that both share one function and its compiled programs.
    strides = (2,) if fast else (1, 2, 2)
    models, found = {"plain": Network(nnx.Rngs(0), strides)}, {}
    models["constrained"] = constrained(Network(nnx.Rngs(0), strides), 3.0, 0.2)
    f = function_of(models["plain"])
    for name, model in models.items():
        train(model, data, epochs=10 if fast else 20, seed=0, name=name)
        count = BATCH if fast else 2 * BATCH
        found[name] = numbers_of(f, folded(model), data.x_train[:count], data.y_train[:count])
    lines = [(what, *(f"{numbers[what]:.4g}" for numbers in found.values())) for what in found["plain"]]
    print_table("Lipschitz constants and generalization measures", ("", *models), *lines)


if __name__ == "__main__":
    main()

"""# Look at a trained network

Which layers stretch most, which of them use few directions, and what does that say about the whole network? This page
trains a small network on scikit-learn's digits, looks at it as a model, and then as bare weights in a file.
"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxsrn
import jaxsrn.nnx as jnnx
from jaxsrn import lipschitz, plots
from jaxsrn.__main__ import main as command_line
from jaxsrn.report import analyze

images, labels = load_digits(return_X_y=True)
images, rng = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), np.random.default_rng(0)


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.dense(x.reshape(len(x), -1))


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


model = CNN(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for batch in (rows for _ in range(6) for rows in rng.permutation(1792).reshape(-1, 64)):
    train_step(model, optimizer, images[batch], labels[batch])
print(f"accuracy {(model(images).argmax(-1) == labels).mean():.3f}")

# ## The table
#
# `analyze` traces the model on the shapes of its inputs, so that it knows each layer with its strides and its padding,
# at the size of the image that it sees. `norm` is the exact one, `certified` a proven interval, and `flattened` the
# norm of the reshaped kernel, which many take for it. `share` is where the stable rank lies between the least and the
# largest that the shape allows.

report = analyze(model, images[:1], progress=False)
print(report)

# Every number is a field, `report.layers[0].stable_rank`, and the report writes itself as JSON, CSV or Markdown.
#
# ## The spectra
#
# The stable rank is one number of a whole spectrum. Two layers with the same norm can differ in everything below it.

weights = nnx.to_pure_dict(nnx.state(model))
operators = jnnx.layer_operators(model, images[:1])
spectra = {f"{name}, {op}": jaxsrn.singular_values(weights[name]["kernel"], op) for (name, _), op in operators.items()}
plots.singular_values(spectra, relative=True).savefig("spectra.png", dpi=110, bbox_inches="tight")

# ## The whole network
#
# Such a chain of layers and ReLUs changes its output by at most the product of the norms times the change of its input.
# That is an upper bound, and mostly a loose one: the largest Jacobian at the images themselves is a lower bound.

graphdef, state = nnx.split(model)
bound = lipschitz.upper_bound(operators, state)
local = lipschitz.local(lambda state, x: nnx.merge(graphdef, state)(x), state, images[:32])
print(f"Lipschitz constant: at least {local.value.max():.1f} (at 32 images), at most {bound:.1f} (product of norms)")

# ## A file of weights
#
# A checkpoint has no model, so the names and the shapes say what each array is. Convolutions are taken at every image
# size at once, unless you give one. The command line prints such a table for `.safetensors`, `.npz` and Orbax
# checkpoints. Strides are not in the file, so that `conv2` is taken with stride 1 unless `--strides conv2=2` is given:
#
# ```sh
# python -m jaxsrn report weights.npz
# ```

flat = jax.tree_util.tree_leaves_with_path(weights)
np.savez("weights.npz", **{"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in flat})
command_line(["report", "weights.npz"])

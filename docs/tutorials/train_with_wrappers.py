"""# Train with wrappers

A wrapper holds the spectral norm and the stable rank of a layer while it trains. You write your Flax model as always,
and wrap the layers that are to be constrained. The raw kernel stays the parameter that the optimizer moves; what the
layer multiplies by is the closest kernel that meets the constraints.
"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxsrn
import jaxsrn.nnx as jnnx

# ## The model
#
# `StableRankNorm(layer, 0.3)` asks for 30% of the largest stable rank, and for spectral norm 1 unless you give another
# `norm`. Without an `input_shape` the norm holds at every image size and padding. With one, norm and stable rank are
# exactly those of the layer at that size. `SpectralNorm` asks for the norm alone.


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = jnnx.SpectralNorm(nnx.Conv(1, 8, (3, 3), rngs=rngs), input_shape=(8, 8), norm=2.0)
        self.conv2 = jnnx.StableRankNorm(nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs), 0.3, norm=2.0)
        self.dense = nnx.Linear(4 * 4 * 8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.dense(x.reshape(len(x), -1))


model = CNN(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

# ## The step
#
# Nothing in the training step knows about the constraints. Every forward takes one or two cheap passes that follow the
# leading singular vectors, and stores them in the wrapper, as batch normalization stores its averages.


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


images, labels = load_digits(return_X_y=True)
images, rng = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), np.random.default_rng(0)
for epoch in range(4):
    batches = rng.permutation(1792).reshape(-1, 64)
    losses = [train_step(model, optimizer, images[batch], labels[batch]) for batch in batches]
    print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}")

# ## What was held
#
# After `model.eval()` forwards only read: all of them see the same weights. `fold` gives the plain Flax model with
# these weights. It has no wrappers, and it is what you deploy, save or analyse.

model.eval()
plain = jnnx.fold(model)
print("predictions differ by at most", float(abs(plain(images[:8]) - model(images[:8])).max()))
for name in ("conv1", "conv2"):
    op, kernel = getattr(model, name).operator, getattr(plain, name).kernel[...]
    norm, rank = jaxsrn.spectral_norm(kernel, op), jaxsrn.stable_rank(kernel, op)
    most = jaxsrn.stable_rank_range(kernel.shape, op).high
    print(f"{name}, {op}: norm {norm:.4f}, stable rank {rank:.3f} of at most {most:g}")

# The layers keep to a pass or two a step, so that the norm lags a little behind a fast optimizer. `jnnx.refresh(model)`
# takes the passes of one more step of every wrapper without a forward.

for _ in range(5):
    jnnx.refresh(model)
kernel = jnnx.fold(model).conv2.kernel[...]
print(f"conv2 after five refreshes: norm {jaxsrn.spectral_norm(kernel, model.conv2.operator):.6f}")

# ## Whole models
#
# `constrain` wraps every matching layer of a model that is already written. The function gets the path and the layer.

unconstrained = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(1)), nnx.relu, nnx.Linear(32, 10, rngs=nnx.Rngs(2)))
constrained = jnnx.constrain(unconstrained, lambda path, layer: jnnx.SpectralNorm(layer))
for path, op in jnnx.layer_operators(jnnx.fold(constrained)).items():
    kernel = dict(nnx.to_flat_state(nnx.state(jnnx.fold(constrained))))[path][...]
    print(path, f"norm {jaxsrn.spectral_norm(kernel, op):.6f}")

# A network of such layers and of activations with slope at most 1 changes its output by at most the product of the
# norms times the change of its input. That is a bound for all inputs, not a measurement at some.

change = jax.random.normal(jax.random.key(0), (64,)) * 0.01
x = images[0].reshape(-1)
moved = np.linalg.norm(constrained(x + change) - constrained(x)) / np.linalg.norm(change)
print(f"the output moved by {moved:.3f} times as much as the input; the bound is 1")

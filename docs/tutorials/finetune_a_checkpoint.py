"""# Fine-tune a normalized checkpoint

A trained network is normalized once, by `srnc`, as close to its weights as the constraints allow. That costs some
accuracy. Fine-tuning with wrappers wins it back while the constraints hold.
"""

import tempfile
from pathlib import Path

import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

import jaxsrn
import jaxsrn.nnx as jnnx

images, labels = load_digits(return_X_y=True)
images, rng = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), np.random.default_rng(0)


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, padding="CIRCULAR", rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.dense(x.reshape(len(x), -1))


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


def train(model, epochs):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for batch in (rows for _ in range(epochs) for rows in rng.permutation(1792).reshape(-1, 64)):
        train_step(model, optimizer, images[batch], labels[batch])


def accuracy(model):
    return float((model(images).argmax(-1) == labels).mean())


# ## A trained network, and its layers
#
# Normally the checkpoint is yours. `layer_operators` says which linear map each kernel stands for, traced on one image.

model = CNN(nnx.Rngs(0))
train(model, epochs=8)
operators = jnnx.layer_operators(model, images[:1])
print(f"trained: accuracy {accuracy(model):.3f}")

# ## Normalize once
#
# The second convolution is replaced by the closest one with the same norm and 40% of its stable rank. (Any layers can
# be chosen.) The result says how far that is, and how much closer any other kernel could be at most.

op, layer = operators["conv2", "kernel"], model.conv2
own = jaxsrn.stable_rank(layer.kernel[...], op)
result = jaxsrn.srnc(layer.kernel[...], op, 0.4 * own)
layer.kernel[...] = result.kernel
print(f"{op}: stable rank {own:.2f} -> {result.stable_rank:.2f}, norm {result.spectral_norm:.4f}")
print(f"moved by {result.distance:.3f} of its length; another kernel could save {result.gap:.3f} of that at most")
print(f"normalized: accuracy {accuracy(model):.3f}")

# ## Fine-tune
#
# The wrapper holds what is there now: `norm=None` keeps the norm that the layer has, and the fraction is the share of
# the largest stable rank that it now has.

largest = min(np.prod(op.in_shape(layer.kernel.shape)), np.prod(op.out_shape(layer.kernel.shape)))
fraction = float(result.stable_rank / largest)


def wrapped(model):
    def wrap(path, layer):
        return jnnx.StableRankNorm(layer, fraction, input_shape=op.input_shape, norm=None)

    return jnnx.constrain(model, wrap, where=lambda path, layer: path == ("conv2",))


tuned = wrapped(model)
train(tuned, epochs=3)
tuned.eval()
plain = jnnx.fold(tuned)
print(f"fine-tuned: accuracy {accuracy(tuned):.3f}, stable rank {jaxsrn.stable_rank(plain.conv2.kernel[...], op):.2f}")

# ## Save and restore
#
# To go on training later, save the wrapped model: raw kernels and the states of the wrappers together. The state is a
# structure and no plain dictionary, so a checkpoint is restored with the state of such a model as the target.

folder = Path(tempfile.mkdtemp()) / "checkpoint"
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, nnx.state(tuned))
    checkpointer.wait_until_finished()
    fresh = wrapped(CNN(nnx.Rngs(1)))
    nnx.update(fresh, checkpointer.restore(folder, nnx.state(fresh)))
fresh.eval()
print("restored, predictions differ by at most", float(abs(fresh(images) - tuned(images)).max()))

# All of that state consists of real floats. So it may be averaged with the weights (an exponential moving average of
# `nnx.state(model)`), cast to half precision, or stored in any file that holds arrays.
#
# A state belongs to its kernel. Where only the kernels change, because weights are loaded into a wrapped model, or
# because an average of weights is evaluated, `restart` starts all states anew, converged. Without it, a forward that
# finds a norm more than 5% above what its state knew of takes as many passes as it needs; in evaluation it stores
# nothing, so that every forward takes them again.

tuned.conv2.layer.kernel[...] = CNN(nnx.Rngs(2)).conv2.kernel[...]
jnnx.restart(tuned)
kernels = tuned.conv2.layer.kernel[...], jnnx.fold(tuned).conv2.kernel[...]
print("other weights: stable rank {:.2f}, normalized {:.2f}".format(*(jaxsrn.stable_rank(k, op) for k in kernels)))

# To deploy, save the state of `plain`: an ordinary Flax model with the very weights that the wrappers computed with.

"""How a classifier of images is trained and scored: standardized and augmented pixels, a step, loss and accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

__all__ = ["augmented", "loss_and_hits", "score", "standardized", "train_step"]

# Of the pixels of CIFAR-10's training images.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def standardized(images):
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


def augmented(images, key):
    """Each image mirrored or not, and shifted by up to an eighth of its size: four pixels of 32."""
    size, margin, keys = images.shape[1], images.shape[1] // 8, jax.random.split(key)
    mirrored = jax.random.bernoulli(keys[0], shape=(len(images), 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
    images = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    corners = jax.random.randint(keys[1], (len(images), 2), 0, 2 * margin + 1)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), (size, size, 3)))(images, corners)


def loss_and_hits(model, x, y):
    logits = model(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (logits.argmax(-1) == y).mean()


@nnx.jit
def train_step(model, optimizer, images, labels, key):
    x = augmented(standardized(images), key)
    (loss, accuracy), grads = nnx.value_and_grad(loss_and_hits, has_aux=True)(model, x, labels)
    optimizer.update(model, grads)
    return loss, accuracy


@nnx.jit
def score_batch(model, images, labels):
    return jnp.stack(loss_and_hits(model, standardized(images), labels))


def score(model, images, labels, batch: int) -> tuple[float, float]:
    """Loss and accuracy, without the last images that fill no batch."""
    starts = range(0, len(images) - batch + 1, batch)
    scores = [score_batch(model, images[i : i + batch], labels[i : i + batch]) for i in starts]
    return tuple(float(value) for value in np.mean(scores, axis=0))

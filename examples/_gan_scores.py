"""How good generated images are, by a small classifier that is trained here: analogues of three scores of GANs.

The Inception score and FID are defined by one large network trained on ImageNet. The numbers here are made by the same
formulas from the features of another network. They compare GANs of one study, and are comparable to nothing else.
"""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

__all__ = [
    "Classifier",
    "class_score",
    "frechet_distance",
    "neural_divergence",
    "outputs_of",
    "restored",
    "trained",
    "weights_of",
]

BATCH = 64


class Classifier(nnx.Module):
    """Three convolutions, two of which are followed by pooling; their means over the image are the features."""

    def __init__(self, colours: int, outputs: int, rngs: nnx.Rngs, width: int = 16):
        widths = (colours, width, 2 * width, 4 * width)
        self.convs = nnx.List([nnx.Conv(*pair, (3, 3), rngs=rngs) for pair in pairwise(widths)])
        self.head = nnx.Linear(widths[-1], outputs, rngs=rngs)

    def features(self, x):
        for i, conv in enumerate(self.convs):
            x = nnx.relu(conv(x))
            x = x if i == 2 else nnx.max_pool(x, (2, 2), (2, 2))
        return x.mean((1, 2))

    def __call__(self, x):
        return self.head(self.features(x))


@functools.cache
def _adam(num_steps: int):
    return optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))


@functools.partial(jax.jit, static_argnums=0)
def _step(graph, state, x, labels):
    model, optimizer = nnx.merge(graph, state)

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))
    return nnx.state((model, optimizer))


def trained(images, labels, outputs: int, num_steps: int, seed: int) -> Classifier:
    """A classifier of images in [-1, 1], trained on mirrored ones too."""
    model = Classifier(images.shape[-1], outputs, nnx.Rngs(seed))
    graph, state = nnx.split((model, nnx.Optimizer(model, _adam(num_steps), wrt=nnx.Param)))
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        places = rng.integers(len(images), size=BATCH)
        mirrored = slice(None, None, rng.choice((-1, 1)))
        state = _step(graph, state, images[places][:, :, mirrored], labels[places])
    return nnx.merge(graph, state)[0]


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graph, state, x):
    model = nnx.merge(graph, state)
    features = model.features(x)
    return features, model.head(features)


def outputs_of(model: Classifier, images, batch: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of all images, in float64."""
    graph, state = nnx.split(model)
    found = [_outputs(graph, state, images[i : i + batch]) for i in range(0, len(images), batch)]
    features, logits = (np.concatenate(parts).astype(float) for parts in zip(*found, strict=True))
    return features, logits


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """FID's formula (Heusel et al. 2017): the squared Wasserstein-2 distance of Gaussians fitted to features, rows.

    `|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))`; the trace of the root is that of the symmetric matrix
    `(R S_y R)^(1/2)` with `R^2 = S_x`.
    """
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ np.cov(y, rowvar=False) @ root).clip(0)
    difference = x.mean(0) - y.mean(0)
    return float(difference @ difference + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * np.sqrt(both).sum())


def class_score(logits: np.ndarray) -> float:
    """The Inception score's formula (Salimans et al. 2016): `exp(mean KL(p(class | image), p(class)))`, 1 to 10."""
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    shares = np.exp(logs)
    return float(np.exp(np.mean(np.sum(shares * (logs - np.log(shares.mean(0))), axis=1))))


def neural_divergence(real, generated, num_steps: int, seed: int) -> float:
    """The loss of a fresh classifier of real against generated images, on images that it has not seen.

    Gulrajani et al. 2019, as Sanyal et al. 2020 take it: the larger, the better are the generated images; it is log 2
    where the classifier cannot tell them apart. Of both kinds, the first half is trained on.
    """
    half = len(real) // 2
    images = jnp.concatenate([real[:half], generated[:half]])
    labels = np.repeat([0, 1], [half, half])
    model = trained(images, labels, 2, num_steps, seed)
    logits = outputs_of(model, jnp.concatenate([real[half:], generated[half:]]))[1]
    labels = np.repeat([0, 1], [len(real) - half, len(generated) - half])
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean())


def weights_of(model: Classifier) -> list:
    """The weights as JSON holds them."""
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(nnx.state(model))]


def restored(weights: list, colours: int, outputs: int) -> Classifier:
    """The classifier of these weights."""
    model = Classifier(colours, outputs, nnx.Rngs(0))
    structure = jax.tree.structure(nnx.state(model))
    nnx.update(model, jax.tree.unflatten(structure, [jnp.asarray(leaf, jnp.float32) for leaf in weights]))
    return model

"""Figure 4 of Sedghi, Gupta, Long 2019: the singular values of every layer of a network, and which networks."""

from typing import NamedTuple

import _cifar10
import jax
import matplotlib
import numpy as np
import optax
from _classification import score, train_step
from _layers import name_of
from _report import paragraphs, resnet50, save, table
from _resnet import ResNetV2
from flax import nnx
from tqdm import tqdm

import jaxsrn
import jaxsrn.nnx as jnnx
from jaxsrn import CircularConv, Dense, plots
from jaxsrn.operators import Operator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw_spectra", "layers_of", "report_spectra", "resnet_v2", "spectrum_of"]

NEGLIGIBLE = 0.01  # of the norm


class Spectrum(NamedTuple):
    """All singular values of a layer, descending; a 1x1 layer has those of its matrix, over and over."""

    name: str
    shape: tuple[int, ...]
    values: np.ndarray
    repeats: int

    @property
    def has_taps(self) -> bool:
        return self.shape[0] > 1

    @property
    def stable_rank(self) -> float:
        return self.repeats * float(np.sum((self.values / self.values[0]) ** 2))

    @property
    def kept(self) -> float:
        """The share of singular values that are not negligible."""
        return float(np.mean(self.values > NEGLIGIBLE * self.values[0]))


def spectrum_of(name: str, layer) -> Spectrum:
    op: Operator = CircularConv(layer.input_shape, strides=layer.strides)
    kernel, repeats = layer.kernel, 1
    if kernel.shape[:2] == (1, 1):
        op, kernel, repeats = Dense(), kernel[0, 0], int(np.prod(op.grid))
    return Spectrum(name, layer.kernel.shape, np.asarray(jaxsrn.singular_values(kernel, op), np.float64), repeats)


class Layer(NamedTuple):
    """A kernel, and where it acts."""

    kernel: np.ndarray
    input_shape: tuple[int, int] = (8, 8)
    strides: tuple[int, int] = (1, 1)


def layers_of(fast: bool) -> tuple[str, dict]:
    """What the network is, and its convolutions: a trained ResNet-50, or random kernels."""
    if not fast:
        return "a trained ResNet-50: Keras's, a v1, trained on ImageNet.", resnet50.load()
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 3, 4), "b": (1, 1, 4, 6), "c": (3, 3, 4, 4)}
    layers = {name: Layer(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    return "random layers.", layers


class Training(NamedTuple):
    """How the ResNet v2 is trained."""

    widths: tuple[int, ...] = (8, 16, 32)
    blocks: int = 3
    pixels: int = 16
    num_train: int = 20000
    num_test: int = 2000
    num_steps: int = 600
    batch: int = 64
    rate: float = 0.1


def resnet_v2(fast: bool) -> tuple[str, dict]:
    """A ResNet v2 that is trained here on CIFAR-10, and its convolutions in their order."""
    how = Training((4, 4), 1, 8, 64, 64, 2, 16) if fast else Training()
    data = _cifar10.smaller(how.pixels, how.num_train, how.num_test, stand_in=fast)
    model = ResNetV2(how.widths, how.blocks, nnx.Rngs(0))
    layers = jnnx.layer_operators(model, jax.ShapeDtypeStruct((1, how.pixels, how.pixels, 3), np.float32))
    schedule = optax.cosine_decay_schedule(how.rate, how.num_steps)
    rule = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, 0.9, nesterov=True))
    optimizer, rng, key = nnx.Optimizer(model, rule, wrt=nnx.Param), np.random.default_rng(0), jax.random.key(0)
    for step in tqdm(range(how.num_steps), desc="ResNet v2", unit="step"):
        chosen = rng.integers(len(data.x_train), size=how.batch)
        train_step(model, optimizer, data.x_train[chosen], data.y_train[chosen], jax.random.fold_in(key, step))
    model.eval()
    loss, accuracy = score(model, data.x_test, data.y_test, how.batch)
    about = (
        f"a small ResNet v2: widths {list(how.widths)}, blocks of each: {how.blocks}; trained for {how.num_steps} "
        f"steps on {data.name} at {how.pixels}x{how.pixels}, test loss {loss:.3f}, test accuracy {accuracy:.1%}."
    )
    kernels = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    found = {
        name_of(path): Layer(np.asarray(kernels[path][...]), op.input_shape, op.strides)
        for path, op in layers.items()
        if hasattr(op, "input_shape")
    }
    return about, found


def draw_spectra(spectra: list[Spectrum], path):
    """The paper's figure, and all layers on one scale."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(17, 5), layout="constrained", width_ratios=[1, 1.3])
    plots.singular_values({spectrum.name: spectrum.values for spectrum in spectra}, relative=True, ax=right)
    for spectrum, line in zip(spectra, right.lines, strict=True):
        if spectrum.has_taps:
            left.plot(spectrum.values, color=line.get_color(), ls=line.get_linestyle(), lw=1.2)
    left.set(xlabel="index", ylabel="singular value", title="Layers with more than one tap")
    left.set_xscale("symlog", linthresh=100)
    right.set_title("All layers")
    save(figure, path, dpi=110)


def report_spectra(spectra: list[Spectrum], about: str, picture: str) -> str:
    """What the figure shows, of which network, beside what the paper reads off its own."""
    rows = []
    for spectrum in spectra:
        norm, number = spectrum.values[0], spectrum.repeats * len(spectrum.values)
        largest = spectrum.stable_rank / number
        cells = (f"{norm:.3f}", f"{spectrum.stable_rank:.1f}", f"{largest:.2%}", f"{spectrum.kept:.1%}")
        rows.append([spectrum.name, "x".join(map(str, spectrum.shape)), number, *cells])
    wide = [spectrum for spectrum in spectra if spectrum.has_taps]
    ranks = np.argsort(np.argsort([-spectrum.values[0] for spectrum in wide]))
    trend, highest = np.corrcoef(np.arange(len(wide)), -ranks)[0, 1], wide[int(np.argmin(ranks))].name
    return paragraphs(
        f"Of {about}",
        "Circular padding, at the image sizes of the network. The stable rank is ||T||_F^2 / ||T||_2^2, also as a "
        f"share of its largest possible value; `kept`: singular values above {NEGLIGIBLE:g} of the norm.",
        table(("layer", "kernel", "singular values", "norm", "stable rank", "of largest", "kept"), rows),
        'The paper reads off its figure: "The transformations with the largest operator norms are closest to the '
        f'inputs." Here, over the {len(wide)} layers with more than one tap, the rank correlation of depth and norm '
        f"is {trend:.2f}; the largest norm is that of {highest}.",
        f"![Singular values]({picture})",
    )

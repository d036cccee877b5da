"""The optimizers of train_cifar10.py, by name: SGD, Adam, Muon, and steepest descent under each layer's own norm."""

import functools

import jax
import jax.numpy as jnp
import optax

from jaxsrn import optim

# The first learning rate of each: that of the convolutions. compare_optimizers.py tries others.
RATES = {
    "sgd": 0.1,
    "adam": 1e-3,
    "muon": 1e-3,
    "muon-flattened": 0.02,
    "descent-flattened": 0.04,
    "descent-frequency": 0.04,
    "descent-exact": 0.04,
}
ABOUT = {
    "sgd": "SGD, momentum 0.9",
    "adam": "Adam",
    "muon": "optax's Muon, convolutions by Adam",
    "muon-flattened": "optax's Muon, convolutions flattened",
    "descent-flattened": "spectral_descent, flattened",
    "descent-frequency": "spectral_descent, frequency",
    "descent-exact": "spectral_descent, exact",
}
# Of Muon where Adam has the convolutions: that of its documentation.
MUON = 0.02
# Of Adam where another optimizer has the layers, as in the RATES of Adam alone.
ADAM = functools.partial(optax.adam, b1=0.9, b2=0.999)


def optimizer(name: str, rate: float, num_steps: int, layers) -> optax.GradientTransformation:
    """The optimizer with a cosine decay; `layers` are `{path: operator}` of `spectral_descent`."""
    schedule = optax.cosine_decay_schedule(rate, num_steps)
    adam = optax.cosine_decay_schedule(RATES["adam"], num_steps)
    if name == "sgd":
        return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9, nesterov=True))
    if name == "adam":
        return ADAM(schedule)
    if name == "muon":
        heads = optax.cosine_decay_schedule(MUON, num_steps)
        return optax.contrib.muon(heads, adam_learning_rate=schedule, muon_weight_dimension_numbers=_matrices)
    if name == "muon-flattened":
        return optax.contrib.muon(schedule, adam_learning_rate=adam, muon_weight_dimension_numbers=_flattened)
    return optim.spectral_descent(schedule, layers, method=name.removeprefix("descent-"), others=ADAM(adam))


def _matrices(params):
    """The dense layers."""
    return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers() if jnp.ndim(leaf) == 2 else None, params)


def _flattened(params):
    """Dense layers, and convolutions as matrices of `taps * c_in` rows."""

    def numbers(leaf):
        axes = tuple(range(jnp.ndim(leaf)))
        return optax.contrib.MuonDimensionNumbers(axes[:-1], axes[-1:]) if len(axes) >= 2 else None

    return jax.tree.map(numbers, params)

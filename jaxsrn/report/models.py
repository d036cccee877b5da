"""The arrays of a Flax model by name, with the layers that they are in: operators as the model's own calls show them.

Flax is imported when a model is given, as bare weights need none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxsrn._tools.checks import ensure
from jaxsrn.operators.flax_layers import LayerMap
from jaxsrn.report.named_arrays import NamedArrays, Tree

__all__ = ["Model", "is_model", "model_of"]


class Model(NamedTuple):
    """A model as a report reads it.

    Attributes:
      arrays: its arrays.
      layers: `{name of the kernel: layer}`, in the order of the calls.
      epsilons: `{scope: epsilon}` of its batch normalizations, as far as the model says it.
    """

    arrays: NamedArrays
    layers: dict[str, LayerMap]
    epsilons: dict[str, float]


def is_model(source: Any) -> bool:
    """Whether something is a module of NNX or of Linen; neither is imported for that."""
    kinds = (_module_class("flax.nnx"), _module_class("flax.linen"))
    return any(kind is not None and isinstance(source, kind) for kind in kinds)


def _module_class(library: str):
    """The class of the modules of a library of Flax; `None` where it is not imported."""
    return getattr(sys.modules.get(library), "Module", None)


def model_of(model: Any, inputs: tuple, computes: Mapping, options: Mapping) -> Model:
    """The arrays and layers of a module of NNX, or of one of Linen with its variables as the first of the inputs."""
    linen = _module_class("flax.linen")
    is_linen = linen is not None and isinstance(model, linen)
    return (_of_linen if is_linen else _of_nnx)(model, inputs, computes, options)


def _of_nnx(model, inputs, computes, options) -> Model:
    from flax import nnx

    from jaxsrn.nnx.models import fold, layer_calls

    # The weights of wrapped layers are those that they compute with.
    plain = fold(model)
    maps = layer_calls(plain, *inputs, computes=computes, **options).found
    arrays = {_joined(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(plain))}
    norms = {_joined(path): node for path, node in nnx.iter_graph(plain) if isinstance(node, nnx.BatchNorm)}
    layers = {_joined(path): seen for path, seen in maps.items()}
    return Model(
        Tree(arrays, type(model).__name__), layers, {scope: float(norm.epsilon) for scope, norm in norms.items()}
    )


def _of_linen(module, inputs, computes, options) -> Model:
    from flax import linen as nn
    from flax.traverse_util import flatten_dict, unflatten_dict

    from jaxsrn.linen.models import layer_calls
    from jaxsrn.linen.variables import stepped
    from jaxsrn.linen.wrappers import COLLECTION

    ensure(
        bool(inputs) and isinstance(inputs[0], Mapping) and "params" in inputs[0],
        f"variables: got none for {type(module).__name__}, expected those that init returns, after the module.",
    )
    variables, *inputs = inputs
    ensure(
        bool(inputs or options),
        f"inputs: got none for {type(module).__name__}, expected those of its call or their shapes: a module of Linen "
        "has no layers before it is called; the variables alone are analyzed as bare weights, analyze(variables).",
    )
    maps = layer_calls(module, variables, *inputs, unbounded=False, computes=computes, **options).found
    params = flatten_dict(variables["params"])
    if COLLECTION in variables:
        for path, kernel, _ in stepped(module, variables).values():
            params[(*path, "kernel")] = kernel
    held = {name: value for name, value in variables.items() if name != COLLECTION}
    arrays = nn.meta.unbox({**held, "params": unflatten_dict(params)})
    layers = {_joined(("params", *path)): seen for path, seen in maps.items()}
    return Model(Tree(arrays, type(module).__name__), layers, {})


def _joined(path: tuple) -> str:
    return "/".join(map(str, path))

"""The **kind** of a layer: which of Flax's maps it computes from its kernel, found without importing Flax.

A layer is taken for one of Flax's only where it provably computes the same map from its kernel: it is of that very
class, or of a subclass that changes nothing that the class reads. The caller has to vouch for any other layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

from jaxsrn._tools.checks import ensure, errors_named

__all__ = ["FlaxLayers", "ensure_own_kernel", "kind_of", "layer_name", "shown"]

# These fields of a layer hold functions that its kernel goes through.
_FUNCTIONS = ("promote_dtype", "dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
# These double-underscored names compute; the others describe or build a layer.
_COMPUTING = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}
# Linen itself writes these names into every subclass.
_LINENS_OWN = {"parent", "name"}


class FlaxLayers(NamedTuple):
    """The four classes of Linen, or of NNX, whose maps are known."""

    conv: type
    conv_transpose: type
    dense: type
    dense_general: type


def shown(where) -> str:
    """A filter of layers in an error message: classes by their names."""
    return ", ".join(kind.__name__ for kind in where) if isinstance(where, FlaxLayers) else repr(where)


def layer_name(layer) -> str:
    """The name of a layer in an error message: its class and its features."""
    features = [
        f"{name}={getattr(layer, name)}"
        for name in ("in_features", "out_features", "features", "kernel_size")
        if hasattr(layer, name)
    ]
    return f"{type(layer).__name__}({', '.join(features)})"


def kind_of(layer, classes: FlaxLayers, vouched: Mapping[type, type | None]) -> str | None:
    """Which of Flax's maps a layer computes from its kernel: a field of `FlaxLayers`.

    Args:
      layer: a Linen or NNX layer.
      classes: the classes of the layer's library.
      vouched: `{class: one of the classes}`, the maps of other classes as the caller vouches for them; `None` says that
        layers of a class compute none of the four.

    Returns:
      The name of the field, or `None` for layers vouched to be none of them.

    Raises:
      ValueError: a layer that may compute another map; the message names it.
    """
    names = ", ".join(kind.__name__ for kind in classes)
    for claim in vouched.values():
        ensure(claim is None or claim in classes, f"computes: got {claim!r}, expected one of Flax's {names}.")
    known = {**{kind: kind for kind in classes}, **vouched}
    base = next((parent for parent in type(layer).__mro__ if parent in known), None)
    vouch = (
        f"if it computes the map of one of Flax's {names} with the parameter `kernel` as it is, say which: computes=..."
    )
    with errors_named(layer_name(layer)):
        ensure(
            base is not None or not hasattr(layer, "num_embeddings"),
            f"layer: got {type(layer).__name__}, expected {names}; a table whose rows are looked up is no linear map "
            "of its input. Leave it out, by the option where= of constrain.",
        )
        ensure(
            base is not None,
            f"layer: got {type(layer).__name__}, expected {names}; wrap the layer that has the kernel, or, {vouch}",
        )
        assert base is not None
        if known[base] is None:
            return None
        changed = _changed(layer, base) + ([] if base in vouched else _own_functions(layer, base))
        ensure(
            not changed,
            f"layer: got {type(layer).__name__}, a {base.__name__} with its own {', '.join(changed)}, "
            f"whose map may be another; expected a plain {base.__name__}, or, {vouch}",
        )
    return classes._fields[classes.index(known[base])]


def ensure_own_kernel(module, changing: tuple[type, ...], name: str) -> None:
    """Raises `ValueError` for one of Flax's own wrappers, whose layer computes with another kernel than it stores."""
    ensure(
        not isinstance(module, changing),
        f"{name or type(module).__name__}: got Flax's {type(module).__name__}, which changes the kernel of the layer "
        "inside; expected a model without it. Take the plain layer; jaxsrn's wrappers take its place.",
    )


def _changed(layer, base: type) -> list[str]:
    """The names that the base's call may read and under which a subclass has other code than the base.

    Values are left out, because the call and `layer_map` read the same ones off the layer. A field is a value unless a
    property stands in its place.
    """
    fields = {*inspect.signature(base.__init__).parameters, "kernel", "bias"}
    methods = {name for name in dir(base) if not name.startswith("__")} | _COMPUTING

    def differs(name: str) -> bool:
        own, inherited = (inspect.getattr_static(kind, name, None) for kind in (type(layer), base))
        is_code = inspect.isdatadescriptor(own) if name in fields else _is_code(own) or _is_code(inherited)
        return own is not inherited and is_code

    return sorted(name for name in (fields | methods) - _LINENS_OWN if differs(name))


def _is_code(attribute) -> bool:
    """Whether an attribute of a class is a method, a property, or the like."""
    return hasattr(type(attribute), "__get__")


def _own_functions(layer, base: type) -> list[str]:
    """The names of the functions that a layer's kernel goes through and that are not Flax's own."""
    defaults = inspect.signature(base.__init__).parameters
    fields = [name for name in _FUNCTIONS if name in defaults]
    own = [name for name in fields if getattr(layer, name) not in (None, defaults[name].default)]
    # NNX reads a parameter through a method of its type, or through a hook; both can change the kernel.
    kernel = getattr(layer, "kernel", None)
    read = getattr(type(kernel), "get_value", None)
    is_plain = read is None or (read.__module__.startswith("flax.") and not getattr(kernel, "on_get_value", ()))
    return own if is_plain else [*own, "kernel.get_value"]

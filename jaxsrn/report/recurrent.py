"""The gates of recurrent cells: the matrices that a stored kernel of several gates is made of.

A gate is a linear map with a nonlinearity of its own, and its norm is what bounds that gate. Flax's LSTM cell stores
one kernel for each gate; PyTorch, Keras and Flax's optimized and convolutional cells store them in one array. A report
has one line for each gate in all of them, so that its numbers do not depend on who stored the cell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxsrn.report.layouts import split_name
from jaxsrn.report.named_arrays import ArrayInfo

__all__ = ["gates_of"]

_TORCH = re.compile(r"(.*?)weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
# The names of the gates by their number, in the order in which each library stores them.
_TORCH_GATES = {3: "rzn", 4: "ifgo"}
_KERAS_GATES = {3: "zrh", 4: "ifco"}
# The scopes of Flax's cells that hold the kernels of the input and of the state, and the names of their gates.
_FLAX_CELLS = {("dense_i", "dense_h"): _TORCH_GATES, ("ih", "hh"): {4: "igfo"}}
_PROJECTIONS = "qkv"


def gates_of(name: str, infos: Mapping[str, ArrayInfo]) -> str:
    """The gates of which an array holds the kernels along its outputs, one letter each; empty for a single kernel.

    The kernel that reads the hidden state shows how many there are: each has as many outputs as the state.
    """
    stem, leaf, _ = split_name(name)
    if found := _TORCH.fullmatch(leaf):
        _, kind, layer, reverse = found.groups()
        ending = f"{layer or ''}{reverse or ''}"
        names = (f"{stem}weight_{k}{ending}" for k in ("hh", "hr"))
        recurrent, projection = (infos[key].shape if key in infos else () for key in names)
        # That of an IndRNN is a vector.
        if kind == "hr" or len(recurrent) != 2:
            return ""
        width = (projection if len(projection) == 2 else recurrent)[1]
        return _TORCH_GATES.get(_ratio(recurrent[0], width), "")
    if leaf == "in_proj_weight":
        shape = infos[name].shape
        return _PROJECTIONS if len(shape) == 2 and shape[0] == 3 * shape[1] else ""
    if leaf in ("kernel", "recurrent_kernel"):
        suffix = ":0" if name.endswith(":0") else ""
        recurrent = infos.get(f"{stem}recurrent_kernel{suffix}")
        if recurrent is not None and len(recurrent.shape) > 1:
            return _KERAS_GATES.get(_ratio(recurrent.shape[-1], recurrent.shape[-2]), "")
        return _flax_gates(stem, infos)
    return ""


def _flax_gates(stem: str, infos: Mapping[str, ArrayInfo]) -> str:
    """The gates of a kernel in a scope of one of Flax's cells; `stem` is its name up to the last dot or slash."""
    for scopes, names in _FLAX_CELLS.items():
        if found := re.fullmatch(rf"((?:.*[./])?)(?:{'|'.join(scopes)})([./])", stem):
            cell, dot = found.groups()
            of_input, of_state = (infos.get(f"{cell}{scope}{dot}kernel") for scope in scopes)
            if of_input is not None and of_state is not None and len(of_state.shape) > 1:
                return names.get(_ratio(of_state.shape[-1], of_state.shape[-2]), "")
    return ""


def _ratio(whole: int, part: int) -> int:
    return whole // part if part and whole % part == 0 else 0

"""`analyze`: the report of a model, or of bare weights."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxsrn._tools.checks import computing_in, ensure, float_dtype
from jaxsrn.report.batch_norms import BatchNorm, folded, pair_batch_norms
from jaxsrn.report.files import open_arrays
from jaxsrn.report.kernels import NamedKernel, Skipped, find_kernels
from jaxsrn.report.layers import LayerReport, layer_report
from jaxsrn.report.models import is_model, model_of
from jaxsrn.report.named_arrays import NamedArrays, Tree
from jaxsrn.report.table import Report
from jaxsrn.report.terminal import Progress, progress_bar

__all__ = ["analyze", "layer_reports"]


def analyze(
    source: Any,
    *inputs,
    layout: str | None = None,
    input_shape: Sequence[int] | None = None,
    groups: Mapping[str, int] = MappingProxyType({}),
    strides: Mapping[str, int] = MappingProxyType({}),
    stacked: Sequence[str] = (),
    spectra: bool = False,
    fold_batch_norm: bool = False,
    epsilon: float | None = None,
    computes: Mapping[type, type | None] = MappingProxyType({}),
    progress: Progress = None,
    **options,
) -> Report:
    """The norm, the stable rank and more of every layer of a network.

        report = analyze(model, x)                        # an NNX model, at the image sizes of x
        report = analyze("model.safetensors")             # bare weights, at every image size
        print(report)

    A model says what its layers are. With inputs it is traced on their shapes, and the numbers are exact for the image
    sizes that its layers see; an NNX model without inputs has the operators of no image size (`jaxsrn.UnboundedConv`).
    Layers wrapped by `jaxsrn.nnx` or `jaxsrn.linen` are reported as they compute.

    Of bare weights the names and the shapes say it, and every record says in its `rule` what decided. Names are those
    of Flax and Keras (`kernel`, HWIO) or of PyTorch (`weight`, OIHW); for others the axes of few samples are the taps.
    Two axes are a dense layer (embeddings too), three to five a convolution of stride 1 on one to three axes. The norm
    with stride 1 bounds that with any other, and a dilation does not change it. Kernels of recurrent cells are reported
    gate by gate, since each gate is a map of its own and libraries differ only in whether they store them together.
    Layers stacked along the first axis by `nn.scan` are reported one by one where their biases or scales are stacked
    too. A kernel of one input channel is depthwise by its name, or where several read one channel.

    Arrays are read one at a time. Layers of one shape share their compiled programs. Matrices of up to 1,024 rows or
    columns go to LAPACK, and compile nothing.

    Args:
      source: an NNX model; a Linen module; a pytree of parameters; or the path of a `.safetensors` file, of
        an index `*.safetensors.index.json` of several of them or its folder, of an `.npz` file, or of the folder of an
        Orbax checkpoint.
      *inputs: those of the model, arrays or `jax.ShapeDtypeStruct`s; for a Linen module the variables come first.
      layout: `"HWIO"`, `"OIHW"` or `"OHWI"`, the order in which all kernels of bare weights are stored.
      input_shape: the spatial shape at which bare convolutions of as many axes are taken, with zero padding `"SAME"`.
      groups: `{name: feature_group_count}` of bare kernels whose names and shapes do not say it.
      strides: `{name: stride}` of bare kernels, 1 for all others.
      stacked: the beginnings of names of bare arrays whose first axis is one of layers, where no bias shows that.
      spectra: whether to list condition numbers and effective ranks where `singular_values` takes the layer.
      fold_batch_norm: whether batch normalizations are folded into the kernels that they follow by their names
        (`penalties.fold_batch_norm`). Those that follow none are listed among what was skipped. Bare weights do not
        say which convolutions are transposed: PyTorch's of as many inputs as outputs are folded along the wrong axis.
      epsilon: that of the batch normalizations; by default that of the NNX model, 1e-3 for Keras's names, else 1e-5.
      computes: as for `jaxsrn.nnx.layer_operators`.
      progress: a function of `(layers done, layers in all, the name of the next)`; `True` for a bar on the error
        stream by rich, `False` for none; by default a bar where rich is installed and that stream is a terminal.
      **options: keyword arguments of the model's call.

    Returns:
      A `Report`. Its layers are in the order of the model's calls, or without inputs in the order in which Flax lists
      them, those of bare weights in the natural order of their names. Every array is among the layers or among the
      skipped, with the reason.

    Raises:
      ValueError: a source that is none of these, inputs without a model, options of bare weights beside a model, an
        unknown layout, a file that is not what its name says, or a model that `layer_operators` refuses.
      FileNotFoundError: no file at the path.
      ImportError: a library for the format is missing; the message says what to install.
    """
    if is_model(source):
        bare = {"layout": layout, "input_shape": input_shape, "groups": groups, "strides": strides, "stacked": stacked}
        given = [name for name, value in bare.items() if value]
        ensure(not given, f"{', '.join(given)}: got it beside a model, expected it for bare weights; a model says it.")
        model = model_of(source, inputs, computes, options)
        kernels, skipped = find_kernels(model.arrays.infos, known=model.layers)
        kernels = _in_order(kernels, list(model.layers))
        arrays, epsilons = model.arrays, model.epsilons if epsilon is None else epsilon
    else:
        unused = [*map(str, options), *(["inputs"] if inputs else [])]
        ensure(
            not unused,
            f"{', '.join(unused)}: got it beside {type(source).__name__}, expected it for a model of Flax only.",
        )
        is_path = isinstance(source, (str, os.PathLike))
        ensure(
            is_path or hasattr(source, "shape") or not (source is None or jax.tree_util.all_leaves([source])),
            f"source: got a {type(source).__name__}, expected a model, a pytree of parameters or a path.",
        )
        arrays = open_arrays(source) if is_path else Tree(source)
        kernels, skipped = find_kernels(
            arrays.infos, layout=layout, input_shape=input_shape, groups=groups, strides=strides, stacked=stacked
        )
        epsilons = epsilon
    norms, skipped = _norms_to_fold(fold_batch_norm, kernels, skipped, arrays, epsilons)
    with progress_bar(progress) as show:
        layers = layer_reports(kernels, norms, arrays, spectra, show)
    return Report(arrays.source, tuple(layers), tuple(skipped))


def _in_order(kernels: list[NamedKernel], names: list[str]) -> list[NamedKernel]:
    """The kernels in the order of the given names, the others after them."""
    places = {name: i for i, name in enumerate(names)}
    return sorted(kernels, key=lambda kernel: places.get(kernel.array, len(places)))


def _norms_to_fold(
    wanted: bool, kernels: list[NamedKernel], skipped: list[Skipped], arrays: NamedArrays, epsilons
) -> tuple[dict[str, BatchNorm], list[Skipped]]:
    """`{name of a kernel: batch normalization}`, and what was skipped with what became of the normalizations."""
    if not wanted:
        return {}, skipped
    pairs, alone = pair_batch_norms(kernels, arrays.infos, epsilons)
    reasons = {}
    for kernel, norm in pairs.items():
        reasons |= dict.fromkeys((norm.scale, norm.variance), f"folded into {kernel}")
    for norm in alone:
        reason = "of a batch normalization that its name pairs with no kernel"
        reasons |= dict.fromkeys((norm.scale, norm.variance), reason)
    return pairs, [entry._replace(reason=reasons.get(entry.name, entry.reason)) for entry in skipped]


def layer_reports(
    kernels: Sequence[NamedKernel], norms: Mapping[str, BatchNorm], arrays: NamedArrays, spectra: bool, show: Callable
) -> list[LayerReport]:
    """The records of all kernels, one after the other, so that one array is held at a time.

    `norms` are the batch normalizations to fold by the names of their kernels; `show` is told the progress.
    """
    # Several kernels of one array follow each other.
    read, found = functools.lru_cache(maxsize=1)(arrays.read), []
    for kernel in kernels:
        show(len(found), len(kernels), kernel.name)
        array = kernel.view(read(kernel.array))
        array = np.asarray(array).astype(float_dtype(array.dtype))
        norm = norms.get(kernel.name)
        with computing_in(array.dtype):
            if norm is not None:
                array = folded(array, norm, arrays)
            values = np.asarray(kernel.to_operator(array))
            found.append(layer_report(kernel, values, spectra, norm.scope if norm else None))
    show(len(found), len(kernels), "")
    return found

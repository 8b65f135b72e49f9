"""Folding adapters into the weights of layers: all is computed, in float32, and checked before anything is set."""

from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor
from tqdm import tqdm

from mindpet.delta.lora_layer import fold_lora
from mindpet.errors import MergeError
from mindpet.graph.parameters import outer_prefix
from mindpet.layers.kinds import layer_kind


@dataclass(frozen=True)
class MergedLayer:
    """What storing a merged weight costs.

    Attributes:
        path (str): of the layer.
        dtype (str): that the weight is stored in.
        largest_change (float): largest absolute change of the weight, in float32.
        largest_error (float): largest absolute difference between the stored weight and the one in float32.
    """

    path: str
    dtype: str
    largest_change: float
    largest_error: float

    def __str__(self):
        return (
            f"{self.path}: {self.dtype}, change up to {self.largest_change:.3g}, error up to {self.largest_error:.3g}"
        )


def fold(weight, kind, group, tensors):
    """A weight in its own type with a LoRA delta folded in, and the two float32 matrices before and after.

    Args:
        weight (numpy.ndarray): as the layer stores it.
        kind (LayerKind): of the layer.
        group (int): groups of a convolution.
        tensors (list of dict): for each delta the keywords of `fold_lora`.
    """
    before = kind.to_matrix(weight.astype(np.float32))
    after = before
    for delta in tensors:
        after = fold_lora(after, group=group, **delta)
    return kind.from_matrix(after, weight.shape).astype(weight.dtype), before, after


def describe(path, stored, before, after, kind):
    """The MergedLayer of a merged weight."""
    back = kind.to_matrix(stored.astype(np.float32))
    return MergedLayer(path, stored.dtype.name, float(np.abs(after - before).max()), float(np.abs(back - after).max()))


def merge_layers(layers, deltas, progressbar=False):
    """The merged weights and biases.

    Args:
        layers (list of Layer): the layers.
        deltas (dict): path -> list of the keywords of `fold_lora`, with 'bias' beside them if there is one.
        progressbar (bool): whether to show progress. Default: False.

    Returns:
        tuple: list of (Cell, attribute, numpy.ndarray), and list of MergedLayer.

    Raises:
        MergeError: a merged weight is not finite; a bias has no place; all of them are in the message.
    """
    values, report, problems = [], [], []
    for layer in tqdm(layers, desc="merging", unit="layer", disable=not progressbar):
        kind = layer_kind(layer.cell)
        weight, bias = kind.weight_of(layer.cell), kind.bias_of(layer.cell)
        own = [dict(delta) for delta in deltas[layer.path]]
        shifts = [delta.pop("bias") * np.float32(delta["scaling"]) for delta in own if "bias" in delta]
        merged, before, after = fold(weight.asnumpy(), kind, getattr(layer.cell, "group", 1), own)
        report.append(describe(layer.path, merged, before, after, kind))
        found = [(layer.cell, kind.weight, merged)]
        if shifts and bias is None:
            problems.append(f"{layer.path} has no bias that 'lora_bias' could go to")
        elif shifts:
            shifted = bias.asnumpy().astype(np.float32) + sum(shifts)
            found.append((layer.cell, kind.bias, shifted.astype(bias.asnumpy().dtype)))
        if not all(np.isfinite(value.astype(np.float32)).all() for _, _, value in found):
            problems.append(f"{layer.path} would hold NaN or infinite numbers as {merged.dtype.name}")
        values += found
    if problems:
        raise MergeError("merging would not work, nothing was changed: " + "; ".join(problems) + ".")
    return values, report


def shared_weights(network, layers):
    """Weights of layers that other Cells hold too, say a head tied to an embedding.

    Returns:
        list of tuple: (Layer, list of (path, Cell, attribute) of the other Cells).
    """
    places = {}
    for path, cell in network.cells_and_names():
        for key, param in cell._params.items():
            places.setdefault(id(param), []).append((path, cell, key))
    found = []
    for layer in layers:
        weight = layer_kind(layer.cell).weight_of(layer.cell)
        others = [place for place in places[id(weight)] if place[1] is not layer.cell]
        found += [(layer, others)] if others else []
    return found


def untie(network, layers):
    """Give layers whose weights other Cells hold too weights of their own, with equal values.

    The Parameter stays where it has its name from; the other side gets a new one, named by its path.
    """
    outer = outer_prefix(network)
    for layer, others in shared_weights(network, layers):
        kind = layer_kind(layer.cell)
        own = [(layer.path, layer.cell, kind.weight)]
        weight = kind.weight_of(layer.cell)
        is_namesake = any(f"{outer}{path}.{key}" == weight.name for path, _, key in own)
        path, _, key = (others if is_namesake else own)[0]
        copy = Parameter(Tensor(weight.asnumpy()), name=f"{outer}{path}.{key}", requires_grad=weight.requires_grad)
        for _, cell, key in others if is_namesake else own:
            cell._params[key] = copy

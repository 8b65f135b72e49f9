"""Folding adapters into the weights of layers: all is computed, in float32, and checked before anything is set."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np
from mindspore import Parameter, Tensor
from tqdm import tqdm

from mindpet.delta.lora_layer import fold_lora
from mindpet.errors import MergeError
from mindpet.graph.parameters import outer_prefix
from mindpet.layers.kinds import layer_kind
from mindpet.peft.plan import parameter_places
from mindpet.peft.probe import probe_merge


@dataclass(frozen=True)
class MergedLayer:
    """What storing a merged weight costs.

    Attributes:
        path (str): of the layer.
        dtype (str): that the weight is stored in.
        largest_change (float): largest absolute change of the weight, in float32.
        largest_error (float): largest absolute difference between the stored weight and the one in float32.
        unchecked (str): why the merged layer could not be compared with the layer and its deltas; None if it was.
    """

    path: str
    dtype: str
    largest_change: float
    largest_error: float
    unchecked: Optional[str] = None

    def __str__(self):
        unchecked = f", not probed: {self.unchecked}" if self.unchecked else ""
        return (
            f"{self.path}: {self.dtype}, change up to {self.largest_change:.3g}, error up to {self.largest_error:.3g}"
            f"{unchecked}"
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


@dataclass(frozen=True)
class Fold:
    """A Parameter that deltas are folded into.

    Attributes:
        path (str): of the layer.
        cell (Cell): the layer.
        attribute (str): of the Parameter.
        apply (callable): from its own value, a numpy.ndarray, and the list of the layer's deltas to the merged value.
        value (numpy.ndarray): the merged value.
    """

    path: str
    cell: object
    attribute: str
    apply: Callable
    value: np.ndarray


def merge_layers(layers, deltas, progressbar=False):
    """The merged weights and biases.

    Args:
        layers (list of Layer): the layers.
        deltas (dict): path -> list of the keywords of `fold_lora`, with 'bias' beside them if there is one.
        progressbar (bool): whether to show progress. Default: False.

    Returns:
        tuple: list of Fold, and list of MergedLayer.

    Raises:
        MergeError: a merged weight is not finite; a bias has no place; all of them are in the message.
    """
    folds, report, problems = [], [], []
    for layer in tqdm(layers, desc="merging", unit="layer", disable=not progressbar):
        cell, kind, own = layer.cell, layer_kind(layer.cell), deltas[layer.path]
        weight, bias = kind.weight_of(cell).asnumpy(), kind.bias_of(cell)
        merge = functools.partial(_merge_weight, kind=kind, group=kind.groups_of(cell))
        merged, before, after = merge(weight, own)
        found = [Fold(layer.path, cell, kind.weight, lambda own, deltas, merge=merge: merge(own, deltas)[0], merged)]
        has_shift = any("bias" in delta for delta in own)
        if has_shift and bias is None:
            problems.append(f"{layer.path} has no bias that 'lora_bias' could go to")
        elif has_shift:
            found.append(Fold(layer.path, cell, kind.bias, _merge_bias, _merge_bias(bias.asnumpy(), own)))
        folds += found
        if not all(np.isfinite(one.value.astype(np.float32)).all() for one in found):
            problems.append(f"{layer.path} would hold NaN or infinite numbers as {merged.dtype.name}")
            continue
        probe = probe_merge(cell, kind, own, {one.attribute: one.value for one in found})
        if probe.problem:
            problems.append(f"{layer.path} {probe.problem}")
        report.append(dataclasses.replace(describe(layer.path, merged, before, after, kind), unchecked=probe.skipped))
    if problems:
        raise MergeError("merging would not work, nothing was changed: " + "; ".join(problems) + ".")
    return folds, report


def _merge_weight(weight, deltas, kind, group):
    tensors = [{name: value for name, value in delta.items() if name != "bias"} for delta in deltas]
    return fold(weight, kind, group, tensors)


def _merge_bias(bias, deltas):
    shift = sum(delta["bias"] * np.float32(delta["scaling"]) for delta in deltas if "bias" in delta)
    return (bias.astype(np.float32) + shift).astype(bias.dtype)


def shared_weights(network, owners):
    """Parameters of which only some places are meant, say a head tied to an embedding.

    Args:
        network (Cell): the network.
        owners (dict): path -> list of (path of a Cell, Cell, attribute), the places that are meant.

    Returns:
        dict: path -> list of such tuples, the places that are not.
    """
    everywhere = {(id(cell), key): found for found in parameter_places("", network).values() for _, cell, key in found}
    shared = {}
    for path, own in owners.items():
        meant = [(id(cell), key) for _, cell, key in own]
        others = [place for place in everywhere[meant[0]] if (id(place[1]), place[2]) not in meant]
        if others:
            shared[path] = others
    return shared


def untie(network, owners):
    """Give the places that are meant a Parameter of their own, where others have the same one; see `shared_weights`.

    The Parameter stays where it has its name from; the other side gets a new one, named by its path.

    Returns:
        list of tuple: the new Parameters, each with the one that it is a copy of.
    """
    outer, made = outer_prefix(network), []
    for path, own in owners.items():
        others = shared_weights(network, {path: own}).get(path)
        if not others:
            continue
        _, cell, key = own[0]
        param = cell._params[key]
        is_namesake = any(f"{outer}{place}.{key}" == param.name for place, _, key in own)
        places = others if is_namesake else own
        name = ".".join(filter(None, (outer.rstrip("."), places[0][0], places[0][2])))
        copy = Parameter(Tensor(param.asnumpy()), name=name, requires_grad=param.requires_grad)
        for _, cell, key in places:
            cell._params[key] = copy
        made.append((copy, param))
    return made

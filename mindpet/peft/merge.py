"""Folding adapters into the weights of layers: all is computed, in float32, and checked before anything is set."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn
from tqdm import tqdm

from mindpet.delta._base import Delta
from mindpet.errors import MergeError
from mindpet.files.merge import MergedLayer, describe
from mindpet.network.kinds import LayerKind
from mindpet.network.parameters import outer_prefix
from mindpet.peft.plan import Place, Target, parameter_places
from mindpet.peft.probe import probe_merge
from mindpet.utils.hints import Arrays


class FoldedDelta(NamedTuple):
    """A delta that is folded into a layer.

    Attributes:
        cls: the Delta.
        arguments: delta arguments.
        values: by name, float32.
    """

    cls: type[Delta]
    arguments: dict[str, Any]
    values: Arrays


def in_float32(values: Arrays) -> Arrays:
    """Arrays by name as `Delta.fold` takes them; integers stay what they are."""
    return {name: value if value.dtype.kind in "iu" else value.astype(np.float32) for name, value in values.items()}


def fold(
    weight: np.ndarray, kind: LayerKind, deltas: Sequence[FoldedDelta]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight in its own type with deltas folded in, and the two float32 matrices before and after.

    Args:
        weight: as the layer stores it.
        kind: of the layer.
        deltas: what is folded in, one after the other.
    """
    before = kind.to_matrix(weight.astype(np.float32))
    after = before
    for delta in deltas:
        after = delta.cls.fold(after, delta.values, **delta.arguments)
    return kind.from_matrix(after, weight.shape).astype(weight.dtype), before, after


def fold_bias(bias: np.ndarray, deltas: Sequence[FoldedDelta]) -> np.ndarray:
    """A bias in its own type with deltas folded in."""
    after = bias.astype(np.float32)
    for delta in deltas:
        after = delta.cls.fold_bias(after, delta.values, **delta.arguments)
    return after.astype(bias.dtype)


@dataclass(frozen=True)
class Fold:
    """A Parameter that deltas are folded into.

    Attributes:
        path: of the layer.
        cell: the layer.
        attribute: of the Parameter.
        apply: from its own value and the layer's deltas to the merged value.
        value: the merged value.
    """

    path: str
    cell: nn.Cell
    attribute: str
    apply: Callable[[np.ndarray, list[FoldedDelta]], np.ndarray]
    value: np.ndarray


def merge_layers(
    targets: Sequence[Target], deltas: dict[str, list[FoldedDelta]], progressbar: bool = False
) -> tuple[list[Fold], list[MergedLayer]]:
    """The merged weights and biases.

    Args:
        targets: the layers.
        deltas: of each, by path.
        progressbar: whether to show progress. Default: False.

    Raises:
        MergeError: a merged weight is not finite; a bias has no place; all of them are in the message.
    """
    folds, report, problems = [], [], []
    for target in tqdm(targets, desc="merging", unit="layer", disable=not progressbar):
        cell, kind, here = target.cell, target.kind, deltas[target.path]
        weight, bias = kind.weight_of(cell).asnumpy(), kind.bias_of(cell)
        merge = functools.partial(_merge_weight, kind=kind)
        merged, before, after = fold(weight, kind, here)
        changed = [Fold(target.path, cell, kind.weight, merge, merged)]
        if bias is None and fold_bias(np.zeros(len(after), np.float32), here).any():
            problems.append(f"{target.path} has no bias that a bias of its delta could go to")
        elif bias is not None and any(delta.cls.folds_bias(**delta.arguments) for delta in here):
            changed.append(Fold(target.path, cell, kind.bias, fold_bias, fold_bias(bias.asnumpy(), here)))
        folds += changed
        if not all(np.isfinite(one.value.astype(np.float32)).all() for one in changed):
            problems.append(f"{target.path} would hold NaN or infinite numbers as {merged.dtype.name}")
            continue
        probe = probe_merge(cell, kind, here, {one.attribute: one.value for one in changed})
        if probe.problem:
            problems.append(f"{target.path} {probe.problem}")
        report.append(dataclasses.replace(describe(target.path, merged, before, after, kind), unchecked=probe.skipped))
    if problems:
        raise MergeError("merging would not work, nothing was changed: " + "; ".join(problems) + ".")
    return folds, report


def _merge_weight(weight, deltas, kind):
    return fold(weight, kind, deltas)[0]


def shared_weights(network: nn.Cell, owners: dict[str, list[Place]]) -> dict[str, list[Place]]:
    """Parameters of which only some places are meant, say a head tied to an embedding.

    Args:
        network: where to look.
        owners: the places that are meant, by path.

    Returns:
        The places that are not, by path.
    """
    everywhere = {
        (id(cell), key): places for places in parameter_places("", network).values() for _, cell, key in places
    }
    shared = {}
    for path, places in owners.items():
        meant = [(id(cell), key) for _, cell, key in places]
        others = [place for place in everywhere[meant[0]] if (id(place[1]), place[2]) not in meant]
        if others:
            shared[path] = others
    return shared


def untie(network: nn.Cell, owners: dict[str, list[Place]]) -> list[tuple[Parameter, Parameter]]:
    """Give the places that are meant a Parameter of their own, where others have the same one; see `shared_weights`.

    The Parameter stays where it has its name from; the other side gets a new one, named by its path.

    Returns:
        The new Parameters, each with the one that it is a copy of.
    """
    outer, made = outer_prefix(network), []
    for path, meant in owners.items():
        others = shared_weights(network, {path: meant}).get(path)
        if not others:
            continue
        _, cell, key = meant[0]
        param = cell._params[key]
        is_namesake = any(f"{outer}{place}.{key}" == param.name for place, _, key in meant)
        places = others if is_namesake else meant
        name = ".".join(filter(None, (outer.rstrip("."), places[0][0], places[0][2])))
        copy = Parameter(Tensor(param.asnumpy()), name=name, requires_grad=param.requires_grad)
        for _, cell, key in places:
            cell._params[key] = copy
        made.append((copy, param))
    return made

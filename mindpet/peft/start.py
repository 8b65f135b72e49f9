"""What of an adapter starts from the values of the base, and follows when other ones are loaded into it."""

from dataclasses import dataclass
from typing import Callable

import numpy as np

from mindpet.errors import ConfigError
from mindpet.layers.kinds import layer_kind
from mindpet.peft.combine import SCALING, A, B, fold_arguments, start_from_weight
from mindpet.peft.merge import fold
from mindpet.peft.plan import is_from_weight
from mindpet.utils.values import value_of

START_A, START_B, MAGNITUDE = "mindpet_lora_start_a", "mindpet_lora_start_b", "mindpet_delta_lora_magnitude"


@dataclass(frozen=True)
class Start:
    """Values of an adapter that come from one Parameter of the base.

    Attributes:
        base (Parameter): the Parameter.
        paths (tuple): of the values.
        inputs (tuple): paths of further values of the adapter that they are computed with.
        compute (callable): from a dict by path with the values of `paths` and `inputs` to these, a dict by path.
        is_lasting (bool): whether they are not in the adapter's file, and computed from the base again. Default: False.
    """

    base: object
    paths: tuple
    inputs: tuple
    compute: Callable
    is_lasting: bool = False


def starts(plan, frame):
    """The Starts of an adapter, in the order in which they are computed.

    Args:
        plan (Plan): of the adapter.
        frame (Frame): of the adapter; it may have been made for another one.

    Returns:
        list of Start.
    """
    found = [_copy(path, plan.trained[base]) for path, base in frame.copies.items()]
    for layer in plan.targets:
        weight, inputs = layer_kind(layer.cell).weight_of(layer.cell), tuple(frame.names[layer.path])
        if is_from_weight(plan.config):
            found.append(_from_weight(layer, weight, inputs, plan.config.init_lora_weights))
        if f"{layer.path}.{MAGNITUDE}" in frame.params:
            found.append(_magnitude(layer, weight, inputs))
    return found


def _copy(path, base):
    return Start(base, (path,), (), lambda values: {path: value_of(base)})


def _from_weight(layer, weight, inputs, init):
    """A and B of PiSSA and OLoRA, and A0 and B0, which their update is counted from."""
    path, kind = layer.path, layer_kind(layer.cell)

    def compute(values):
        matrix = kind.to_matrix(value_of(weight).astype(np.float32))
        if not np.isfinite(matrix).all():
            raise ConfigError(f"{path}: init_lora_weights={init!r}, but the weight has NaN or infinite numbers.")
        rank, scaling = len(values[f"{path}.{A}"]), float(values[f"{path}.{SCALING}"])
        lora_a, lora_b = start_from_weight(matrix, init, rank, scaling)
        own = {A: lora_a, B: lora_b, START_A: lora_a, START_B: lora_b}
        return {f"{path}.{name}": np.ascontiguousarray(value, np.float32) for name, value in own.items()}

    return Start(weight, tuple(f"{path}.{name}" for name in (A, B, START_A, START_B)), inputs, compute, True)


def _magnitude(layer, weight, inputs):
    """DoRA's magnitude with which its gain is one: the norms of `W + s B A`."""
    path, kind = f"{layer.path}.{MAGNITUDE}", layer_kind(layer.cell)

    def compute(values):
        delta = {**fold_arguments(layer.path, values), "magnitude": None}
        _, _, tuned = fold(value_of(weight), kind, kind.groups_of(layer.cell), [delta])
        return {path: np.linalg.norm(tuned, axis=1).reshape(values[path].shape)}

    return Start(weight, (path,), inputs, compute)

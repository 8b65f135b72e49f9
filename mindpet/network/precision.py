"""Frozen weights stored once in half precision, which is what their layers compute in."""

import dataclasses
import types
import warnings
from collections.abc import Collection
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn, ops

from mindpet.errors import ConfigError, NoMatchError
from mindpet.layers.linear import Dense, cast
from mindpet.network.construct import construct_like
from mindpet.network.kinds import LayerKind, compute_attribute, layer_kind
from mindpet.network.parameters import TRAINED
from mindpet.network.values import forget_graphs, value_of
from mindpet.utils.validate import Checker

HALVES = {ms.float16: "FP16", ms.bfloat16: "BF16"}  # what `Cell.to_float` notes in `mixed_precision_type`
LARGEST = {ms.float16: 65504.0, ms.bfloat16: 3.3895313892515355e38}
# What a layer that computes in the type of its weight returns, see `construct_like`.
LAYER = "as_before(self, {first}, self.mindpet_half_construct(to_half(self, {first}){rest}))"


class HalfPlan(NamedTuple):
    """What is to be stored in half precision.

    Attributes:
        dtype: the type.
        layers: pairs of a Cell and its LayerKind.
        params: the Parameters, weights and biases of the layers.
        left: a line for each matrix that is frozen and stays what it is.
    """

    dtype: ms.Type
    layers: list[tuple[nn.Cell, LayerKind]]
    params: list[Parameter]
    left: list[str]


def check_half(check: Checker, dtype: Optional[ms.Type]) -> None:
    """Note a problem with 'frozen_dtype', which is float16, bfloat16 or None."""
    rule = "mindspore.float16, mindspore.bfloat16 or None"
    check.require(dtype is None or dtype in HALVES, TypeError, "frozen_dtype", dtype, rule)


def plan_half(network: nn.Cell, frozen: Collection[int], dtype: ms.Type) -> HalfPlan:
    """Find which weights can be stored in half precision: those of layers, in all places that a Parameter has.

    Args:
        network: without adapters.
        frozen: ids of the Parameters that do not train.
        dtype: float16 or bfloat16.

    Raises:
        ConfigError: an adapter is in the network; the type cannot hold a number of a weight, all are in the message.
        NoMatchError: there is no such weight.
    """
    cells = list(network.cells_and_names())
    carrying = [path for path, cell in cells if "mindpet_base_construct" in vars(cell)]
    if carrying:
        raise ConfigError(
            f"'frozen_dtype': {carrying} carry deltas of an adapter, which compute as their layers did; give "
            "frozen_dtype to get_peft_model."
        )
    reasons, layers = {}, {}
    for _, cell in cells:
        kind = _kind(cell)
        if kind is not None and id(kind.weight_of(cell)) in frozen:
            reason = _why_not(cell, kind, frozen, dtype)
            if reason:
                reasons[id(kind.weight_of(cell))] = reason
            else:
                layers[id(cell)] = (cell, kind)
    places = _places(cells)
    while True:  # a layer that is left leaves those that have its weight, too
        outside = [key for key, cell_kind in layers.items() if not _has_alone(*cell_kind, layers, places)]
        if not outside:
            break
        for key in outside:
            cell, kind = layers.pop(key)
            reasons[id(kind.weight_of(cell))] = "another Cell has it, too, and is no layer that can"
    params = {id(param): param for cell, kind in layers.values() for param in _frozen_of(cell, kind, frozen)}
    params = {key: param for key, param in params.items() if param.dtype != dtype}
    _check_range(params.values(), dtype)
    if not layers:
        raise NoMatchError(f"'frozen_dtype': no layer has a frozen weight that could be stored as {dtype}.")
    of_layers = {id(kind.weight_of(cell)) for cell, kind in layers.values()}
    left = [
        f"{param.name} ({reasons.get(id(param), 'it is no weight of a layer that is known')})"
        for param in network.get_parameters()
        if id(param) in frozen and param.dtype == ms.float32 and param.ndim > 1 and id(param) not in of_layers
    ]
    return HalfPlan(dtype, list(layers.values()), list(params.values()), left)


def store_half(plan: HalfPlan, owner: str) -> None:
    """Do what a plan says; a warning names the matrices that are left.

    A layer that says in an attribute which type it computes in gets another one there. One that computes in that of its
    weight takes its input in half precision from then on, and returns what it returned: the type of the input, and of
    an embedding that of its table before.

    Args:
        plan: what `plan_half` returns.
        owner: of the warning.
    """
    before = {id(cell): kind.weight_of(cell).dtype for cell, kind in plan.layers}
    for param in plan.params:
        param.set_dtype(plan.dtype)
    for cell, kind in plan.layers:
        attribute = compute_attribute(cell)
        if attribute is not None:
            setattr(cell, attribute, plan.dtype)
            if isinstance(getattr(cell, "kind", None), LayerKind):  # of a hand-made layer
                cell.kind = dataclasses.replace(cell.kind, compute_dtype=plan.dtype)
        elif cell.mixed_precision_type is None:
            _compute_in_half(cell, kind, plan.dtype, before[id(cell)])
    forget_graphs()
    if plan.left:
        warnings.warn(f"{owner}: stay in float32: {'; '.join(plan.left)}.", stacklevel=3)


def _kind(cell):
    """The LayerKind of a layer, or of a hand-made one with a delta."""
    kind = layer_kind(cell)
    return LayerKind(compute_dtype=cell.compute_dtype) if kind is None and isinstance(cell, Dense) else kind


def _why_not(cell, kind, frozen, dtype):
    """Why a layer cannot compute in half precision, or None."""
    bias = kind.bias_of(cell)
    if TRAINED + kind.weight in cell._params:
        return "an adapter trains a copy of it"
    if compute_attribute(cell) is not None:
        return None
    precision = cell.mixed_precision_type
    if precision is not None:
        return None if precision.name == HALVES[dtype] else f"its layer computes in {precision.name}, by to_float"
    if getattr(cell, "use_one_hot", False):
        return "its layer multiplies it by one-hot vectors of float32"
    if bias is not None and id(bias) not in frozen and "bias_add" not in cell._primitives:
        return "the bias of its layer trains, and is added by the same operator"
    return None


def _frozen_of(cell, kind, frozen):
    """The Parameters of a layer that are stored in half precision."""
    return [param for param in (kind.weight_of(cell), kind.bias_of(cell)) if param is not None and id(param) in frozen]


def _places(cells):
    """id of a Parameter -> ids of the Cells that have it, with the attribute."""
    places = {}
    for _, cell in cells:
        for name, param in cell._params.items():
            places.setdefault(id(param), []).append((id(cell), name))
    return places


def _has_alone(cell, kind, layers, places):
    """Whether all places of a layer's weight are weights of layers in `layers`."""
    return all(key in layers and layers[key][1].weight == name for key, name in places[id(kind.weight_of(cell))])


def _check_range(params, dtype):
    """Refuse numbers that half precision does not have."""
    wrong = []
    for param in params:
        largest = 0.0 if param.has_init or not param.size else float(np.abs(value_of(param).astype(np.float32)).max())
        if not largest <= LARGEST[dtype]:  # NaN, too
            wrong.append(f"{param.name} has {largest:g}")
    if wrong:
        raise ConfigError(f"'frozen_dtype': {dtype} cannot hold all numbers: {'; '.join(wrong)}.")


def _compute_in_half(cell, kind, dtype, before):
    """Have a layer that computes in the type of its weight take its input in half precision."""
    held = vars(cell)
    held["mindpet_half"] = dtype
    if "mindpet_half_construct" in held:
        return
    held["mindpet_output"] = before if kind.name == "embedding" else None
    held["mindpet_half_construct"] = cell.construct
    held["construct"] = types.MethodType(construct_like(cell.construct, LAYER, __name__), cell)
    if "bias_add" in cell._primitives:  # for a bias that trains, in float32
        operator = cell._primitives.pop("bias_add")
        held.pop("bias_add", None)
        cell.bias_add = CastBias(operator)


class CastBias(nn.Cell):
    """The sum with a bias, in the type of the other summand.

    Args:
        operator: BiasAdd of a layer.
    """

    def __init__(self, operator: ops.Primitive):
        super().__init__(auto_prefix=False)
        self.bias_add = operator

    def construct(self, x, bias):
        return self.bias_add(x, cast(bias, x.dtype))


def to_half(self, x):
    """What a layer gets in place of its input."""
    return x if self.mindpet_output is not None else cast(x, self.mindpet_half)


def as_before(self, x, result):
    """What a layer returns, in the type that it had before."""
    dtype = x.dtype if self.mindpet_output is None else self.mindpet_output
    if isinstance(result, tuple):
        return (cast(result[0], dtype), *result[1:])
    return cast(result, dtype)

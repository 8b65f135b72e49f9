"""What is changed in the Cells of a network while an adapter is in it. Each change is on the object, and is undone."""

import types
from typing import Any

from mindspore import Parameter, nn

from mindpet.delta._base import Delta
from mindpet.layers.linear import from_rows, to_rows
from mindpet.network.construct import construct_like
from mindpet.network.kinds import LayerKind
from mindpet.network.parameters import TRAINED

# What a layer with a delta returns, see `construct_like`.
LAYER = "leave(self, {first}, self.mindpet_base_construct(self.mindpet_delta.before({first}){rest}))"


class AttributePatch:
    """Another value of an attribute: a prefix, the offset of positions, how a BatchNorm normalises.

    Args:
        cell: has the attribute.
        name: the attribute; it may be one of the class.
        value (Union[Cell, int, bool]): its value.
    """

    def __init__(self, cell: nn.Cell, name: str, value: Any):
        self.cell, self.name, self.value = cell, name, value

    def apply(self) -> None:
        """Set the value, on the object, where it hides what the class has."""
        self.before = {self.name: vars(self.cell)[self.name]} if self.name in vars(self.cell) else {}
        vars(self.cell)[self.name] = self.value
        if isinstance(self.value, nn.Cell):
            self.cell._cells[self.name] = self.value
            self.value.set_train(self.cell.training)

    def revert(self) -> None:
        """Set the value that was there before."""
        del vars(self.cell)[self.name]
        self.cell._cells.pop(self.name, None)
        vars(self.cell).update(self.before)


class ParameterPatch:
    """A Parameter that takes the place of another one.

    The attribute of the object hides the Cell's own: Python looks there before it asks `Cell.__getattr__`, in PyNative
    and in graph mode (MindSpore 2.7 to 2.10).

    Args:
        cell: has the Parameter.
        name: the attribute.
        param: takes the place.
    """

    def __init__(self, cell: nn.Cell, name: str, param: Parameter):
        self.cell, self.name, self.param = cell, name, param

    def apply(self) -> None:
        """Hide the Cell's own Parameter."""
        self.cell._params[TRAINED + self.name] = self.param
        vars(self.cell)[self.name] = self.param

    def revert(self) -> None:
        """Let the Cell have its own Parameter again."""
        del self.cell._params[TRAINED + self.name]
        del vars(self.cell)[self.name]


class ConstructPatch:
    """Another `construct` of a layer, that calls the layer's own and a delta."""

    def __init__(self, cell: nn.Cell, kind: LayerKind, delta: Delta):
        self.cell, self.kind, self.delta = cell, kind, delta
        # Whether the layer's own activation is left to us.
        self.activates = delta.before_activation and bool(getattr(cell, "activation_flag", False))
        self.construct = construct_like(cell.construct, LAYER, __name__)

    def apply(self) -> None:
        """Patch the layer."""
        self.attributes = {
            "mindpet_base_construct": self.cell.construct,
            "construct": types.MethodType(self.construct, self.cell),
            "mindpet_activates": self.activates,
            "mindpet_flattens": self.kind.flattens,
        }
        self.before = {name: vars(self.cell)[name] for name in self.attributes if name in vars(self.cell)}
        vars(self.cell).update(self.attributes)
        self.cell._cells["mindpet_delta"] = self.delta
        self.delta.set_train(self.cell.training)
        if self.activates:
            self.cell.activation_flag = False

    def revert(self) -> None:
        """Leave the layer as it was."""
        if self.activates:
            self.cell.activation_flag = True
        for name in self.attributes:
            del vars(self.cell)[name]
        vars(self.cell).update(self.before)
        del self.cell._cells["mindpet_delta"]


def leave(self, x, result):
    """What a layer with a delta returns, from its input and what its own `construct` returned."""
    if isinstance(result, tuple):  # the output, and say a bias that the caller adds
        return (activated(self, self.mindpet_delta(x, result[0])), *result[1:])
    return activated(self, self.mindpet_delta(x, result))


def activated(self, out):
    """The layer's own activation, if it is left to this, of what the layer would give it."""
    if not self.mindpet_activates:
        return out
    return from_rows(self.activation(to_rows(out)), out) if self.mindpet_flattens else self.activation(out)


def bind_construct(cell: nn.Cell, network: nn.Cell) -> None:
    """Have a Cell call its `network`, with the parameters that this one has."""
    construct = construct_like(network.construct, "self.network({arguments})", __name__)
    vars(cell)["construct"] = types.MethodType(construct, cell)

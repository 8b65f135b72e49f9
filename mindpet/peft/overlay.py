"""The `construct` that takes the place of a layer's own, on the object, while the layer has a delta."""

import types

from mindspore import ops


def beside(self, x, *rest):
    """What takes the place of `construct` in a layer with a delta."""
    out = self.mindpet_delta(x, self.mindpet_base_construct(x, *rest))
    return self.activation(out) if self.mindpet_activates else out


def by_rows(self, x, *rest):
    """What takes the place of `construct` in a layer where each row of the batch has the delta of its own adapter."""
    out = self.mindpet_base_construct(x, *rest)
    if out.shape[0] != self.mindpet_rows.shape[0]:
        raise ValueError("adapter_names: a layer got another number of rows than there are names.")
    result = out
    index = 0
    for delta in self.mindpet_deltas:
        chosen = ops.reshape(self.mindpet_rows == index, (-1,) + (1,) * (out.ndim - 1))
        result = ops.select(chosen, delta(x, out), result)
        index += 1
    return self.activation(result) if self.mindpet_activates else result


class Overlay:
    """A layer with another `construct`, and what that needs; `remove()` leaves no trace.

    Args:
        cell (Cell): the layer.
        construct (callable): takes the place of its `construct`.
        before_activation (bool): whether the layer's own activation is left to `construct`.
        cells, params (dict): attribute -> Cell or Parameter that `construct` needs.
    """

    def __init__(self, cell, construct, before_activation, cells, params=None):
        self.cell, self.construct = cell, construct
        self.activates = before_activation and bool(getattr(cell, "activation_flag", False))
        self.cells, self.params = cells, params or {}

    def put(self):
        """Overlay the layer."""
        self.cell.__dict__["mindpet_base_construct"] = self.cell.construct
        self.cell.__dict__["mindpet_activates"] = self.activates
        self.cell.__dict__["construct"] = types.MethodType(self.construct, self.cell)
        self.cell._cells.update(self.cells)
        self.cell._params.update(self.params)
        if self.activates:
            self.cell.activation_flag = False

    def remove(self):
        """Leave the layer as it was."""
        if self.activates:
            self.cell.activation_flag = True
        attributes = ("construct", "mindpet_base_construct", "mindpet_activates")
        for where, names in (
            (self.cell.__dict__, attributes),
            (self.cell._cells, self.cells),
            (self.cell._params, self.params),
        ):
            for name in names:
                del where[name]

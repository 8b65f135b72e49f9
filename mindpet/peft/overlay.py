"""The `construct` that takes the place of a layer's own, on the object, while the layer has a delta."""

import contextlib
import re
import types

from mindspore import ops

from mindpet.errors import AdapterError
from mindpet.layers.kinds import layer_kind
from mindpet.layers.linear import from_rows, to_rows


def beside(self, x, *rest, **keywords):
    """What takes the place of `construct` in a layer with a delta."""
    result = self.mindpet_base_construct(x, *rest, **keywords)
    if isinstance(result, tuple):  # the output, and say a bias that the caller adds
        return (activated(self, self.mindpet_delta(x, result[0])), *result[1:])
    return activated(self, self.mindpet_delta(x, result))


def by_rows(self, x, *rest, **keywords):
    """What takes the place of `construct` in a layer where each row of the batch has the delta of its own adapter."""
    result = self.mindpet_base_construct(x, *rest, **keywords)
    if isinstance(result, tuple):
        return (chosen(self, x, result[0]), *result[1:])
    return chosen(self, x, result)


def chosen(self, x, out):
    """The output with the delta of each row's adapter."""
    axis, count = self.mindpet_batch_axis, self.mindpet_rows.shape[0]
    times = out.shape[axis] // count
    # A layer may get (batch, seq) as rows, those of one sample side by side.
    if times * count != out.shape[axis] or (axis > 0 and times > 1):
        raise ValueError(
            f"adapter_names: the layer of {self.mindpet_weight_name} returns {out.shape[axis]} rows, which is no "
            f"multiple of the {count} names."
        )
    rows = ops.repeat_interleave(self.mindpet_rows, times) if times > 1 else self.mindpet_rows
    result = out
    index = 0
    for delta in self.mindpet_deltas:
        own = ops.reshape(rows == index, (1,) * axis + (-1,) + (1,) * (out.ndim - axis - 1))
        result = ops.select(own, delta(x, out), result)
        index += 1
    return activated(self, result)


def activated(self, out):
    """The layer's own activation, if it is left to this, of what the layer would give it."""
    if not self.mindpet_activates:
        return out
    return from_rows(self.activation(to_rows(out)), out) if self.mindpet_flattens else self.activation(out)


@contextlib.contextmanager
def one_error():
    """A context that turns an error of `by_rows` into an AdapterError, without the stacks of graph mode."""
    try:
        yield
    except ValueError as error:
        message = re.match(r"'?(adapter_names: .*?)'?$", str(error), re.MULTILINE)
        if message is None:
            raise
        raise AdapterError(message[1]) from None


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
        self.kind = layer_kind(cell)
        self.cells, self.params = cells, params or {}

    def put(self):
        """Overlay the layer."""
        self.attributes = {
            "mindpet_base_construct": self.cell.construct,
            "construct": types.MethodType(self.construct, self.cell),
            "mindpet_activates": self.activates,
            "mindpet_flattens": self.kind.flattens,
            "mindpet_batch_axis": self.kind.batch_axis,
            "mindpet_weight_name": self.kind.weight_of(self.cell).name,
        }
        self.cell.__dict__.update(self.attributes)
        self.cell._cells.update(self.cells)
        self.cell._params.update(self.params)
        if self.activates:
            self.cell.activation_flag = False

    def remove(self):
        """Leave the layer as it was."""
        if self.activates:
            self.cell.activation_flag = True
        for where, names in (
            (self.cell.__dict__, self.attributes),
            (self.cell._cells, self.cells),
            (self.cell._params, self.params),
        ):
            for name in names:
                del where[name]

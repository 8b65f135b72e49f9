"""Putting the delta Cells of an adapter into a network, and taking them out again.

A layer stays the object that it is: its class, parameters, operators and place in the network do not change. Only its
`construct` is overlaid, on the object, by one that calls the original and then the delta. So whoever holds a reference
to the layer sees the delta, and taking it out leaves the layer as it was.
"""

import mindspore as ms
from mindspore import Tensor

from mindpet.graph.parameters import matches, outer_prefix
from mindpet.layers.kinds import layer_kind
from mindpet.peft.match import list_layers
from mindpet.peft.overlay import Overlay, beside
from mindpet.peft.strategies import carry_strategy


class Attribute:
    """An attribute of a Cell with another value: a prefix, or the offset of positions.

    Args:
        cell (Cell): the Cell.
        name (str): the attribute.
        value (Union[Cell, int]): its value.
    """

    def __init__(self, cell, name, value):
        self.cell, self.name, self.value = cell, name, value

    def put(self):
        """Set the value."""
        self.before = self.cell.__dict__.pop(self.name)
        where = self.cell.__dict__ if isinstance(self.value, int) else self.cell._cells
        where[self.name] = self.value

    def remove(self):
        """Set the value that was there before."""
        where = self.cell.__dict__ if isinstance(self.value, int) else self.cell._cells
        del where[self.name]
        self.cell.__dict__[self.name] = self.before


class Frame:
    """The delta Cells of a configuration, and where they go. Adapters of the same shapes share a frame.

    Args:
        network (Cell): the network; `put` changes it.
        plan (Plan): what goes where.
        suffix (str): of the names of the parameters. Default: ''.

    Attributes:
        plan (Plan): what it was made from.
        deltas (dict): path of a layer -> its delta Cell.
        names (dict): path of a layer -> paths of the delta's parameters, from the network.
        params (dict): path -> Parameter of the deltas.
    """

    def __init__(self, network, plan, suffix=""):
        method = plan.method
        self.outer = outer_prefix(network)
        self.network, self.plan, self.deltas, self.places = network, plan, {}, []
        self.names, self.params = {}, {}
        for layer in plan.targets:
            kind = layer_kind(layer.cell)
            delta = method.make(layer.cell, kind, **plan.config.sizes(layer.path))
            carry_strategy(layer.cell, kind, delta)
            self._add(layer.path, method.prefix, delta, suffix)
            self.places.append(Overlay(layer.cell, beside, method.before_activation, {"mindpet_delta": delta}))
        for layer in plan.attentions:
            delta = method.make(layer.cell.kv_heads, layer.cell.head_dim, **plan.config.sizes(layer.path))
            self._add(layer.path, method.prefix, delta, suffix)
            self.places.append(Attribute(layer.cell, "prefix_source", delta))
        if plan.attentions:
            cells = [layer.cell for layer in list_layers(network) if hasattr(layer.cell, "position_offset")]
            self.places += [Attribute(cell, "position_offset", plan.config.num_virtual_tokens) for cell in cells]

    def _add(self, path, prefix, delta, suffix):
        params = {f"{path}.{prefix}{name}{suffix}": param for name, param in named_parameters(delta)}
        for name, param in params.items():
            param.name = self.outer + name
        self.params.update(params)
        self.deltas[path], self.names[path] = delta, list(params)

    def set_types(self, values, as_layer=False):
        """Give the parameters the types of `values`, a dict by name; the others that of their layer if `as_layer`."""
        layers = self.plan.targets if as_layer else ()
        own = {layer.path: layer_kind(layer.cell).weight_of(layer.cell).dtype for layer in layers}
        for path, names in self.names.items():
            for name in names:
                if name in values:
                    self.params[name].set_dtype(Tensor(values[name]).dtype)
                elif matches(name, self.plan.method.trainable):
                    self.params[name].set_dtype(own.get(path, ms.float32))

    @property
    def signature(self):
        """What must be equal for two adapters to share a frame."""
        kinds = tuple((path, str(delta)) for path, delta in self.deltas.items())
        return kinds, tuple((name, param.shape, param.dtype) for name, param in self.params.items())

    def put(self):
        """Put the deltas into the network."""
        for place in self.places:
            place.put()
        self._mark()

    def remove(self):
        """Take the deltas out of the network."""
        for place in self.places:
            place.remove()
        self._mark(remove=True)

    def reset(self):
        """Make the deltas the identity; returns whether they can be."""
        able = all(hasattr(delta, "reset") for delta in self.deltas.values())
        for delta in self.deltas.values() if able else ():
            delta.reset()
        return able

    def _mark(self, remove=False):
        """Have Cells with `lazy_inline` compiled apart where their deltas differ.

        MindSpore compiles such Cells once for all that were made with the same arguments.
        """
        lazy = [layer for layer in list_layers(self.network) if hasattr(layer.cell, "_cell_init_args")]
        for layer in lazy:
            inside = [name[len(layer.path) :] for name in self.params if name.startswith(f"{layer.path}.")]
            mark = f"mindpet {inside}" if inside else ""
            own = layer.cell._cell_init_args
            layer.cell._cell_init_args = own.replace(mark, "") if remove else own + mark


def named_parameters(delta):
    """(name within the delta, Parameter) of those that belong to the delta, and not to its layer."""
    pairs = getattr(delta, "delta", delta).parameters_and_names()
    return [(name, param) for name, param in pairs if not name.startswith(("base_weight", "base_bias"))]

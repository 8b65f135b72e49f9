"""Putting the delta Cells of an adapter into a network, and taking them out again.

A layer stays the object that it is: its class, parameters, operators and place in the network do not change. Only its
`construct` is overlaid, on the object, by one that calls the original and then the delta. So whoever holds a reference
to the layer sees the delta, and taking it out leaves the layer as it was. A parameter of the base that an adapter
trains stays where it is, too: the adapter has a copy, which hides it from the layer's `construct`.
"""

import inspect

import mindspore as ms
from mindspore import Parameter, Tensor
from mindspore.common._register_for_recompute import recompute_registry

from mindpet.graph.parameters import TRAINED, matches, outer_prefix
from mindpet.layers.kinds import layer_kind
from mindpet.peft.match import list_layers
from mindpet.peft.overlay import Overlay, beside
from mindpet.peft.strategies import carry_strategy
from mindpet.utils.values import assign, digest, value_of


class Attribute:
    """An attribute of a Cell with another value: a prefix, the offset of positions, how a BatchNorm normalises.

    Args:
        cell (Cell): the Cell.
        name (str): the attribute; it may be one of the class.
        value (Union[Cell, int, bool]): its value.
    """

    def __init__(self, cell, name, value):
        self.cell, self.name, self.value = cell, name, value

    def put(self):
        """Set the value, on the object, where it hides what the class has."""
        self.before = {self.name: vars(self.cell)[self.name]} if self.name in vars(self.cell) else {}
        vars(self.cell)[self.name] = self.value
        if isinstance(self.value, ms.nn.Cell):
            self.cell._cells[self.name] = self.value

    def remove(self):
        """Set the value that was there before."""
        del vars(self.cell)[self.name]
        self.cell._cells.pop(self.name, None)
        vars(self.cell).update(self.before)


class Copy:
    """A Parameter that takes the place of another one in a Cell.

    The attribute of the object hides the Cell's own: Python looks there before it asks `Cell.__getattr__`, in PyNative
    and in graph mode (MindSpore 2.7 to 2.10).

    Args:
        cell (Cell): the Cell.
        name (str): the attribute.
        param (Parameter): takes the place.
    """

    def __init__(self, cell, name, param):
        self.cell, self.name, self.param = cell, name, param

    def put(self):
        """Hide the Cell's own Parameter."""
        self.cell._params[TRAINED + self.name] = self.param
        vars(self.cell)[self.name] = self.param

    def remove(self):
        """Let the Cell have its own Parameter again."""
        del self.cell._params[TRAINED + self.name]
        del vars(self.cell)[self.name]


class Frame:
    """The delta Cells and copies of an adapter, and where they go. Adapters of the same shapes may share a frame.

    Args:
        network (Cell): the network; `put` changes it.
        plan (Plan): what goes where.
        suffix (str): of the names of the parameters. Default: ''.

    Attributes:
        plan (Plan): what it was made from.
        deltas (dict): path of a layer -> its delta Cell.
        names (dict): path of a layer -> paths of the delta's parameters, from the network.
        copies (dict): path of a copy -> path of the Parameter that it is of.
        params (dict): path -> Parameter of the deltas, and copies.
        holder (Adapter): whose values are in the parameters, or None.
        hidden (dict): path -> digest, of parameters that hold a neutral value instead of that of the holder.
    """

    def __init__(self, network, plan, suffix=""):
        method = plan.method
        self.outer = outer_prefix(network)
        self.network, self.plan, self.deltas, self.places = network, plan, {}, []
        self.names, self.params, self.copies = {}, {}, {}
        self.holder, self.hidden = None, {}
        self._layers = []  # (delta, the Cell that it belongs to)
        copies = self._copy_trained(suffix)  # (id of a Cell, attribute) -> copy
        for layer in plan.targets:
            kind = layer_kind(layer.cell)
            delta = method.make(layer.cell, kind, **plan.config.sizes(layer.path))
            if getattr(delta, "use_dora", False):
                delta.base_bias = copies.get((id(layer.cell), kind.bias), delta.base_bias)
            carry_strategy(layer.cell, kind, delta)
            self._add(layer, method.prefix, delta, suffix)
            self.places.append(Overlay(layer.cell, beside, method.before_activation, {"mindpet_delta": delta}))
        for layer in plan.attentions:
            delta = method.make(layer.cell.kv_heads, layer.cell.head_dim, **plan.config.sizes(layer.path))
            carry_strategy(layer.cell, None, delta)
            self._add(layer, method.prefix, delta, suffix)
            self.places.append(Attribute(layer.cell, "prefix_source", delta))
        if plan.attentions:
            cells = [layer.cell for layer in list_layers(network) if hasattr(layer.cell, "position_offset")]
            self.places += [Attribute(cell, "position_offset", plan.config.num_virtual_tokens) for cell in cells]
        self.places += [Attribute(cell, "use_batch_statistics", False) for cell in plan.still]
        self._marks = self._find_marks()
        for param in self.params.values():  # until the adapter is active
            param.requires_grad = False

    def _copy_trained(self, suffix):
        """The copies of the base's parameters, by where they go."""
        found = {}
        for path, places in self.plan.places.items():
            own, _, attribute = places[0]
            name = ".".join(filter(None, (own, TRAINED + attribute))) + suffix
            base = self.plan.trained[path]
            copy = Parameter(Tensor(value_of(base)), name=self.outer + name)
            self.params[name], self.copies[name] = copy, path
            found.update({(id(cell), key): copy for _, cell, key in places})
            self.places += [Copy(cell, key, copy) for _, cell, key in places]
        return found

    def _add(self, layer, prefix, delta, suffix):
        params = {f"{layer.path}.{prefix}{name}{suffix}": param for name, param in named_parameters(delta)}
        for name, param in params.items():
            param.name = self.outer + name
        self.params.update(params)
        self.deltas[layer.path], self.names[layer.path] = delta, list(params)
        self._layers.append((delta, layer.cell))

    def set_types(self, values, as_layer=False):
        """Give the parameters the types of `values`, a dict by path; the others that of their layer if `as_layer`."""
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
        kinds = tuple((path, getattr(delta, "signature", str(delta))) for path, delta in self.deltas.items())
        shapes = tuple((name, param.shape, param.dtype) for name, param in self.params.items())
        places = tuple((id(cell), key) for found in self.plan.places.values() for _, cell, key in found)
        return kinds, shapes, places, tuple(map(id, self.plan.still))

    @property
    def trained(self):
        """Paths of the parameters that train."""
        own = {path for path, base in self.copies.items() if base not in self.plan.buffers}
        return [path for path in self.params if path in own or matches(path, self.plan.method.trainable)]

    def put(self):
        """Put the deltas and copies into the network, in the mode, training or not, of their layers."""
        outer = outer_prefix(self.network)
        for name, param in self.params.items() if outer != self.outer else ():
            param.name = outer + name  # the network has come into another one
        self.outer = outer
        for place in self.places:
            place.put()
        for delta, cell in self._layers:
            delta.set_train(cell.training)
        self.mark()

    def remove(self):
        """Take the deltas and copies out of the network."""
        for place in self.places:
            place.remove()
        self.mark(remove=True)

    def fill(self, holder, values, is_new=False):
        """Set the parameters; where graphs are compiled anew in any case, no operator is needed for it.

        Args:
            holder (Adapter): whose values they are.
            values (dict): path -> numpy.ndarray.
            is_new (bool): whether graphs are compiled anew. Default: False.
        """
        self.holder, self.hidden = holder, {}
        for name, value in values.items():
            if is_new:
                self.params[name].set_data(Tensor(value))
            else:
                assign(self.params[name], Tensor(value))

    @property
    def can_reset(self):
        """Whether the deltas can be made the identity."""
        return all(hasattr(delta, "reset") for delta in self.deltas.values())

    def hide(self, copies):
        """Make the deltas the identity, and with `copies` (bool) the copies what they are copies of."""
        for delta in self.deltas.values():
            delta.reset()
        for name, path in self.copies.items() if copies else ():
            assign(self.params[name], Tensor(value_of(self.plan.trained[path])))
        self.hidden = {
            name: digest(value_of(param)) for name, param in self.params.items() if copies or name not in self.copies
        }

    def changed(self):
        """Paths of hidden parameters that somebody has written to."""
        return [name for name, before in self.hidden.items() if digest(value_of(self.params[name])) != before]

    def mark(self, remove=False):
        """Have Cells with `lazy_inline` compiled apart where their deltas differ.

        MindSpore compiles such Cells once for all that were made with the same arguments.
        """
        for cell, mark in self._marks:
            own = cell._cell_init_args
            cell._cell_init_args = own.replace(mark, "") if remove else own + mark

    def _find_marks(self):
        """(Cell with `lazy_inline`, what tells apart what the frame puts into it)."""
        found = []
        for layer in (layer for layer in list_layers(self.network) if hasattr(layer.cell, "_cell_init_args")):
            start, own = f"{layer.path}.", self.params.items()
            inside = [f"{name[len(layer.path) :]} {param.shape}" for name, param in own if name.startswith(start)]
            found += [(layer.cell, f"mindpet {inside}")] if inside else []
        return found


def renew_recompute(network):
    """Have Cells that recompute do so with the `construct` and the parameters that they have now.

    In PyNative mode `Cell.recompute()` keeps both as they are when it is called (MindSpore 2.7 to 2.10, attribute
    `_recompute_cell`).
    """
    for _, cell in list(network.cells_and_names()):
        old = cell._recompute_cell
        if isinstance(old, ms.nn.Cell):
            cell._recompute_cell = recompute_registry.get()(cell.construct)
        elif old is not None:  # use_reentrant=False, MindSpore 2.10: a function that has its options in its closure
            options = {**inspect.getclosurevars(old).nonlocals, "block": cell.construct, "use_reentrant": False}
            cell._recompute_cell = recompute_registry.get()(**options)


def named_parameters(delta):
    """(name within the delta, Parameter) of those that belong to the delta, and not to its layer."""
    pairs = getattr(delta, "delta", delta).parameters_and_names()
    return [(name, param) for name, param in pairs if not name.startswith(("base_weight", "base_bias"))]

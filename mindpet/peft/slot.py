"""The slot of an adapter: its deltas and trained base parameters, and putting them into a network.

A layer stays the object that it is: its class, parameters, operators and place in the network do not change. Only its
`construct` is patched, on the object, by one that calls the original and the delta. So whoever holds a reference to the
layer sees the delta, and taking it out leaves the layer as it was. A parameter of the base that an adapter trains stays
where it is, too: the adapter has a copy, which hides it from the layer's `construct`.
"""

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from mindpet.errors import ConfigError
from mindpet.network.match import list_layers
from mindpet.network.parameters import TRAINED, matches, outer_prefix
from mindpet.network.values import assign, digest, value_of
from mindpet.peft.patch import AttributePatch, ConstructPatch, ParameterPatch
from mindpet.peft.plan import Plan
from mindpet.peft.strategies import carry_strategy
from mindpet.utils.hints import Arrays


class AdapterSlot:
    """The deltas and trained base parameters of an adapter. Adapters of the same shapes may share a slot.

    Args:
        network: the network; `put` changes it.
        plan: what goes where.
        suffix: of the names of the parameters. Default: ''.

    Attributes:
        plan (Plan): what it was made from.
        deltas (dict): path of a target -> its Delta.
        names (dict): path of a target -> name of a parameter in the Delta -> its path in the network.
        fixed (set): paths of parameters of deltas that do not train, see `Delta.fixed_names`.
        copies (dict): path of a trained base parameter -> path of the Parameter that it is a copy of.
        params (dict): path -> Parameter of the deltas, and trained base parameters.
        holder (Adapter): whose values are in the parameters, or None.
        hidden (dict): path -> digest, of parameters that hold a neutral value instead of that of the holder.
    """

    def __init__(self, network: nn.Cell, plan: Plan, suffix: str = ""):
        self.outer = outer_prefix(network)
        self.network, self.plan, self.deltas, self.patches = network, plan, {}, []
        self.names, self.params, self.copies, self.fixed = {}, {}, {}, set()
        self.holder, self.hidden = None, {}
        copies = self._copy_trained(suffix)  # (id of a Cell, attribute) -> copy
        shared = {cls: _shared(cls, plan) for cls in {target.delta for target in plan.targets}}
        for target in plan.targets:
            delta = self._make(target, copies, shared[target.delta])
            self._add(target.path, delta, suffix)
            for tied in target.tied:
                arguments = {"shared": dict(delta.parameters_and_names())}
                self.deltas[tied.path] = self._make(tied, copies, arguments)
        positions = max((delta.positions for delta in self.deltas.values()), default=0)
        if positions:
            cells = [network, *(layer.cell for layer in list_layers(network))]
            counting = [cell for cell in cells if hasattr(cell, "position_offset")]
            self.patches += [AttributePatch(cell, "position_offset", positions) for cell in counting]
        self.patches += [AttributePatch(cell, "use_batch_statistics", False) for cell in plan.still]
        self._marks = self._find_marks()
        for param in self.params.values():  # until the adapter is active
            param.requires_grad = False

    def _copy_trained(self, suffix):
        """The copies of the base's parameters, by where they go."""
        copies = {}
        for path, places in self.plan.places.items():
            parent, _, attribute = places[0]
            name = ".".join(filter(None, (parent, TRAINED + attribute))) + suffix
            base = self.plan.trained[path]
            copy = Parameter(Tensor(value_of(base)), name=self.outer + name)
            self.params[name], self.copies[name] = copy, path
            copies.update({(id(cell), key): copy for _, cell, key in places})
            self.patches += [ParameterPatch(cell, key, copy) for _, cell, key in places]
        return copies

    def _make(self, target, copies, shared):
        """The Delta of a target, which is patched in when the slot is put."""
        delta = target.delta.create(target.cell, target.kind, **target.arguments, **shared)
        for name, (cell, attribute) in delta.base_places(target.cell).items():
            setattr(delta, name, copies.get((id(cell), attribute), getattr(delta, name)))
        try:
            carry_strategy(target.cell, target.kind, delta)
        except ConfigError as error:
            raise ConfigError(f"{target.path or 'the network'}: {error}") from error
        if target.is_slot:
            self.patches.append(AttributePatch(target.cell, target.kind.slot, delta))
        else:
            self.patches.append(ConstructPatch(target.cell, target.kind, delta))
        return delta

    def _add(self, path, delta, suffix):
        params = {name: param for name, param in delta.parameters_and_names() if not name.startswith("base_")}
        known = {id(param): name for name, param in self.params.items()}  # what deltas share has the first one's path
        start = f"{path}." if path else ""  # of the network itself
        names = {name: known.get(id(param), f"{start}{name}{suffix}") for name, param in params.items()}
        self.deltas[path], self.names[path] = delta, names
        self.fixed.update(names[name] for name in delta.fixed_names)
        for name, param in params.items():
            self.params[names[name]], param.name = param, self.outer + names[name]

    def set_types(self, values: Arrays, as_layer: bool = False) -> None:
        """Give the parameters the types of `values`, by path; the others that of their layer if `as_layer`."""
        targets = [target for target in self.plan.targets if as_layer and target.is_layer]
        types = {target.path: target.kind.weight_of(target.cell).dtype for target in targets}
        for path, names in self.names.items():
            for name in names.values():
                if name in values:
                    self.params[name].set_dtype(Tensor(values[name]).dtype)
                elif matches(name, self.plan.trainable):
                    self.params[name].set_dtype(types.get(path, ms.float32))

    def values_of(self, path: str, values: Arrays) -> Arrays:
        """The values of a target's Delta, by name in it, from those of the adapter by path."""
        return {name: values[key] for name, key in self.names[path].items() if key in values}

    @property
    def signature(self) -> tuple:
        """What must be equal for two adapters to share a slot."""
        kinds = tuple((path, delta.signature) for path, delta in self.deltas.items())
        shapes = tuple((name, param.shape, param.dtype) for name, param in self.params.items())
        places = tuple((id(cell), key) for group in self.plan.places.values() for _, cell, key in group)
        return kinds, shapes, places, tuple(map(id, self.plan.still))

    @property
    def trained(self) -> list[str]:
        """Paths of the parameters that train."""
        copied = {path for path, base in self.copies.items() if base not in self.plan.buffers}
        trained = [path for path in self.params if path in copied or matches(path, self.plan.trainable)]
        return [path for path in trained if path not in self.fixed]

    def put(self) -> None:
        """Put the deltas and copies into the network, in the mode, training or not, of their layers."""
        outer = outer_prefix(self.network)
        for name, param in self.params.items() if outer != self.outer else ():
            param.name = outer + name  # the network has come into another one
        self.outer = outer
        for patch in self.patches:
            patch.apply()
        self.mark()

    def remove(self) -> None:
        """Take the deltas and copies out of the network."""
        for patch in self.patches:
            patch.revert()
        self.mark(remove=True)

    def fill(self, holder: Any, values: Arrays, is_new: bool = False) -> None:
        """Set the parameters; where graphs are compiled anew in any case, no operator is needed for it.

        Args:
            holder (Adapter): whose values they are.
            values: by path.
            is_new: whether graphs are compiled anew. Default: False.
        """
        self.holder, self.hidden = holder, {}
        for name, value in values.items():
            if is_new:
                self.params[name].set_data(Tensor(value))
            else:
                assign(self.params[name], Tensor(value))

    @property
    def can_reset(self) -> bool:
        """Whether the deltas can be made the identity."""
        return all(delta.can_reset for delta in self.deltas.values())

    def hide(self, copies: bool) -> None:
        """Make the deltas the identity, if all can be, and with `copies` the copies what they are copies of."""
        for delta in self.deltas.values() if self.can_reset else ():
            delta.reset()
        for name, path in self.copies.items() if copies else ():
            assign(self.params[name], Tensor(value_of(self.plan.trained[path])))
        self.hidden = {
            name: digest(value_of(param)) for name, param in self.params.items() if copies or name not in self.copies
        }

    def changed(self) -> list[str]:
        """Paths of hidden parameters that somebody has written to."""
        return [name for name, before in self.hidden.items() if digest(value_of(self.params[name])) != before]

    def mark(self, remove: bool = False) -> None:
        """Have Cells with `lazy_inline` compiled apart where their deltas differ.

        MindSpore compiles such Cells once for all that were made with the same arguments.
        """
        for cell, mark in self._marks:
            arguments = cell._cell_init_args
            cell._cell_init_args = arguments.replace(mark, "") if remove else arguments + mark

    def _find_marks(self):
        """(Cell with `lazy_inline`, what tells apart what the slot puts into it)."""
        marks = []
        for layer in (layer for layer in list_layers(self.network) if hasattr(layer.cell, "_cell_init_args")):
            start, params = f"{layer.path}.", self.params.items()
            inside = [f"{name[len(layer.path) :]} {param.shape}" for name, param in params if name.startswith(start)]
            marks += [(layer.cell, f"mindpet {inside}")] if inside else []
        return marks


def _shared(cls, plan):
    """The keyword of `Delta.setup` for the parameters that deltas of a class share."""
    params = cls.shared([target for target in plan.targets if target.delta is cls])
    return {"shared": params} if params else {}

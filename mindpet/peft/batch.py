"""Several adapters in one batch: every layer computes the delta of each, and every row takes its own."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet.delta._base import Delta
from mindpet.errors import AdapterError, ConfigError
from mindpet.network.values import assign, forget_graphs, has_jit_functions
from mindpet.peft.patch import AttributePatch, ConstructPatch, bind_construct
from mindpet.peft.slot import AdapterSlot
from mindpet.utils.sharding import PARALLEL_MODES

BASE = "__base__"  # stands for no adapter in `adapter_names`


class MixedBatches:
    """Computes batches whose rows have different adapters, with one graph for all adapters that can be mixed.

    Args:
        placement: has the adapters.

    Attributes:
        roots (dict): whether the network trains -> Cell around it, with graphs of its own.
        adapters (dict): name -> Adapter that the Cells compute.
        slots (dict): name -> AdapterSlot of its own for each adapter.
        patches (list): what is changed in the network for a batch.
    """

    def __init__(self, placement: Any):
        self.placement = placement
        self.clear()

    def run(self, names: Sequence[str], inputs: tuple, keywords: dict[str, Any]) -> Any:
        """The network's output with adapter `names[i]` for row i of the batch; see `PeftModel.__call__`."""
        self._check(names, inputs, keywords)
        used = set(names) - {BASE}
        with self.placement.bare():
            self._prepare(used)
            for name in used:
                values = self.adapters[name].values
                for path, param in self.slots[name].params.items():
                    assign(param, Tensor(values[path[: -len(f"@{name}")]]))
            order = {BASE: -1, **{name: index for index, name in enumerate(self.adapters)}}
            self.rows.set_data(Tensor(np.array([order[name] for name in names], np.int32)), slice_shape=True)
            root = self._root()
            with contextlib.ExitStack() as stack:
                for patch in self.patches:
                    patch.apply()
                    stack.callback(patch.revert)
                for slot in self.slots.values():
                    slot.mark()
                    stack.callback(slot.mark, remove=True)
                stack.enter_context(_without_jit_functions())
                with one_error():
                    return root(*inputs, **keywords)

    def clear(self) -> None:
        """Forget the Cells."""
        self.roots, self.adapters, self.slots, self.patches = {}, {}, {}, []

    def _check(self, names, inputs, keywords):
        adapters = self.placement.adapters
        unknown = [name for name in dict.fromkeys(names) if name != BASE and name not in adapters]
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise AdapterError(f"adapter_names: there is no adapter {names}; there are {list(adapters)}.")
        whole = [name for name in dict.fromkeys(names) if name != BASE and not _can_mix(adapters[name])]
        if whole:
            raise AdapterError(
                f"adapter_names: {', '.join(map(repr, whole))} cannot share a batch, for there is more than deltas of "
                "layers: modules_to_save, biases, a prefix or a prompt."
            )
        if ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES:
            raise AdapterError("adapter_names: in semi-auto parallel mode all rows of a batch have one adapter.")
        first = next((value for value in _tensors([inputs, keywords]) if value.ndim), None)
        if not names or (first is not None and len(names) != first.shape[0]):
            rows = "" if first is None else f": {first.shape[0]}"
            raise AdapterError(
                f"adapter_names: the batch has another number of rows than there are names, {len(names)}{rows}."
            )

    def _prepare(self, used):
        """Have Cells for the adapters: for all that can be mixed, else for those that are used."""
        current = self.placement.adapters
        is_current = all(current.get(name) is adapter for name, adapter in self.adapters.items())
        if self.adapters and is_current and used <= set(self.adapters):
            return
        try:
            self._build({name: adapter for name, adapter in current.items() if _can_mix(adapter)})
        except ConfigError:
            self._build({name: adapter for name, adapter in current.items() if name in used})

    def _root(self):
        network = self.placement.network
        if network.training not in self.roots:
            self.roots[network.training] = Root(network)
        return self.roots[network.training]

    def _build(self, adapters):
        network = self.placement.network
        slots = {name: AdapterSlot(network, adapter.plan, suffix=f"@{name}") for name, adapter in adapters.items()}
        for name, slot in slots.items():
            slot.set_types({f"{path}@{name}": value for path, value in adapters[name].values.items()})
        rows = ms.Parameter(Tensor(np.zeros(1, np.int32)), name="mindpet_rows", requires_grad=False)
        targets = {target.path: target for adapter in adapters.values() for target in adapter.plan.reached}
        still = {id(cell): cell for adapter in adapters.values() for cell in adapter.plan.still}
        patches = [AttributePatch(cell, "use_batch_statistics", False) for cell in still.values()]
        for path, target in targets.items():
            before = {slot.deltas[path].before_activation for slot in slots.values() if path in slot.deltas}
            if len(before) > 1 and getattr(target.cell, "activation_flag", False):
                raise ConfigError(f"adapter_names: {path} has deltas before and behind its activation.")
            deltas = [slot.deltas[path] if path in slot.deltas else Unchanged() for slot in slots.values()]
            delta = MixedDelta.create(target.cell, target.kind, deltas=deltas, rows=rows, path=path)
            patches.append(ConstructPatch(target.cell, target.kind, delta))
        self.roots, self.adapters, self.slots, self.patches, self.rows = {}, adapters, slots, patches, rows


class Root(nn.Cell):
    """A Cell around a network, with compiled graphs of its own."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network
        bind_construct(self, network)


class Unchanged(Delta):
    """The delta of a layer that an adapter leaves alone."""

    def after(self, x, out):
        return out


class MixedDelta(Delta):
    """Several deltas for a layer, of which each row of a batch has one.

    Args of `setup`:
        deltas (list of Delta): for the layer, one for each adapter.
        rows (Parameter): of each row of the batch the index of its delta; another number for none.
        path (str): of the layer, for a message.
    """

    def setup(self, cell, deltas, rows, path):
        self.deltas, self.rows = nn.CellList(deltas, auto_prefix=False), rows
        self.before_activation = any(delta.before_activation for delta in deltas)
        self.changes_input = any(type(delta).before is not Delta.before for delta in deltas)
        self.batch_axis, self.path = self.kind.batch_axis, path

    def before(self, x):
        entering, index = x, 0
        if self.changes_input:
            for delta in self.deltas:
                entering = self.select_rows(index, delta.before(x), entering)
                index += 1
        return entering

    def after(self, x, out):
        result, index = out, 0
        for delta in self.deltas:
            result = self.select_rows(index, delta(x, out), result)
            index += 1
        return result

    def select_rows(self, index, chosen, others):
        """`chosen` in the rows of the adapter with that index, else `others`."""
        axis, count = self.batch_axis, self.rows.shape[0]
        times = chosen.shape[axis] // count
        # A layer may get (batch, seq) as rows, those of one sample side by side.
        if times * count != chosen.shape[axis] or (axis > 0 and times > 1):
            raise ValueError(
                f"adapter_names: {self.path} returns {chosen.shape[axis]} rows, which is no "
                f"multiple of the {count} names."
            )
        rows = ops.repeat_interleave(self.rows, times) if times > 1 else self.rows
        is_chosen = ops.reshape(rows == index, (1,) * axis + (-1,) + (1,) * (chosen.ndim - axis - 1))
        return ops.select(is_chosen, chosen, others)


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """A context that turns an error of `select_rows` into an AdapterError, without the stacks of graph mode."""
    try:
        yield
    except ValueError as error:
        message = re.match(r"'?(adapter_names: .*?)'?$", str(error), re.MULTILINE)
        if message is None:
            raise
        raise AdapterError(message[1]) from None


@contextlib.contextmanager
def _without_jit_functions():
    """A context with compiled `mindspore.jit` functions of its own, where PyNative mode may call some."""
    is_needed = ms.get_context("mode") == ms.PYNATIVE_MODE
    if is_needed and has_jit_functions():
        forget_graphs()
    try:
        yield
    finally:
        if is_needed and has_jit_functions():
            forget_graphs()


def _tensors(value):
    """The Tensors in a value, also within lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _can_mix(adapter):
    return not adapter.plan.trained and not any(target.is_slot for target in adapter.plan.targets)

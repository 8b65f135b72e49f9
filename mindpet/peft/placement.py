"""Which adapter is in a network, and where the values of the others are.

What always holds between two calls:

* The base's Parameters have the base's own values, but for those in `merged`, which keeps their own values.
* At most one slot is in the network: that of the active adapter.
* An adapter that can train has a slot of its own; others share one with adapters of the same signature.
* The values of an adapter are in its slot's parameters if it is the slot's `holder`, but for the `hidden` ones;
  these, and all of the other adapters, are in `stored`.
* Of the adapters' parameters only those have `requires_grad` that the active adapter trains and that are not hidden.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet.delta._config import PeftConfig
from mindpet.errors import AdapterError, ConfigError, MergeError
from mindpet.files.merge import MergedLayer
from mindpet.network.precision import plan_half, store_half
from mindpet.network.recompute import renew_recompute
from mindpet.network.values import assign, digest, forget_graphs, is_watched, know_graphs, unwatch, value_of, watch
from mindpet.peft.merge import FoldedDelta, in_float32, merge_layers, shared_weights, untie
from mindpet.peft.plan import Plan
from mindpet.peft.slot import AdapterSlot
from mindpet.peft.start import starts
from mindpet.utils.hints import Arrays

MARK = "mindpet_wrapped"  # attribute of a network that has adapters


class Adapter:
    """An adapter: what it is, where it goes, and its values.

    Args:
        config: its configuration; of a prefix from a file it tells of a projection that is not there.
        plan: what of the network it concerns.
        slot: the Cells of its deltas, perhaps shared with other adapters.
        stored: its values by path.
        trainable: whether it trains when it is active.
        given: paths of the values that it was made with; the others are fresh.

    Attributes:
        strayed (bool): whether it was trained, and then other values of the base were loaded, so that what PiSSA or
            OLoRA started from cannot be computed from it any more.
    """

    def __init__(
        self, config: PeftConfig, plan: Plan, slot: AdapterSlot, stored: Arrays, trainable: bool, given: set[str]
    ):
        self.config, self.plan, self.slot = config, plan, slot
        self.stored, self.trainable, self.given = stored, trainable, given
        self.starts, self.strayed = starts(plan, slot), False
        self.bases = {start.paths[0]: digest(value_of(start.base)) for start in self.starts}
        self.started = {path: digest(stored[path]) for start in self.starts for path in start.paths}

    @property
    def values(self) -> Arrays:
        """All of its values by path."""
        return {path: self.value(path) for path in self.slot.params}

    def value(self, path: str) -> np.ndarray:
        """One of its values."""
        is_held = self.slot.holder is self and path not in self.slot.hidden
        return value_of(self.slot.params[path]) if is_held else self.stored[path]

    def write(self, values: Arrays) -> None:
        """Set some of its values, wherever they are."""
        for path, value in values.items():
            if self.slot.holder is self and path not in self.slot.hidden:
                assign(self.slot.params[path], Tensor(value))
            else:
                self.stored[path] = value

    def follow_as(self, other: "Adapter", paths: dict[str, str]) -> None:
        """Follow the base as another adapter does, of which this one has values: path here -> path there."""
        self.given = {path for path, there in paths.items() if there in other.given}
        self.started = {path: other.started[paths[path]] for path in self.started}
        self.strayed = other.strayed

    def follow(self, base: Parameter) -> None:
        """Take from a Parameter of the base, which has other values now, what was taken from it at the start.

        What has been trained since stays, and so does what came from a file.
        """
        concerned = [start for start in self.starts if start.comes_from(base)]
        now = digest(value_of(concerned[0].base)) if concerned else None
        for start in concerned:
            before, self.bases[start.paths[0]] = self.bases[start.paths[0]], now
            if before == now:
                continue
            if any(digest(self.value(path)) != self.started[path] for path in start.paths):
                self.strayed |= start.is_lasting
                continue
            fresh = start.compute({path: self.value(path) for path in (*start.paths, *start.inputs)})
            values = {path: value.astype(self.stored[path].dtype) for path, value in fresh.items()}
            self.write({path: value for path, value in values.items() if path not in self.given})
            self.started.update({path: digest(self.value(path)) for path in start.paths})


class Placement:
    """The adapters of a network, and what of them is in it. `PeftModel` is the interface.

    Args:
        network: the base network.
        frozen_dtype: see `PeftModel`. Default: None.

    Attributes:
        adapters (dict): name -> Adapter.
        active (str): name of the active adapter, or None.
        slot (AdapterSlot): the slot that is in the network, or None.
        disabled (bool): whether the active adapter is hidden by `disable`.
        merged (dict): id of a Parameter -> [Parameter, its own value, Fold, digest of the merged value], or None.
        merged_names (list of str): of the adapters that are merged.
    """

    def __init__(self, network: nn.Cell, frozen_dtype: Optional[ms.Type] = None):
        self.network, self.frozen_dtype = network, frozen_dtype
        self.adapters, self.active, self.slot = {}, None, None
        self.disabled, self.merged, self.merged_names = False, None, []
        self._dequantized = []  # quantised layers that have merged weights in place of codes
        self._base = []  # pairs of a Parameter of the base and its `requires_grad` without adapters

    def _open(self):
        """Freeze the base, and see to it that adapters follow what is loaded into it."""
        params = list(self.network.get_parameters())
        others = [param.name for param in params if is_watched(param)]
        if others:
            raise ConfigError(f"the network shares {others} with another one that has adapters; unload() that first.")
        self._base = [(param, param.requires_grad) for param in params]
        for param in params:
            param.requires_grad = False
        know_graphs(self.network)
        self.watch()
        self._hook = self.network.register_load_state_dict_post_hook(self._follow_all)  # it calls no `set_data`
        vars(self.network)[MARK] = True

    def watch(self) -> None:
        """Be told when the base is loaded by `set_data`; the network keeps this alive, and MindSpore the Parameters."""
        for param, _ in self._base:
            watch(param, functools.partial(_call_if_alive, weakref.WeakMethod(self._follow), param))
        self._watch_hidden()

    def _watch_hidden(self):
        """Be told when somebody loads what is hidden, which would count beside what is merged or disabled."""
        for path in self.slot.hidden if self.slot else ():
            param = self.slot.params[path]
            watch(param, functools.partial(_call_if_alive, weakref.WeakMethod(self._refuse_load), param))

    def _refuse_load(self, param):
        self.slot.hide(copies=self.disabled)
        raise AdapterError(
            f"{param.name} was loaded while {self.active!r} is {'disabled' if self.disabled else 'merged'}, and would "
            "count twice; it is neutral again. Load it before, or afterwards."
        )

    def rebind(self) -> None:
        """Do with the network what was done with the one that this is a deep copy of; functions are not copied."""
        self.watch()
        for adapter in self.adapters.values():
            adapter.starts = starts(adapter.plan, adapter.slot)
        if self.merged:
            self.merged = {id(entry[0]): entry for entry in self.merged.values()}

    def _follow_all(self, cell, keys):
        for param, _ in self._base:
            self._follow(param)

    def close(self) -> None:
        """Take everything out of the network, and let train again what trained before."""
        self._put(None)
        for param, flag in self._base:
            param.requires_grad = flag
            unwatch(param)
        if self._base:
            self._hook.remove()
            renew_recompute(self.network)
        vars(self.network).pop(MARK, None)
        self.adapters, self.active, self._base = {}, None, []
        self.merged, self.merged_names, self._dequantized = None, [], []

    # Adapters

    def add(
        self,
        name: str,
        plan: Plan,
        trainable: bool,
        values: Optional[Arrays] = None,
        as_layer: bool = False,
        config: Optional[PeftConfig] = None,
    ) -> None:
        """Register an adapter, fresh or with values. The context `bare` is around the call.

        Args:
            name: its name.
            plan: what goes where.
            trainable: whether it can train.
            values: by path. Default: None, for a fresh one.
            as_layer: whether parameters without a value have the type of their layer. Default: False.
            config: see `Adapter`. Default: None, for that of the plan.
        """
        values = values or {}
        slot, stored = self._make(plan, values, as_layer)
        if self.frozen_dtype is not None and not self.adapters:  # what could be refused has been
            trained = set(map(id, plan.trained.values()))
            frozen = {id(param) for param in self.network.get_parameters()} - trained
            store_half(plan_half(self.network, frozen, self.frozen_dtype), "frozen_dtype")
            plan.renew_kinds()
            slot, stored = self._make(plan, values, as_layer)
        free = [other.slot for other in self.adapters.values() if not (trainable or other.trainable)]
        slot = next((other for other in free if other.signature == slot.signature), slot)
        if not self.adapters:
            self._open()
        self.adapters[name] = Adapter(config or plan.config, plan, slot, stored, trainable, set(values))

    def _make(self, plan, values, as_layer):
        """A slot, and the values of an adapter for it."""
        slot = AdapterSlot(self.network, plan)
        slot.set_types(values, as_layer)
        stored = {path: value_of(param) for path, param in slot.params.items()}
        for start in starts(plan, slot):
            stored.update({path: new.astype(stored[path].dtype) for path, new in start.compute(stored).items()})
        with np.errstate(over="ignore"):  # numbers that become infinite were let through by force
            stored.update({path: new.astype(stored[path].dtype) for path, new in values.items()})
        return slot, stored

    def activate(self, name: str) -> None:
        """Have an adapter in the network, and no other."""
        adapter = self.adapters[name]
        others = adapter.slot.holder not in (None, adapter)
        if others and any(param.requires_grad for param in adapter.slot.params.values()):
            self._give_own_slot(adapter)  # somebody lets the other one train, say by freeze_delta
        self._hold(adapter, self._put(adapter.slot))
        self.active = name
        self.set_flags()

    def write(self, adapter: Adapter, values: Arrays) -> None:
        """Give an adapter other values, from outside: they do not follow the base any more."""
        adapter.write({path: value.astype(adapter.stored[path].dtype) for path, value in values.items()})
        adapter.given |= set(values)
        adapter.started = {path: digest(adapter.value(path)) for path in adapter.started}

    def make_trainable(self, adapter: Adapter) -> None:
        """Let an adapter train from now on, in a slot of its own."""
        if any(other.slot is adapter.slot for other in self.adapters.values() if other is not adapter):
            self._give_own_slot(adapter)
        adapter.trainable = True

    def _give_own_slot(self, adapter):
        adapter.stored = adapter.values
        if adapter.slot.holder is adapter:
            adapter.slot.holder = None
        with self.bare():
            adapter.slot = AdapterSlot(self.network, adapter.plan)
        adapter.slot.set_types(adapter.stored)

    def set_flags(self) -> None:
        """Let what trains in the active adapter have gradients, and nothing else of the adapters.

        It is called after each change of what is in the network, for Cells that recompute depend on both.
        """
        active = self.adapters.get(self.active)
        for adapter in self.adapters.values():
            slot = adapter.slot
            trained = set(slot.trained) if active and active.trainable and active.slot is slot else ()
            for path, param in slot.params.items():
                param.requires_grad = path in trained and path not in slot.hidden
        renew_recompute(self.network)

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """A context in which nothing of an adapter is in the network; it must not be called."""
        slot = self.slot
        if slot is not None:
            slot.remove()
        try:
            yield
        finally:
            if slot is not None:
                slot.put()

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """A context in which the network computes as the base does.

        Raises:
            AdapterError: at the end, if parameters of the adapter were written to.
        """
        adapter = self.adapters[self.active]
        try:
            self._hide(adapter, copies=True)
            self.disabled = True
            yield
            self._refuse_changes(adapter, "disable_adapter")
        finally:
            self.disabled = False
            self.activate(self.active)

    def base_value(self, param: Parameter) -> np.ndarray:
        """The base's own value of one of its Parameters."""
        return self.merged[id(param)][1] if self.merged and id(param) in self.merged else value_of(param)

    def _put(self, slot):
        """Have this slot, and no other, in the network; returns whether another one was there."""
        if slot is self.slot:
            return False
        if self.slot is not None:
            self.slot.remove()
        if slot is not None:
            slot.put()
        self.slot = slot
        forget_graphs()
        return True

    def _hold(self, adapter, is_new):
        """Have the values of an adapter in its slot's parameters."""
        slot = adapter.slot
        if slot.holder is adapter and not slot.hidden:
            return
        for path in slot.hidden:
            unwatch(slot.params[path])
        if slot.holder not in (None, adapter):
            slot.holder.stored = slot.holder.values
        adapter.stored = adapter.values
        slot.fill(adapter, adapter.stored, is_new)

    def _hide(self, adapter, copies):
        """Make the active adapter the identity, with `copies` also what it trains of the base.

        Where the deltas cannot be the identity, everything is taken out.
        """
        adapter.stored = adapter.values
        adapter.slot.hide(copies)
        if adapter.slot.can_reset:
            self._watch_hidden()
        else:
            self._put(None)
        self.set_flags()

    def _refuse_changes(self, adapter, owner):
        changed = adapter.slot.changed()
        if changed:
            raise AdapterError(
                f"{owner}: these parameters of {self.active!r} were written to meanwhile, say by a training step; they "
                f"have the values again that they had before: {changed}."
            )

    def _follow(self, param):
        """What to do when another value was set to a Parameter of the base from outside."""
        for adapter in self.adapters.values():
            adapter.follow(param)
        if self.merged and id(param) in self.merged:
            _, _, one, merged = self.merged[id(param)]
            value = value_of(param)
            if digest(value) != merged:
                self._set_merged(param, one, one.apply(value, self._deltas(self.merged_names, one.path)))
        if self.slot is not None and self.slot.hidden:
            if any(start.comes_from(param) for start in self.adapters[self.active].starts):
                self.slot.hide(copies=self.disabled)

    # Merging

    def merge(self, names: Sequence[str], progressbar: bool, for_good: bool, untie_weights: bool) -> list[MergedLayer]:
        """Fold adapters into the weights of the network; all is computed and checked before anything is set.

        Args:
            names: of the adapters.
            progressbar: whether to show progress.
            for_good: whether what the active adapter trains of the base is set, too.
            untie_weights: whether weights that other Cells have too are untied; else that is an error.

        Raises:
            MergeError: an adapter cannot be merged; nothing was changed.
        """
        chosen = {name: self.adapters[name] for name in names}
        active = self.adapters.get(self.active)
        layers = {target.path: target for adapter in chosen.values() for target in adapter.plan.targets}
        copies = active.slot.copies if for_good and self.active in names else {}
        owners = {}
        for adapter in chosen.values():
            for target in adapter.plan.targets:
                for key in _merged_attributes(target):
                    if target.cell._params.get(key) is not None:
                        is_weight = key == target.kind.weight
                        name = target.path if is_weight else f"{target.path}.{key}"
                        reached = [target, *(target.tied if is_weight else ())]
                        places = [(one.path, one.cell, key if one is target else one.kind.weight) for one in reached]
                        owners[name] = [place for place in places if place in owners.get(name, places)]
        owners.update({base: active.plan.places[base] for base in copies.values()})
        quantized = {id(one.cell): one.cell for one in layers.values() if getattr(one.cell, "is_quantized", False)}
        with self.bare(), _dequantized(quantized.values()):
            tied = {} if untie_weights else shared_weights(self.network, owners)
            self._check_mergeable(chosen, tied)
            deltas = {path: self._deltas(names, path) for path in layers}
            folds, report = merge_layers(list(layers.values()), deltas, progressbar)
            if untie_weights:
                flags = {id(param): flag for param, flag in self._base}
                self._base += [(new, flags[id(old)]) for new, old in untie(self.network, owners)]
                forget_graphs()
        self._dequantized = list(quantized.values())
        if self._dequantized:
            forget_graphs()
        trained = {copy: active.value(copy) for copy in copies}
        self.merged, self.merged_names = {}, list(names)
        for one in folds:
            param = one.cell._params[one.attribute]
            self._set_merged(param, one, one.value)
        if self.active in names:
            self._hide(active, copies=False)
        else:
            self._put(None)
            self.set_flags()
        for copy, base in copies.items():
            _, cell, key = active.plan.places[base][0]
            assign(cell._params[key], Tensor(trained[copy]))
        return report

    def _set_merged(self, param, one, value):
        self.merged[id(param)] = [param, value_of(param), one, digest(value)]
        assign(param, Tensor(value))

    def unmerge(self) -> None:
        """Undo `merge`.

        Raises:
            AdapterError: at the end, if parameters of the merged delta were written to.
        """
        merged, self.merged, self.merged_names = self.merged, None, []
        for param, value, _, _ in merged.values():
            assign(param, Tensor(value))
        for cell in self._dequantized:
            cell.requantize()
        if self._dequantized:
            forget_graphs()
        self._dequantized = []
        if self.active is None:
            return
        try:
            self._refuse_changes(self.adapters[self.active], "unmerge_adapter")
        finally:
            self.activate(self.active)

    def _deltas(self, names, path):
        """What is folded into the layer at a path, a list of FoldedDelta."""
        deltas = []
        for adapter in (self.adapters[name] for name in names):
            for target in (target for target in adapter.plan.targets if target.path == path):
                values = {name: adapter.value(key) for name, key in adapter.slot.names[path].items()}
                deltas.append(FoldedDelta(target.delta, target.arguments, in_float32(values)))
        return deltas

    def _check_mergeable(self, chosen, tied):
        problems = []
        for name, adapter in chosen.items():
            plan = adapter.plan
            lasting = [part.peft_name for part, method in zip(plan.config.parts, plan.methods) if not method.mergeable]
            if lasting and plan.targets:
                problems.append(f"{name!r} is of {' and '.join(lasting)}, which cannot be folded into weights")
            elif plan.trained and name != self.active:
                problems.append(f"{name!r} changes the base's own parameters; only the active adapter may")
        if self.active in chosen:
            trained = [place[1:] for places in self.adapters[self.active].plan.places.values() for place in places]
            problems += [
                f"{target.path} has parameters that {self.active!r} trains"
                for adapter in chosen.values()
                for target in adapter.plan.targets
                if any(cell is target.cell and key in _merged_attributes(target) for cell, key in trained)
            ]
        problems += [
            f"{tied.path} has a delta of its own, and that of {target.path}, whose weight it has"
            for adapter in chosen.values()
            for target in adapter.plan.targets
            for tied in target.tied
            if any(tied.cell is other.cell for one in chosen.values() for other in one.plan.targets)
        ]
        problems += [
            f"{path} has its weight in common with {[other for other, _, _ in others]}, which would change too; "
            "merge_and_unload(untie_weights=True) gives each its own"
            for path, others in tied.items()
        ]
        if problems:
            raise MergeError("merge: " + "; ".join(problems) + ".")


@contextlib.contextmanager
def _dequantized(cells):
    """Have quantised layers hold their weights themselves, and after an error their codes again."""
    for cell in cells:
        cell.dequantize()
    try:
        yield
    except BaseException:
        for cell in cells:
            cell.requantize()
        raise


def _call_if_alive(reference, param):
    method = reference()
    if method is not None:
        method(param)


def _merged_attributes(target):
    """The attributes whose Parameters merging an adapter changes in a layer."""
    if not target.is_layer:
        return ()
    folds_bias = target.delta.folds_bias(**target.arguments)
    return (target.kind.weight, target.kind.bias) if folds_bias else (target.kind.weight,)

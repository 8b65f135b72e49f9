"""AdapterDrop: the deltas of the lowest layers are left out, for good or by chance while training.

Source: Rücklé et al. 2021, "AdapterDrop: On the Efficiency of Adapters in Transformers", arXiv:2010.11918, section 3.
"""

import types
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindpet.delta._base import Delta
from mindpet.delta._config import TargetConfig
from mindpet.errors import AdapterError
from mindpet.graph.callback import TrainCallback
from mindpet.network.match import layer_number, list_layers, listed
from mindpet.network.values import assign, forget_graphs
from mindpet.peft.checks import check_name
from mindpet.peft.model import PeftModel
from mindpet.peft.plan import Plan, plan_targets
from mindpet.peft.state_dict import check_model
from mindpet.utils.sharding import PARALLEL_MODES
from mindpet.utils.validate import Checker, is_int


def drop_adapter_layers(model: PeftModel, number: int, adapter_name: str, source: Optional[str] = None) -> None:
    """Add an adapter that is another one without the deltas of the lowest layers; it does not train.

    What is left out is not computed, and is in no file. The other adapter, and which one is active, stay as they are.

    Args:
        model: the network with adapters.
        number: how many layers lose their deltas: those whose number, the first one in their path or that after
            `layers_pattern`, is below it. What stands in no numbered layer keeps its delta.
        adapter_name: of the new adapter.
        source: name of the other one. Default: None, for the active one.

    Raises:
        AdapterError: a name is unknown or taken; no delta would be left out, or none left; a method of the adapter adds
            tokens, or keys and values, of all layers together; an adapter is merged or disabled.
        ValueError: `number` is not a positive int.
    """
    check_model(model)
    with model._turns.change("drop_adapter_layers"):
        model._check_state("drop_adapter_layers")
        check_name(adapter_name, model.adapters)
        adapter = model._get(model.active_adapter if source is None else source)
        _add_without(model, number, adapter_name, adapter)


def _add_without(model, number, adapter_name, adapter):
    """Add what is left of an adapter without the deltas of the lowest layers."""
    numbers = numbers_of(adapter.plan, number, "drop_adapter_layers")
    kept = [target for target in adapter.plan.targets if numbers.get(target.path, number) >= number]
    parts = []
    with model._placement.bare():
        known = [path for layer in list_layers(model.network) for path in layer.paths]
        for part in adapter.plan.config.parts:
            before = [target for target in adapter.plan.targets if target.config is part]
            pairs = [(path, path) for target in before if target in kept for path in target.paths]
            if before and not pairs:
                raise AdapterError(f"drop_adapter_layers: without the layers below {number} no delta is left.")
            parts.append(part.with_targets(pairs, known) if before else part)
        plan = plan_targets(model.network, adapter.plan.config.with_parts(parts), model.batch_statistics)
        paths, values = _paths(adapter, plan), adapter.values
        model._placement.add(adapter_name, plan, False, {path: values[before] for path, before in paths.items()})
        model.adapters[adapter_name].follow_as(adapter, paths)


def numbers_of(plan: Plan, number: int, owner: str) -> dict[str, int]:
    """Path of a target -> number of its layer, of those that have one; of several places the highest.

    Args:
        plan: of an adapter.
        number: how many layers are to lose their deltas.
        owner: for a message.

    Raises:
        AdapterError: a method has no targets, or there is no layer that loses a delta.
        ValueError: `number` is not a positive int.
    """
    check = Checker(owner)
    check.positive_int(number=number)
    check.done()
    others = [part.peft_name for part in plan.config.parts if not isinstance(part, TargetConfig)]
    if others:
        raise AdapterError(f"{owner}: {others} is of all layers together.")
    found = {}
    for target in plan.targets:
        names = listed(target.config.layers_pattern)
        own = [layer_number(path, names) for path in target.paths]
        if None not in own:
            found[target.path] = max(own)
    if not any(own < number for own in found.values()):
        raise AdapterError(
            f"{owner}: no delta is in a layer below {number}; the numbers are {sorted(set(found.values()))}."
        )
    return found


def _paths(adapter, plan):
    """Path in the slot of a plan that has some of an adapter's targets -> path in that of the adapter."""
    paths = {}  # what deltas share has the path of the first of them
    for target in plan.targets:
        for name, before in adapter.slot.names[target.path].items():
            paths.setdefault(before, f"{target.path}.{name}")
    paths.update({path: path for path, base in adapter.slot.copies.items() if base in plan.trained})
    return {path: before for before, path in paths.items()}


class AdapterDrop(TrainCallback):
    """Leaves out the deltas of the lowest n layers in each training step, n by chance from 0 to `most`.

    So the adapter learns to do without them, and `drop_adapter_layers` costs it little ("robust AdapterDrop"). The
    active adapter of a PeftModel is meant, when training begins. It computes all deltas, and takes what the layer gives
    in place of those that are left out, so that nothing is compiled for another n; they get gradients of zero.
    Between two steps nothing is left out.

    In a loop of your own::

        with AdapterDrop(model) as drop:
            for x, labels in batches:
                drop.draw()
                step(x, labels)

    Args:
        model: the network with adapters.
        most: the highest n. Default: None, for the highest number of a layer, which is never left out then.
        seed: of the chance. Default: None, for NumPy's global state, which `mindspore.set_seed` sets too.

    Attributes:
        number (int): n of the present step.

    Raises:
        ValueError, TypeError: an argument is wrong.
        AdapterError: when training begins: there is no delta in a layer below `most`; a delta acts on the input of its
            layer, or on keys and values; the mode is semi-auto parallel.
    """

    def __init__(self, model: PeftModel, most: Optional[int] = None, seed: Optional[int] = None):
        super().__init__()
        check_model(model)
        check = Checker(type(self).__name__)
        if most is not None:
            check.positive_int(most=most)
        check.require(seed is None or is_int(seed), TypeError, "seed", seed, "an int or None")
        check.done()
        self.model, self.most, self.number = model, most, 0
        self._rng = np.random if seed is None else np.random.RandomState(seed)
        self._gated, self._level, self._depth = [], None, 0

    def __enter__(self):
        if not self._depth:
            try:
                self._start()
            except BaseException:
                self._stop()
                raise
        self._depth += 1  # `Model.fit` enters its callbacks for each evaluation, too
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self._stop()

    def on_train_step_begin(self, run_context: Any) -> None:
        self.draw()

    def on_train_step_end(self, run_context: Any) -> None:
        self.leave_out(0)

    def draw(self) -> int:
        """Choose n for the next step.

        Returns:
            int.
        """
        self._check_started()
        self.leave_out(int(self._rng.randint(0, self._highest + 1)))
        return self.number

    def leave_out(self, number: int) -> None:
        """Leave out the deltas of the lowest layers, as many as are given, until further notice.

        Raises:
            AdapterError: training has not begun.
            ValueError: `number` is not an int from 0 to `most`.
        """
        self._check_started()
        if not is_int(number) or not 0 <= number <= self._highest:
            raise ValueError(f"AdapterDrop: 'number' must be an int from 0 to {self._highest}, but got {number!r}.")
        self.number = number
        assign(self._level, Tensor(np.array([number], np.int32)))

    def _check_started(self):
        if not self._gated:
            raise AdapterError("AdapterDrop: training has not begun; outside of Model.train, 'with' begins it.")

    def _start(self):
        owner = type(self).__name__
        with self.model._turns.change(owner):
            self.model._check_state(owner)
            if ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES:
                raise AdapterError(f"{owner}: not in semi-auto parallel mode.")
            slot = self.model._get(self.model.active_adapter).slot
            numbers = numbers_of(slot.plan, self.most or 2**31, owner)
            self._highest = self.most or max(numbers.values())
            deltas = {path: slot.deltas[path] for path, own in numbers.items() if own < self._highest}
            others = [path for path, delta in deltas.items() if not _can_gate(type(delta))]
            if others or not deltas:
                what = f"the deltas of {others} act on more than the output" if others else "there is one layer alone"
                raise AdapterError(f"{owner}: {what}.")
            self._level = Parameter(Tensor(np.zeros(1, np.int32)), name="mindpet_dropped", requires_grad=False)
            for path, delta in deltas.items():
                self._gated.append(delta)
                vars(delta).update(construct=types.MethodType(_construct_gated, delta), mindpet_dropped=self._level)
                vars(delta)["mindpet_number"] = numbers[path]
            forget_graphs()

    def _stop(self):
        for delta in self._gated:
            for name in ("construct", "mindpet_dropped", "mindpet_number"):
                vars(delta).pop(name, None)
        if self._gated:
            forget_graphs()
        self._gated, self.number = [], 0


def _can_gate(delta):
    """Whether a class of Deltas changes what comes out of a layer, and nothing else."""
    return delta.construct is Delta.construct and delta.before is Delta.before


def _construct_gated(self, x, out):
    """In place of `Delta.construct`: the output as it is where more layers are left out than the number of this one."""
    is_dropped = ops.reshape(self.mindpet_dropped > self.mindpet_number, (1,) * out.ndim)
    return ops.select(is_dropped, out, self.after(x, out))

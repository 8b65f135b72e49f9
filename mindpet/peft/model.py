"""A network with adapters: one is active, the others wait as values."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Optional, Union

import mindspore as ms
from mindspore import Parameter, nn

from mindpet.delta._config import PeftConfig
from mindpet.errors import AdapterError
from mindpet.files.names import NameMap
from mindpet.network.precision import check_half
from mindpet.network.values import know_graphs
from mindpet.peft.batch import MixedBatches
from mindpet.peft.checks import check_bare, check_name, check_names
from mindpet.peft.knowing import KnowsAdapters
from mindpet.peft.merging import MergesAdapters
from mindpet.peft.patch import bind_construct
from mindpet.peft.placement import Placement
from mindpet.peft.plan import plan_targets
from mindpet.peft.saving import SavesAdapters
from mindpet.peft.turns import Turns, alone
from mindpet.utils.validate import Checker


class PeftModel(KnowsAdapters, MergesAdapters, SavesAdapters, nn.Cell):
    """A network with adapters. One adapter is active: the network computes with it, and only it trains.

    The network's layers stay the Cells that they are, and its parameters keep their names, values and order: what an
    adapter trains of the base is a copy. So base weights can be loaded at any time; what a fresh adapter takes from
    them follows. An adapter that trains has Parameters of its own, so that a training step never reaches another one.
    Adapters that do not train, and are of equal shapes, take turns in the same Parameters: switching among them copies
    values and compiles nothing. A call that changes what is computed has every graph compiled anew, those of
    `mindspore.jit` and of Cells around the network too.

    The running statistics of the network's BatchNorms stay while adapters are there, also while training.

    Attributes that a PeftModel does not have are those of the network. Use `get_peft_model` or `from_pretrained`.
    Several threads may call it at once; what changes what is computed is refused meanwhile, see docs/peft.md.

    Args:
        model: the base network; it is changed.
        peft_config: of the first adapter. Default: None, for none yet.
        adapter_name: of the first adapter. Default: 'default'.
        autocast_adapter_dtype: whether adapters are float32 where the layer is in half precision; else they have the
            layer's type. Default: True.
        name_map: to the names of the PyTorch model, for files. Default: None, see `NameMap`.
        batch_statistics: whether BatchNorms normalise with their batch while training, as without adapters; then their
            running statistics belong to the adapter, and are saved with it. Default: False.
        frozen_dtype: float16 or bfloat16, to store the weights of the network's layers in, but those that the first
            adapter trains, and to have these layers compute in. It is done when the first adapter is added, and for
            good: there is no float32 copy. Default: None, to leave both as they are.

    Raises:
        TypeError, NoMatchError, ConfigError: see `plan_targets`, and `mindpet.graph.freeze_delta` for `frozen_dtype`.
        AdapterError: the name cannot be one; the network has adapters already.
    """

    def __init__(
        self,
        model: nn.Cell,
        peft_config: Optional[PeftConfig] = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        name_map: Optional[NameMap] = None,
        batch_statistics: bool = False,
        frozen_dtype: Optional[ms.Type] = None,
    ):
        check_bare(model)
        check = Checker(type(self).__name__)
        check_half(check, frozen_dtype)
        check.done()
        super().__init__(auto_prefix=False)
        self.network = model
        self.name_map = name_map or NameMap()
        self.autocast_adapter_dtype, self.batch_statistics = autocast_adapter_dtype, batch_statistics
        self.merge_report = []
        self._turns, self._bases = Turns(), {}  # name -> passport of an adapter that was loaded
        self._placement = Placement(model, frozen_dtype)
        self._mixed = MixedBatches(self._placement)
        if type(self).construct is PeftModel.construct:
            bind_construct(self, model)
        self.add_flags(training=model.training)
        self._phase = model._phase  # 'train' or 'predict', with `training`
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)
            self.set_adapter(adapter_name)

    def construct(self, *inputs, **keywords):
        return self.network(*inputs, **keywords)

    def __call__(self, *inputs: Any, adapter_names: Optional[Sequence[str]] = None, **keywords: Any) -> Any:
        """The network's output.

        Args:
            inputs, keywords: of the network.
            adapter_names: for each row of the batch the name of an adapter, or '__base__'. Default: None, for the
                active adapter.

        Raises:
            AdapterError: a name is unknown; an adapter cannot share a batch; another thread changes what is computed.
        """
        if adapter_names is None:
            with self._turns.call(self._placement):
                return super().__call__(*inputs, **keywords)
        names = check_names("adapter_names", adapter_names)
        with self._turns.change("adapter_names"):
            self._check_state("adapter_names")
            return self._mixed.run(names, inputs, keywords)

    def __deepcopy__(self, memo):
        """A copy with a network of its own, that follows what is loaded into that one."""
        twin = memo[id(self)] = type(self)(nn.Cell())
        vars(twin).update(copy.deepcopy(vars(self), memo))
        know_graphs(twin)
        twin._placement.rebind()
        return twin

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = self.__dict__.get("_cells", {}).get("network")
            if network is None or name.startswith("_"):
                raise
            return getattr(network, name)

    @alone
    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:
        """Add a fresh adapter; the active one stays active.

        Args:
            adapter_name: its name.
            peft_config: the method may be another.

        Raises:
            AdapterError: the name is taken or cannot be one; an adapter is merged.
            TypeError, NoMatchError, ConfigError: see `plan_targets`.
        """
        self._check_state("add_adapter")
        check_name(adapter_name, self.adapters)
        with self._placement.bare():
            plan = plan_targets(self.network, peft_config, self.batch_statistics)
            dataclasses.replace(plan.config, inference_mode=False)  # checks what it starts from; files may have others
            trainable = not peft_config.inference_mode
            self._placement.add(adapter_name, plan, trainable, as_layer=not self.autocast_adapter_dtype)

    @alone
    def set_adapter(self, adapter_name: Union[str, Sequence[str]]) -> None:
        """Make an adapter the active one; no other one is computed or trains.

        An optimizer belongs to the adapter that was active when it was made: make a new one, and a new training step.

        Args:
            adapter_name: its name; a list has one name.

        Raises:
            AdapterError: there is no such adapter; one is merged, or the call is inside of `disable_adapter`; several
                names (see `add_weighted_adapter`, and `adapter_names` of the call).
        """
        self._check_state("set_adapter")
        if not isinstance(adapter_name, str):
            names = check_names("adapter_name", adapter_name)
            if len(names) != 1:
                raise AdapterError(
                    f"set_adapter: one adapter is active at a time, but got {names}; add_weighted_adapter() makes one "
                    "of several."
                )
            (adapter_name,) = names
        self._get(adapter_name)
        self._placement.activate(adapter_name)
        self._turns.choose(adapter_name)

    @alone
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it is active, the first of the others takes its place.

        Raises:
            AdapterError: there is no such adapter, or no other; one is merged.
        """
        self._check_state("delete_adapter")
        self._get(adapter_name)
        others = [name for name in self.adapters if name != adapter_name]
        if not others:
            raise AdapterError(f"delete_adapter: {adapter_name!r} is the only adapter; use unload() to have the base.")
        if adapter_name == self.active_adapter:
            self.set_adapter(others[0])
        del self.adapters[adapter_name]
        self._bases.pop(adapter_name, None)
        self._mixed.clear()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the network computes as the base does. Where a delta can be the identity, nothing is
        compiled; a prefix is taken out, and its graphs are compiled anew.

        Raises:
            AdapterError: an adapter is merged; at the end, if the adapter was trained meanwhile.
        """
        with self._turns.change("disable_adapter"):
            if self._placement.disabled or self.active_adapter is None:
                yield
                return
            self._check_state("disable_adapter")
            with self._placement.disable():
                yield

    @alone
    def prepare_for_training(self, adapter_name: Optional[str] = None) -> list[Parameter]:
        """Make an adapter the active one and let it train, say one that was loaded with `is_trainable=False`.

        Args:
            adapter_name: Default: None, for the active one.

        Returns:
            What trains, for an optimizer.

        Raises:
            AdapterError: there is no such adapter, or it is merged.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_state("prepare_for_training")
        self._placement.make_trainable(self._get(name))
        self.set_adapter(name)
        self.set_train()
        return self.trainable_params()

    def _check_state(self, owner):
        if self._placement.merged is not None:
            raise AdapterError(f"{owner}: an adapter is merged; call unmerge_adapter() first.")
        if self._placement.disabled:
            raise AdapterError(f"{owner}: not inside of disable_adapter().")

    def _close(self):
        self._placement.close()
        self._mixed.clear()
        self._bases = {}
        return self.network


def get_peft_model(
    model: nn.Cell,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    name_map: Optional[NameMap] = None,
    batch_statistics: bool = False,
    frozen_dtype: Optional[ms.Type] = None,
) -> PeftModel:
    """A network with a fresh adapter.

    Args:
        mixed: kept for Hugging Face PEFT; every PeftModel takes adapters of several methods. Default: False.
        model, peft_config, adapter_name, autocast_adapter_dtype, name_map, batch_statistics, frozen_dtype: see
            `PeftModel`, with the errors.
    """
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype, name_map, batch_statistics, frozen_dtype)


def inject_adapter_in_model(peft_config: PeftConfig, model: nn.Cell, adapter_name: str = "default") -> nn.Cell:
    """Put an adapter into a network for good, without a PeftModel around it; all else is frozen.

    Args:
        peft_config: of the adapter.
        model: is changed.
        adapter_name: of no effect, as the network has one adapter. Default: 'default'.

    Returns:
        `model`.

    Raises:
        TypeError, NoMatchError, ConfigError, AdapterError: see `PeftModel`.
    """
    return get_peft_model(model, peft_config, adapter_name).network

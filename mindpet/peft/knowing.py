"""Which adapters a PeftModel has, and how large they are."""

from typing import Any, Optional

from mindspore import nn

from mindpet.delta._config import PeftConfig
from mindpet.errors import AdapterError
from mindpet.peft.placement import Adapter
from mindpet.utils.hints import Arrays


class KnowsAdapters:
    """The part of PeftModel that tells of its adapters."""

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name."""
        return self._placement.adapters

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations of the adapters by name."""
        return {name: adapter.config for name, adapter in self.adapters.items()}

    @property
    def active_adapter(self) -> Optional[str]:
        """Name of the active adapter, or None."""
        return self._placement.active

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter, as a list: there is at most one."""
        return [] if self.active_adapter is None else [self.active_adapter]

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged."""
        return list(self._placement.merged_names)

    @property
    def is_enabled(self) -> bool:
        """Whether adapters compute: not within `disable_adapter`."""
        return not self._placement.disabled

    def get_base_model(self) -> nn.Cell:
        """The network; it computes with the active adapter."""
        return self.network

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable parameters, and of all parameters with those of all adapters.

        As in Hugging Face PEFT, a module that is trained as a whole counts twice, a bias once.
        """
        of_adapters = self._adapter_ids()
        total = sum(param.size for param in self.network.get_parameters() if id(param) not in of_adapters)
        for adapter in self.adapters.values():
            slot, modules = adapter.slot, tuple(f"{layer.path}." for layer in adapter.plan.modules_to_save)
            counted = set(slot.trained) - {path for path in slot.copies if not path.startswith(modules)}
            total += sum(slot.params[path].size for path in counted)
        trainable = sum(param.size for param in self.network.get_parameters() if param.requires_grad)
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print the numbers of `get_nb_trainable_parameters` and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # What a training that is resumed asks of a Cell with values outside of Parameters, see `mindpet.graph.resume`.

    def kept_facts(self) -> dict[str, Any]:
        """Which adapters there are, and which one is active."""
        return {"active": self.active_adapter, "all": sorted(self.adapters)}

    def kept_values(self) -> Arrays:
        """The values of the adapters that are not active, by name and path."""
        others = {name: adapter.values for name, adapter in self.adapters.items() if name != self.active_adapter}
        return {f"{name}.{path}": value for name, values in others.items() for path, value in values.items()}

    def keep_values(self, values: Arrays) -> None:
        """Set what `kept_values` gave."""
        for name, adapter in self.adapters.items():
            if name != self.active_adapter:
                adapter.write({path: values[f"{name}.{path}"] for path in adapter.slot.params})

    def _get(self, name):
        if not isinstance(name, str) or name not in self.adapters:
            raise AdapterError(f"there is no adapter {name!r}; there are {list(self.adapters)}.")
        return self.adapters[name]

    def _adapter_ids(self):
        """The ids of all parameters of adapters."""
        return {id(param) for adapter in self.adapters.values() for param in adapter.slot.params.values()}

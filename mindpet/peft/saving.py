"""Writing the adapters of a PeftModel into files, and reading them."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn

import mindpet.files.adapter as adapter_files
import mindpet.peft.state as state
from mindpet.delta._config import PeftConfig
from mindpet.errors import AdapterError
from mindpet.files.keys import without_ties
from mindpet.files.names import NameMap
from mindpet.files.passport import check_base, check_files, make_passport
from mindpet.network.parameters import model_parameters
from mindpet.peft.checks import check_name, check_names
from mindpet.peft.plan import plan_targets
from mindpet.peft.slot import AdapterSlot
from mindpet.peft.turns import alone
from mindpet.utils.hints import Arrays, PathLike


class SavesAdapters:
    """The part of PeftModel that has to do with files."""

    @alone
    def save_pretrained(
        self,
        save_directory: PathLike,
        safe_serialization: bool = True,
        selected_adapters: Optional[Sequence[str]] = None,
        step: Optional[int] = None,
    ) -> None:
        """Save adapters as Hugging Face PEFT does: 'default' into the directory, others into folders of their names.

        Each has `adapter_model.safetensors`, in the parameters' types, `adapter_config.json`, and
        `mindpet_passport.json`, which tells the base from others.

        Args:
            save_directory: the directory; it is made if it is missing.
            safe_serialization: kept for Hugging Face PEFT: files are safetensors. Default: True.
            selected_adapters: Default: None, for all.
            step: training step, for the passport. Default: None.

        Raises:
            AdapterError: there is no such adapter; a parameter of the base is trainable, which would be lost; an
                adapter starts from weights that are not those of the base any more.
            ValueError: `safe_serialization` is False.
            CheckpointError: the parameters are cut over ranks; see docs/peft.md for how to save them.
        """
        if not safe_serialization:
            raise ValueError("save_pretrained: 'safe_serialization' must be True: files are safetensors.")
        names = (
            list(self.adapters) if selected_adapters is None else check_names("selected_adapters", selected_adapters)
        )
        adapters = {name: self._get(name) for name in names}
        if not adapters:
            raise AdapterError("save_pretrained: there is no adapter.")
        state.refuse_slices(self.network)
        self._refuse_lost()
        strayed = [name for name, adapter in adapters.items() if adapter.strayed]
        if strayed:
            raise AdapterError(
                f"save_pretrained: {strayed} start from the base's weights (PiSSA, OLoRA), and others were loaded "
                "after they were trained; a file would be read with another start. Load the base first."
            )
        for name, adapter in adapters.items():
            config = dataclasses.replace(adapter.config, inference_mode=True)
            config.auto_mapping = config.auto_mapping or state.auto_mapping(self.network)
            passport = make_passport(self._base_values(adapter.plan), self.network, step)
            tensors, config = self._tensors(adapter, config)
            adapter_files.save_adapter(adapter_files.folder_of(save_directory, name), config, tensors, passport)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Cell,
        model_id: PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Optional[PeftConfig] = None,
        autocast_adapter_dtype: bool = True,
        force: bool = False,
        name_map: Optional[NameMap] = None,
        batch_statistics: bool = False,
        frozen_dtype: Optional[ms.Type] = None,
    ) -> nn.Cell:
        """A network with an adapter from a folder that mindpet or Hugging Face PEFT wrote. Types are kept.

        Args:
            model: the base network, its weights in place; it is changed if all is well.
            model_id: the folder.
            adapter_name: Default: 'default'.
            is_trainable: whether the adapter trains. Default: False.
            config: takes the place of the one in the folder. Default: None.
            autocast_adapter_dtype: of the PeftModel, for adapters that are added; a file's types are kept.
                Default: True.
            force: whether to load an adapter that was trained on another base. Default: False.
            name_map: to the names of the PyTorch model. Default: None, see `NameMap`.
            batch_statistics: see `PeftModel`; of an adapter whose file has running statistics it is True.
                Default: False.
            frozen_dtype: see `PeftModel`. Default: None.

        Returns:
            PeftModel.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: the tensors do not fit, all are listed; the base is another one.
            TypeError, NoMatchError, ConfigError, AdapterError: see `PeftModel`.
        """
        peft_model = cls(
            model,
            autocast_adapter_dtype=autocast_adapter_dtype,
            name_map=name_map,
            batch_statistics=batch_statistics,
            frozen_dtype=frozen_dtype,
        )
        try:
            peft_model.load_adapter(model_id, adapter_name, is_trainable, config, force=force)
        except BaseException:
            peft_model.unload()
            raise
        peft_model.set_adapter(adapter_name)
        return peft_model

    @alone
    def load_adapter(
        self,
        model_id: PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        config: Optional[PeftConfig] = None,
        autocast_adapter_dtype: bool = True,
        force: bool = False,
    ) -> None:
        """Add an adapter from a folder; the active one stays active. See `from_pretrained`."""
        self._check_state("load_adapter")
        check_name(adapter_name, self.adapters)
        config = copy.deepcopy(config) if config is not None else PeftConfig.from_pretrained(model_id)
        config.check_supported(from_file=True)
        with self._placement.bare():
            # A file has the table that a projection computed, and not the projection.
            config, tensors = config.unpack(without_ties(adapter_files.read_tensors(model_id), config))
            tensors, config = self.name_map.fuse(tensors, config)
            config = state.to_network(config, tensors, self.network, self.name_map)
            moving = self.batch_statistics or adapter_files.has_statistics(tensors, config)
            unmatched = []
            computed = config.computed()
            plan = plan_targets(self.network, computed, moving, unmatched)
            for part in plan.config.parts:
                paths = [target.path for target in plan.targets if target.config is part]
                part.check_sizes(model_id, paths, map(np.shape, tensors.values()))
            values = state.load(model_id, tensors, AdapterSlot(self.network, plan), self.name_map, force)
            passport = {} if force else check_files(model_id)
            check_base(model_id, passport, self._base_values())
            if unmatched:
                warnings.warn(f"{model_id}: all tensors have their place, but {'; '.join(unmatched)}.", stacklevel=3)
            shown = map(_as_in_file, plan.config.parts, config.parts, computed.parts)
            shown = dataclasses.replace(plan.config.with_parts(shown), inference_mode=not is_trainable)
            self._placement.add(adapter_name, plan, is_trainable, values, config=shown)
            self._bases[adapter_name] = passport

    @alone
    def adapter_tensors(self, adapter_name: str) -> Arrays:
        """The tensors of an adapter's file by their keys, a dict of numpy.ndarray; see `get_peft_model_state_dict`."""
        adapter = self._get(adapter_name)
        return self._tensors(adapter, adapter.config)[0]

    @alone
    def set_adapter_tensors(self, adapter_name: str, tensors: Arrays) -> None:
        """Give an adapter the values of such a dict; see `set_peft_model_state_dict`."""
        self._check_state("set_adapter_tensors")
        adapter = self._get(adapter_name)
        tensors = without_ties(adapter_files.without_doubles(tensors), adapter.config)
        tensors, _ = self.name_map.fuse(tensors, adapter.config)
        with self._placement.bare():
            values = state.load(repr(adapter_name), tensors, AdapterSlot(self.network, adapter.plan), self.name_map)
        self._placement.write(adapter, values)

    def _refuse_lost(self):
        """Refuse to save while a parameter trains that would be in no file."""
        of_adapters = self._adapter_ids()
        params = model_parameters(self.network)
        lost = [path for path, param in params.items() if param.requires_grad and id(param) not in of_adapters]
        if lost:
            raise AdapterError(
                f"save_pretrained: {lost} are trainable, but belong to no adapter, and would not be saved; name their "
                "Cells in 'modules_to_save', or freeze them."
            )

    def _base_values(self, plan=None):
        """path -> Parameter, or the base's own value, of all but modules that a plan trains as a whole."""
        trained = plan.trained.items() if plan else ()
        copied = [param for path, param in trained if path in plan.buffers or _is_inside(path, plan)]
        left_out = self._adapter_ids() | set(map(id, copied))
        return {
            path: self._placement.base_value(param) if self._placement.merged else param
            for path, param in self.network.parameters_and_names()
            if id(param) not in left_out
        }

    def _tensors(self, adapter, config):
        """The tensors and the configuration of an adapter as they stand in its files."""
        keys = state.file_keys(adapter.slot, self.name_map)
        tensors = {key: adapter.value(path).copy() for path, key in keys.items()}
        tensors.update(state.whole_tensors(adapter.slot, adapter.values))
        with self._placement.bare():
            tensors, config = self.name_map.split(tensors, config)
            tensors, config = state.portable(tensors, config, adapter.plan, self.network, self.name_map)
        ties = state.tied_keys(adapter.slot, self.name_map)
        return {**tensors, **{key: tensors[first] for key, first in ties.items()}}, config


def _as_in_file(completed, config, computed):
    """A configuration that was completed, with the fields that the file's own has other than the computed one."""
    fields = [field.name for field in dataclasses.fields(config)]
    kept = {name: getattr(config, name) for name in fields if getattr(config, name) != getattr(computed, name)}
    return dataclasses.replace(completed, **kept)


def _is_inside(path, plan):
    """Whether a parameter is in one of the modules that a plan trains as a whole."""
    return path.startswith(tuple(f"{layer.path}." for layer in plan.modules_to_save))

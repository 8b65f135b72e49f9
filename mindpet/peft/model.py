"""A network with adapters: one is active, the others wait as values."""

import contextlib
import copy
import dataclasses
import re
import warnings

from mindspore import nn

import mindpet
import mindpet.peft.combine as combine
import mindpet.peft.state as state
from mindpet.errors import AdapterError, CheckpointError, ConfigError, MergeError
from mindpet.graph.parameters import model_parameters
from mindpet.peft.batch import BASE, MixedBatches
from mindpet.peft.config import PeftConfig
from mindpet.peft.inject import Frame
from mindpet.peft.names import NameMap, portable, to_network
from mindpet.peft.overlay import bind_construct
from mindpet.peft.passport import check_base, check_files, make_passport
from mindpet.peft.placement import MARK, Placement
from mindpet.peft.plan import plan_targets
from mindpet.peft.turns import Turns, alone
from mindpet.utils.values import know_graphs


class PeftModel(nn.Cell):
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
        model (Cell): the base network; it is changed.
        peft_config (PeftConfig): of the first adapter. Default: None, for none yet.
        adapter_name (str): of the first adapter. Default: 'default'.
        autocast_adapter_dtype (bool): whether adapters are float32 where the layer is in half precision; else they have
            the layer's type. Default: True.
        name_map (NameMap): to the names of the PyTorch model, for files. Default: None, see `NameMap`.
        batch_statistics (bool): whether BatchNorms normalise with their batch while training, as without adapters; then
            their running statistics belong to the adapter, and are saved with it. Default: False.

    Raises:
        TypeError, NoMatchError, ConfigError: see `plan_targets`.
        AdapterError: the name cannot be one; the network has adapters already.
    """

    def __init__(
        self,
        model,
        peft_config=None,
        adapter_name="default",
        autocast_adapter_dtype=True,
        name_map=None,
        batch_statistics=False,
    ):
        _check_bare(model)
        super().__init__(auto_prefix=False)
        self.network = model
        self.name_map = name_map or NameMap()
        self.autocast_adapter_dtype, self.batch_statistics = autocast_adapter_dtype, batch_statistics
        self.merge_report = []
        self._turns, self._bases = Turns(), {}  # name -> passport of an adapter that was loaded
        self._placement = Placement(model)
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

    def __call__(self, *inputs, adapter_names=None, **keywords):
        """The network's output.

        Args:
            inputs, keywords: of the network.
            adapter_names (list of str): for each row of the batch the name of an adapter, or '__base__'. Default: None,
                for the active adapter.

        Raises:
            AdapterError: a name is unknown; an adapter cannot share a batch; another thread changes what is computed.
        """
        if adapter_names is None:
            with self._turns.call(self._placement):
                return super().__call__(*inputs, **keywords)
        names = _names("adapter_names", adapter_names)
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

    # What there is

    @property
    def adapters(self):
        """dict of name -> Adapter."""
        return self._placement.adapters

    @property
    def peft_config(self):
        """dict of name -> configuration."""
        return {name: adapter.config for name, adapter in self.adapters.items()}

    @property
    def active_adapter(self):
        """Name of the active adapter, or None."""
        return self._placement.active

    @property
    def active_adapters(self):
        """The active adapter, as a list: there is at most one."""
        return [] if self.active_adapter is None else [self.active_adapter]

    @property
    def merged_adapters(self):
        """Names of the adapters that are merged."""
        return list(self._placement.merged_names)

    @property
    def is_enabled(self):
        """Whether adapters compute: not within `disable_adapter`."""
        return not self._placement.disabled

    def get_base_model(self):
        """The network; it computes with the active adapter."""
        return self.network

    def get_nb_trainable_parameters(self):
        """Numbers of trainable parameters, and of all parameters with those of all adapters, as a tuple.

        As in Hugging Face PEFT, a module that is trained as a whole counts twice, a bias once.
        """
        own = self._adapter_ids()
        total = sum(param.size for param in self.network.get_parameters() if id(param) not in own)
        for adapter in self.adapters.values():
            frame, modules = adapter.frame, tuple(f"{layer.path}." for layer in adapter.plan.modules_to_save)
            counted = set(frame.trained) - {path for path in frame.copies if not path.startswith(modules)}
            total += sum(frame.params[path].size for path in counted)
        trainable = sum(param.size for param in self.network.get_parameters() if param.requires_grad)
        return trainable, total

    def print_trainable_parameters(self):
        """Print the numbers of `get_nb_trainable_parameters` and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # Adapters

    @alone
    def add_adapter(self, adapter_name, peft_config):
        """Add a fresh adapter; the active one stays active.

        Args:
            adapter_name (str): its name.
            peft_config (PeftConfig): its configuration; the method may be another.

        Raises:
            AdapterError: the name is taken or cannot be one; an adapter is merged.
            TypeError, NoMatchError, ConfigError: see `plan_targets`.
        """
        self._check_state("add_adapter")
        _check_name(adapter_name, self.adapters)
        with self._placement.bare():
            plan = plan_targets(self.network, peft_config, self.batch_statistics)
            dataclasses.replace(plan.config, inference_mode=False)  # checks what it starts from; files may have others
            trainable = not peft_config.inference_mode
            self._placement.add(adapter_name, plan, trainable, as_layer=not self.autocast_adapter_dtype)

    @alone
    def set_adapter(self, adapter_name):
        """Make an adapter the active one; no other one is computed or trains.

        An optimizer belongs to the adapter that was active when it was made: make a new one, and a new training step.

        Args:
            adapter_name (Union[str, list of str]): its name; a list has one name.

        Raises:
            AdapterError: there is no such adapter; one is merged, or the call is inside of `disable_adapter`; several
                names (see `add_weighted_adapter`, and `adapter_names` of the call).
        """
        self._check_state("set_adapter")
        if not isinstance(adapter_name, str):
            names = _names("adapter_name", adapter_name)
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
    def delete_adapter(self, adapter_name):
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
    def disable_adapter(self):
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
    def add_weighted_adapter(
        self,
        adapters,
        weights,
        adapter_name,
        combination_type="svd",
        svd_rank=None,
        svd_clamp=None,
        svd_full_matrices=True,
        svd_driver=None,
        density=None,
        majority_sign_method="total",
        seed=None,
    ):
        """Add a LoRA adapter that is a sum of others with weights; it does not train.

        Args:
            adapters (list of str): names of LoRA adapters.
            weights (list of float): one for each.
            adapter_name (str): of the new adapter.
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method, seed:
                see `mindpet.peft.combine.combine`.

        Raises:
            AdapterError: a name is unknown or taken; an adapter cannot be summed; an adapter is merged.
            TypeError, ValueError: an argument is wrong.
        """
        self._check_state("add_weighted_adapter")
        _check_name(adapter_name, self.adapters)
        parts = [self._get(name) for name in _names("adapters", adapters)]
        config, values = combine.combine(
            parts,
            weights,
            combination_type,
            svd_rank,
            svd_clamp,
            svd_full_matrices,
            svd_driver,
            density,
            majority_sign_method,
            seed,
        )
        with self._placement.bare():
            self._placement.add(adapter_name, plan_targets(self.network, config), False, values)

    @alone
    def prepare_for_training(self, adapter_name=None):
        """Make an adapter the active one and let it train, say one that was loaded with `is_trainable=False`.

        Args:
            adapter_name (str): Default: None, for the active one.

        Returns:
            list of Parameter, what trains, for an optimizer.

        Raises:
            AdapterError: there is no such adapter, or it is merged.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_state("prepare_for_training")
        self._placement.make_trainable(self._get(name))
        self.set_adapter(name)
        self.set_train()
        return self.trainable_params()

    # Merging

    @alone
    def merge_adapter(self, adapter_names=None, safe_merge=True):
        """Fold adapters into the weights of the network; `unmerge_adapter` undoes it. `merge_report` has the errors.

        All is computed in float32, and checked for NaN and infinite numbers before the first weight is set. What the
        active adapter trains of the base goes on training meanwhile, if it is among those that are merged.

        Args:
            adapter_names (list of str): Default: None, for the active one.
            safe_merge (bool): kept for Hugging Face PEFT; every merge is checked. Default: True.

        Raises:
            AdapterError: an adapter is unknown or named twice, or one is merged already.
            MergeError: an adapter cannot be merged, a weight would not be finite, or another Cell has the same weight;
                all is in the message, and nothing was changed.
        """
        self._merge(adapter_names)

    @alone
    def unmerge_adapter(self):
        """Undo `merge_adapter`: every weight has the bits that it had before.

        Raises:
            AdapterError: no adapter is merged; at the end, if a merged delta was trained meanwhile.
        """
        if self._placement.merged is None:
            raise AdapterError("unmerge_adapter: no adapter is merged.")
        self._placement.unmerge()

    @alone
    def merge_and_unload(self, progressbar=False, safe_merge=True, adapter_names=None, untie_weights=False):
        """Fold adapters into the weights for good, and take everything else out.

        Args:
            progressbar (bool): whether to show progress. Default: False.
            safe_merge (bool): kept for Hugging Face PEFT; every merge is checked. Default: True.
            adapter_names (list of str): Default: None, for those that are merged, or else the active one.
            untie_weights (bool): whether a parameter that another Cell has too, say an embedding that is tied to the
                head, is given to each; else that is an error. Default: False.

        Returns:
            Cell, the network, with base Cells only.

        Raises:
            AdapterError, MergeError: as in `merge_adapter`.
        """
        merged = self.merged_adapters
        if merged:
            if adapter_names is not None and sorted(adapter_names) != sorted(merged):
                raise AdapterError(f"merge: {merged} are merged already; call unmerge_adapter() first.")
            self.unmerge_adapter()
        try:
            self._merge(merged or adapter_names, progressbar, True, untie_weights)
        except (AdapterError, MergeError):
            if merged:
                self._merge(merged)
            raise
        return self._close()

    @alone
    def unload(self):
        """Take the adapters out; returns the network, bit for bit as it was before the first adapter came.

        Raises:
            AdapterError: the call is inside of `disable_adapter`.
        """
        if self._placement.merged is not None:
            self.unmerge_adapter()
        self._check_state("unload")
        return self._close()

    # Files

    @alone
    def save_pretrained(self, save_directory, safe_serialization=True, selected_adapters=None, step=None):
        """Save adapters as Hugging Face PEFT does: 'default' into the directory, others into folders of their names.

        Each has `adapter_model.safetensors`, in the parameters' types, `adapter_config.json`, and
        `mindpet_passport.json`, which tells the base from others.

        Args:
            save_directory (str): the directory; it is made if it is missing.
            safe_serialization (bool): kept for Hugging Face PEFT: files are safetensors. Default: True.
            selected_adapters (list of str): Default: None, for all.
            step (int): training step, for the passport. Default: None.

        Raises:
            AdapterError: there is no such adapter; a parameter of the base is trainable, which would be lost; an
                adapter starts from weights that are not those of the base any more.
            ValueError: `safe_serialization` is False.
            CheckpointError: the parameters are cut over ranks; see docs/peft.md for how to save them.
        """
        if not safe_serialization:
            raise ValueError("save_pretrained: 'safe_serialization' must be True: files are safetensors.")
        names = list(self.adapters) if selected_adapters is None else _names("selected_adapters", selected_adapters)
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
            config.peft_version = config.peft_version or f"mindpet {mindpet.__version__}"
            passport = make_passport(self._base_values(adapter.plan), self.network, step)
            tensors, config = self._tensors(adapter, config)
            state.save_adapter(state.folder_of(save_directory, name), config, tensors, passport)

    @classmethod
    def from_pretrained(
        cls,
        model,
        model_id,
        adapter_name="default",
        is_trainable=False,
        config=None,
        autocast_adapter_dtype=True,
        force=False,
        name_map=None,
        batch_statistics=False,
    ):
        """A network with an adapter from a folder that mindpet or Hugging Face PEFT wrote. Types are kept.

        Args:
            model (Cell): the base network, its weights in place; it is changed if all is well.
            model_id (str): the folder.
            adapter_name (str): Default: 'default'.
            is_trainable (bool): whether the adapter trains. Default: False.
            config (PeftConfig): takes the place of the one in the folder. Default: None.
            autocast_adapter_dtype (bool): of the PeftModel, for adapters that are added; a file's types are kept.
                Default: True.
            force (bool): whether to load an adapter that was trained on another base. Default: False.
            name_map (NameMap): to the names of the PyTorch model. Default: None, see `NameMap`.
            batch_statistics (bool): see `PeftModel`; of an adapter whose file has running statistics it is True.
                Default: False.

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
        self, model_id, adapter_name, is_trainable=False, config=None, autocast_adapter_dtype=True, force=False
    ):
        """Add an adapter from a folder; the active one stays active. See `from_pretrained`."""
        self._check_state("load_adapter")
        _check_name(adapter_name, self.adapters)
        config = copy.deepcopy(config) if config is not None else PeftConfig.from_pretrained(model_id)
        config.check_supported(from_file=True)
        with self._placement.bare():
            # A file has the table that a projection computed, and not the projection.
            tensors, config = self.name_map.fuse(state.read_tensors(model_id), config)
            config = to_network(config, tensors, self.network, self.name_map)
            moving = self.batch_statistics or state.has_statistics(tensors, config)
            unmatched = []
            plan = plan_targets(self.network, state.without_projection(config), moving, unmatched)
            layers = plan.targets + plan.attentions
            plan.config.check_sizes(model_id, [layer.path for layer in layers], [v.shape for v in tensors.values()])
            values = state.load(model_id, tensors, Frame(self.network, plan), self.name_map, force)
            passport = {} if force else check_files(model_id)
            check_base(model_id, passport, self._base_values())
            if unmatched:
                warnings.warn(f"{model_id}: all tensors have their place, but {'; '.join(unmatched)}.", stacklevel=3)
            shown = dataclasses.replace(state.with_projection(plan.config, config), inference_mode=not is_trainable)
            self._placement.add(adapter_name, plan, is_trainable, values, config=shown)
            self._bases[adapter_name] = passport

    @alone
    def adapter_tensors(self, adapter_name):
        """The tensors of an adapter's file by their keys, a dict of numpy.ndarray; see `get_peft_model_state_dict`."""
        adapter = self._get(adapter_name)
        return self._tensors(adapter, adapter.config)[0]

    @alone
    def set_adapter_tensors(self, adapter_name, tensors):
        """Give an adapter the values of such a dict; see `set_peft_model_state_dict`."""
        self._check_state("set_adapter_tensors")
        adapter = self._get(adapter_name)
        tensors, _ = self.name_map.fuse(state.without_doubles(tensors), adapter.config)
        with self._placement.bare():
            values = state.load(repr(adapter_name), tensors, Frame(self.network, adapter.plan), self.name_map)
        self._placement.write(adapter, values)

    # How it is done

    def _get(self, name):
        if not isinstance(name, str) or name not in self.adapters:
            raise AdapterError(f"there is no adapter {name!r}; there are {list(self.adapters)}.")
        return self.adapters[name]

    def _check_state(self, owner):
        if self._placement.merged is not None:
            raise AdapterError(f"{owner}: an adapter is merged; call unmerge_adapter() first.")
        if self._placement.disabled:
            raise AdapterError(f"{owner}: not inside of disable_adapter().")

    def _merge(self, adapter_names, progressbar=False, for_good=False, untie_weights=False):
        self._check_state("merge")
        names = self.active_adapters if adapter_names is None else _names("adapter_names", adapter_names)
        for name in names:
            self._get(name)
        if not names or len(set(names)) < len(names):
            raise AdapterError(f"merge: there is no adapter, or one is named twice: {names}.")
        self._warn_of_other_base(names)
        self.merge_report = self._placement.merge(names, progressbar, for_good, untie_weights)

    def _warn_of_other_base(self, names):
        """Warn where other values were loaded into the base since an adapter's file was found to fit."""
        with self._placement.bare():
            base = self._base_values()
        for name in names:
            try:
                check_base(repr(name), self._bases.get(name, {}), base)
            except CheckpointError as error:
                warnings.warn(f"merge: {error}", stacklevel=5)

    def _close(self):
        self._placement.close()
        self._mixed.clear()
        self._bases = {}
        return self.network

    def _adapter_ids(self):
        """The ids of all parameters of adapters."""
        return {id(param) for adapter in self.adapters.values() for param in adapter.frame.params.values()}

    def _refuse_lost(self):
        """Refuse to save while a parameter trains that would be in no file."""
        own = self._adapter_ids()
        params = model_parameters(self.network)
        lost = [path for path, param in params.items() if param.requires_grad and id(param) not in own]
        if lost:
            raise AdapterError(
                f"save_pretrained: {lost} are trainable, but belong to no adapter, and would not be saved; name their "
                "Cells in 'modules_to_save', or freeze them."
            )

    def _base_values(self, plan=None):
        """path -> Parameter, or the base's own value, of all but modules that a plan trains as a whole."""
        trained = plan.trained.items() if plan else ()
        own = [param for path, param in trained if path in plan.buffers or _is_inside(path, plan)]
        left_out = self._adapter_ids() | set(map(id, own))
        return {
            path: self._placement.base_value(param) if self._placement.merged else param
            for path, param in self.network.parameters_and_names()
            if id(param) not in left_out
        }

    def _tensors(self, adapter, config):
        """The tensors and the configuration of an adapter as they stand in its files."""
        keys = state.file_keys(adapter.frame, adapter.plan, self.name_map)
        tensors = {key: adapter.value(own).copy() for own, key in keys.items()}
        with self._placement.bare():
            if adapter.plan.attentions:
                tensors[state.PROMPT] = state.prefix_table(Frame(self.network, adapter.plan), adapter.values)
            tensors, config = self.name_map.split(tensors, config)
            return portable(tensors, config, adapter.plan, self.network, self.name_map)


def _is_inside(path, plan):
    """Whether a parameter is in one of the modules that a plan trains as a whole."""
    return path.startswith(tuple(f"{layer.path}." for layer in plan.modules_to_save))


def _check_bare(network):
    """Refuse a network that has adapters already."""
    if not isinstance(network, nn.Cell):
        raise TypeError(f"'network' must be a Cell, but got {network!r} ({type(network).__name__}).")
    if any(isinstance(cell, PeftModel) or MARK in vars(cell) for _, cell in network.cells_and_names()):
        raise ConfigError(
            f"the {type(network).__name__} has adapters already; use add_adapter() or load_adapter() of its PeftModel, "
            "or unload() it first."
        )


def _names(argument, value):
    """A list of names; one that is a str is not taken for a list of letters."""
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"'{argument}' must be a list of str, but got {value!r} ({type(value).__name__}).")
    return list(value)


def _check_name(name, taken):
    """Refuse what cannot be an adapter's name: it becomes the name of a folder, beside files of 'default'."""
    if not isinstance(name, str):
        raise TypeError(f"'adapter_name' must be a str, but got {name!r} ({type(name).__name__}).")
    if not re.fullmatch(r"\w[\w\-.]*", name) or name == BASE or name in state.FILES:
        raise AdapterError(
            f"'adapter_name' must be of letters, digits, '_', '-' and '.', and not the name of a file that is saved, "
            f"but got {name!r}."
        )
    if name in taken:
        raise AdapterError(f"'adapter_name': there is an adapter {name!r} already.")


def get_peft_model(
    model,
    peft_config,
    adapter_name="default",
    mixed=False,
    autocast_adapter_dtype=True,
    name_map=None,
    batch_statistics=False,
):
    """A network with a fresh adapter.

    Args:
        mixed (bool): kept for Hugging Face PEFT; every PeftModel takes adapters of several methods. Default: False.
        model, peft_config, adapter_name, autocast_adapter_dtype, name_map, batch_statistics: see `PeftModel`, with the
            errors.

    Returns:
        PeftModel.
    """
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype, name_map, batch_statistics)


def inject_adapter_in_model(peft_config, model, adapter_name="default"):
    """Put an adapter into a network for good, without a PeftModel around it; all else is frozen.

    Args:
        peft_config (PeftConfig): the configuration.
        model (Cell): the network; it is changed.
        adapter_name (str): of no effect, as the network has one adapter. Default: 'default'.

    Returns:
        Cell, `model`.

    Raises:
        TypeError, NoMatchError, ConfigError, AdapterError: see `PeftModel`.
    """
    return get_peft_model(model, peft_config, adapter_name).network

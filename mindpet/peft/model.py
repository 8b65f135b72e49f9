"""A network with adapters: one is in place, the others wait as values."""

import contextlib
import copy
import dataclasses
import functools
import re

from mindspore import Tensor, nn

import mindpet
import mindpet.peft.combine as combine
import mindpet.peft.state as state
from mindpet.errors import AdapterError, ConfigError, MergeError
from mindpet.graph.parameters import matches, model_parameters
from mindpet.peft.batch import Rows
from mindpet.peft.config import LoraConfig, PeftConfig
from mindpet.peft.inject import Frame
from mindpet.peft.merge import merge_layers, shared_weights, untie
from mindpet.peft.names import NameMap, to_model, to_network
from mindpet.peft.plan import is_from_weight, plan_targets
from mindpet.utils.values import assign, forget_graphs, value_of

BASE = "__base__"  # stands for no adapter in `adapter_names`


@dataclasses.dataclass
class Adapter:
    """An adapter: what it is, where it goes, and its values while it is not in place.

    Attributes:
        plan (Plan): its configuration, and what of the network it concerns.
        frame (Frame): the Cells of its deltas, perhaps shared with other adapters.
        values (dict): name -> numpy.ndarray, of the deltas, of what it trains in the base, and of the weights that a
            part is taken off.
        trainable (bool): whether it trains when it is in place.
    """

    plan: object
    frame: Frame
    values: dict
    trainable: bool

    @property
    def config(self):
        """Its configuration."""
        return self.plan.config


class PeftModel(nn.Cell):
    """A network with adapters. One adapter is in place: the network computes with it, and only it trains.

    The network's layers stay the Cells that they are, and its parameters keep their names, values and order. Adapters
    of equal shapes take turns in the same Parameters: switching copies values and compiles nothing. A call that changes
    what is computed has every graph compiled anew, those of `mindspore.jit` and of Cells around the network too.

    Attributes that a PeftModel does not have are those of the network. Use `get_peft_model` or `from_pretrained`.

    Args:
        network (Cell): the base network; it is changed.
        peft_config (PeftConfig): of the first adapter. Default: None, for none yet.
        adapter_name (str): of the first adapter. Default: 'default'.
        autocast_adapter_dtype (bool): whether adapters are float32 where the layer is in half precision; else they have
            the layer's type. Default: True.
        name_map (NameMap): to the names of the PyTorch model, for files. Default: None, see `NameMap`.

    Raises:
        TypeError, NoMatchError, ConfigError: see `plan_targets`.
        AdapterError: the name cannot be one; the network has adapters already.
    """

    def __init__(self, network, peft_config=None, adapter_name="default", autocast_adapter_dtype=True, name_map=None):
        _check_bare(network)
        super().__init__(auto_prefix=False)
        self.network = network
        self.name_map = name_map or NameMap()
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self.adapters = {}
        self.merge_report = []
        self._flags = {param.name: param.requires_grad for param in network.get_parameters()}
        self._base = {}  # the base's own values of what adapters have other values of
        self._frame = None  # in the network
        self._active = None
        self._is_disabled = False
        self._merged = None  # or the weights before a merge, by name
        self._rows = {}
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
                for the adapter that is in place.

        Raises:
            AdapterError: a name is unknown; an adapter cannot share a batch.
        """
        if adapter_names is None:
            return super().__call__(*inputs, **keywords)
        return self._mixed(list(adapter_names), inputs, keywords)

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
    def peft_config(self):
        """dict of name -> configuration."""
        return {name: adapter.config for name, adapter in self.adapters.items()}

    @property
    def active_adapter(self):
        """Name of the adapter that is in place, or None."""
        return self._active

    @property
    def active_adapters(self):
        """The adapter that is in place, as a list: there is at most one."""
        return [] if self._active is None else [self._active]

    def get_base_model(self):
        """The network; it computes with the adapter that is in place."""
        return self.network

    def get_nb_trainable_parameters(self):
        """Numbers of trainable parameters, and of all parameters with those of all adapters, as a tuple."""
        own = {param.name for adapter in self.adapters.values() for param in adapter.frame.params.values()}
        total = sum(param.size for name, param in model_parameters(self.network).items() if name not in own)
        for adapter in self.adapters.values():
            total += sum(adapter.values[name].size for name in adapter.frame.params if self._trains(adapter, name))
            for layer in adapter.plan.modules_to_save:
                total += sum(param.size for param in layer.cell.get_parameters())
        trainable = sum(param.size for param in model_parameters(self.network).values() if param.requires_grad)
        return trainable, total

    def print_trainable_parameters(self):
        """Print the numbers of `get_nb_trainable_parameters` and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # Adapters

    def add_adapter(self, adapter_name, peft_config):
        """Add a fresh adapter; the one that is in place stays in place.

        Args:
            adapter_name (str): its name.
            peft_config (PeftConfig): its configuration; the method may be another.

        Raises:
            AdapterError: the name is taken or cannot be one; an adapter is merged.
            TypeError, NoMatchError, ConfigError: see `plan_targets`.
        """
        self._check_state("add_adapter")
        _check_name(adapter_name, self.adapters)
        with self._bare():
            plan = plan_targets(self.network, peft_config)
            self._add(adapter_name, plan, not peft_config.inference_mode)

    def set_adapter(self, adapter_name):
        """Put an adapter in place; no other one is computed or trains.

        An optimizer belongs to the adapter that was in place when it was made.

        Args:
            adapter_name (str): its name.

        Raises:
            AdapterError: there is no such adapter; one is merged, or the call is inside of `disable_adapter`.
        """
        self._check_state("set_adapter")
        adapter = self._get(adapter_name)
        self._store()
        is_new = self._put(adapter.frame)
        self._write(adapter.values, is_new)
        self._active = adapter_name
        self._set_flags()

    def delete_adapter(self, adapter_name):
        """Remove an adapter. If it is in place, the first of the others takes its place.

        Raises:
            AdapterError: there is no such adapter, or no other; one is merged.
        """
        self._check_state("delete_adapter")
        self._get(adapter_name)
        others = [name for name in self.adapters if name != adapter_name]
        if not others:
            raise AdapterError(f"delete_adapter: {adapter_name!r} is the only adapter; use unload() to have the base.")
        if adapter_name == self._active:
            self.set_adapter(others[0])
        del self.adapters[adapter_name]
        self._rows.clear()

    @contextlib.contextmanager
    def disable_adapter(self):
        """A context in which the network computes as the base does. Where a delta can be the identity, nothing is
        compiled; a prefix is taken out, and its graphs are compiled anew."""
        if self._is_disabled or self._active is None:
            yield
            return
        self._check_state("disable_adapter")
        self._store()
        self._is_disabled = True
        if not self._frame.reset():
            self._put(None)
        try:
            yield
        finally:
            self._is_disabled = False
            adapter = self.adapters[self._active]
            is_new = self._put(adapter.frame)
            self._write(adapter.values, is_new)

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", svd_rank=None):
        """Add a LoRA adapter that is a sum of others with weights.

        Args:
            adapters (list of str): names of LoRA adapters.
            weights (list of float): one for each.
            adapter_name (str): of the new adapter.
            combination_type (str): 'linear' sums A and B by themselves, each with the root of weight and scale, for
                equal ranks; 'cat' puts them side by side, which is exact, its rank the sum of ranks; 'svd' has the best
                approximation of the sum of B A of rank `svd_rank`. Default: 'svd'.
            svd_rank (int): Default: None, for the largest rank.

        Raises:
            AdapterError: a name is unknown or taken; an adapter cannot be summed; an adapter is merged.
            ValueError: `combination_type` is unknown, the numbers of adapters and weights differ.
        """
        self._check_state("add_weighted_adapter")
        _check_name(adapter_name, self.adapters)
        parts = [self._get(name) for name in adapters]
        self._refresh()
        config, values = combine.combine(parts, list(weights), combination_type, svd_rank)
        with self._bare():
            self._add(adapter_name, plan_targets(self.network, config), False, values)

    def prepare_for_training(self, adapter_name=None):
        """Put an adapter in place and let it train, say one that was loaded with `is_trainable=False`.

        Args:
            adapter_name (str): Default: None, for the one that is in place.

        Returns:
            list of Parameter, what trains, for an optimizer.

        Raises:
            AdapterError: there is no such adapter, or it is merged.
        """
        name = self._active if adapter_name is None else adapter_name
        self._get(name).trainable = True
        self.set_adapter(name)
        self.set_train()
        return self.trainable_params()

    # Merging

    def merge_adapter(self, adapter_names=None, safe_merge=True):
        """Fold adapters into the weights of the network; `unmerge_adapter` undoes it. `merge_report` has the errors.

        All is computed in float32, and checked for NaN and infinite numbers before the first weight is set.

        Args:
            adapter_names (list of str): Default: None, for the one that is in place.
            safe_merge (bool): kept for Hugging Face PEFT; every merge is checked. Default: True.

        Raises:
            AdapterError: an adapter is unknown, or one is merged already.
            MergeError: an adapter cannot be merged, a weight would not be finite, or another Cell has the same weight;
                all is in the message, and nothing was changed.
        """
        self._merge(adapter_names, progressbar=False)

    def unmerge_adapter(self):
        """Undo `merge_adapter`: every weight has the bits that it had before.

        Raises:
            AdapterError: no adapter is merged.
        """
        if self._merged is None:
            raise AdapterError("unmerge_adapter: no adapter is merged.")
        self._write(self._merged)
        self._merged = None
        self._write(self.adapters[self._active].values)

    def merge_and_unload(self, progressbar=False, safe_merge=True, adapter_names=None, untie_weights=False):
        """Fold adapters into the weights for good, and take everything else out.

        Args:
            progressbar (bool): whether to show progress. Default: False.
            safe_merge (bool): kept for Hugging Face PEFT; every merge is checked. Default: True.
            adapter_names (list of str): Default: None, for the one that is in place.
            untie_weights (bool): whether a layer whose weight another Cell has too, say an embedding that is tied to
                the head, gets a weight of its own; else that is an error. Default: False.

        Returns:
            Cell, the network, with base Cells only.

        Raises:
            AdapterError, MergeError: as in `merge_adapter`.
        """
        if self._merged is None:
            self._merge(adapter_names, progressbar, untie_weights)
        self._merged = None
        return self._close()

    def unload(self):
        """Take the adapters out; returns the network, bit for bit as it was before the first adapter came.

        Raises:
            AdapterError: the call is inside of `disable_adapter`.
        """
        if self._merged is not None:
            self.unmerge_adapter()
        self._check_state("unload")
        self._store()
        return self._close()

    # Files

    def save_pretrained(self, save_directory, selected_adapters=None, step=None):
        """Save adapters as Hugging Face PEFT does: 'default' into the directory, others into folders of their names.

        Each has `adapter_model.safetensors`, in the parameters' types, `adapter_config.json`, and
        `mindpet_passport.json`, which tells the base from others.

        Args:
            save_directory (str): the directory; it is made if it is missing.
            selected_adapters (list of str): Default: None, for all.
            step (int): training step, for the passport. Default: None.

        Raises:
            AdapterError: there is no such adapter.
            CheckpointError: the parameters are cut over ranks; see docs/peft.md for how to save them.
        """
        names = list(self.adapters) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._get(name)
        state.refuse_slices(self.network)
        self._refresh()
        for name in names:
            adapter = self.adapters[name]
            config = dataclasses.replace(adapter.config, inference_mode=True)
            config.auto_mapping = config.auto_mapping or state.auto_mapping(self.network)
            config.peft_version = config.peft_version or f"mindpet {mindpet.__version__}"
            passport = state.make_passport(self._base_values(adapter.plan), self.network, step)
            tensors, config = self.name_map.split(self._tensors(name), config)
            if self._has_other_names(config):
                config = to_model(config, tensors, adapter.plan, self.name_map)
            state.save_adapter(state.folder_of(save_directory, name), config, tensors, passport)

    @classmethod
    def from_pretrained(
        cls,
        model,
        model_id,
        adapter_name="default",
        is_trainable=False,
        config=None,
        force=False,
        name_map=None,
    ):
        """A network with an adapter from a folder that mindpet or Hugging Face PEFT wrote. Types are kept.

        Args:
            model (Cell): the base network, its weights in place; it is changed if all is well.
            model_id (str): the folder.
            adapter_name (str): Default: 'default'.
            is_trainable (bool): whether the adapter trains. Default: False.
            config (PeftConfig): takes the place of the one in the folder. Default: None.
            force (bool): whether to load an adapter that was trained on another base. Default: False.
            name_map (NameMap): to the names of the PyTorch model. Default: None, see `NameMap`.

        Returns:
            PeftModel.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: the tensors do not fit, all are listed; the base is another one.
            TypeError, NoMatchError, ConfigError, AdapterError: see `PeftModel`.
        """
        peft_model = cls(model, name_map=name_map)
        peft_model.load_adapter(model_id, adapter_name, is_trainable, config, force)
        peft_model.set_adapter(adapter_name)
        return peft_model

    def load_adapter(self, model_id, adapter_name, is_trainable=False, config=None, force=False):
        """Add an adapter from a folder; the one that is in place stays in place. See `from_pretrained`."""
        self._check_state("load_adapter")
        _check_name(adapter_name, self.adapters)
        config = copy.deepcopy(config) if config is not None else PeftConfig.from_pretrained(model_id)
        with self._bare():
            # A file has the table that a projection computed, and not the projection.
            tensors, config = self.name_map.fuse(state.read_tensors(model_id), config)
            if self._has_other_names(config):
                config = to_network(config, tensors, self.network, self.name_map)
            plan = plan_targets(self.network, state.without_projection(config))
            values = state.load(model_id, tensors, Frame(self.network, plan), self.name_map)
            if not force:
                state.check_passport(model_id, self._base_values(plan))
            self._add(adapter_name, plan, is_trainable, values)
            plan.config = state.with_projection(plan.config, config)

    # How it is done

    def _get(self, name):
        if name not in self.adapters:
            raise AdapterError(f"there is no adapter {name!r}; there are {list(self.adapters)}.")
        return self.adapters[name]

    def _has_other_names(self, config):
        return isinstance(config, LoraConfig) and self.name_map != NameMap()

    def _check_state(self, owner):
        if self._merged is not None:
            raise AdapterError(f"{owner}: an adapter is merged; call unmerge_adapter() first.")
        if self._is_disabled:
            raise AdapterError(f"{owner}: not inside of disable_adapter().")

    def _add(self, name, plan, trainable, values=None):
        """Register an adapter; no frame is in the network."""
        values = values or {}
        for key, param in {**plan.owned, **plan.residual}.items():
            self._base.setdefault(key, value_of(param))
        frame = Frame(self.network, plan)
        frame.set_types(values, as_layer=not self.autocast_adapter_dtype)
        for delta in frame.deltas.values():
            if getattr(delta, "use_dora", False):
                delta.set_magnitude()
        fresh = {key: value_of(param) for key, param in frame.params.items()}
        fresh.update({key: self._base[key] for key in (*plan.owned, *plan.residual)})
        if is_from_weight(plan.config):
            fresh.update(combine.initial_from_weight(frame, self._base))
        own = {key: value if key in frame.params else value.astype(fresh[key].dtype) for key, value in values.items()}
        twins = [other.frame for other in self.adapters.values() if other.frame.signature == frame.signature]
        self.adapters[name] = Adapter(plan, (twins or [frame])[0], {**fresh, **own}, trainable)
        self._rows.clear()

    def _put(self, frame):
        """Have this frame, and no other, in the network; returns whether another one was there."""
        if frame is self._frame:
            return False
        if self._frame is not None:
            self._frame.remove()
        if frame is not None:
            frame.put()
        self._frame = frame
        forget_graphs()
        return True

    @contextlib.contextmanager
    def _bare(self):
        """A context in which no deltas are in the network; it must not be called."""
        if self._frame is not None:
            self._frame.remove()
        try:
            yield
        finally:
            if self._frame is not None:
                self._frame.put()

    def _written(self):
        """Everything that adapters write to: the base's Parameters by name, those of deltas by path."""
        deltas = self._frame.params if self._frame else {}
        own = {param.name for param in deltas.values()}
        base = {name: param for name, param in model_parameters(self.network).items() if name not in own}
        return {**base, **deltas}

    def _write(self, values, is_new=False):
        """Set values by name; where graphs are compiled anew in any case, no operator is needed for it."""
        params = self._written()
        for name, value in values.items():
            if is_new:
                params[name].set_data(Tensor(value))
            else:
                assign(params[name], Tensor(value))

    def _refresh(self):
        """Bring the stored values of the adapter in place up to date."""
        if self._active is None or self._is_disabled or self._merged is not None:
            return
        adapter, params = self.adapters[self._active], self._written()
        adapter.values = {name: value_of(params[name]) for name in adapter.values}

    def _store(self):
        """Store the values of the adapter in place, and give the base back its own."""
        self._refresh()
        if self._active is not None:
            held = self.adapters[self._active].values
            self._write({name: self._base[name] for name in held if name in self._base})

    def _trains(self, adapter, name):
        return name in adapter.plan.owned or matches(name, adapter.plan.method.trainable)

    def _set_flags(self):
        adapter = self.adapters[self._active]
        for name, param in self._written().items():
            param.requires_grad = adapter.trainable and name in adapter.values and self._trains(adapter, name)

    def _mixed(self, names, inputs, keywords):
        """The network's output, every row with its own adapter."""
        self._check_state("adapter_names")
        distinct = sorted(set(names) - {BASE})
        for name in distinct:
            plan = self._get(name).plan
            if plan.owned or plan.residual or plan.attentions:
                raise AdapterError(
                    f"adapter_names: {name!r} cannot share a batch, for it has more than deltas of layers: "
                    "modules_to_save, biases, a prefix, or weights that it starts from."
                )

        self._store()
        try:
            with self._bare():
                rows = [distinct.index(name) if name != BASE else -1 for name in names]
                return self._rows_of(distinct)(rows, inputs, keywords)
        finally:
            if self._active is not None:
                self._write(self.adapters[self._active].values)

    def _rows_of(self, names):
        """The Rows of these adapters, with their values."""
        key = tuple(names)
        if key not in self._rows:
            plans = [self.adapters[name].plan for name in names]
            frames = [Frame(self.network, plan, suffix=f"@{name}") for name, plan in zip(names, plans)]
            self._rows[key] = Rows(self.network, frames)
        for name, frame in zip(names, self._rows[key].frames):
            values = {f"{own}@{name}": value for own, value in self.adapters[name].values.items()}
            frame.set_types(values)
            for own, param in frame.params.items():
                assign(param, Tensor(values[own]))
        return self._rows[key]

    def _merge(self, adapter_names, progressbar, untie_weights=False):
        self._check_state("merge")
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        if not names:
            raise AdapterError("merge: there is no adapter.")
        chosen = [self._get(name) for name in names]
        problems = []
        for name, adapter in zip(names, chosen):
            if not adapter.plan.method.mergeable and adapter.frame.deltas:
                problems.append(f"{name!r} is of {adapter.config.peft_type.value}, which cannot be folded into weights")
            elif (adapter.plan.owned or adapter.plan.residual) and name != self._active:
                problems.append(f"{name!r} changes the base's own parameters; only the adapter in place may")
        layers = {layer.path: layer for adapter in chosen for layer in adapter.plan.targets}
        with self._bare():
            tied = [] if untie_weights else shared_weights(self.network, layers.values())
        problems += [
            f"{layer.path} has its weight in common with {[path for path, _, _ in others]}, which would change too; "
            "merge_and_unload(untie_weights=True) gives each its own"
            for layer, others in tied
        ]
        if problems:
            raise MergeError("merge: " + "; ".join(problems) + ".")
        self._refresh()
        if self._active not in names:
            self._store()  # what it changes in the base is not to be merged
        deltas = {path: [] for path in layers}
        for adapter in chosen:
            for path in adapter.frame.deltas:
                deltas[path].append(combine.fold_arguments(path, adapter.values))
        values, self.merge_report = merge_layers(list(layers.values()), deltas, progressbar)
        if untie_weights:
            with self._bare():
                untie(self.network, layers.values())
            forget_graphs()
        merged = {getattr(cell, attribute).name: value for cell, attribute, value in values}
        params = self._written()
        self._merged = {name: value_of(params[name]) for name in merged}
        self._write(merged)
        self._frame.reset()

    def _close(self):
        """Take the frame out, and let train again what trained before."""
        self._put(None)
        for name, param in model_parameters(self.network).items():
            param.requires_grad = self._flags.get(name, True)
        self.adapters, self._active, self._base = {}, None, {}
        self._rows.clear()
        return self.network

    def _base_values(self, plan):
        """path -> function that gives the base's own value, for all but modules that a plan trains as a whole."""
        left_out = {param.name for layer in plan.modules_to_save for param in layer.cell.get_parameters()}
        left_out.update(param.name for other in self.adapters.values() for param in other.frame.params.values())
        held = {**(self._merged or {}), **self._base}

        def read(param):
            return held[param.name] if param.name in held else value_of(param)

        named = self.network.parameters_and_names()
        return {path: functools.partial(read, param) for path, param in named if param.name not in left_out}

    def _tensors(self, name):
        """What stands in an adapter's file."""
        adapter = self.adapters[name]
        keys = state.file_keys(adapter.frame, adapter.plan, self.name_map)
        tensors = {key: adapter.values[own] for own, key in keys.items()}
        if adapter.plan.attentions:
            before = self._active
            self.set_adapter(name)
            tensors[state.PROMPT] = state.prefix_table(adapter.frame, adapter.values)
            self.set_adapter(before)
        return tensors


def _check_bare(network):
    """Refuse a network that has adapters already."""
    if not isinstance(network, nn.Cell):
        raise TypeError(f"'network' must be a Cell, but got {network!r} ({type(network).__name__}).")
    if any({"mindpet_delta", "prefix_source"} & set(cell._cells) for _, cell in network.cells_and_names()):
        raise ConfigError(
            f"the {type(network).__name__} has adapters already; use add_adapter() or load_adapter() of its PeftModel, "
            "or unload() it first."
        )


def _check_name(name, taken):
    """Refuse what cannot be an adapter's name: it becomes the name of a folder."""
    if not isinstance(name, str):
        raise TypeError(f"'adapter_name' must be a str, but got {name!r} ({type(name).__name__}).")
    if not re.fullmatch(r"\w[\w\-.]*", name) or name == BASE:
        raise AdapterError(f"'adapter_name' must be of letters, digits, '_', '-' and '.', but got {name!r}.")
    if name in taken:
        raise AdapterError(f"'adapter_name': there is an adapter {name!r} already.")


def get_peft_model(model, peft_config, adapter_name="default", autocast_adapter_dtype=True, name_map=None):
    """A network with a fresh adapter; see `PeftModel` for arguments and errors."""
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype, name_map)


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

"""The values and the configuration of an adapter in a network, as its files have them."""

import copy
import dataclasses
import re
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from mindpet.delta._config import PeftConfig, TargetConfig
from mindpet.delta.lora import APPROXIMATE_INITS
from mindpet.errors import CheckpointError
from mindpet.files.adapter import check_finite, check_tensors, take_base_layers
from mindpet.files.keys import copied_key, shared_key, target_paths
from mindpet.files.names import PREFIX, NameMap
from mindpet.network.match import ALL_LINEAR, ends_with, list_layers, listed
from mindpet.network.values import value_of
from mindpet.peft.plan import Plan
from mindpet.peft.slot import AdapterSlot
from mindpet.utils.hints import Arrays, PathLike


def file_keys(slot: AdapterSlot, names: NameMap) -> dict[str, str]:
    """Where an adapter's values stand in its file one by one, path of a Parameter -> key; see `whole_tensors`."""
    keys, plan = {}, slot.plan
    for target in plan.targets:
        cls, path = target.delta, names.to_torch(target.path)
        for name, param in slot.names[target.path].items():
            if name in cls.shared_names:
                keys[param] = shared_key(cls.shared_names[name])
            elif cls.file_names is None or name in cls.file_names:
                keys[param] = f"{target.config.key_start}{path}.{(cls.file_names or {}).get(name, name)}"
    targets = {target.path for target in plan.targets}
    copied = {layer.path for layer in plan.copied}
    for name, base in slot.copies.items():
        layer = next((path for path in copied if base.startswith(f"{path}.")), None)
        if layer is not None:
            keys[name] = copied_key(names.to_torch(layer), names.to_torch(base), plan.config)
            continue
        path, _, leaf = names.to_torch(base).rpartition(".")
        # Hugging Face PEFT keeps the layer itself inside of its own as `base_layer`.
        inner = f"{path}.base_layer" if base.rpartition(".")[0] in targets else path
        keys[name] = plan.config.key_start + ".".join(filter(None, (inner, leaf)))
    return keys


def tied_keys(slot: AdapterSlot, names: NameMap) -> dict[str, str]:
    """Where a file has values a second time, for layers that are tied to a target: key -> key of the target."""
    start, ties = slot.plan.config.key_start, {}
    for target in slot.plan.targets:
        for tied in target.tied:
            for file in (target.delta.file_names or {}).values():
                ties[f"{start}{names.to_torch(tied.path)}.{file}"] = f"{start}{names.to_torch(target.path)}.{file}"
    return ties


def whole_tensors(slot: AdapterSlot, values: Arrays) -> Arrays:
    """The tensors of a file that are of all layers together, by key.

    Args:
        slot: of the adapter.
        values: of its parameters, by path.
    """
    tensors = {}
    for cls, paths in _by_class(slot.plan).items():
        tensors.update(cls.to_file({path: slot.values_of(path, values) for path in paths}))
    return tensors


def _by_class(plan):
    """Delta class -> paths of the targets that have it."""
    paths = {}
    for target in plan.targets:
        paths.setdefault(target.delta, []).append(target.path)
    return paths


def load(folder: PathLike, tensors: Arrays, slot: AdapterSlot, names: NameMap, force: bool = False) -> Arrays:
    """The values of an adapter's parameters by path, from its file.

    Args:
        folder: of the adapter, for the message.
        tensors: what is in its file, by key.
        slot: of the adapter.
        names: to the names in the file.
        force: whether NaN and infinite numbers are let through. Default: False.

    Raises:
        CheckpointError: see `check_tensors`; a tensor has NaN or infinite numbers, or gets them in the type of the
            network's parameter.
    """
    plan, keys = slot.plan, file_keys(slot, names)
    # For the shapes alone: zeros that take no memory, where a trained head may be large.
    blank = {path: np.broadcast_to(np.float32(0), param.shape) for path, param in slot.params.items()}
    whole = whole_tensors(slot, blank)
    wanted = {key: blank[path].shape for path, key in keys.items()}
    wanted.update({key: value.shape for key, value in whole.items()})
    layers = [target for target in plan.targets if target.is_layer]
    weights = {names.to_torch(target.path): target.kind.weight_of(target.cell) for target in layers}
    take_base_layers(folder, tensors, weights)
    check_tensors(folder, tensors, wanted)
    values = {path: tensors[key] for path, key in keys.items()}
    for cls, paths in _by_class(plan).items() if whole else ():
        for path, parts in cls.from_file(tensors, paths).items():
            values.update({slot.names[path][name]: value for name, value in parts.items()})
    if not set(slot.trained) <= set(values):
        raise CheckpointError(f"{folder}: holds what the adapter's projection computes, and not the projection.")
    if not force:
        check_finite(folder, values, {name: ms.dtype_to_nptype(slot.params[name].dtype) for name in slot.copies})
    return values


def refuse_slices(network: nn.Cell) -> None:
    """Refuse to save parameters that are cut over ranks.

    Raises:
        CheckpointError: some are.
    """
    cut = [param.name for param in network.get_parameters() if param.sliced]
    if cut:
        raise CheckpointError(
            f"save_pretrained: {len(cut)} parameters are slices of this rank, {cut[0]} among them. Save with "
            "TrainableParamsCheckPoint, put the slices together with gather_delta, and use `mindpet convert`."
        )


def auto_mapping(network: nn.Cell) -> Optional[dict[str, str]]:
    """Where the network's class is found, if it has `from_pretrained`; see `AutoPeftModel`."""
    cls = type(network)
    if not hasattr(cls, "from_pretrained"):
        return None
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def to_network(config: PeftConfig, tensors: Arrays, network: nn.Cell, names: NameMap) -> PeftConfig:
    """A configuration in a file with the names of the network.

    Args:
        config: names layers as the PyTorch model does.
        tensors: what is in its file, by key: it tells the layers.
        network: the network, without deltas.
        names: between the names.
    """
    layers, config = list_layers(network), copy.copy(config)
    theirs = {layer.path: names.to_torch(layer.path) for layer in layers}
    paths = {theirs[layer.path]: layer.paths for layer in layers}
    parts = []
    for part in config.parts:
        if isinstance(part, TargetConfig) and names != NameMap():
            pairs = [(path, ours) for path in target_paths(tensors, part) for ours in paths.get(path, ())]
            part = part.with_targets(pairs, [path for layer in layers for path in layer.paths])
        parts.append(part)
    config, modules = config.with_parts(parts), []
    for entry in listed(config.modules_to_save):
        # Hugging Face PEFT looks at the end of a name, also inside of a part of it.
        inside = [path for path, name in theirs.items() if name.endswith(entry) and _has_module(tensors, name)]
        usual = [layer.path for layer in layers if any(ends_with(path, entry) for path in layer.paths)]
        modules += [entry] if not inside or inside == usual else inside
    config.modules_to_save = modules or None
    return config


def portable(
    tensors: Arrays, config: PeftConfig, plan: Plan, network: nn.Cell, names: NameMap
) -> tuple[Arrays, PeftConfig]:
    """What is written to a file, so that Hugging Face PEFT finds the same layers and all of their tensors.

    Args:
        tensors: of the adapter, by key.
        config: of the adapter, after `NameMap.split`.
        plan: of the adapter.
        network: the base network.
        names: to the names of the PyTorch model.
    """
    config, layers = copy.copy(config), list_layers(network)
    is_renamed = names != NameMap()
    # A delta in the network is no module of the PyTorch model.
    places = [(path, layer.cell) for layer in layers for path in layer.paths if "mindpet" not in path]
    known = {names.to_torch(place[0]): place for place in places}
    targets = {
        names.to_torch(target.path): [(target.path, names.to_torch(path)) for path in target.paths]
        for target in (*plan.targets, *plan.copied)
    }
    parts = []
    for part in config.parts:
        fields = ("layers_to_transform", *part.not_in_peft) if isinstance(part, TargetConfig) else ()
        chosen = any(getattr(part, name) is not None for name in fields)
        if fields and (is_renamed or part.target_modules == ALL_LINEAR or chosen):
            pairs = [pair for path in target_paths(tensors, part) for pair in targets.get(path, [(path, path)])]
            part = part.with_targets(pairs, known)
        if re.fullmatch(APPROXIMATE_INITS, str(getattr(part, "init_lora_weights", None))):
            part = dataclasses.replace(part, init_lora_weights="pissa")
        parts.append(part)
    config = config.with_parts(parts)
    meant = {names.to_torch(path) for layer in plan.modules_to_save for path in layer.paths}
    entries, heads = listed(config.modules_to_save), config.task_heads
    if is_renamed or _at_end([*entries, *heads], known) != meant:
        entries = sorted(meant)
    config.modules_to_save = entries or None
    start = config.key_start
    surplus = {  # that Hugging Face PEFT takes for meant too, and needs the tensors of
        f"{start}{names.to_torch(f'{path}.{name}')}": value_of(param)
        for path, cell in (known[path] for path in sorted(_at_end([*entries, *heads], known) - meant))
        for name, param in cell.parameters_and_names()
        if "mindpet" not in name
    }
    tensors = {**surplus, **tensors}
    # A BatchNorm of PyTorch counts its batches, which only an average over all of them needs.
    norms = [key[: -len("running_var")] for key in tensors if key.endswith(".running_var")]
    return {**{f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}, **tensors}, config


def _at_end(entries, known):
    """The modules whose names end like one of the entries, as Hugging Face PEFT looks for them."""
    return {path for path in known if path.endswith(tuple(entries))}


def _has_module(tensors, name):
    """Whether a file has tensors of a module as it is."""
    return any(key.startswith((f"{PREFIX}{name}.", f"base_model.{name}.")) for key in tensors)

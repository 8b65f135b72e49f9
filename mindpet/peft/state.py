"""The files of an adapter: tensors and configuration as Hugging Face PEFT has them, and a passport of the base."""

import dataclasses
import pathlib
import re

import mindspore as ms
import numpy as np

from mindpet.errors import CheckpointError
from mindpet.layers.kinds import layer_kind
from mindpet.peft.config import CONFIG_NAME
from mindpet.peft.match import listed
from mindpet.peft.names import PREFIX, key_start
from mindpet.peft.passport import PASSPORT_NAME, WEIGHTS_NAME, fingerprint, write_passport
from mindpet.utils.files import together
from mindpet.utils.tensors import TensorFile, save_tensors

FILES = (WEIGHTS_NAME, "adapter_model.bin", PASSPORT_NAME, CONFIG_NAME)  # names that a folder of 'default' has
PROMPT = "prompt_embeddings"
DOUBLES = re.compile(r"\.((modules_to_save|original_module)\.bias|num_batches_tracked)$")


def file_keys(frame, plan, names):
    """Where an adapter's values stand in its file: name of the Parameter -> key; prefixes are apart, see PROMPT."""
    keys = {}
    start = key_start(plan)
    for layer in plan.targets:
        delta = frame.deltas[layer.path]
        inside = getattr(delta, "file_names", None)
        for name in frame.names[layer.path]:
            local = name[len(layer.path) + 1 :]
            if inside is None or local in inside:
                keys[name] = f"{start}{names.to_torch(layer.path)}.{(inside or {}).get(local, local)}"
    targets = {layer.path for layer in plan.targets}
    for name, base in frame.copies.items():
        path, _, leaf = names.to_torch(base).rpartition(".")
        # Hugging Face PEFT keeps the layer itself inside of its own as `base_layer`.
        inner = f"{path}.base_layer" if base.rpartition(".")[0] in targets else path
        keys[name] = start + ".".join(filter(None, (inner, leaf)))
    return keys


def prefix_table(frame, values):
    """The keys and values of all layers as one table `(tokens, layers * 2 * width)`.

    Layer i has its keys in slot 2i and its values in slot 2i + 1.

    Args:
        frame (Frame): of no adapter; it computes the table.
        values (dict): path -> numpy.ndarray, of its parameters.
    """
    parts = []
    frame.fill(None, values, is_new=True)
    for path, delta in frame.deltas.items():
        plain = f"{path}.mindpet_delta_ptuning2_embedding.embedding_table"
        if plain in values and len(frame.names[path]) == 2:  # nothing is computed: bit for bit
            parts.append(values[plain])
            continue
        key, value = (part.asnumpy()[0].swapaxes(0, 1) for part in delta.past(1, ms.float32))
        parts += [key.reshape(key.shape[0], -1), value.reshape(value.shape[0], -1)]
    return np.concatenate(parts, 1)


def split_table(frame, table):
    """The values of a frame without projection from the table of all layers."""
    parts = np.split(table, len(frame.deltas), 1)
    return {
        f"{path}.mindpet_delta_ptuning2_embedding.embedding_table": np.ascontiguousarray(part)
        for path, part in zip(frame.deltas, parts)
    }


def save_adapter(folder, config, tensors, passport):
    """Write an adapter's three files: a reader finds all of this save, or all of the one before.

    Args:
        folder (str): of the adapter.
        config (PeftConfig): its configuration.
        tensors (dict): key -> numpy.ndarray.
        passport (dict): see `mindpet.peft.passport`.
    """
    with together(folder, (PASSPORT_NAME, CONFIG_NAME, WEIGHTS_NAME)) as staged:
        save_tensors(staged / WEIGHTS_NAME, tensors)
        (staged / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
        write_passport(staged, folder, passport)


def read_tensors(folder):
    """The tensors of an adapter's folder.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds nothing.
    """
    folder = pathlib.Path(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{folder}: only adapter_model.bin, a pickle of PyTorch; save it again with safetensors, which is the "
                "default of Hugging Face PEFT since 0.6."
            )
        raise FileNotFoundError(f"{folder}: no {WEIGHTS_NAME} in this folder.")
    tensors = TensorFile(folder / WEIGHTS_NAME).read_all()
    if not tensors:
        raise CheckpointError(f"{folder / WEIGHTS_NAME}: holds no tensors.")
    return without_doubles(tensors)


def without_doubles(tensors):
    """The tensors of a file without those that say nothing more.

    With `bias="all"` Hugging Face PEFT has the biases of modules_to_save three times, two of them under names of its
    own; PyTorch's BatchNorms count their batches.
    """
    return {name: value for name, value in tensors.items() if not DOUBLES.search(name)}


def has_statistics(tensors, config):
    """Whether a file has running statistics of BatchNorms other than those in modules that are saved as a whole."""
    modules = listed(config.modules_to_save)
    paths = [f".{key.rpartition('.')[0]}." for key in tensors if key.endswith((".running_mean", ".moving_mean"))]
    return any(not any(f".{module}." in path for module in modules) for path in paths)


def load(folder, found, frame, names, force=False):
    """The values of an adapter's parameters from its file.

    Args:
        folder (str): of the adapter, for the message.
        found (dict): key -> numpy.ndarray, what is in its file.
        frame (Frame): of the adapter.
        names (NameMap): to the names in the file.
        force (bool): whether NaN and infinite numbers are let through. Default: False.

    Returns:
        dict of name -> numpy.ndarray.

    Raises:
        CheckpointError: see `check_tensors`; a tensor has NaN or infinite numbers, or gets them in the type of the
            network's parameter.
    """
    plan = frame.plan
    keys = file_keys(frame, plan, names)
    shapes = {name: param.shape for name, param in frame.params.items()}
    wanted = {key: shapes[name] for name, key in keys.items()}
    if plan.attentions:
        config = plan.config
        wanted[PROMPT] = (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)
    kinds = {layer.path: layer_kind(layer.cell) for layer in plan.targets}
    weights = {names.to_torch(layer.path): kinds[layer.path].weight_of(layer.cell) for layer in plan.targets}
    take_base_layers(folder, found, weights)
    check_tensors(folder, found, wanted)
    table = split_table(frame, found[PROMPT]) if plan.attentions else {}
    values = {**{name: found[key] for name, key in keys.items()}, **table}
    if not force:
        check_finite(folder, values, {name: ms.dtype_to_nptype(frame.params[name].dtype) for name in frame.copies})
    return values


def check_finite(folder, values, types):
    """Refuse what is not finite, in the type of the file or in that of the base's own parameter.

    Args:
        folder (str): for the message.
        values (dict): name -> numpy.ndarray.
        types (dict): name -> NumPy type of the parameter of the base that takes the value.

    Raises:
        CheckpointError: some are not finite; all are in the message.
    """
    problems = []
    for name, value in values.items():
        with np.errstate(over="ignore"):
            own = value.astype(types.get(name, value.dtype))
        if not np.isfinite(own.astype(np.float32)).all():
            problems.append(f"{name} as {own.dtype.name}")
    if problems:
        raise CheckpointError(
            f"{folder}: NaN or infinite numbers (with force they are used all the same):\n  " + "\n  ".join(problems)
        )


def take_base_layers(folder, found, weights):
    """Take out of `found` weights of the base, which Hugging Face PEFT saves with deltas of embeddings.

    Args:
        folder (str): for the message.
        found (dict): key -> numpy.ndarray.
        weights (dict): path of a layer in the PyTorch model -> its weight, a Parameter or numpy.ndarray.

    Raises:
        CheckpointError: they are not those of this base.
    """
    for path, weight in weights.items():
        theirs = found.pop(f"{PREFIX}{path}.base_layer.weight", None)
        if theirs is not None and (theirs.shape != weight.shape or fingerprint(theirs) != fingerprint(weight)):
            raise CheckpointError(
                f"{folder}: trained on another base: the weight {list(weight.shape)} of {path} is not the same."
            )


def without_projection(config):
    """A configuration of prefixes that are not computed; others as they are."""
    return with_projection(config, None) if hasattr(config, "prefix_projection") else config


def with_projection(config, like):
    """A configuration of prefixes that says of its projection what `like` says; others as they are."""
    if not hasattr(config, "prefix_projection"):
        return config
    return dataclasses.replace(config, prefix_projection=bool(like and like.prefix_projection))


def check_tensors(folder, found, wanted, what="the network, which is unchanged"):
    """Refuse tensors that do not fit.

    Args:
        folder (str): for the message.
        found (dict): key -> numpy.ndarray.
        wanted (dict): key -> shape.
        what (str): what they must fit, for the message. Default: 'the network, which is unchanged'.

    Raises:
        CheckpointError: tensors are missing, surplus, or of the wrong shape or type; all are in the message.
    """
    problems = [f"missing: {key} {list(shape)}" for key, shape in wanted.items() if key not in found]
    problems += [f"surplus: {key} {list(found[key].shape)}" for key in found if key not in wanted]
    for key, shape in wanted.items():
        value = found.get(key)
        if value is not None and value.shape != tuple(shape):
            problems.append(f"{key}: {list(shape)} is needed, but it is {list(value.shape)}")
        elif value is not None and value.dtype.kind in "iubc":
            problems.append(f"{key}: must hold floating-point numbers, but is {value.dtype.name}")
    if problems:
        raise CheckpointError(f"{folder}: the adapter does not fit {what}:\n  " + "\n  ".join(problems))


def folder_of(directory, adapter_name):
    """The folder of an adapter in a directory of several: 'default' is in the directory itself."""
    return pathlib.Path(directory) / ("" if adapter_name == "default" else adapter_name)


def is_adapter(folder):
    """Whether a folder has the configuration of an adapter."""
    return (pathlib.Path(folder) / CONFIG_NAME).is_file()


def refuse_slices(network):
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


def auto_mapping(network):
    """Where the network's class is found, if it has `from_pretrained`; see `AutoPeftModel`."""
    cls = type(network)
    if not hasattr(cls, "from_pretrained"):
        return None
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}

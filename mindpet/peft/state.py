"""The files of an adapter: tensors and configuration as Hugging Face PEFT has them, and a passport of the base."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

import mindpet
from mindpet.errors import CheckpointError
from mindpet.layers.kinds import layer_kind
from mindpet.peft.config import CONFIG_NAME
from mindpet.utils.files import atomic
from mindpet.utils.tensors import TensorFile, save_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
PASSPORT_NAME = "mindpet_passport.json"
FILES = (WEIGHTS_NAME, "adapter_model.bin", PASSPORT_NAME, CONFIG_NAME)  # names that a folder of 'default' has
PREFIX = "base_model.model."
PROMPT = "prompt_embeddings"
DOUBLES = re.compile(r"\.((modules_to_save|original_module)\.bias|num_batches_tracked)$")
SAMPLES = 64


def file_keys(frame, plan, names):
    """Where an adapter's values stand in its file: name of the Parameter -> key; prefixes are apart, see PROMPT."""
    keys = {}
    start = "base_model." if plan.attentions else PREFIX
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
    """Write an adapter's three files: all are whole on the disk before the first takes its name, the tensors last."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        names = (WEIGHTS_NAME, PASSPORT_NAME, CONFIG_NAME)
        weights, notes, fields = (pathlib.Path(stack.enter_context(atomic(folder / name))) for name in names)
        save_tensors(weights, tensors)
        notes.write_text(json.dumps(passport, indent=1), encoding="utf-8")
        fields.write_text(config.to_json(), encoding="utf-8")


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


def has_statistics(tensors):
    """Whether a file has running statistics of BatchNorms."""
    return any(name.endswith((".running_mean", ".moving_mean")) for name in tensors)


def make_passport(base, network, step):
    """What is written beside an adapter: for which base it was trained, with what, and how long."""
    return {
        "mindpet": mindpet.__version__,
        "mindspore": ms.__version__,
        "step": step,
        "base": {
            "network": type(network).__name__,
            "parameters": {path: fingerprint(value) for path, value in base.items()},
        },
    }


def fingerprint(value):
    """Shape, type and a hash of up to 64 evenly spaced values, compared in float32.

    Args:
        value (Union[numpy.ndarray, Parameter]): of a Parameter only the samples leave the device.
    """
    if isinstance(value, Parameter):
        dtype = np.dtype(ms.dtype_to_nptype(value.dtype)).name
        flat = value.asnumpy().reshape(-1) if _is_on_host(value) else ops.reshape(value, (-1,))
    else:
        dtype, flat = value.dtype.name, value.reshape(-1)
    places = np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(np.int64)
    if isinstance(flat, Tensor):
        flat = ops.gather(flat, Tensor(places), 0).asnumpy()
    elif flat.size:
        flat = flat[places]
    content = np.ascontiguousarray(flat.astype(np.float32)).tobytes()
    return f"{list(value.shape)} {dtype} {hashlib.sha256(content).hexdigest()[:16]}"


def _is_on_host(param):
    """Whether a Parameter's value is read without a copy from a device, or cannot be gathered there."""
    return param.size == 0 or ms.get_context("device_target") == "CPU"


def read_passport(folder):
    """The passport of an adapter's folder; an empty dict if there is none."""
    path = pathlib.Path(folder) / PASSPORT_NAME
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a JSON object: {error}") from error


def check_passport(folder, base):
    """Refuse an adapter that was trained on another base; one without a passport is taken to fit.

    Args:
        folder (str): of the adapter.
        base (dict): path -> Parameter, or numpy.ndarray, with the base's own value.

    Raises:
        CheckpointError: the base differs; the parameters are in the message.
    """
    expected = read_passport(folder).get("base", {}).get("parameters", {})
    problems = []
    for name, print_there in expected.items():
        here = fingerprint(base[name]) if name in base else None
        if here is None:
            problems.append(f"{name}: not in this network")
        elif here != print_there:
            same_shape = here.rpartition(" ")[0] == print_there.rpartition(" ")[0]
            what = "other values" if same_shape else f"{print_there.rpartition(' ')[0]}, here {here.rpartition(' ')[0]}"
            problems.append(f"{name}: {what}")
    if problems:
        raise CheckpointError(
            f"{folder}: trained on another base, whose parameters differ (force=True loads it all the same):\n  "
            + "\n  ".join(problems)
        )


def load(folder, found, frame, names):
    """The values of an adapter's parameters from its file.

    Args:
        folder (str): of the adapter, for the message.
        found (dict): key -> numpy.ndarray, what is in its file.
        frame (Frame): of the adapter.
        names (NameMap): to the names in the file.

    Returns:
        dict of name -> numpy.ndarray.

    Raises:
        CheckpointError: see `check_tensors`.
    """
    plan = frame.plan
    keys = file_keys(frame, plan, names)
    shapes = {name: param.shape for name, param in frame.params.items()}
    wanted = {key: shapes[name] for name, key in keys.items()}
    if plan.attentions:
        config = plan.config
        wanted[PROMPT] = (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)
    _check_base_layers(folder, found, plan, names)
    check_tensors(folder, found, wanted)
    table = split_table(frame, found[PROMPT]) if plan.attentions else {}
    return {**{name: found[key] for name, key in keys.items()}, **table}


def _check_base_layers(folder, found, plan, names):
    """Take out of `found` weights of the base, which Hugging Face PEFT saves with deltas of embeddings.

    Raises:
        CheckpointError: they are not those of this base.
    """
    for layer in plan.targets:
        theirs = found.pop(f"{PREFIX}{names.to_torch(layer.path)}.base_layer.weight", None)
        weight = layer_kind(layer.cell).weight_of(layer.cell)
        if theirs is not None and (theirs.shape != weight.shape or fingerprint(theirs) != fingerprint(weight)):
            raise CheckpointError(
                f"{folder}: trained on another base: {weight.name} {list(weight.shape)} is not the same."
            )


def without_projection(config):
    """A configuration of prefixes that are not computed; others as they are."""
    return with_projection(config, None) if hasattr(config, "prefix_projection") else config


def with_projection(config, like):
    """A configuration of prefixes that says of its projection what `like` says; others as they are."""
    if not hasattr(config, "prefix_projection"):
        return config
    return dataclasses.replace(config, prefix_projection=bool(like and like.prefix_projection))


def check_tensors(folder, found, wanted):
    """Refuse tensors that do not fit.

    Args:
        folder (str): for the message.
        found (dict): key -> numpy.ndarray.
        wanted (dict): key -> shape.

    Raises:
        CheckpointError: tensors are missing, surplus, or of the wrong shape or type; all are in the message.
    """
    problems = [f"missing: {key} {list(shape)}" for key, shape in wanted.items() if key not in found]
    problems += [f"surplus: {key} {list(found[key].shape)}" for key in found if key not in wanted]
    for key, shape in wanted.items():
        value = found.get(key)
        if value is not None and value.shape != tuple(shape):
            problems.append(f"{key}: {list(shape)} is needed, but it is {list(value.shape)}")
        elif value is not None and value.dtype.kind in "iub":
            problems.append(f"{key}: must hold floating-point numbers, but is {value.dtype.name}")
    if problems:
        raise CheckpointError(
            f"{folder}: the adapter does not fit the network, which is unchanged:\n  " + "\n  ".join(problems)
        )


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

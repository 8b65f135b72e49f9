"""Files of adapters without a network: reading, converting, inspecting."""

import json
import os
import pathlib
import re
import tempfile

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindpet.delta.lora_layer import LoraEmbedding, LoraLayer
from mindpet.delta.registry import METHODS
from mindpet.errors import CheckpointError, ConfigError
from mindpet.graph.parameters import TRAINED, matches
from mindpet.peft.config import APPROXIMATE_INITS, CONFIG_NAME, LoraConfig, PeftConfig, get_peft_config
from mindpet.peft.match import exact_targets, exactly
from mindpet.peft.names import EMBEDDING, PREFIX, NameMap, target_paths
from mindpet.peft.passport import WEIGHTS_NAME, read_passport
from mindpet.peft.plan import is_from_weight
from mindpet.peft.state import PROMPT, is_adapter, read_tensors, save_adapter
from mindpet.utils.tensors import TensorFile, save_tensors

# Name in a file of Hugging Face PEFT -> name of the Parameter beside a layer.
LORA_NAMES = {file: own for cls in (LoraLayer, LoraEmbedding) for own, file in cls.file_names.items()}
LORA_KEY = re.compile(rf"(?P<path>.+)\.(?P<name>{'|'.join(map(re.escape, LORA_NAMES))})")
DELTA_KEY = re.compile(r"(?P<path>.+)\.(?P<name>mindpet_delta_lora_(a|b|A|B|bias|magnitude))")
TABLE = "mindpet_delta_ptuning2_embedding.embedding_table"
# An embedding of prefixes -> the two Dense layers behind it, which P-Tuning v2 may do without.
PROJECTIONS = {
    TABLE: ("mindpet_delta_ptuning2_dense_in", "mindpet_delta_ptuning2_dense_out"),
    "mindpet_delta_prefixtuning_wte.embedding_table": tuple(
        f"mindpet_delta_prefixtuning_control_trans.{number}" for number in (0, 2)
    ),
}
CONSTANTS = [pattern for method in METHODS.values() for pattern in method.constants]


def read_delta(path):
    """The tensors of a file of MindSpore, by their names.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or neither .ckpt nor .safetensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix == ".safetensors":
        return TensorFile(path).read_all()
    if path.suffix != ".ckpt":
        raise CheckpointError(f"{path}: must end in .ckpt or .safetensors.")
    try:
        content = ms.load_checkpoint(str(path))
    except Exception as error:  # MindSpore and protobuf each raise their own for a damaged file
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return {name: param.asnumpy() for name, param in content.items() if isinstance(param, Tensor)}


def write_delta(path, tensors):
    """Write a file of MindSpore as a whole; its ending says which."""
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        save_tensors(path, tensors)
        return
    if path.suffix != ".ckpt":
        raise CheckpointError(f"{path}: must end in .ckpt or .safetensors.")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".incomplete-") as folder:
        staged = os.path.join(folder, path.name)
        ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in tensors.items()], staged)
        os.replace(staged, path)


def read_adapter(path, config=None, names=None):
    """An adapter from a folder of Hugging Face PEFT or mindpet, or from a delta file of mindpet.

    Args:
        path (str): the folder or the file.
        config (PeftConfig): of a delta file, which does not hold its own. Default: None.
        names (NameMap): from the names in a delta file to those of the PyTorch model. Default: None.

    Returns:
        tuple: configuration, and dict of key -> numpy.ndarray as in a file of Hugging Face PEFT.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: it cannot be read; a delta file comes without `config`.
    """
    if os.path.isdir(path):
        config = PeftConfig.from_pretrained(path)
        config.check_supported(from_file=True)
        return config, read_tensors(path)
    tensors = read_delta(path)
    if config is None:
        raise ConfigError(f"{path}: a delta file does not hold its configuration (lora_alpha, ...); give --config.")
    return from_delta(tensors, config, names or NameMap())


def from_delta(tensors, config, names):
    """What `read_adapter` returns, from the tensors of a delta file; rank and targets are found in them.

    Raises:
        CheckpointError: a prefix lacks a part of what it is computed from.
        ConfigError: `config` does not say what Hugging Face PEFT needs, or does not fit the tensors.
    """
    tensors = _known_names(tensors)
    if config.is_prompt_learning:
        heads = {
            f"base_model.{names.to_torch(name)}": value for name, value in tensors.items() if "mindpet" not in name
        }
        return config, {PROMPT: _prefixes(tensors, config), **heads}
    if not isinstance(config, LoraConfig):
        return config, {PREFIX + names.to_torch(name): value for name, value in tensors.items()}
    deltas = {name: DELTA_KEY.fullmatch(name) for name in tensors}
    targets = {names.to_torch(match["path"]) for match in deltas.values() if match}
    found, ranks = {}, {}
    for name, value in tensors.items():
        match = deltas[name]
        if match is None:
            path, _, leaf = names.to_torch(name).rpartition(".")
            # Hugging Face PEFT keeps the layer itself inside of its own as `base_layer`.
            found[PREFIX + ".".join(filter(None, (path, "base_layer" if path in targets else "", leaf)))] = value
            continue
        path = names.to_torch(match["path"])
        cls = LoraLayer if EMBEDDING.search(path) is None else LoraEmbedding
        found[f"{PREFIX}{path}.{cls.file_names[match['name'].lower()]}"] = value
        if match["name"].lower().endswith("_a"):
            ranks[path] = len(value)
    config.r = max(ranks.values(), key=list(ranks.values()).count) if ranks else config.r
    others = {exactly(path): rank for path, rank in ranks.items() if rank != config.r}
    config.rank_pattern = {**others, **config.rank_pattern}
    found, config = names.split(_without_start(found, config), config)
    config.target_modules = config.target_modules or exact_targets(target_paths(found))
    return config, found


def _known_names(tensors):
    """Tensors by their names of today, without constants; what an adapter trains of the base as the base calls it."""
    named = {name.replace("tk_delta", "mindpet_delta"): value for name, value in tensors.items()}
    named = {name: value for name, value in named.items() if not matches(name, CONSTANTS)}
    base = {name: value for name, value in named.items() if TRAINED not in name}
    return {**base, **{name.replace(TRAINED, ""): value for name, value in named.items() if TRAINED in name}}


def _without_start(tensors, config):
    """Tensors without what PiSSA and OLoRA took off the base, which the configuration must tell then."""
    start = [name for name in tensors if "mindpet_lora_start_" in name]
    if start and not is_from_weight(config):
        raise ConfigError(
            f"{start[0]} is a part of the base that the adapter starts from: 'init_lora_weights' must say how, 'pissa' "
            f"or 'olora', but is {config.init_lora_weights!r}."
        )
    if re.fullmatch(APPROXIMATE_INITS, str(config.init_lora_weights)):
        config.init_lora_weights = "pissa"  # it was computed exactly
    return {name: value for name, value in tensors.items() if name not in start}


def _prefixes(tensors, config):
    """The keys and values of all layers as one table, as in `state.prefix_table`."""
    tables = [name for name in tensors if name.endswith(tuple(PROJECTIONS))]
    if not tables:
        raise CheckpointError(f"no prefix in the file; there are {sorted(tensors)}.")
    order = sorted(tables, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])
    table = np.concatenate([_prefix(tensors, name) for name in order], 1)
    sizes = ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads")
    tokens, layers, width, heads = (getattr(config, name) for name in sizes)
    if None in (tokens, layers, width, heads) or table.shape != (tokens, layers * 2 * width):
        given = {name: getattr(config, name) for name in sizes}
        raise ConfigError(
            f"the prefixes are {list(table.shape)}: the configuration must say (num_virtual_tokens, num_layers * 2 * "
            f"token_dim) of it, and num_attention_heads, but has {given}."
        )
    return table


def _prefix(tensors, name):
    """What is computed from an embedding: `W_2 tanh(W_1 E + b_1) + b_2`, or itself."""
    end = next(end for end in PROJECTIONS if name.endswith(end))
    parts = [f"{name[: -len(end)]}{dense}.{leaf}" for dense in PROJECTIONS[end] for leaf in ("weight", "bias")]
    lacking = [part for part in parts if part not in tensors]
    if end == TABLE and len(lacking) == len(parts):
        return tensors[name]
    if lacking:
        raise CheckpointError(f"{name} is projected, but the file lacks {lacking}.")
    weight_in, bias_in, weight_out, bias_out = (tensors[part].astype(np.float32) for part in parts)
    inner = np.tanh(tensors[name].astype(np.float32) @ weight_in.T + bias_in)
    return inner @ weight_out.T + bias_out


def to_delta(tensors, names, prefix_path="prefix_encoder"):
    """The tensors of a delta file of mindpet, from those of a file of Hugging Face PEFT.

    Args:
        tensors (dict): key -> numpy.ndarray.
        names (NameMap): between the network's names and those of the PyTorch model.
        prefix_path (str): where the network has its PrefixEncoder. Default: 'prefix_encoder'.

    Returns:
        dict of name -> numpy.ndarray.
    """
    result = {}
    for key, value in tensors.items():
        match = LORA_KEY.fullmatch(key)
        if key == PROMPT:
            result[f"{prefix_path}.{TABLE}"] = value
        elif match is not None:
            path = names.to_mindspore(match["path"][len(PREFIX) :])
            result[f"{path}.{LORA_NAMES[match['name']]}"] = value
        else:
            plain = re.sub(r"^base_model\.(model\.)?", "", key).replace(".base_layer.", ".")
            result[names.to_mindspore(plain)] = value
    return result


def convert(source, target, config=None, name_map=None, prefix_path="prefix_encoder"):
    """A folder of Hugging Face PEFT or mindpet into a delta file of mindpet, or a delta file into such a folder.

    Args:
        source (str): folder or file.
        target (str): a file that ends in .ckpt or .safetensors, or a folder.
        config (PeftConfig): of a delta file, which does not hold its own. Default: None.
        name_map (NameMap): between the network's names and those of the PyTorch model. Default: None, see `NameMap`.
        prefix_path (str): where the network has its PrefixEncoder. Default: 'prefix_encoder'.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: the source cannot be read.
    """
    names = name_map or NameMap()
    config, tensors = read_adapter(source, config, names)
    if pathlib.Path(target).suffix in (".ckpt", ".safetensors"):
        tensors, _ = names.fuse(tensors, config)
        write_delta(target, to_delta(tensors, names, prefix_path))
    else:
        config.inference_mode = True
        save_adapter(target, config, tensors, {})


def inspect(path):
    """What is in a folder or file of an adapter, and for which base, as text.

    Args:
        path (str): folder of an adapter, or a .ckpt or .safetensors file.

    Returns:
        str.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: it cannot be read.
    """
    lines, passport = [], {}
    if os.path.isdir(path):
        if not is_adapter(path):
            raise FileNotFoundError(f"{path}: no {CONFIG_NAME} in this folder.")
        config = PeftConfig.from_pretrained(path)
        passport = read_passport(path)
        content = {name: value for name, value in config.to_dict().items() if value not in (None, {}, [], False)}
        lines += [f"{name}: {value}" for name, value in sorted(content.items())]
        file = pathlib.Path(path) / WEIGHTS_NAME
        tensors = read_tensors(path)
    else:
        file = pathlib.Path(path)
        tensors = read_delta(path)
    if passport:
        base = passport.get("base", {})
        lines.append(
            f"made by mindpet {passport.get('mindpet')}, MindSpore {passport.get('mindspore')}, "
            f"step {passport.get('step')}, for a {base.get('network')} of {len(base.get('parameters', {}))} parameters"
        )
    width = max(len(name) for name in tensors)
    lines += [f"{name:<{width}}  {value.dtype.name:<8}  {list(value.shape)}" for name, value in tensors.items()]
    numbers = sum(value.size for value in tensors.values())
    lines.append(f"{len(tensors)} tensors, {numbers:,} numbers, {file.stat().st_size:,} bytes")
    return "\n".join(lines)


def load_config(path):
    """The configuration in a JSON file, which must say at least `peft_type`."""
    try:
        return get_peft_config(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error

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
from mindpet.errors import CheckpointError, ConfigError
from mindpet.peft.config import CONFIG_NAME, LoraConfig, PeftConfig, get_peft_config
from mindpet.peft.names import EMBEDDING, NameMap, target_paths
from mindpet.peft.state import PREFIX, PROMPT, WEIGHTS_NAME, is_adapter, read_passport, read_tensors, save_adapter
from mindpet.utils.tensors import TensorFile, save_tensors

# Name in a file of Hugging Face PEFT -> name of the Parameter beside a layer.
LORA_NAMES = {file: own for cls in (LoraLayer, LoraEmbedding) for own, file in cls.file_names.items()}
LORA_KEY = re.compile(rf"(?P<path>.+)\.(?P<name>{'|'.join(map(re.escape, LORA_NAMES))})")
DELTA_KEY = re.compile(r"(?P<path>.+)\.(?P<name>mindpet_delta_lora_(a|b|A|B|bias|magnitude))")
TABLE = "mindpet_delta_ptuning2_embedding.embedding_table"


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
        config.check_supported()
        return config, read_tensors(path)
    tensors = read_delta(path)
    if config is None:
        raise ConfigError(f"{path}: a delta file does not hold its configuration (lora_alpha, ...); give --config.")
    return from_delta(tensors, config, names or NameMap())


def from_delta(tensors, config, names):
    """What `read_adapter` returns, from the tensors of a delta file; rank and targets are found in them."""
    tables = [name for name in tensors if name.endswith(TABLE)]
    if tables:
        order = sorted(tables, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])
        heads = {
            f"base_model.{names.to_torch(name)}": value for name, value in tensors.items() if "mindpet" not in name
        }
        return config, {PROMPT: np.concatenate([tensors[name] for name in order], 1), **heads}
    found, ranks = {}, {}
    for name, value in tensors.items():
        match = DELTA_KEY.fullmatch(name.replace("tk_delta", "mindpet_delta"))
        path = names.to_torch(match["path"] if match else name)
        if match is not None:
            cls = LoraLayer if EMBEDDING.search(path) is None else LoraEmbedding
            found[f"{PREFIX}{path}.{cls.file_names[match['name'].lower()]}"] = value
        elif not name.endswith("mindpet_lora_scaling"):
            found[PREFIX + path] = value
        if match is not None and match["name"].lower().endswith("_a"):
            ranks[path] = len(value)
    if not isinstance(config, LoraConfig):
        return config, found
    config.r = max(ranks.values(), key=list(ranks.values()).count) if ranks else config.r
    config.rank_pattern.update({re.escape(path): rank for path, rank in ranks.items() if rank != config.r})
    found, config = names.split(found, config)
    config.target_modules = config.target_modules or sorted(target_paths(found))
    return config, found


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
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error

"""Files of adapters without a network: reading, converting, inspecting."""

import collections
import math
import os
import pathlib
import re
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindpet.delta._base import PROMPT, Delta
from mindpet.delta._config import CONFIG_NAME, PeftConfig, get_peft_config
from mindpet.delta.lora import LoraConfig
from mindpet.delta.registry import METHODS, method_of
from mindpet.errors import CheckpointError, ConfigError
from mindpet.files.adapter import check_finite, check_tensors, is_adapter, read_tensors, save_adapter
from mindpet.files.checkpoints import read_checkpoint
from mindpet.files.keys import (
    base_name,
    copied_key,
    copied_layer,
    parse_keys,
    shared_key,
    target_paths,
    without_ties,
)
from mindpet.files.names import EMBEDDING, PREFIX, NameMap
from mindpet.files.passport import WEIGHTS_NAME, check_files, read_passport
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.network.match import Layer, check_patterns, exact_targets, listed, names_module
from mindpet.network.parameters import TRAINED, matches
from mindpet.utils.files import atomic
from mindpet.utils.hints import Arrays, PathLike, Shape
from mindpet.utils.parse import read_json
from mindpet.utils.quote import printable, quote

SHARED = {
    name: shared_key(file)
    for method in METHODS.values()
    for delta in method.deltas.values()
    for name, file in delta.shared_names.items()
}
DELTA_KEY = re.compile(rf"(?P<path>.+?)\.(?P<name>mindpet_delta_.+|{'|'.join(SHARED)})")
WHOLE_KEY = re.compile(r"((?P<path>.+?)\.)?(?P<name>mindpet_delta_.+)")
STATISTICS = ("running_mean", "running_var")
CONSTANTS = [pattern for method in METHODS.values() for pattern in method.constants]


def read_delta(path: PathLike) -> Arrays:
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
    return {name: param.asnumpy() for name, param in read_checkpoint(path).items()}


def write_delta(path: PathLike, tensors: Arrays) -> None:
    """Write a file of MindSpore as a whole; its ending says which."""
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        save_tensors(path, tensors)
        return
    if path.suffix != ".ckpt":
        raise CheckpointError(f"{path}: must end in .ckpt or .safetensors.")
    with atomic(path) as staged:
        ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in tensors.items()], staged)


def read_adapter(
    path: PathLike, config: Optional[PeftConfig] = None, names: Optional[NameMap] = None, force: bool = False
) -> tuple[PeftConfig, Arrays, dict[str, Any]]:
    """An adapter from a folder of Hugging Face PEFT or mindpet, or from a delta file of mindpet.

    Args:
        path: of the folder or the file.
        config: of a delta file, which does not hold its own. Default: None.
        names: from the names in a delta file to those of the PyTorch model. Default: None.
        force: whether a folder's files need not be those of its passport, and numbers not finite. Default: False.

    Returns:
        The configuration, the tensors by key as in a file of Hugging Face PEFT, and the folder's passport.

    Raises:
        FileNotFoundError, CheckpointError: it cannot be read; its tensors are not those that its configuration says,
            all are listed.
        ConfigError: a delta file comes without `config`, or a folder with one; the configuration lacks a number.
    """
    if os.path.isdir(path):
        if config is not None:
            raise ConfigError(f"{path}: has its own {CONFIG_NAME}; 'config' is for a delta file.")
        config = PeftConfig.from_pretrained(path)
        config.check_supported(from_file=True)
        file = pathlib.Path(path) / CONFIG_NAME
        _require(file, config, _lacking(config, read_json(file, ConfigError), with_told=True))
        config, tensors = config.unpack(read_tensors(path))
        passport = {} if force else check_files(path)
    else:
        tensors, passport = read_delta(path), {}
        if config is None:
            raise ConfigError(f"{path}: a delta file does not hold its configuration (lora_alpha, ...); give --config.")
        config.check_supported()
        config, tensors = from_delta(tensors, config, names or NameMap())
    check_tensors(
        path,
        tensors,
        wanted_tensors(config, tensors),
        "its configuration (r, target_modules, bias, modules_to_save, ...)",
    )
    if not force:
        check_finite(path, tensors, {})
    return config, tensors, passport


def wanted_tensors(config: PeftConfig, tensors: Arrays) -> dict[str, Shape]:
    """What an adapter must have by its configuration, as far as that can be told without a network.

    Args:
        config: of the adapter.
        tensors: of the adapter, by key: they tell the layers, and the sizes of these.

    Returns:
        Shapes by key.
    """
    wanted, own_names = {}, []  # patterns of parameters that are in a file by their own names
    for part in config.parts:
        keys, method = parse_keys(tensors, part), method_of(part)
        if part.is_prompt_learning:
            shape = tensors[PROMPT].shape if PROMPT in tensors else ("tokens", "features")
            wanted[PROMPT] = part.table_shape or shape
        elif any(delta.file_names for delta in method.deltas.values()):
            for path in sorted(set(target_paths(tensors, part))) or ["*"]:
                here = {key: tensors[key].shape for key in keys if keys[key].path in (path, None)}
                for key, shape in _layer_shapes(part, path, here).items():
                    if shape != here.get(key):
                        wanted[key] = shape  # also where it fits another of the layers that share it
                    wanted.setdefault(key, shape)
        elif not keys and not getattr(part, "copied_as", None):
            own_names += method.trainable
    for key, value in tensors.items():
        path = key[len(config.key_start) :]
        whole = in_modules_to_save(path, config) or _is_shared(path, config, tensors) or matches(path, own_names)
        whole = whole or copied_layer(key, config) is not None
        if key.startswith(config.key_start) and whole:
            wanted.setdefault(key, value.shape)
    return wanted


def _layer_shapes(config, path, shapes):
    """key -> shape of the tensors that a layer must have, from the shapes of those that it has, by key."""
    keys = parse_keys(shapes, config)
    kinds = [kind for kind in method_of(config).deltas if all(kind in key.kinds for key in keys.values())]
    delta = method_of(config).deltas[(kinds or list(method_of(config).deltas))[0]]
    known = {key.name: shapes[name] for name, key in keys.items()}
    wanted = delta.file_shapes(known, **config.delta_arguments(path))
    keys = {name: f"{config.key_start}{path}.{file}" for name, file in delta.file_names.items()}
    keys.update({name: shared_key(file) for name, file in delta.shared_names.items()})
    return {keys[name]: shape for name, shape in wanted.items()}


def in_modules_to_save(path: str, config: PeftConfig) -> bool:
    """Whether a parameter is in a module that the adapter has as a whole; Hugging Face PEFT looks at ends of names."""
    entries = (*listed(config.modules_to_save), *config.task_heads)
    parts = path.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    return not re.search(r"(^|\.)(lora|mindpet)_", path) and any(module.endswith(entries) for module in modules)


def _is_shared(path, config, tensors):
    """Whether an adapter may have its own value of a parameter of the base, or the base's own."""
    biased = {layer for part in config.parts if part.trains_target_biases for layer in target_paths(tensors, part)}
    head, _, leaf = path.rpartition(".")
    layer, _, base = head.rpartition(".")
    layer = layer if base == "base_layer" else head
    if leaf == "bias":
        return matches(path, config.trained_parameters) or layer in biased
    is_base = leaf == "weight" and base == "base_layer"
    return leaf in STATISTICS or (is_base and layer in target_paths(tensors, config))


def _unique(pairs):
    """A dict of pairs.

    Raises:
        CheckpointError: a key is there twice.
    """
    pairs = list(pairs)
    double = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
    if double:
        raise CheckpointError(f"several tensors of the file would be called the same: {quote(double)}.")
    return dict(pairs)


def from_delta(tensors: Arrays, config: PeftConfig, names: NameMap) -> tuple[PeftConfig, Arrays]:
    """An adapter from the tensors of a delta file; rank and targets are found in them.

    Those of a union of methods are taken apart by the names of the methods' parameters; what has no such name is the
    base's, and goes with the first method that is no prefix or prompt.

    Returns:
        The configuration, and the tensors by key as in a file of Hugging Face PEFT.

    Raises:
        CheckpointError: a prefix lacks a part of what it is computed from; two tensors would be the same.
        ConfigError: `config` does not say what Hugging Face PEFT needs, or does not fit the tensors.
        NoMatchError: a pattern of `config` fits no layer.
    """
    rest, content, parts = _known_names(tensors), {}, []
    targets = {names.to_torch(match["path"]) for name in rest if (match := DELTA_KEY.fullmatch(name))}
    first = next((part for part in config.parts if not part.is_prompt_learning), config.parts[0])
    patterns = {id(part): (*method_of(part).trainable, *method_of(part).saved) for part in config.parts}
    others = [pattern for part in config.parts if part is not first for pattern in patterns[id(part)]]
    for part in config.parts:
        chosen = {
            name: value
            for name, value in rest.items()
            if (not matches(name, others) if part is first else matches(name, patterns[id(part)]))
        }
        part, chosen = _of_method(chosen, part, names, targets)
        content.update(chosen)
        parts.append(part)
    return config.with_parts(parts), content


def _of_method(tensors, config, names, targets):
    """`from_delta` of one method; `targets` are the paths of the layers with a delta of any."""
    if config.is_prompt_learning:
        heads = ((f"{config.key_start}{names.to_torch(name)}", value) for name, value in tensors.items())
        heads = {name: value for name, value in heads if "mindpet" not in name}
        return config.of_delta_file({}, {**_whole(tensors, config), **heads})
    deltas = {name: match for name in tensors if (match := DELTA_KEY.fullmatch(name))}
    content, shapes, shared = [], {}, {}
    for name, value in tensors.items():
        if name in deltas:
            path, local = names.to_torch(deltas[name]["path"]), deltas[name]["name"]
            if local in SHARED:
                shared.setdefault(SHARED[local], {})[name] = value
                continue
            file_names = _file_names(config, path)
            local = local if local in file_names else local.lower()  # LoRA's A and B of hand-made layers
            content.append((f"{PREFIX}{path}.{file_names.get(local, local)}", value))
            shapes.setdefault(path, {})[local] = value.shape
        elif (layer := _copied_layer(names.to_torch(name), config)) is not None:
            content.append((copied_key(layer, names.to_torch(name), config), value))
        else:
            path, _, leaf = names.to_torch(name).rpartition(".")
            # Hugging Face PEFT keeps the layer itself inside of its own as `base_layer`.
            inner = ".".join(filter(None, (path, "base_layer" if path in targets else "", leaf)))
            content.append((PREFIX + inner, value))
    content += [(key, _only(copies)) for key, copies in shared.items()]
    if shapes:
        check_patterns(config, [Layer(None, [path], []) for path in shapes])
    config, content = config.of_delta_file(shapes, _unique(content))
    content, config = names.split(content, config)
    paths = target_paths(content, config)
    if paths:
        config.target_modules = config.target_modules or exact_targets(paths)
    return config, content


def _copied_layer(name, config):
    """The path of the target that a parameter is in, of a method that trains copies of its targets; else None."""
    if getattr(config, "copied_as", None) is None or in_modules_to_save(name, config):
        return None
    parts = name.split(".")[:-1]
    paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return next((path for path in paths if names_module(config.target_modules or paths[-1:], path)), None)


def _only(values):
    """The one value of tensors that an adapter's layers share; hand-made layers may have each their own.

    Raises:
        CheckpointError: they differ.
    """
    first, *others = values.values()
    if not all(np.array_equal(first, other) for other in others):
        raise CheckpointError(
            f"the layers of an adapter share one tensor, but these differ: {quote(list(values))}; hand-made "
            "ones are made with those of another one."
        )
    return first


def _file_names(config, path):
    """name -> name in a file, of the delta at a path, whose name tells whether it is beside an embedding."""
    deltas = method_of(config).deltas
    is_embedding = EMBEDDING.search(path) and "embedding" in deltas
    delta = deltas["embedding"] if is_embedding else next(iter(deltas.values()), None)
    return delta.file_names or {} if delta else {}


def _known_names(tensors):
    """Tensors by their names of today, without constants; what an adapter trains of the base as the base calls it."""
    named = _unique((name.replace("tk_delta", "mindpet_delta"), value) for name, value in tensors.items())
    # Neither are numbers by themselves, such as the step, which MindSpore's checkpoints have beside the parameters.
    constants = {name for name, value in named.items() if matches(name, CONSTANTS) or not value.ndim}
    named = {name: value for name, value in named.items() if name not in constants}
    base = {name: value for name, value in named.items() if TRAINED not in name}
    return {**base, **_unique((name.replace(TRAINED, ""), value) for name, value in named.items() if TRAINED in name)}


def _whole_delta(method):
    """The Delta of a method whose tensors in a file are of all places together, or None."""
    deltas = (delta for delta in method.deltas.values() if delta.to_file.__func__ is not Delta.to_file.__func__)
    return next(deltas, None)


def _whole(tensors, config):
    """The tensors of all places together, see `Delta.to_file`, from those of a delta file; others are no deltas."""
    values = {}  # path -> name -> value
    for key, value in tensors.items():
        match = WHOLE_KEY.fullmatch(key)
        if match:
            values.setdefault(match["path"] or "", {})[match["name"]] = value
    names = {name for parts in values.values() for name in parts}
    for method in METHODS.values():
        # Prefixes of both methods are the same in a file of Hugging Face PEFT, and so may be their configuration.
        is_meant = isinstance(config, method.config) or issubclass(method.config, type(config))
        is_meant |= method is method_of(config.computed())
        if is_meant and names and all(matches(name, method.trainable) for name in names):
            paths = sorted(values, key=lambda path: [n.zfill(9) if n.isdigit() else n for n in path.split(".")])
            return _whole_delta(method).to_file({path: values[path] for path in paths})
    raise CheckpointError(
        f"the file must have a delta of {config.peft_name}, and no other; there are {sorted(tensors)}."
    )


def to_delta(tensors: Arrays, config: PeftConfig, names: NameMap, prefix_path: Optional[str] = None) -> Arrays:
    """The tensors of a delta file of mindpet by name, from those of a file of Hugging Face PEFT.

    Args:
        tensors: by key.
        config: of the adapter.
        names: between the network's names and those of the PyTorch model.
        prefix_path: where the network has its prefix or its prompt. Default: None, see `Delta.usual_path`.
    """
    result, keys = [], parse_keys(tensors, config)
    for key, value in tensors.items():
        if key == PROMPT:
            (part,) = (part for part in config.computed().parts if part.is_prompt_learning)
            delta = _whole_delta(method_of(part))
            path = delta.usual_path if prefix_path is None else prefix_path
            parts = delta.from_file({PROMPT: value}, [path])[path]
            result += [(".".join(filter(None, (path, name))), tensor) for name, tensor in parts.items()]
        elif key in keys:
            path, name, _, part = keys[key]
            path = target_paths(tensors, part)[0] if path is None else path
            result.append((f"{names.to_mindspore(path)}.{name}", value))
        else:
            plain = re.sub(r"^base_model\.(model\.)?", "", base_name(key, config))
            result.append((names.to_mindspore(plain), value))
    return _unique(result)


def convert(
    source: PathLike,
    target: PathLike,
    config: Optional[PeftConfig] = None,
    name_map: Optional[NameMap] = None,
    prefix_path: Optional[str] = None,
    force: bool = False,
) -> None:
    """A folder of Hugging Face PEFT or mindpet into a delta file of mindpet, or a delta file into such a folder.

    Args:
        source: folder or file.
        target: a file that ends in .ckpt or .safetensors, or a folder.
        config: of a delta file, which does not hold its own. Default: None.
        name_map: between the network's names and those of the PyTorch model. Default: None, see `NameMap`.
        prefix_path: where the network has its prefix or its prompt. Default: None, see `Delta.usual_path`.
        force: see `read_adapter`. Default: False.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: see `read_adapter`.
        NoMatchError: a pattern of `config` fits no layer.
    """
    names = name_map or NameMap()
    config, tensors, _ = read_adapter(source, config, names, force)
    if pathlib.Path(target).suffix in (".ckpt", ".safetensors"):
        tensors, _ = names.fuse(without_ties(tensors, config), config)
        write_delta(target, to_delta(tensors, config, names, prefix_path))
    else:
        config.inference_mode = True
        save_adapter(target, config, tensors, {})


def inspect(path: PathLike) -> str:
    """What is in a folder or file of an adapter, and for which base, as text. Of safetensors only the header is read.

    Args:
        path: folder of an adapter, or a .ckpt or .safetensors file.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: it cannot be read.
    """
    lines, passport, config, file = [], {}, None, pathlib.Path(path)
    if file.is_dir():
        if not is_adapter(path):
            raise FileNotFoundError(f"{path}: no {CONFIG_NAME} in this folder.")
        config = PeftConfig.from_pretrained(path)
        passport = read_passport(path)
        content = {name: value for name, value in config.to_dict().items() if value not in (None, {}, [], False)}
        lines += [f"{name}: {value}" for name, value in sorted(content.items())]
        file = file / WEIGHTS_NAME
    shapes, dtypes = _header(file)
    if passport:
        base = passport.get("base", {})
        lines.append(
            f"made by mindpet {passport.get('mindpet')}, MindSpore {passport.get('mindspore')}, "
            f"step {passport.get('step')}, for a {base.get('network')} of {len(base.get('parameters', {}))} parameters"
        )
    width = max(map(len, shapes), default=0)
    lines += [f"{name:<{width}}  {dtypes[name].name:<8}  {list(shape)}" for name, shape in shapes.items()]
    lines += [f"method: {method}" for method in _methods(shapes, config)]
    numbers = sum(map(math.prod, shapes.values()))
    lines.append(f"{len(shapes)} tensors, {numbers:,} numbers, {file.stat().st_size:,} bytes")
    return "\n".join(printable(line).replace("\n", "\\n") for line in lines)


def _header(file):
    """Shapes and types of the tensors in a file by their names."""
    if file.suffix == ".safetensors" and file.is_file():
        content = TensorFile(file)
        return content.shapes, content.dtypes
    tensors = read_delta(file)
    return ({name: getattr(value, what) for name, value in tensors.items()} for what in ("shape", "dtype"))


def _methods(shapes, config):
    """The methods that names of tensors, or the configuration, tell of, and of LoRA the ranks."""
    first = re.compile(r".*(?<![a-z])lora_(embedding_)?[aA](\.weight)?")
    may_be = config is None or any(isinstance(part, LoraConfig) for part in config.parts)
    ranks = [shape[0] for name, shape in shapes.items() if may_be and shape and first.fullmatch(name)]
    lines = [f"LORA, rank {', '.join(map(str, sorted(set(ranks))))}, {len(ranks)} layers"] if ranks else []
    others = (method for method in METHODS.values() if method.cells and method.name != "lora")
    lines += [
        method.config.peft_type.value for method in others if any(matches(name, method.trainable) for name in shapes)
    ]
    whole = (
        [part for part in config.parts if part.is_prompt_learning]
        if config
        else [method.config() for method in METHODS.values() if _whole_delta(method)]
    )
    names = sorted({one.to_dict()["peft_type"] for one in whole})
    return lines + [" or ".join(names)] * (PROMPT in shapes)


def _lacking(config, content, with_told=False):
    """Lines for what the content of a file does not say, but its methods need, and defaults are guesses for."""
    lacking = []
    for part, fields in zip(config.parts, content.get("configs", [content]) if config.parts != [config] else [content]):
        names = part.required + (part.told_by_tensors if with_told else ())
        lacking += [f"{name!r} is missing" for name in names if name not in fields]
    return lacking


def _require(path, config, problems):
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)} (a configuration of {config.peft_name}).")


def load_config(path: PathLike) -> PeftConfig:
    """The configuration of a delta file in a JSON file that somebody wrote, or that a library wrote for an adapter.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is not the JSON of a configuration; a field is missing or unknown. A library's file may have
            fields that are not known here.
    """
    content = read_json(path, ConfigError)
    try:
        config = get_peft_config(content)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    # Every library writes these, and nobody else has a reason to.
    is_written = {"base_model_name_or_path", "inference_mode"} <= content.keys()
    unknown = [f"{name!r} is not known" for name in sorted(config.unknown) if not is_written]
    _require(path, config, unknown + _lacking(config, content))
    if isinstance(config, LoraConfig) and "r" in content:
        config.rank_pattern = {**config.rank_pattern, ".*": config.r}  # not the default, but of every layer
    return config

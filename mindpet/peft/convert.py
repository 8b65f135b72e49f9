"""Files of adapters without a network: reading, converting, inspecting."""

import collections
import copy
import math
import os
import pathlib
import re

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindpet.delta.lora_layer import LoraEmbedding, LoraLayer
from mindpet.delta.registry import METHODS
from mindpet.errors import CheckpointError, ConfigError
from mindpet.graph.parameters import TRAINED, matches
from mindpet.peft.config import APPROXIMATE_INITS, CONFIG_NAME, LoraConfig, PeftConfig, get_peft_config, pattern_value
from mindpet.peft.match import Layer, check_patterns, exact_targets, exactly, listed
from mindpet.peft.names import EMBEDDING, PREFIX, NameMap, target_paths
from mindpet.peft.passport import WEIGHTS_NAME, check_files, read_passport
from mindpet.peft.plan import TASK_HEADS, is_from_weight
from mindpet.peft.state import PROMPT, check_finite, check_tensors, is_adapter, read_tensors, save_adapter
from mindpet.utils.checkpoints import read_checkpoint
from mindpet.utils.files import atomic
from mindpet.utils.parse import read_json
from mindpet.utils.quote import printable, quote
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
STATISTICS = ("running_mean", "running_var")
# What a configuration must say, for the tensors do not.
REQUIRED = {
    "LORA": ("lora_alpha",),
    "ADAPTER": ("bottleneck_size",),
    "LOW_RANK_ADAPTER": ("reduction_factor", "low_rank_size"),
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
    return {name: param.asnumpy() for name, param in read_checkpoint(path).items()}


def write_delta(path, tensors):
    """Write a file of MindSpore as a whole; its ending says which."""
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        save_tensors(path, tensors)
        return
    if path.suffix != ".ckpt":
        raise CheckpointError(f"{path}: must end in .ckpt or .safetensors.")
    with atomic(path) as staged:
        ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in tensors.items()], staged)


def read_adapter(path, config=None, names=None, force=False):
    """An adapter from a folder of Hugging Face PEFT or mindpet, or from a delta file of mindpet.

    Args:
        path (str): the folder or the file.
        config (PeftConfig): of a delta file, which does not hold its own. Default: None.
        names (NameMap): from the names in a delta file to those of the PyTorch model. Default: None.
        force (bool): whether a folder's files need not be those of its passport, and numbers not finite.
            Default: False.

    Returns:
        tuple: configuration, dict of key -> numpy.ndarray as in a file of Hugging Face PEFT, and the folder's passport.

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
        _require(file, read_json(file, ConfigError), ("r",) if isinstance(config, LoraConfig) else ())
        tensors = read_tensors(path)
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


def wanted_tensors(config, tensors):
    """What an adapter must have by its configuration, as far as that can be told without a network.

    Args:
        config (PeftConfig): the configuration.
        tensors (dict): key -> numpy.ndarray, of the adapter: they tell the layers, and the sizes of these.

    Returns:
        dict of key -> shape.
    """
    wanted, layers = {}, set()
    if config.is_prompt_learning:
        sizes = (config.num_virtual_tokens, config.num_layers, config.token_dim)
        known = None not in sizes
        own = tensors[PROMPT].shape if PROMPT in tensors else ("tokens", "features")
        wanted[PROMPT] = (sizes[0], sizes[1] * 2 * sizes[2]) if known else own
    elif isinstance(config, LoraConfig):
        found = (LORA_KEY.fullmatch(key) for key in tensors if key.startswith(PREFIX))
        layers = {match["path"][len(PREFIX) :] for match in found if match}
        for path in sorted(layers) or ["*"]:
            wanted.update(_lora_shapes(config, path, tensors))
    start = "base_model." if config.is_prompt_learning else PREFIX
    has_own_names = isinstance(config, LoraConfig) or config.is_prompt_learning
    own = () if has_own_names else config.method.trainable
    for key, value in tensors.items():
        path = key[len(start) :]
        whole = in_modules_to_save(path, config) or _is_shared(path, config, layers) or matches(path, own)
        if key.startswith(start) and whole:
            wanted.setdefault(key, value.shape)
    return wanted


def _lora_shapes(config, path, tensors):
    """key -> shape of the tensors of a layer: of the rank that the configuration says, and of their own sizes."""
    table = {own: f"{PREFIX}{path}.{name}" for own, name in LoraEmbedding.file_names.items()}
    pair = ("mindpet_delta_lora_a", "mindpet_delta_lora_b")
    if not any(table[name] in tensors for name in pair):
        table = {own: f"{PREFIX}{path}.{name}" for own, name in LoraLayer.file_names.items()}
    a, b = (tensors.get(table[name], np.zeros(())).shape for name in pair)
    rank, rest = config.sizes(path)["rank"], a[1:] or ("in",)
    out, inner = (b[0], b[1]) if len(b) > 1 else ("out", rank)
    taps = (1,) * (len(rest) - 1)
    # B of a convolution in groups has a part of the rank.
    grouped = taps and inner and rank % inner == 0 and out != "out" and out % (rank // inner) == 0
    shapes = {table[pair[0]]: (rank, *rest), table[pair[1]]: (out, inner if grouped else rank, *taps)}
    if config.use_dora:
        shapes[table["mindpet_delta_lora_magnitude"]] = (1, out, *taps) if taps else (out,)
    if config.lora_bias and "mindpet_delta_lora_bias" in table:
        shapes[table["mindpet_delta_lora_bias"]] = (out,)
    return shapes


def in_modules_to_save(path, config):
    """Whether a parameter is in a module that the adapter has as a whole; Hugging Face PEFT looks at ends of names."""
    entries = (*listed(config.modules_to_save), *TASK_HEADS.get(config.task_type, ()))
    parts = path.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    return not re.search(r"(^|\.)(lora|mindpet)_", path) and any(module.endswith(entries) for module in modules)


def _is_shared(path, config, layers):
    """Whether an adapter may have its own value of a parameter of the base, or the base's own."""
    head, _, leaf = path.rpartition(".")
    layer, _, base = head.rpartition(".")
    layer = layer if base == "base_layer" else head
    bias = getattr(config, "bias", "none")
    if leaf == "bias":
        return bias == "all" or (bias == "lora_only" and layer in layers)
    return leaf in STATISTICS or (leaf == "weight" and base == "base_layer" and layer in layers)


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


def from_delta(tensors, config, names):
    """An adapter from the tensors of a delta file; rank and targets are found in them.

    Returns:
        tuple: configuration, and dict of key -> numpy.ndarray as in a file of Hugging Face PEFT.

    Raises:
        CheckpointError: a prefix lacks a part of what it is computed from; two tensors would be the same.
        ConfigError: `config` does not say what Hugging Face PEFT needs, or does not fit the tensors.
        NoMatchError: a pattern of `config` fits no layer.
    """
    tensors = _known_names(tensors)
    if config.is_prompt_learning:
        heads = ((f"base_model.{names.to_torch(name)}", value) for name, value in tensors.items())
        heads = {name: value for name, value in heads if "mindpet" not in name}
        return config, {PROMPT: _prefixes(tensors, config), **heads}
    if not isinstance(config, LoraConfig):
        return config, _unique((PREFIX + names.to_torch(name), value) for name, value in tensors.items())
    deltas = {name: DELTA_KEY.fullmatch(name) for name in tensors}
    targets = {names.to_torch(match["path"]) for match in deltas.values() if match}
    found, ranks = [], {}
    for name, value in tensors.items():
        match = deltas[name]
        if match is None:
            path, _, leaf = names.to_torch(name).rpartition(".")
            # Hugging Face PEFT keeps the layer itself inside of its own as `base_layer`.
            inner = ".".join(filter(None, (path, "base_layer" if path in targets else "", leaf)))
            found.append((PREFIX + inner, value))
            continue
        path = names.to_torch(match["path"])
        cls = LoraLayer if EMBEDDING.search(path) is None else LoraEmbedding
        own = match["name"].lower()
        found.append((f"{PREFIX}{path}.{cls.file_names.get(own, own)}", value))
        if own.endswith("_a"):
            ranks[path] = value.shape[0] if value.ndim else 0
    config = _with_ranks(config, ranks)
    found, config = names.split(_without_start(_unique(found), config), config)
    config.target_modules = config.target_modules or exact_targets(target_paths(found))
    return config, found


def _with_ranks(config, ranks):
    """A configuration with the ranks that tensors have; what it says itself of layers must fit them."""
    config = copy.deepcopy(config)
    if ranks:
        check_patterns(config, [Layer(None, [path], []) for path in ranks])
    said = {path: pattern_value(config.rank_pattern, path, rank) for path, rank in ranks.items()}
    wrong = [f"{path}: {said[path]} is given, but it is {rank}" for path, rank in ranks.items() if said[path] != rank]
    if wrong:
        raise ConfigError("the ranks are not those of the tensors:\n  " + "\n  ".join(wrong))
    config.r = max(ranks.values(), key=list(ranks.values()).count) if ranks else config.r
    config.rank_pattern = {exactly(path): rank for path, rank in ranks.items() if rank != config.r}
    return config


def _known_names(tensors):
    """Tensors by their names of today, without constants; what an adapter trains of the base as the base calls it."""
    named = _unique((name.replace("tk_delta", "mindpet_delta"), value) for name, value in tensors.items())
    # Neither are numbers by themselves, such as the step, which MindSpore's checkpoints have beside the parameters.
    constants = {name for name, value in named.items() if matches(name, CONSTANTS) or not value.ndim}
    named = {name: value for name, value in named.items() if name not in constants}
    base = {name: value for name, value in named.items() if TRAINED not in name}
    return {**base, **_unique((name.replace(TRAINED, ""), value) for name, value in named.items() if TRAINED in name)}


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
    result = []
    for key, value in tensors.items():
        match = LORA_KEY.fullmatch(key)
        if key == PROMPT:
            result.append((f"{prefix_path}.{TABLE}", value))
        elif match is not None:
            path = names.to_mindspore(match["path"][len(PREFIX) :])
            result.append((f"{path}.{LORA_NAMES[match['name']]}", value))
        else:
            plain = re.sub(r"^base_model\.(model\.)?", "", key).replace(".base_layer.", ".")
            result.append((names.to_mindspore(plain), value))
    return _unique(result)


def convert(source, target, config=None, name_map=None, prefix_path="prefix_encoder", force=False):
    """A folder of Hugging Face PEFT or mindpet into a delta file of mindpet, or a delta file into such a folder.

    Args:
        source (str): folder or file.
        target (str): a file that ends in .ckpt or .safetensors, or a folder.
        config (PeftConfig): of a delta file, which does not hold its own. Default: None.
        name_map (NameMap): between the network's names and those of the PyTorch model. Default: None, see `NameMap`.
        prefix_path (str): where the network has its PrefixEncoder. Default: 'prefix_encoder'.
        force (bool): see `read_adapter`. Default: False.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: see `read_adapter`.
        NoMatchError: a pattern of `config` fits no layer.
    """
    names = name_map or NameMap()
    config, tensors, _ = read_adapter(source, config, names, force)
    if pathlib.Path(target).suffix in (".ckpt", ".safetensors"):
        tensors, _ = names.fuse(tensors, config)
        write_delta(target, to_delta(tensors, names, prefix_path))
    else:
        config.inference_mode = True
        save_adapter(target, config, tensors, {})


def inspect(path):
    """What is in a folder or file of an adapter, and for which base, as text. Of safetensors only the header is read.

    Args:
        path (str): folder of an adapter, or a .ckpt or .safetensors file.

    Returns:
        str.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: it cannot be read.
    """
    lines, passport, file = [], {}, pathlib.Path(path)
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
    lines += [f"method: {method}" for method in _methods(shapes)]
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


def _methods(shapes):
    """The methods that names of tensors tell of, and of LoRA the ranks."""
    first = re.compile(r".*lora_(embedding_)?[aA](\.weight)?")
    ranks = [shape[0] for name, shape in shapes.items() if shape and first.fullmatch(name)]
    found = [f"LORA, rank {', '.join(map(str, sorted(set(ranks))))}, {len(ranks)} layers"] if ranks else []
    own = (method for method in METHODS.values() if method.cells and method.name != "lora")
    found += [method.peft_type for method in own if any(matches(name, method.trainable) for name in shapes)]
    return found + ["PREFIX_TUNING"] * (PROMPT in shapes)


def _require(path, content, more, problems=()):
    """Refuse the content of a file that does not say a number that its method needs, and defaults are guesses for."""
    names = (*REQUIRED.get(content["peft_type"], ()), *more)
    problems = [*problems, *(f"{name!r} is missing" for name in names if name not in content)]
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)} (a configuration of {content['peft_type']}).")


def load_config(path):
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
    _require(path, content, (), [f"{name!r} is not known" for name in sorted(config.unknown) if not is_written])
    if isinstance(config, LoraConfig) and "r" in content:
        config.rank_pattern = {**config.rank_pattern, ".*": config.r}  # not the default, but of every layer
    return config

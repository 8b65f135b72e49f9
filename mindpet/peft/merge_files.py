"""Folding an adapter into the files of its base, without a network."""

import json
import os
import pathlib
import shutil
import tempfile
import warnings

import numpy as np
from tqdm import tqdm

from mindpet.delta.lora_layer import FOLD, fold_lora
from mindpet.errors import MergeError
from mindpet.layers.kinds import LayerKind
from mindpet.peft.combine import start_from_weight
from mindpet.peft.config import LoraConfig
from mindpet.peft.convert import LORA_KEY, LORA_NAMES, read_adapter, read_delta, write_delta
from mindpet.peft.merge import describe
from mindpet.peft.names import PREFIX, NameMap
from mindpet.peft.plan import is_from_weight
from mindpet.utils.tensors import TensorFile, write_tensors

INDEX = "model.safetensors.index.json"
# Files of weights are not copied: what is not merged would be mistaken for what is.
WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")


class Base:
    """The files of a base model, and their tensors by name.

    Args:
        path (str): a .ckpt or .safetensors file, or a folder of .safetensors files.

    Raises:
        FileNotFoundError, CheckpointError: there is nothing to read, or it is damaged.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if self.path.is_dir():
            files = _files_of(self.path)
        else:
            files = [self.path]
            if not self.path.is_file():
                raise FileNotFoundError(f"{path}: no such file or folder.")
        self.shards = {file: _Checkpoint(file) if file.suffix == ".ckpt" else TensorFile(file) for file in files}
        self.shapes = {name: shape for shard in self.shards.values() for name, shape in shard.shapes.items()}


def _files_of(folder):
    """The files of weights in a folder: those in its index, or `model.safetensors`, or all that end like it."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors in this folder.")
    return files


class _Checkpoint:
    """A .ckpt file, with the interface of a TensorFile; MindSpore reads it as a whole."""

    def __init__(self, path):
        self.metadata, self.values = None, read_delta(path)
        self.shapes = {name: value.shape for name, value in self.values.items()}
        self.dtypes = {name: value.dtype for name, value in self.values.items()}

    def read(self, name):
        """A tensor."""
        return self.values[name]


def merge(base, adapter, output, config=None, name_map=None, progressbar=True):
    """Fold a LoRA adapter into the files of its base, one tensor in memory at a time (a .ckpt is read as a whole).

    What comes out is like the base: a folder with the same files, or a file of the same kind.

    Args:
        base (str): a .ckpt or .safetensors file, or a folder of .safetensors files and what belongs to them.
        adapter (str): a folder of Hugging Face PEFT or mindpet, or a delta file of mindpet.
        output (str): must not exist.
        config (PeftConfig): of a delta file. Default: None.
        name_map (NameMap): from the base's names to those of the adapter. Default: None, see `NameMap`.
        progressbar (bool): whether to show progress. Default: True.

    Returns:
        list of MergedLayer.

    Raises:
        FileNotFoundError, FileExistsError, CheckpointError, ConfigError: a file is missing, in the way or damaged.
        MergeError: the method cannot be merged; a tensor has no place in the base, all are listed; a weight would hold
            NaN or infinite numbers. Nothing is written.
    """
    output, names = pathlib.Path(output), name_map or NameMap()
    if output.exists():
        raise FileExistsError(f"{output}: exists already.")
    files = Base(base)
    config, tensors = read_adapter(adapter, config, names)
    if not isinstance(config, LoraConfig):
        raise MergeError(f"{adapter}: {config.peft_type.value} cannot be folded into weights.")
    tensors, config = names.fuse(tensors, config)
    deltas, whole = assign_places(tensors, config, files, names)
    report = []

    def merged(shard, name):
        value = whole[name].astype(shard.dtypes[name]) if name in whole else shard.read(name)
        return _fold(name, value, config, deltas[name], report) if name in deltas else value

    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.incomplete-") as folder:
        total = sum(len(shard.shapes) for shard in files.shards.values())
        bar = tqdm(total=total, desc="merging", unit="tensor", disable=not progressbar)
        new = {name: value for name, value in whole.items() if name not in files.shapes}
        last = list(files.shards)[-1]
        for path, shard in files.shards.items():
            _write_shard(os.path.join(folder, path.name), shard, new if path == last else {}, merged, bar)
        bar.close()
        if files.path.is_dir():
            _copy_others(files.path, folder, new, last.name)
            os.chmod(folder, 0o755)
            os.rename(folder, output)
            os.mkdir(folder)  # for TemporaryDirectory to remove
        else:
            os.replace(os.path.join(folder, files.path.name), output)
    return report


def assign_places(tensors, config, files, names):
    """Which tensor of the base each tensor of an adapter goes to.

    Returns:
        tuple: dict of name in the base -> keywords of `fold_lora`, 'path', 'embedding' and 'kind'; dict of name
        -> whole value.

    Raises:
        MergeError: some have no place, or another shape; all are listed.
    """
    known = {names.to_torch(name): name for name in files.shapes}
    deltas, whole, problems = {}, {}, []

    def place(path):
        """The name in the base; it may lack the first parts of the path, or have more."""
        parts = path.split(".")
        short = [".".join(parts[start:]) for start in range(len(parts) - 1) if ".".join(parts[start:]) in known]
        longer = [name for name in known if name.endswith(f".{path}")]
        found = short[:1] or (longer if len(longer) == 1 else [])
        return known[found[0]] if found else None

    for key, value in tensors.items():
        match = LORA_KEY.fullmatch(key)
        if match is None:
            path = key[len(PREFIX) :].replace(".base_layer.", ".")
            name = place(path)
            if name is not None and files.shapes[name] != value.shape:
                problems.append(f"{key}: {list(value.shape)}, but {name} is {list(files.shapes[name])}")
            elif not key.endswith(".base_layer.weight"):  # the base's own, saved with deltas of embeddings
                whole[name or path] = value
            continue
        path = match["path"][len(PREFIX) :]
        argument = FOLD[LORA_NAMES[match["name"]]]
        name = place(f"{path}.{'bias' if argument == 'bias' else 'weight'}")
        if name is None:
            problems.append(f"{key}: no tensor of the base is called {path}.weight")
            continue
        entry = deltas.setdefault(name, {"path": path})
        entry[argument] = value.astype(np.float32)
        entry["embedding"] = entry.get("embedding", False) or "embedding" in match["name"]
    problems += [
        f"{name}: only {sorted(set(entry) - {'path', 'embedding'})} of A and B"
        for name, entry in deltas.items()
        if "bias" not in entry and not {"lora_a", "lora_b"} <= set(entry)
    ]
    if not problems:
        problems = _orient(deltas, files, config) + _tied(deltas, files)
    if problems:
        raise MergeError("the adapter does not fit the base:\n  " + "\n  ".join(problems))
    return deltas, whole


def _orient(deltas, files, config):
    """Note of each delta how its weight is stored; returns what does not fit.

    A linear weight that is not square tells by its shape whether it is `(out, in)` or `(in, out)`, and so tells it of
    the square ones.
    """
    problems, turned = [], set()
    linear = [
        name
        for name, entry in deltas.items()
        if "lora_a" in entry and not entry["embedding"] and len(files.shapes[name]) == 2
    ]
    for name in linear:
        shape = (len(deltas[name]["lora_b"]), deltas[name]["lora_a"].shape[1])
        if shape[0] != shape[1] and sorted(shape) == sorted(files.shapes[name]):
            turned.add(shape != files.shapes[name])
    way = turned.pop() if len(turned) == 1 else config.fan_in_fan_out
    for name, entry in deltas.items():
        if "lora_a" not in entry:
            continue
        axes = len(files.shapes[name]) - 2
        kind = "embedding" if entry["embedding"] else f"conv{axes}d" if axes else "linear"
        entry["kind"] = LayerKind(kind, fan_in_fan_out=kind == "linear" and way)
        shape = (len(entry["lora_b"]), int(np.prod(entry["lora_a"].shape[1:])))
        stored = files.shapes[name]
        matrix = stored[::-1] if entry["kind"].transposed else (stored[0], int(np.prod(stored[1:])))
        if shape != tuple(matrix):
            problems.append(f"{name}: {list(stored)} in the base, but the adapter is for {list(shape)}")
    return problems


def _tied(deltas, files):
    """A line for each embedding whose table is the head's weight too, which would change along.

    A Hugging Face model with a language model head has them tied unless its configuration says otherwise.
    """
    embeddings = [name for name, entry in deltas.items() if entry["embedding"]]
    path = files.path / "config.json"
    if not embeddings or not path.is_file():
        for name in embeddings:
            warnings.warn(
                f"{name}: if the head has this embedding's table as its weight, it changes too.", stacklevel=2
            )
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    has_head = any("LM" in name or "PreTraining" in name for name in content.get("architectures") or ())
    tied = has_head and content.get("tie_word_embeddings", True)
    return [
        f"{name}: the head has this embedding's table as its weight (tie_word_embeddings), and would change too"
        for name in embeddings
        if tied and files.shapes[name][0] == content.get("vocab_size")
    ]


def _fold(name, value, config, entry, report):
    """A merged tensor."""
    if "bias" in entry:
        scaling = config.scaling(entry["path"])
        result = (value.astype(np.float32) + np.float32(scaling) * entry["bias"]).astype(value.dtype)
    else:
        kind, scaling = entry["kind"], config.scaling(entry["path"])
        lora_a, lora_b = entry["lora_a"], entry["lora_b"]
        before = kind.to_matrix(value.astype(np.float32))
        start_a, start_b = None, None
        if is_from_weight(config):
            start_a, start_b = start_from_weight(before, config.init_lora_weights, len(lora_a), scaling)
        group = len(lora_a) // lora_b.shape[1] if kind.is_convolution else 1
        after = fold_lora(before, lora_a, lora_b, scaling, entry.get("magnitude"), group, start_a, start_b)
        result = kind.from_matrix(after, value.shape).astype(value.dtype)
        report.append(describe(name, result, before, after, kind))
    if not np.isfinite(result.astype(np.float32)).all():
        raise MergeError(f"{name} would hold NaN or infinite numbers as {value.dtype.name}; nothing was written.")
    return result


def _write_shard(path, shard, extra, merged, bar):
    """Write one file of the base."""

    def read(name):
        bar.update()
        return np.ascontiguousarray(extra[name] if name in extra else merged(shard, name))

    shapes = {**shard.shapes, **{name: value.shape for name, value in extra.items()}}
    if isinstance(shard, _Checkpoint):
        write_delta(path, {name: read(name) for name in shapes})
        return
    dtypes = {**shard.dtypes, **{name: value.dtype for name, value in extra.items()}}
    write_tensors(path, shapes, dtypes, read, shard.metadata or None)


def _copy_others(source, folder, new, last):
    """Copy what is beside the weights: configuration, tokenizer; the index learns of new tensors."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in WEIGHTS:
            shutil.copy(path, folder)
    index = pathlib.Path(folder) / INDEX
    if new and index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"].update(dict.fromkeys(new, last))
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Folding an adapter into the files of its base, without a network."""

import collections
import collections.abc
import json
import pathlib
import re
import shutil
import warnings

import numpy as np
from tqdm import tqdm

from mindpet.delta.lora_layer import FOLD, fold_lora
from mindpet.errors import CheckpointError, MergeError
from mindpet.layers.kinds import LayerKind
from mindpet.peft.combine import start_from_weight
from mindpet.peft.config import LoraConfig
from mindpet.peft.convert import LORA_KEY, LORA_NAMES, in_modules_to_save, read_adapter, read_delta, write_delta
from mindpet.peft.match import ALL_LINEAR, ends_with
from mindpet.peft.merge import describe
from mindpet.peft.names import PREFIX, NameMap
from mindpet.peft.passport import check_base, fingerprint
from mindpet.peft.plan import is_from_weight
from mindpet.peft.state import check_finite, take_base_layers
from mindpet.utils.files import together
from mindpet.utils.parse import read_json
from mindpet.utils.quote import quote
from mindpet.utils.tensors import TYPES, TensorFile, write_tensors
from mindpet.utils.validate import is_int

INDEX = "model.safetensors.index.json"
FLOATS = {TYPES[code].name: TYPES[code] for code in ("F16", "BF16", "F32", "F64")}
# Files of weights are not copied: what is not merged would be mistaken for what is.
WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")


class Base:
    """The files of a base model, and their tensors by name.

    Args:
        path (str): a .ckpt or .safetensors file, or a folder of .safetensors files.

    Raises:
        FileNotFoundError, CheckpointError: there is nothing to read, or it is damaged; a tensor is there twice.
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
        counts = collections.Counter(name for shard in self.shards.values() for name in shard.shapes)
        double = [name for name, count in counts.items() if count > 1]
        if double:
            raise CheckpointError(f"{path}: in more than one of its files: {quote(double)}.")
        index = self.path / INDEX
        lacking = [name for name in _weight_map(index) if name not in counts] if index.is_file() else []
        if lacking:
            raise CheckpointError(f"{path}: the index has {', '.join(map(quote, lacking[:9]))}, its files have not.")
        self.where = {name: shard for shard in self.shards.values() for name in shard.shapes}
        self.shapes = {name: shard.shapes[name] for name, shard in self.where.items()}
        self.dtypes = {name: shard.dtypes[name] for name, shard in self.where.items()}

    def read(self, name):
        """A tensor."""
        return self.where[name].read(name)


def _files_of(folder):
    """The files of weights in a folder: those in its index, or `model.safetensors`, or all that end like it."""
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors in this folder.")
    return files


def _weight_map(index):
    """The dict of tensor -> file in an index, whose files are in its folder or below."""
    content = read_json(index, CheckpointError)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index}: 'weight_map' must be an object of names of files, but is {quote(found)}.")
    names = {name: pathlib.PurePosixPath(name) for name in found.values()}
    wrong = [name for name, path in names.items() if path.is_absolute() or ".." in path.parts or str(path) != name]
    wrong += [name for name, path in names.items() if path.suffix != ".safetensors" and name not in wrong]
    if wrong:
        raise CheckpointError(
            f"{index}: must name .safetensors files in its folder or below, but names {quote(sorted(wrong))}."
        )
    return found


class _Checkpoint:
    """A .ckpt file, with the interface of a TensorFile; MindSpore reads it as a whole."""

    def __init__(self, path):
        self.metadata, self.values = None, read_delta(path)
        self.shapes = {name: value.shape for name, value in self.values.items()}
        self.dtypes = {name: value.dtype for name, value in self.values.items()}

    def read(self, name):
        """A tensor."""
        return self.values[name]


def merge(base, adapter, output, config=None, name_map=None, progressbar=True, force=False):
    """Fold a LoRA adapter into the files of its base, one tensor in memory at a time (a .ckpt is read as a whole).

    What comes out is like the base: a folder with the same files, or a file of the same kind.

    Args:
        base (str): a .ckpt or .safetensors file, or a folder of .safetensors files and what belongs to them.
        adapter (str): a folder of Hugging Face PEFT or mindpet, or a delta file of mindpet.
        output (str): must not exist; of a file, with the same ending as the base.
        config (PeftConfig): of a delta file. Default: None.
        name_map (NameMap): from the base's names to those of the adapter. Default: None, see `NameMap`.
        progressbar (bool): whether to show progress, on a terminal. Default: True.
        force (bool): whether to merge an adapter that was trained on another base, or whose files are not those of
            its passport. Default: False.

    Returns:
        list of MergedLayer.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing or in the way.
        CheckpointError, ConfigError, NoMatchError: a file is damaged; the adapter's tensors are not those that its
            configuration says, see `read_adapter`; it was trained on another base.
        MergeError: the method cannot be merged; a tensor has no place in the base, all are listed; a weight would hold
            NaN or infinite numbers. Nothing is written.
    """
    output, names = pathlib.Path(output), name_map or NameMap()
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output}: exists already.")
    files = Base(base)
    wrong = output.suffix in (".ckpt", ".safetensors") if files.path.is_dir() else output.suffix != files.path.suffix
    if wrong:
        raise MergeError(
            f"'output' must be {'a folder' if files.path.is_dir() else 'a file that ends in ' + files.path.suffix}, as "
            f"the base is, but got {str(output)!r}."
        )
    config, tensors, passport = read_adapter(adapter, config, names, force)
    if not isinstance(config, LoraConfig):
        raise MergeError(f"{adapter}: {config.peft_type.value} cannot be folded into weights.")
    tensors, config = names.fuse(tensors, config)
    places = Places(files, names, tensors)
    deltas, whole = assign_places(adapter, tensors, config, files, places)
    if not force:
        check_base(adapter, passport, _BaseValues(files, places, names, passport))
        check_finite(adapter, whole, files.dtypes)
    lacking = places.lacking(config, {entry["path"] for entry in deltas.values()})
    if lacking:
        warnings.warn(
            f"{adapter}: 'target_modules' means these layers of the base, too, but there is nothing for them: "
            f"{quote(lacking)}.",
            stacklevel=2,
        )
    report = []

    def merged(shard, name):
        value = whole[name].astype(shard.dtypes[name]) if name in whole else shard.read(name)
        return _fold(name, value, config, deltas[name], report) if name in deltas else value

    new = {name: value for name, value in whole.items() if name not in files.shapes}
    last = list(files.shards)[-1]
    total = sum(len(shard.shapes) for shard in files.shards.values()) + len(new)
    with tqdm(total=total, desc="merging", unit="tensor", disable=None if progressbar else True) as bar:
        if not files.path.is_dir():
            _write_shard(output, files.shards[last], new, merged, bar)
            return report
        inside = {path.relative_to(files.path): shard for path, shard in files.shards.items()}
        others = [path for path in files.path.iterdir() if path.is_file() and path.suffix not in WEIGHTS]
        with together(output, (*map(str, inside), *(path.name for path in others))) as folder:
            for path, shard in inside.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                _write_shard(folder / path, shard, new if shard is files.shards[last] else {}, merged, bar)
            _copy_others(others, folder, new, last.relative_to(files.path))
    return report


class Places:
    """Where the tensors of an adapter are in a base, whose names may begin otherwise: all of them alike.

    Args:
        files (Base): the base.
        names (NameMap): from the base's names to those of the adapter.
        tensors (dict): key -> numpy.ndarray, of the adapter.

    Attributes:
        start (tuple): what the adapter's names begin with, and what the base's begin with in its place.

    Raises:
        MergeError: the adapter fits several places.
    """

    def __init__(self, files, names, tensors):
        self.known, self._shapes = {}, files.shapes
        for name in files.shapes:
            self.known.setdefault(names.to_torch(name), []).append(name)
        deltas = (LORA_KEY.fullmatch(key) for key in tensors)
        paths = list(dict.fromkeys(f"{match['path'][len(PREFIX) :]}.weight" for match in deltas if match))
        self.start = ("", "")
        starts = [] if any(path in self.known for path in paths) else next(filter(None, map(self._starts, paths)), [])
        hits = {start: sum(self._name(path, start) in self.known for path in paths) for start in starts}
        best = [start for start in starts if hits[start] == max(hits.values())]
        if len(best) > 1:
            found = [self._name(path, start) for start in best for path in paths if self._name(path, start)]
            raise MergeError(f"it cannot be told which tensor of the base {paths[0]} is: one of {quote(found)}.")
        self.start = best[0] if best else self.start

    def _starts(self, path):
        """The pairs of beginnings with which a path is in the base."""
        parts = path.split(".")
        ends = (".".join(parts[number:]) for number in range(1, len(parts) - 1))
        shorter = [(path[: -len(end)], "") for end in ends if end in self.known]
        return shorter + [("", name[: -len(path)]) for name in self.known if name.endswith(f".{path}")]

    def _name(self, path, start):
        cut, put = start
        return put + path[len(cut) :] if path.startswith(cut) else None

    def new(self, path):
        """The name that a tensor gets which the base does not have."""
        return self._name(path, self.start) or path

    def lacking(self, config, paths):
        """The layers of the base that a configuration means by their names, beside those at `paths`."""
        if config.target_modules == ALL_LINEAR or config.layers_to_transform is not None:
            return []  # the names do not tell
        cut, put = self.start
        paths = {
            cut + name[len(put) : -len(".weight")]
            for name, own in self.known.items()
            if name.startswith(put) and name.endswith(".weight") and len(self._shapes[own[0]]) > 1
        } - paths
        return sorted(
            path
            for path in paths
            if _is_named(config.target_modules, path)
            and not _is_named(config.exclude_modules, path)
            and not in_modules_to_save(f"{path}.weight", config)
        )

    def find(self, path):
        """The name in the base, or None.

        Raises:
            MergeError: several tensors of the base are called so.
        """
        found = self.known.get(self._name(path, self.start), ())
        if len(found) > 1:
            raise MergeError(f"several tensors of the base are {path}: {quote(found)}.")
        return found[0] if found else None


def _is_named(entries, path):
    """Whether `target_modules` or the like, that is not 'all-linear', means a path."""
    if isinstance(entries, str):
        return re.fullmatch(entries, path) is not None
    return any(ends_with(path, entry) for entry in entries or ())


class _BaseValues(collections.abc.Mapping):
    """The base's values by the names of an adapter's passport, and in the types there: files are cast when loaded."""

    def __init__(self, files, places, names, passport):
        self._files, self._places, self._names = files, places, names
        self._prints = passport.get("base", {}).get("parameters", {})

    def __getitem__(self, name):
        own = self._places.find(self._names.to_torch(name))
        if own is None:
            raise KeyError(name)
        value, expected = self._files.read(own), self._prints[name]
        dtype = expected.rpartition(" ")[0].rpartition(" ")[2]
        if value.dtype.name in FLOATS:
            with np.errstate(over="ignore"):
                value = value.astype(FLOATS.get(dtype, value.dtype))
        if value.ndim == 2 and fingerprint(value) != expected and fingerprint(value.T) == expected:
            return value.T  # a linear layer may have its weight the other way up in the network
        return value

    def __contains__(self, name):
        return self._places.find(self._names.to_torch(name)) is not None

    def __iter__(self):
        return iter(self._prints)

    def __len__(self):
        return len(self._prints)


def assign_places(adapter, tensors, config, files, places):
    """Which tensor of the base each tensor of an adapter goes to.

    Args:
        adapter (str): for the message.
        tensors (dict): key -> numpy.ndarray, of the adapter; weights of the base itself are taken out.
        config (LoraConfig): of the adapter.
        files (Base): the base.
        places (Places): of the adapter in the base.

    Returns:
        tuple: dict of name in the base -> keywords of `fold_lora`, 'path', 'embedding' and 'kind'; dict of name
        -> whole value.

    Raises:
        CheckpointError: the adapter has other weights of the base than this one.
        MergeError: some have no place, another's, or another shape; all are listed.
    """
    deltas, whole, problems, owners = {}, {}, [], {}
    _take_base_layers(adapter, tensors, files, places)
    for key, value in tensors.items():
        match = LORA_KEY.fullmatch(key)
        argument = FOLD[LORA_NAMES[match["name"]]] if match else "whole"
        path = match["path"][len(PREFIX) :] if match else key[len(PREFIX) :].replace(".base_layer.", ".")
        own = path if not match else f"{path}.{'bias' if argument == 'bias' else 'weight'}"
        name = places.find(own)
        if name is None and not match and in_modules_to_save(own, config):
            name = places.new(own)
            if name in files.shapes:
                problems.append(f"{key}: the base has another tensor {name}")
        elif name is None:
            problems.append(f"{key}: no tensor of the base is called {own}")
            continue
        elif files.dtypes[name].kind in "iubc":
            problems.append(f"{key}: {name} holds {files.dtypes[name].name} in the base, not floating-point numbers")
        elif not match and files.shapes[name] != value.shape:
            problems.append(f"{key}: {list(value.shape)}, but {name} is {list(files.shapes[name])}")
        if owners.setdefault((name, argument), key) != key:
            problems.append(f"{key}: {owners[name, argument]} is for {name}, too")
        if not match:
            whole[name] = value
            continue
        entry = deltas.setdefault(name, {"path": path})
        entry[argument] = value.astype(np.float32)
        entry["embedding"] = entry.get("embedding", False) or "embedding" in match["name"]
    both = [name for name, entry in deltas.items() if "lora_a" in entry and name in whole]
    problems += [f"{name}: has a delta, and is in the adapter as a whole" for name in both]
    if not problems:
        problems = _orient(deltas, files, config) + _tied(deltas, files)
    if problems:
        raise MergeError("the adapter does not fit the base:\n  " + "\n  ".join(problems))
    return deltas, whole


def _take_base_layers(adapter, tensors, files, places):
    """Take weights of the base out of an adapter's tensors, after a look whether they are those of this base."""
    ending, weights = ".base_layer.weight", {}
    for key in [key for key in tensors if key.endswith(ending)]:
        path = key[len(PREFIX) : -len(ending)]
        name = places.find(f"{path}.weight")
        if name is not None:
            weights[path] = files.read(name).astype(tensors[key].dtype)
    take_base_layers(adapter, tensors, weights)


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
    content = read_json(path, CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object, but holds {quote(content)}.")
    names = str(content.get("architectures"))
    has_head = "LM" in names or "PreTraining" in names
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


def _copy_others(paths, folder, new, last):
    """Copy what is beside the weights: configuration, tokenizer; the index learns of new tensors, in the last file."""
    for path in paths:
        shutil.copy(path, folder)
    index = folder / INDEX
    if new and index.is_file():
        content = read_json(index, CheckpointError)
        content["weight_map"].update(dict.fromkeys(new, last.as_posix()))
        metadata = content.get("metadata")
        if isinstance(metadata, dict) and is_int(metadata.get("total_size")):
            metadata["total_size"] += sum(value.nbytes for value in new.values())
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

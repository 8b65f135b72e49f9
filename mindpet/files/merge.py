"""Folding an adapter into the files of its base, without a network."""

import collections
import collections.abc
import json
import pathlib
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import numpy as np
from tqdm import tqdm

from mindpet.delta._base import Delta
from mindpet.delta._config import PeftConfig
from mindpet.delta.registry import method_of
from mindpet.errors import CheckpointError, MergeError
from mindpet.files.adapter import check_finite, take_base_layers
from mindpet.files.coded import PARTS, CodedFile, open_tensors
from mindpet.files.convert import in_modules_to_save, read_adapter, read_delta, write_delta
from mindpet.files.keys import base_name, parse_keys, tied_keys
from mindpet.files.names import PREFIX, NameMap
from mindpet.files.passport import check_base, fingerprint
from mindpet.files.tensors import TYPES, write_tensors
from mindpet.network.kinds import LayerKind
from mindpet.network.match import ALL_LINEAR, names_module
from mindpet.utils.files import together
from mindpet.utils.hints import Arrays, PathLike, Shape
from mindpet.utils.parse import read_json
from mindpet.utils.quote import quote
from mindpet.utils.validate import is_int

INDEX = "model.safetensors.index.json"
FLOATS = {TYPES[code].name: TYPES[code] for code in ("F16", "BF16", "F32", "F64")}
# Files of weights are not copied: what is not merged would be mistaken for what is.
WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class MergedLayer:
    """What storing a merged weight costs.

    Attributes:
        path: of the layer.
        dtype: that the weight is stored in.
        largest_change: largest absolute change of the weight, in float32.
        largest_error: largest absolute difference between the stored weight and the one in float32.
        unchecked: why the merged layer could not be compared with the layer and its deltas; None if it was.
    """

    path: str
    dtype: str
    largest_change: float
    largest_error: float
    unchecked: Optional[str] = None

    def __str__(self) -> str:
        unchecked = f", not probed: {self.unchecked}" if self.unchecked else ""
        return (
            f"{self.path}: {self.dtype}, change up to {self.largest_change:.3g}, error up to {self.largest_error:.3g}"
            f"{unchecked}"
        )


def describe(path: str, stored: np.ndarray, before: np.ndarray, after: np.ndarray, kind: LayerKind) -> MergedLayer:
    """The MergedLayer of a merged weight."""
    back = kind.to_matrix(stored.astype(np.float32))
    return MergedLayer(path, stored.dtype.name, float(np.abs(after - before).max()), float(np.abs(back - after).max()))


class Base:
    """The files of a base model, and their tensors by name; quantised weights are read as weights.

    Args:
        path: a .ckpt or .safetensors file, or a folder of .safetensors files.

    Raises:
        FileNotFoundError, CheckpointError: there is nothing to read, or it is damaged; a tensor is there twice.
    """

    def __init__(self, path: PathLike):
        self.path = pathlib.Path(path)
        if self.path.is_dir():
            files = _files_of(self.path)
        else:
            files = [self.path]
            if not self.path.is_file():
                raise FileNotFoundError(f"{path}: no such file or folder.")
        self.shards = {file: _Checkpoint(file) if file.suffix == ".ckpt" else open_tensors(file) for file in files}
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

    def read(self, name: str) -> np.ndarray:
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
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{index}: 'weight_map' must be an object of names of files, but is {quote(files)}.")
    names = {name: pathlib.PurePosixPath(name) for name in files.values()}
    wrong = [name for name, path in names.items() if path.is_absolute() or ".." in path.parts or str(path) != name]
    wrong += [name for name, path in names.items() if path.suffix != ".safetensors" and name not in wrong]
    if wrong:
        raise CheckpointError(
            f"{index}: must name .safetensors files in its folder or below, but names {quote(sorted(wrong))}."
        )
    return files


class _Checkpoint:
    """A .ckpt file, with the interface of a TensorFile; MindSpore reads it as a whole."""

    def __init__(self, path):
        self.metadata, self.values = None, read_delta(path)
        if any(value.dtype.kind in "iu" and f"{name}_scale" in self.values for name, value in self.values.items()):
            raise CheckpointError(f"{path}: quantised weights are read from .safetensors files alone.")
        self.shapes = {name: value.shape for name, value in self.values.items()}
        self.dtypes = {name: value.dtype for name, value in self.values.items()}

    def read(self, name):
        """A tensor."""
        return self.values[name]


def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    config: Optional[PeftConfig] = None,
    name_map: Optional[NameMap] = None,
    progressbar: bool = True,
    force: bool = False,
) -> list[MergedLayer]:
    """Fold an adapter into the files of its base, one tensor in memory at a time (a .ckpt is read as a whole).

    What comes out is like the base: a folder with the same files, or a file of the same kind.

    Args:
        base: a .ckpt or .safetensors file, or a folder of .safetensors files and what belongs to them.
        adapter: a folder of Hugging Face PEFT or mindpet, or a delta file of mindpet.
        output: must not exist; of a file, with the same ending as the base.
        config: of a delta file. Default: None.
        name_map: from the base's names to those of the adapter. Default: None, see `NameMap`.
        progressbar: whether to show progress, on a terminal. Default: True.
        force: whether to merge an adapter that was trained on another base, or whose files are not those of its
            passport. Default: False.

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
    lasting = [part.peft_name for part in config.parts if not method_of(part).mergeable]
    if lasting:
        raise MergeError(f"{adapter}: {' and '.join(lasting)} cannot be folded into weights.")
    tensors, config = names.fuse(tensors, config)
    weights = [f"{key.path}.weight" for key in parse_keys(tensors, config).values() if key.path is not None]
    places = Places(files, names, weights or [base_name(key, config) for key in tensors])
    ties = {key: parse_keys([key], config)[key].path for key in tied_keys(tensors, config)}
    absent = {key for key, path in ties.items() if places.find(f"{path}.weight") is None}  # the base has it once
    tensors = {key: value for key, value in tensors.items() if key not in absent}
    deltas, whole = assign_places(adapter, tensors, config, files, places)
    if not force:
        check_base(adapter, passport, _BaseValues(files, places, names, passport))
        check_finite(adapter, whole, files.dtypes)
    lacking = places.lacking(config, {layer.path for layer, _ in deltas.values()})
    if lacking:
        warnings.warn(
            f"{adapter}: 'target_modules' means these layers of the base, too, but there is nothing for them: "
            f"{quote(lacking)}.",
            stacklevel=2,
        )
    report = []

    def merged(shard, name):
        value = whole[name].astype(shard.dtypes[name]) if name in whole else shard.read(name)
        return _fold(name, value, *deltas[name], report) if name in deltas else value

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
        files: of the base.
        names: from the base's names to those of the adapter.
        paths: of the weights that the adapter changes.

    Attributes:
        start (tuple): what the adapter's names begin with, and what the base's begin with in its place.

    Raises:
        MergeError: the adapter fits several places.
    """

    def __init__(self, files: Base, names: NameMap, paths: Sequence[str]):
        self.known, self._shapes = {}, files.shapes
        for name in files.shapes:
            self.known.setdefault(names.to_torch(name), []).append(name)
        self.start = ("", "")
        starts = [] if any(path in self.known for path in paths) else next(filter(None, map(self._starts, paths)), [])
        hits = {start: sum(self._name(path, start) in self.known for path in paths) for start in starts}
        best = [start for start in starts if hits[start] == max(hits.values())]
        if len(best) > 1:
            candidates = [self._name(path, start) for start in best for path in paths if self._name(path, start)]
            raise MergeError(f"it cannot be told which tensor of the base {paths[0]} is: one of {quote(candidates)}.")
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

    def new(self, path: str) -> str:
        """The name that a tensor gets which the base does not have."""
        return self._name(path, self.start) or path

    def lacking(self, config: PeftConfig, paths: set[str]) -> list[str]:
        """The layers of the base that a configuration means by their names, beside those at `paths`."""
        # With 'all-linear' and numbers the names do not tell.
        parts = [part for part in config.parts if getattr(part, "target_modules", None) not in (None, ALL_LINEAR)]
        parts = [part for part in parts if part.layers_to_transform is None]
        cut, put = self.start
        paths = {
            cut + name[len(put) : -len(".weight")]
            for name, names in self.known.items()
            if name.startswith(put) and name.endswith(".weight") and len(self._shapes[names[0]]) > 1
        } - paths
        return sorted(
            path
            for path in paths
            if any(names_module(p.target_modules, path) and not names_module(p.exclude_modules, path) for p in parts)
            and not in_modules_to_save(f"{path}.weight", config)
        )

    def find(self, path: str) -> Optional[str]:
        """The name in the base, or None.

        Raises:
            MergeError: several tensors of the base are called so.
        """
        names = self.known.get(self._name(path, self.start), ())
        if len(names) > 1:
            raise MergeError(f"several tensors of the base are {path}: {quote(names)}.")
        return names[0] if names else None


class _BaseValues(collections.abc.Mapping):
    """The base's values by the names of an adapter's passport, and in the types there: files are cast when loaded."""

    def __init__(self, files, places, names, passport):
        self._files, self._places, self._names = files, places, names
        self._prints = passport.get("base", {}).get("parameters", {})

    def __getitem__(self, name):
        stored = self._find(name)
        if stored is None:
            raise KeyError(name)
        if isinstance(stored, tuple):
            file, key = stored
            return file.raw(key)
        value, expected = self._files.read(stored), self._prints[name]
        dtype = expected.rpartition(" ")[0].rpartition(" ")[2]
        if value.dtype.name in FLOATS:
            with np.errstate(over="ignore"):
                value = value.astype(FLOATS.get(dtype, value.dtype))
        if value.ndim == 2 and fingerprint(value) != expected and fingerprint(value.T) == expected:
            return value.T  # a linear layer may have its weight the other way up in the network
        return value

    def _find(self, name):
        """The name in the base, or None; of what the base has as codes, and had when it was trained, file and name."""
        was_coded = self._prints[name].rpartition(" ")[0].endswith("int8")
        for end in PARTS.values():
            if not name.endswith(end):
                continue
            stored = self._places.find(self._names.to_torch(name[: len(name) - len(end)]))
            file = self._files.where.get(stored)
            if isinstance(file, CodedFile) and stored in file.codes and (end or was_coded):
                return file, f"{stored}{end}"
            if stored is not None and not end:
                return stored
        return None

    def __contains__(self, name):
        return self._find(name) is not None

    def __iter__(self):
        return iter(self._prints)

    def __len__(self):
        return len(self._prints)


@dataclass
class FileDelta:
    """A delta of an adapter's file, and the layer in the base that it is for.

    Attributes:
        path: of the layer, as the adapter has it.
        kinds: what the layer may be.
        config: of the method.
        values: by name, float32.
        weight: name of the layer's weight in the base.
        cls: the Delta.
        arguments: delta arguments.
        kind: of the layer.
    """

    path: str
    kinds: set[str]
    config: PeftConfig
    values: Arrays = field(default_factory=dict)
    weight: Optional[str] = None
    cls: Optional[type[Delta]] = None
    arguments: Optional[dict[str, Any]] = None
    kind: Optional[LayerKind] = None

    def fits(self, stored: Shape, turned: bool) -> bool:
        """Whether the values can be of a layer whose weight has a shape in the base, or the one the other way round."""
        return self.cls.fits(stored[::-1] if turned else stored, self.values, **self.arguments)


def assign_places(
    adapter: PathLike, tensors: Arrays, config: PeftConfig, files: Base, places: Places
) -> tuple[dict[str, tuple[FileDelta, bool]], Arrays]:
    """Which tensor of the base each tensor of an adapter goes to.

    Args:
        adapter: for the message.
        tensors: of the adapter, by key; weights of the base itself are taken out.
        config: of the adapter.
        files: of the base.
        places: of the adapter in the base.

    Returns:
        By the name in the base: the delta, and whether it is for the layer's weight and not its bias; and the whole
        values.

    Raises:
        CheckpointError: the adapter has other weights of the base than this one.
        MergeError: some have no place, another's, or another shape; all are listed.
    """
    layers, shared, whole, problems, owners = {}, {}, {}, [], {}
    _take_base_layers(adapter, tensors, files, places)
    keys = parse_keys(tensors, config)
    for key, value in tensors.items():
        if key in keys:
            path, name, kinds, part = keys[key]
            if path is None:
                shared.setdefault(part.peft_name, {})[name] = value.astype(np.float32)
                continue
            layer = layers.setdefault(path, FileDelta(path, set(kinds), part))
            layer.values[name] = value.astype(np.float32)
            layer.kinds.intersection_update(kinds)
            continue
        path = base_name(key, config)
        name = places.find(path)
        if name is None and in_modules_to_save(path, config):
            name = places.new(path)
            if name in files.shapes:
                problems.append(f"{key}: the base has another tensor {name}")
        elif name is None:
            problems.append(f"{key}: no tensor of the base is called {path}")
            continue
        elif files.shapes[name] != value.shape:
            problems.append(f"{key}: {list(value.shape)}, but {name} is {list(files.shapes[name])}")
        if owners.setdefault(name, key) != key:
            problems.append(f"{key}: {owners[name]} is for {name}, too")
        whole[name] = value
    for layer in layers.values():
        layer.values.update(shared.get(layer.config.peft_name, {}))
        layer.weight = places.find(f"{layer.path}.weight")
        if layer.weight is None:
            problems.append(f"{layer.path}: no tensor of the base is called {layer.path}.weight")
        elif owners.setdefault(layer.weight, layer.path) != layer.path:
            problems.append(f"{layer.path}: {owners[layer.weight]} is for {layer.weight}, too")
    if not problems:
        problems = _find_kinds(list(layers.values()), files) + _tied(layers.values(), files)
    deltas = {}
    for layer in layers.values() if not problems else ():
        deltas[layer.weight] = (layer, True)
        bias, features = places.find(f"{layer.path}.bias"), files.shapes[layer.weight][-layer.kind.transposed]
        changes = layer.cls.folds_bias(**layer.arguments)
        if bias is not None and changes:
            deltas[bias] = (layer, False)
            if bias in whole:
                problems.append(f"{bias}: has a delta, and is in the adapter as a whole")
        elif changes and layer.cls.fold_bias(np.zeros(features, np.float32), layer.values, **layer.arguments).any():
            problems.append(f"{layer.path}: no tensor of the base is called {layer.path}.bias")
    problems += [
        f"{name}: holds {files.dtypes[name].name} in the base, not floating-point numbers"
        for name in (*deltas, *whole)
        if name in files.dtypes and files.dtypes[name].kind in "iubc"
    ]
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


def _find_kinds(layers, files):
    """Find of each layer what it is and how its weight is stored; returns what does not fit.

    A linear weight that is not square tells by its shape whether it is `(out, in)` or `(in, out)`, and so tells it of
    the square ones.
    """
    problems, turned = [], set()
    for layer in layers:
        stored = files.shapes[layer.weight]
        names = ("linear", "embedding") if len(stored) == 2 else (f"conv{len(stored) - 2}d",)
        name = next((name for name in names if name in layer.kinds), None)
        if name is None:
            problems.append(f"{layer.weight}: {list(stored)} in the base, but the adapter is for {sorted(layer.kinds)}")
            continue
        layer.kind, layer.cls = LayerKind(name), method_of(layer.config).deltas[name]
        layer.arguments = layer.config.delta_arguments(layer.path)
        layer.values.update(layer.cls.constants(**layer.arguments))
        if name == "linear" and stored[0] != stored[1]:
            turned.update(way for way in (False, True) if layer.fits(stored, way))
    way = turned.pop() if len(turned) == 1 else None
    for layer in (layer for layer in layers if layer.kind):
        stored = files.shapes[layer.weight]
        if layer.kind.name == "linear":
            said = getattr(layer.config, "fan_in_fan_out", False)
            layer.kind = replace(layer.kind, fan_in_fan_out=said if way is None else way)
        if not layer.fits(stored, layer.kind.transposed):
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in layer.values.items() if value.ndim)
            problems.append(f"{layer.weight}: {list(stored)} in the base, but the adapter has {shapes}")
    return problems


def _tied(layers, files):
    """A line for each embedding whose table is the head's weight too, which would change along, and must not.

    A Hugging Face model with a language model head has them tied unless its configuration says otherwise.
    """
    holders = [layer for layer in layers if layer.kind and not layer.cls.tied_deltas]
    embeddings = [layer.weight for layer in holders if layer.kind.name == "embedding"]
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


def _fold(name, value, layer, is_weight, report):
    """A merged tensor."""
    base = value.astype(np.float32)
    if is_weight:
        before = layer.kind.to_matrix(base)
        values = layer.values
        if not set(layer.cls.start_names(**layer.arguments)) <= set(values):
            values = {**layer.cls.start(before, values, **layer.arguments), **values}
        after = layer.cls.fold(before, values, **layer.arguments)
        result = layer.kind.from_matrix(after, value.shape).astype(value.dtype)
        report.append(describe(name, result, before, after, layer.kind))
    else:
        result = layer.cls.fold_bias(base, layer.values, **layer.arguments).astype(value.dtype)
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

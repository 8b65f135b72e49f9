"""Quantising the files of a base, tensor by tensor, without a network."""

import functools
import json
import pathlib
import shutil
from typing import Optional

import numpy as np
from tqdm import tqdm

from mindpet.errors import CheckpointError, ConfigError, NoMatchError
from mindpet.files.coded import DTYPES, PARTS, CodedFile, types_as_text
from mindpet.files.merge import INDEX, WEIGHTS, Base
from mindpet.files.names import EMBEDDING
from mindpet.files.tensors import TensorFile, write_tensors
from mindpet.network.match import ALL_LINEAR, HEADS, names_module
from mindpet.network.quantize import QuantizationConfig, QuantizedLayer
from mindpet.utils.files import together
from mindpet.utils.hints import PathLike
from mindpet.utils.parse import read_json
from mindpet.utils.quantization import quantize_rows

ENDING = ".weight"


def quantize_files(
    base: PathLike, output: PathLike, config: Optional[QuantizationConfig] = None, progressbar: bool = True
) -> list[QuantizedLayer]:
    """Quantise the linear weights in the files of a base, some rows in memory at a time.

    Weights are the tensors `(out, in)` that are called `PATH.weight`. With 'all-linear' these are all matrices of
    floating-point numbers but those of embeddings and output layers, which the names tell. What comes out is like the
    base, and is loaded into a network after `quantize` with the same configuration.

    Args:
        base: a .safetensors file, or a folder of .safetensors files and what belongs to them.
        output: must not exist; of a file it ends in .safetensors.
        config: which layers, and how; of the field `compute_dtype` nothing is used. Default: None, for a
            QuantizationConfig.
        progressbar: whether to show progress, on a terminal. Default: True.

    Returns:
        For each weight what it costs.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing or in the way.
        CheckpointError: a file is damaged, quantised already, or no .safetensors.
        NoMatchError, ConfigError: an entry of the configuration matches nothing; a weight cannot be quantised; all is
            in the message, and nothing is written.
    """
    config, output = QuantizationConfig() if config is None else config, pathlib.Path(output)
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output}: exists already.")
    files = Base(base)
    _check_files(files, output)
    names = _chosen(files, config)
    report = []
    total = sum(len(shard.shapes) for shard in files.shards.values())
    with tqdm(total=total, desc="quantising", unit="tensor", disable=None if progressbar else True) as bar:
        if not files.path.is_dir():
            (shard,) = files.shards.values()
            _write(output, shard, names, config, report, bar)
            return report
        inside = {path.relative_to(files.path): shard for path, shard in files.shards.items()}
        others = [path for path in files.path.iterdir() if path.is_file() and path.suffix not in WEIGHTS]
        with together(output, (*map(str, inside), *(path.name for path in others))) as folder:
            for path, shard in inside.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                _write(folder / path, shard, names, config, report, bar)
            for path in others:
                shutil.copy(path, folder)
            _renew_index(folder, inside)
    return report


def _check_files(files, output):
    """Refuse what is no float safetensors, and an output of another kind."""
    if not all(isinstance(shard, (TensorFile, CodedFile)) for shard in files.shards.values()):
        raise CheckpointError(f"{files.path}: must be a .safetensors file, or a folder of some.")
    if any(isinstance(shard, CodedFile) for shard in files.shards.values()):
        raise CheckpointError(f"{files.path}: has quantised weights already.")
    if not files.path.is_dir() and output.suffix != ".safetensors":
        raise CheckpointError(f"{output}: must end in .safetensors.")


def _chosen(files, config):
    """The names of the tensors that are quantised."""
    weights = {
        name[: -len(ENDING)]: name
        for name, shape in files.shapes.items()
        if name.endswith(ENDING) and len(shape) == 2 and files.dtypes[name].kind not in "iub"
    }
    missing = [
        f"'{field}': no weight of a matrix is called {entry!r}"
        for field, entries in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules))
        for entry in ([entries] if isinstance(entries, str) else entries or ())
        if entry != ALL_LINEAR
        and not any(names_module(entry if isinstance(entries, str) else [entry], path) for path in weights)
    ]
    if missing:
        raise NoMatchError(f"{files.path}: {'; '.join(missing)}.")
    chosen = {
        name: path
        for path, name in weights.items()
        if (_is_usual(path) if config.target_modules == ALL_LINEAR else names_module(config.target_modules, path))
        and not names_module(config.exclude_modules, path)
    }
    problems = [f"{name} {problem}" for name in chosen if (problem := config.form.problem(files.shapes[name]))]
    problems += [
        f"{name}{end} is there already"
        for name in chosen
        for end in PARTS.values()
        if end and f"{name}{end}" in files.shapes
    ]
    if not chosen:
        problems = ["there is no weight of a linear layer"]
    if problems:
        raise ConfigError(f"{files.path}: {'; '.join(problems)}.")
    return chosen


def _is_usual(path):
    """Whether a matrix is of a linear layer that is no output layer, as far as its name tells."""
    return not EMBEDDING.search(path) and path.rsplit(".", 1)[-1] not in HEADS


def _write(path, shard, names, config, report, bar):
    """Write one file."""
    shapes, dtypes, kept = {}, {}, {}
    for name in shard.shapes:
        if name not in names:
            shapes[name], dtypes[name] = shard.shapes[name], shard.dtypes[name]
            continue
        for part, (shape, dtype) in config.form.shapes(shard.shapes[name]).items():
            shapes[f"{name}{PARTS[part]}"], dtypes[f"{name}{PARTS[part]}"] = shape, dtype

    def read(name):
        if name in kept:
            return kept.pop(name)
        bar.update()
        if name not in names:
            return shard.read(name)
        arrays, *errors = _quantize(shard, name, config.form)
        size = int(np.prod(shard.shapes[name])) * shard.dtypes[name].itemsize
        after = sum(array.nbytes for array in arrays.values())
        report.append(QuantizedLayer(names[name], config.bits, size, after, *errors))
        kept.update({f"{name}{PARTS[part]}": array for part, array in arrays.items()})
        return kept.pop(name)

    coded = {name: shard.dtypes[name] for name in shard.shapes if name in names}
    metadata = {"format": "pt", **shard.metadata, **({DTYPES: types_as_text(coded)} if coded else {})}
    write_tensors(path, shapes, dtypes, read, metadata)


def _quantize(shard, name, form):
    """The arrays of a weight, and its errors."""
    try:
        return quantize_rows(functools.partial(shard.read_rows, name), shard.shapes[name], form, errors=True)
    except ValueError as error:
        raise ConfigError(f"{shard.path}: {name}: {error}; nothing was written.") from error


def _renew_index(folder, files):
    """Have an index tell of the tensors that are in the files now."""
    index = folder / INDEX
    if not index.is_file():
        return
    content = read_json(index, CheckpointError)
    written = {path: TensorFile(folder / path) for path in files}
    content["weight_map"] = {name: path.as_posix() for path, file in written.items() for name in file.shapes}
    if isinstance(content.get("metadata"), dict):
        sizes = [
            int(np.prod(shape)) * file.dtypes[name].itemsize
            for file in written.values()
            for name, shape in file.shapes.items()
        ]
        content["metadata"]["total_size"] = sum(sizes)
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

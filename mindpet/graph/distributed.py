"""Checkpoints of a network that is cut over ranks: put together, and cut for other ranks."""

import functools
import math
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.communication import GlobalComm, get_group_size, get_rank

from mindpet.errors import CheckpointError
from mindpet.files.checkpoints import read_checkpoint
from mindpet.network.values import digest
from mindpet.utils.hints import PathLike
from mindpet.utils.validate import Checker

SUFFIXES = (".ckpt", ".safetensors")
FILE_NAME = re.compile(  # as MindSpore gives it
    r"(?P<prefix>.*?)(?:_(?P<run>\d+))?-(?P<epoch>\d+)_(?P<step>\d+)(?P<breakpoint>_breakpoint)?\.(?:ckpt|safetensors)"
)
UNKNOWN = (  # of a parameter: where its slices belong
    " (the strategy file lacks it, for it did not train when the network was compiled; see docs/parallel.md)"
)
SUM_OF_GRADIENTS = "accu_grads."  # in front of a parameter's name, see `_missing`
STRATEGY_FOLDER = "strategy"  # beside the folders of the ranks


def this_rank() -> int:
    """The rank of this process."""
    return get_rank() if GlobalComm.INITED else ms.get_auto_parallel_context("global_rank")


def place_among_ranks() -> tuple[int, int]:
    """The rank of this process and the number of ranks; in stand-alone mode it is one of its own."""
    if ms.get_auto_parallel_context("parallel_mode") == ms.ParallelMode.STAND_ALONE:
        return 0, 1
    return this_rank(), get_group_size() if GlobalComm.INITED else ms.get_auto_parallel_context("device_num")


def gather_delta(
    folder: PathLike, strategy: Optional[PathLike] = None, name: Optional[str] = None
) -> dict[str, Parameter]:
    """Put the slices of all ranks together.

    Args:
        folder: has a folder `rank_N` for each rank, as `TrainableParamsCheckPoint` writes them.
        strategy: MindSpore's strategy file of the run, or for several pipeline stages a folder with the file of each.
            Default: None, for the folder `strategy` in `folder`.
        name: of the file in each rank's folder. Default: None, for that of the last step which all ranks have, by the
            names that `TrainableParamsCheckPoint` gives.

    Returns:
        The whole Parameters by name, as `mindspore.load_checkpoint` returns them.

    Raises:
        TypeError: an argument is not a path.
        FileNotFoundError: the folder or the strategy does not exist.
        CheckpointError: the folder of a rank, or its file, is missing, surplus, empty or damaged; the names do not tell
            which file is the last; a rank lacks its slice of a parameter; ranks that hold the same slice have other
            values for it; all are listed.
    """
    folder, strategy = _paths("gather_delta", folder, strategy)
    with tempfile.TemporaryDirectory(prefix="mindpet-gather-") as work:
        strategy = _one_strategy(strategy, work)
        layouts = _layouts(strategy)
        files = _rank_files(folder, count_ranks(layouts), name)
        _check_slices(folder, files, layouts)
        for rank, file in enumerate(files):
            target = pathlib.Path(work, "slices", f"rank_{rank}", f"delta{file.suffix}")
            target.parent.mkdir(parents=True)
            target.symlink_to(file.resolve())
        format = files[0].suffix[1:]
        _transform(f"{work}/slices", f"{work}/whole", strategy, None, format, files)
        (whole,) = pathlib.Path(work, "whole").rglob(f"*.{format}")
        return read_checkpoint(whole)


def slice_delta(
    delta: Union[dict[str, Union[Tensor, Parameter]], PathLike], strategy: PathLike, folder: PathLike
) -> list[str]:
    """Cut a whole delta for the ranks of a run: the inverse of `gather_delta`.

    Args:
        delta: values by name, or a checkpoint file.
        strategy: MindSpore's strategy file of the run, or for several pipeline stages a folder with the file of each;
            `dry_run(..., strategy_ckpt_config={"save_file": ...})` writes one.
        folder: gets a file `delta.ckpt` in a folder `rank_N` for each rank; must be new or empty.

    Returns:
        The files in order of the ranks.

    Raises:
        TypeError: an argument is not a path, `delta` neither a dict of Tensors nor a path.
        FileNotFoundError: the file or the strategy does not exist.
        FileExistsError: `folder` is not empty.
        CheckpointError: a parameter is not in the strategy or cannot be cut by it; nothing is written.
    """
    whole = _read_whole(delta)
    folder, strategy = pathlib.Path(folder), pathlib.Path(strategy)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"slice_delta: 'folder' must be new or empty, but {folder} is not.")
    if not strategy.exists():
        raise FileNotFoundError(f"slice_delta: no strategy {strategy}.")
    with tempfile.TemporaryDirectory(prefix="mindpet-slice-") as work:
        strategy = _one_strategy(strategy, work)
        layouts = _layouts(strategy)
        _check_cuts(whole, layouts, strategy)
        source = pathlib.Path(work, "whole", "rank_0")
        source.mkdir(parents=True)
        ms.save_checkpoint([{"name": key, "data": value} for key, value in whole.items()], f"{source}/delta.ckpt")
        _transform(f"{work}/whole", f"{work}/slices", None, strategy, "ckpt", [delta if isinstance(delta, str) else ""])
        files = []
        for rank in range(count_ranks(layouts)):
            target = folder / f"rank_{rank}" / "delta.ckpt"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(f"{work}/slices/rank_{rank}/delta{rank}.ckpt", target)
            files.append(str(target))
        return files


def _paths(owner, folder, strategy):
    check = Checker(owner)
    check.require(isinstance(folder, (str, os.PathLike)), TypeError, "folder", folder, "a path")
    check.require(
        strategy is None or isinstance(strategy, (str, os.PathLike)), TypeError, "strategy", strategy, "a path"
    )
    check.done()
    folder = pathlib.Path(folder)
    strategy = pathlib.Path(strategy) if strategy else folder / STRATEGY_FOLDER
    for path in (folder, strategy):
        if not path.exists():
            raise FileNotFoundError(f"{owner}: {path} does not exist.")
    return folder, strategy


def _one_strategy(strategy, work):
    """A strategy as one file; those of several pipeline stages are merged."""
    if strategy.is_file():
        return str(strategy)
    files = sorted(file for file in strategy.iterdir() if file.suffix in (".ckpt", ".json"))
    if not files:
        raise CheckpointError(f"{strategy} has no strategy file (.ckpt or .json).")
    contents = {file.read_bytes() for file in files}
    if len(contents) == 1:
        return str(files[0])
    merged = f"{work}/strategy{files[0].suffix}"
    try:
        ms.merge_pipeline_strategys(str(strategy), merged)
    except Exception as error:  # MindSpore and protobuf each raise their own for a damaged file
        raise CheckpointError(f"{strategy} has a file that is not a strategy file: {error}") from error
    return merged


def _layouts(strategy):
    """Parameter -> MindSpore's layout. With several pipeline stages the names begin with the number of the stage."""
    try:
        layouts = ms.build_searched_strategy(strategy)
    except Exception as error:  # MindSpore and protobuf each raise their own for a damaged file
        raise CheckpointError(f"{strategy} is not a strategy file: {error}") from error
    if not layouts:
        raise CheckpointError(f"{strategy} is a strategy file without parameters.")
    return layouts


def layouts_of(strategy: PathLike) -> dict[str, Any]:
    """Parameter -> MindSpore's layout, of a strategy file or a folder of those of the pipeline stages."""
    with tempfile.TemporaryDirectory(prefix="mindpet-strategy-") as work:
        return _layouts(_one_strategy(pathlib.Path(strategy), work))


def count_ranks(layouts: dict[str, Any]) -> int:
    """The number of ranks that layouts are for."""
    stages = {match.group(1) for match in (re.match(r"(\d+)-", name) for name in layouts) if match}
    return _ranks_of_stage(layouts) * max(len(stages), 1)


def _ranks_of_stage(layouts):
    return math.prod(next(iter(layouts.values())).dev_matrix[0].dim)


def without_stage(name: str) -> str:
    """The name of a parameter without the number of the pipeline stage that MindSpore writes before it."""
    return re.sub(r"^\d+-", "", name)


def _rank_files(folder, ranks, name):
    """The file of each rank, in order."""
    folders = {path.name: path for path in folder.iterdir() if re.fullmatch(r"rank_\d+", path.name)}
    wanted = [f"rank_{rank}" for rank in range(ranks)]
    problems = [f"missing: {rank}" for rank in wanted if rank not in folders]
    problems += [f"surplus: {rank}" for rank in sorted(set(folders) - set(wanted))]
    contents = {
        rank: {file.name: file for file in folders[rank].iterdir() if file.suffix in SUFFIXES}
        for rank in wanted
        if rank in folders
    }
    if name is None and contents:
        name = _last_everywhere(folder, contents)
    for rank, files in contents.items():
        if name not in files:
            problems.append(f"missing: {rank}/{name or '*.ckpt'}")
        elif not files[name].stat().st_size:
            problems.append(f"empty: {rank}/{name}")
    if problems:
        raise CheckpointError(f"{folder} does not fit a strategy for {ranks} ranks:\n  " + "\n  ".join(problems))
    return [contents[rank][name] for rank in wanted]


def _last_everywhere(folder, contents):
    """The name of the file of the last step that all ranks have; if there is none, some name of the first rank.

    A run has one prefix, and each that is started again the next number behind it. Where the ranks have different runs,
    files with one name may be of two.

    Args:
        folder (Path): for the message.
        contents (dict): rank -> its files by name.

    Raises:
        CheckpointError: the names do not tell.
    """
    common = set.intersection(*map(set, contents.values()))
    names = sorted(set().union(*contents.values()))
    known = {name: match for name in names for match in [FILE_NAME.fullmatch(name)] if match}
    runs = {tuple(sorted({known[name]["run"] or "" for name in files if name in known})) for files in contents.values()}
    numbers = {int(match["run"] or 0) for match in known.values()}
    steps = {name: _position(known[name]) for name in common if name in known}
    last = [name for name, step in steps.items() if step == max(steps.values())]
    has_one_prefix = len({match["prefix"] for match in known.values()}) <= 1
    are_runs = len(numbers) == 1 or numbers == set(range(len(numbers)))  # and not a part of the prefix
    is_told = has_one_prefix and are_runs and len(runs) == 1 and len(last) == 1
    if is_told and set(steps) == common:
        return last[0]
    if len(common) <= 1 and len(runs) == 1:
        return next(iter(common), max(next(iter(contents.values())), default=None))
    each = [f"{rank}: {', '.join(sorted(files)[-20:])}" for rank, files in contents.items()]
    raise CheckpointError(
        f"{folder}: the names of the files do not tell which is the last that all ranks have; say it by 'name':\n  "
        + "\n  ".join(each)
    )


def _position(match):
    """Where a file's name stands in time."""
    return int(match["run"] or 0), int(match["epoch"]), int(match["step"]), bool(match["breakpoint"])


def _check_slices(folder, files, layouts):
    """Refuse files that lack a slice, and those in which ranks that hold the same slice have other bits for it."""
    holders = {}  # name -> ranks
    slices = {}  # name, place -> digest -> ranks
    stages = _by_name(layouts)
    for rank, file in enumerate(files):
        for name, value in read_checkpoint(file).items():
            content = f"{value.shape} {value.dtype} {digest(value.asnumpy())}"
            holders.setdefault(name, []).append(rank)
            slices.setdefault((name, _place(name, rank, stages.get(name))), {}).setdefault(content, []).append(rank)
    missing = [f"{name}: {_listed(ranks)}" for name, ranks in _missing(holders, len(files), stages).items()]
    differing = [
        f"{name}: {' / '.join(map(_listed, ranks.values()))}{'' if place else UNKNOWN}"
        for (name, place), ranks in slices.items()
        if len(ranks) > 1
    ]
    problems = {
        "ranks lack their slice of a parameter": missing,
        "ranks that hold the same slice have other values for it": differing,
    }
    messages = [f"{folder}: {what}:\n  " + "\n  ".join(lines) for what, lines in problems.items() if lines]
    if messages:
        raise CheckpointError("\n".join(messages))


def _listed(ranks):
    return ", ".join(f"rank_{rank}" for rank in ranks)


def _by_name(layouts):
    """Name of a parameter -> name with the number of a stage in front, or alone -> layout."""
    stages = {}
    for key, layout in layouts.items():
        stages.setdefault(without_stage(key), {})[key] = layout
    return stages


def _missing(holders, count, stages):
    """Name -> ranks without their slice of it.

    All ranks of a stage hold the same parameters. Of several stages that use one, MindSpore saves it in some. What
    trains in a pipeline it clones for the sums of the gradients (2.7 to 2.10), frozen parameters it does not: so it is
    told what is in no file at all, if the files are those of what trains.
    """
    size = _ranks_of_stage(next(iter(stages.values())))
    members = [range(first, first + size) for first in range(0, count, size)]
    missing = {}
    for name, ranks in holders.items():
        wanted = [rank for stage in members if not set(stage).isdisjoint(ranks) for rank in stage]
        missing[name] = sorted(set(wanted) - set(ranks))
    trained = {name for name in stages if SUM_OF_GRADIENTS + name in stages}
    for name in trained - set(holders) if trained & set(holders) else ():
        keys = stages[name].keys()
        missing[name] = [
            rank for number, stage in enumerate(members) if keys & {name, f"{number}-{name}"} for rank in stage
        ]
    return {name: ranks for name, ranks in sorted(missing.items()) if ranks}


def _place(name, rank, stages):
    """Tells which slice of a parameter a rank holds; what is not in the strategy is the same everywhere.

    Stages that cut a parameter in the same way hold the same slices.
    """
    if not stages:
        return None
    stage, local = divmod(rank, _ranks_of_stage(stages))
    layout = stages.get(f"{stage}-{name}") or next(iter(stages.values()))
    matrix = layout.dev_matrix[0].dim
    mapped = {len(matrix) - 1 - axis for axes in layout.tensor_map for axis in axes.dim if axis >= 0}
    places = np.unravel_index(local, matrix)
    rest = [axis for axis in range(len(matrix)) if axis not in mapped]
    replica = functools.reduce(lambda index, axis: index * matrix[axis] + places[axis], rest, 0)
    # The parallel optimizer cuts a slice again, over what are replicas without it: all of them (-1), or so many.
    shards = {0: 1, -1: math.prod(matrix)}.get(layout.opt_weight_shard_size, layout.opt_weight_shard_size)
    return layout.SerializeToString(), tuple(int(places[axis]) for axis in sorted(mapped)), int(replica) % shards


def _transform(source, target, from_strategy, to_strategy, format, files):
    """MindSpore's own transformation; what it cannot read is a CheckpointError."""
    try:
        ms.transform_checkpoints(source, target, "delta", from_strategy, to_strategy, output_format=format)
    except Exception as error:  # MindSpore, protobuf and safetensors each raise their own for a damaged file
        raise CheckpointError(f"cannot transform {[str(file) for file in files]}: {error}") from error


def _read_whole(delta):
    if isinstance(delta, (str, os.PathLike)):
        if not os.path.isfile(delta):
            raise FileNotFoundError(f"slice_delta: no such file: {delta}.")
        delta = read_checkpoint(delta)
    if not isinstance(delta, dict) or not all(isinstance(value, (Tensor, Parameter)) for value in delta.values()):
        raise TypeError(f"slice_delta: 'delta' must be a dict of Tensors or a path, but got {type(delta).__name__}.")
    return delta


def _check_cuts(whole, layouts, strategy):
    """Whether the layouts of a strategy have every parameter, and cut its shape into equal parts."""
    layouts = {without_stage(name): layout for name, layout in layouts.items()}
    problems = [f"{name}: not in the strategy" for name in whole if name not in layouts]
    for name, value in whole.items():
        if name in layouts:
            matrix = layouts[name].dev_matrix[0].dim
            counts = [matrix[-1 - axis] if axis >= 0 else 1 for axis in layouts[name].tensor_map[0].dim]
            if len(counts) != value.ndim or any(size % count for size, count in zip(value.shape, counts)):
                problems.append(f"{name}: {value.shape} cannot be cut into {tuple(counts)}")
    if problems:
        raise CheckpointError(f"slice_delta: the delta does not fit {strategy}:\n  " + "\n  ".join(problems))

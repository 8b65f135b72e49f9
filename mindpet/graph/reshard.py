"""The state of a run that is cut over ranks, cut for another number of ranks."""

import pathlib
import tempfile
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindpet.errors import CheckpointError
from mindpet.graph.distributed import count_ranks, gather_delta, layouts_of, slice_delta, without_stage
from mindpet.graph.state_files import RunFolder, choose, read, steps
from mindpet.graph.training_state import RANDOM
from mindpet.utils.hints import Arrays, PathLike
from mindpet.utils.validate import Checker, is_int


def reshard_state(
    directory: PathLike, strategy: PathLike, new_strategy: PathLike, target: PathLike, step: Optional[int] = None
) -> int:
    """Cut what `TrainableParamsCheckPoint` saved on some ranks, to resume on others: delta, moments and all else.

    What is in a strategy is put together and cut anew, the rest must be the same on all ranks. Random states are those
    of the old ranks in turn.

    Args:
        directory: of the checkpoints of the run.
        strategy: MindSpore's strategy file of the run.
        new_strategy: that of the ranks that go on; `dry_run(..., strategy_ckpt_config={"save_file": ...})` writes one.
        target: folder that gets the state, for `resume`; its `resume` must be missing.
        step: which one. Default: None, for the last complete one.

    Returns:
        The step.

    Raises:
        TypeError: an argument is not a path, `step` not an int.
        FileNotFoundError: a strategy does not exist.
        FileExistsError: `target` has states already.
        CheckpointError: no step is complete, or none of as many ranks as the strategy; ranks that hold the same slice
            have other values for it; a parameter cannot be cut; there are pipeline stages, whose ranks hold different
            parameters. Nothing is written.
    """
    check = Checker("reshard_state")
    paths = {"directory": directory, "strategy": strategy, "new_strategy": new_strategy, "target": target}
    for name, path in paths.items():
        check.require(isinstance(path, (str, pathlib.PurePath)), TypeError, name, path, "a path")
    check.require(step is None or is_int(step), TypeError, "step", step, "an int or None")
    check.done()
    for path in (strategy, new_strategy):
        if not pathlib.Path(path).exists():
            raise FileNotFoundError(f"reshard_state: no strategy {path}.")
    if steps(target):
        raise FileExistsError(f"reshard_state: {target} has states already.")
    chosen = choose(directory, step)
    old, new = layouts_of(strategy), layouts_of(new_strategy)
    for path, layouts in ((strategy, old), (new_strategy, new)):
        if any(name != without_stage(name) for name in layouts):
            raise CheckpointError(f"reshard_state: {path} is of pipeline stages; resume these on the same ranks.")
    ranks, new_ranks = count_ranks(old), count_ranks(new)
    if chosen is None or chosen.ranks() != ranks:
        there = "no step" if chosen is None else f"a step of {chosen.ranks()}"
        raise CheckpointError(f"reshard_state: {directory} has {there} that is complete, for {ranks} ranks.")
    saved = [read(chosen, rank, ranks) for rank in range(ranks)]
    names = saved[0][1]["names"]
    cut = [name for name in names if names[name] in old or names[name] in new]
    _check_same([tensors for tensors, _ in saved], set(saved[0][0]) - set(cut))
    with tempfile.TemporaryDirectory(prefix="mindpet-reshard-") as work:
        for rank, (tensors, _) in enumerate(saved):
            _write(f"{work}/old/rank_{rank}", {names[name]: tensors[name] for name in cut})
        whole = gather_delta(f"{work}/old", strategy, "state.ckpt")
        slice_delta(whole, new_strategy, f"{work}/new")
        for rank in range(new_ranks):
            slices = ms.load_checkpoint(f"{work}/new/rank_{rank}/delta.ckpt")
            tensors, record = saved[rank % ranks]
            tensors = {**tensors, **{name: slices[names[name]].asnumpy() for name in cut}}
            run = RunFolder(target, rank, new_ranks, 1)
            run.run = 0
            run.write(chosen.step, tensors, {**record, "runs": []})
    return chosen.step


def _write(folder: str, arrays: Arrays) -> None:
    pathlib.Path(folder).mkdir(parents=True)
    content = [{"name": name, "data": Tensor(value)} for name, value in arrays.items()]
    ms.save_checkpoint(content, f"{folder}/state.ckpt")


def _check_same(ranks, names):
    """Refuse tensors that are in no strategy, and are not the same on all ranks."""
    other = [
        name
        for name in sorted(names)
        if not name.startswith(RANDOM) and any(not np.array_equal(ranks[0][name], rank[name]) for rank in ranks)
    ]
    if other:
        raise CheckpointError(f"reshard_state: not in the strategy, and not the same on all ranks: {other}.")

"""Every slice counts: deltas with random cuts, of which some rank lacks something."""

import functools
import os
import pathlib
import re

import mindspore as ms
import numpy as np
import pipelined
import pytest
from mindspore import Tensor
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from mindpet.errors import CheckpointError
from mindpet.graph import gather_delta, slice_delta
from mindpet.graph.ckpt_util import saved_parameters
from mindpet.parallel import dry_run_many

SHAPES = [(16, 8), (8, 16), (16,)]
# Slices of the batch, of the features, pipeline stages, shards of the parallel optimizer (0: none, -1: all replicas).
CASES = [(4, 1, 1, 0), (1, 1, 2, 0), (1, 2, 2, 0), (2, 2, 2, 0), (2, 2, 2, -1), (4, 2, 1, -1), (4, 2, 1, 2)]


def add_layout(strategy, name, matrix, cut, shards):
    """What MindSpore's front end writes about a parameter; `cut` is the tensor map: 0 is the last device axis."""
    item = strategy.parallel_layout_item.add()
    item.param_name = name
    layouts = item.parallel_layouts
    layouts.dev_matrix.add().dim.extend(matrix)
    layouts.tensor_map.add().dim.extend(cut)
    layouts.param_split_shape.add()
    layouts.indices_offset.add()
    layouts.field = 0
    layouts.opt_weight_shard_size = shards
    layouts.opt_weight_shard_step = (matrix[1] if 0 in cut else 1) if shards else 0


def write_strategies(folder, rng, data, features, stages, shards):
    """A strategy file for each stage; returns a delta, and name -> its stages."""
    folder.mkdir()
    members = {f"layers.{stage}.{side}": [stage] for stage in range(stages) for side in "ab"}
    if stages > 1:
        members["shared"] = list(range(stages))
    strategies = [ParallelStrategyMap(current_stage=1) for _ in range(stages)]
    delta = {}
    for name, places in members.items():
        shape = SHAPES[rng.integers(len(SHAPES))]
        cut = [-1] * len(shape)
        if features > 1 and rng.integers(2):
            cut[rng.integers(len(shape))] = 0
        delta[name] = Tensor(rng.normal(size=shape).astype(np.float32))
        for stage in places:
            # The base, which is in the strategy file as well, and in a pipeline the sums of gradients of what trains.
            for prefix in ("frozen.", "accu_grads.") if stages > 1 else ("frozen.",):
                add_layout(strategies[stage], prefix + name, (data, features), cut, shards)
            add_layout(strategies[stage], name, (data, features), cut, shards)
    for stage, strategy in enumerate(strategies):
        operator = strategy.parallel_strategy_item.add(node_name="MatMul").parallel_strategys
        operator.stage = stage
        operator.parallel_strategy.add().dim.extend((data, 1))
        (folder / f"rank_{stage * data * features}.ckpt").write_bytes(strategy.SerializeToString())
    return delta, members


def bits(content):
    return {name: value.asnumpy().tobytes() for name, value in content.items()}


def rewrite(file, content):
    os.chmod(file, 0o600)
    ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in content.items()], str(file))


def sliced(tmp_path, case):
    """Returns the delta, name -> its stages, the folders of strategies and of slices, the file of each rank."""
    delta, members = write_strategies(tmp_path / "strategy", np.random.default_rng(case[:3]), *case)
    files = slice_delta(delta, tmp_path / "strategy", tmp_path / "slices")
    assert bits(gather_delta(tmp_path / "slices", tmp_path / "strategy")) == bits(delta)
    return delta, members, tmp_path / "strategy", tmp_path / "slices", list(map(pathlib.Path, files))


def refusal(folder, strategy):
    with pytest.raises(CheckpointError) as caught:
        gather_delta(folder, strategy)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_without_its_slice(case, tmp_path):
    _, members, strategy, folder, files = sliced(tmp_path, case)
    size, dropped = case[0] * case[1], 0
    for rank, file in enumerate(files):
        content, whole = ms.load_checkpoint(str(file)), file.read_bytes()
        assert set(content) == {name for name, stages in members.items() if rank // size in stages}
        for name in content:
            if size == 1 and name == "shared":
                continue  # another stage has it
            rewrite(file, {key: value for key, value in content.items() if key != name})
            expected = f"{folder}: ranks lack their slice of a parameter:\n  {name}: rank_{rank}"
            assert refusal(folder, strategy) == expected
            dropped += 1
        file.write_bytes(whole)
        file.rename(f"{file}.gone")
        assert f"missing: rank_{rank}/" in refusal(folder, strategy)
        pathlib.Path(f"{file}.gone").rename(file)
    assert dropped >= 4


def test_what_no_rank_of_a_stage_has(tmp_path):
    _, _, strategy, folder, files = sliced(tmp_path, (1, 2, 2, 0))
    for rank, file in enumerate(files):
        content = ms.load_checkpoint(str(file))
        del content["layers.0.a" if rank < 2 else "layers.1.b"]
        if rank == 3:
            del content["layers.1.a"]
        if rank < 2:
            content["shared"] = content["shared"] * 2
        rewrite(file, content)
    lines = refusal(folder, strategy).split("\n")
    assert lines[0].endswith("ranks lack their slice of a parameter:")
    assert lines[1:4] == ["  layers.0.a: rank_0, rank_1", "  layers.1.a: rank_3", "  layers.1.b: rank_2, rank_3"]
    assert lines[4].endswith("ranks that hold the same slice have other values for it:")
    assert re.match("  shared: rank_0, .*rank_2", lines[5])


def test_a_parameter_that_one_of_its_stages_saves(tmp_path):
    delta, _, strategy, folder, files = sliced(tmp_path, (1, 2, 2, 0))
    for file in files[2:]:
        rewrite(file, {name: value for name, value in ms.load_checkpoint(str(file)).items() if name != "shared"})
    assert bits(gather_delta(folder, strategy)) == bits(delta)


def test_slices_of_the_base_need_no_delta(tmp_path):
    delta, _, strategy, _, _ = sliced(tmp_path, (1, 2, 2, 0))
    base = {f"frozen.{name}": value for name, value in delta.items()}
    slice_delta(base, strategy, tmp_path / "base")
    assert bits(gather_delta(tmp_path / "base", strategy)) == bits(base)


def test_strategy_files_of_stages_that_are_missing_or_damaged(tmp_path):
    _, _, strategy, folder, _ = sliced(tmp_path, (1, 2, 2, 0))
    first, second = sorted(strategy.iterdir())
    content = second.read_bytes()
    second.unlink()
    assert "strategy for 2 ranks:\n  surplus: rank_2\n  surplus: rank_3" in refusal(folder, strategy)
    for damaged in (b"", content[: len(content) // 2], b"no strategy"):
        second.write_bytes(damaged)
        assert "strategy" in refusal(folder, strategy)


def test_stages_of_the_front_end_keep_every_parameter_of_an_adapter(tmp_path, rng):
    """Two stages of one rank each."""
    held = {name: {} for name in pipelined.CONFIGS}
    for stage in (0, 1):
        builds = [
            functools.partial(pipelined.build, name, tmp_path / f"{name}/strategy/rank_{stage}.ckpt") for name in held
        ]
        for name, report in zip(held, dry_run_many(builds, 2, rank=stage)):
            held[name][stage] = {plan.name for plan in report.parameters if plan.role != "optimizer"}
    for name, stages in held.items():
        saved = saved_parameters(pipelined.adapted(name))
        for key in saved:
            places = {stage for stage, names in stages.items() if key in names}
            expected = {pipelined.STAGES[key.split(".")[0]]}
            assert places == ({0, 1} if key in pipelined.SHARED else expected), key
        whole = {key: Tensor(rng.normal(size=param.shape).astype(np.float32)) for key, param in saved.items()}
        folder, strategy = tmp_path / name / "slices", tmp_path / name / "strategy"
        files = slice_delta(whole, strategy, folder)
        assert bits(gather_delta(folder, strategy)) == bits(whole)
        content = ms.load_checkpoint(files[1])
        key = sorted(name for name in content if "mindpet_delta" in name)[-1]
        rewrite(files[1], {other: value for other, value in content.items() if other != key})
        assert refusal(folder, strategy).endswith(f"ranks lack their slice of a parameter:\n  {key}: rank_1")

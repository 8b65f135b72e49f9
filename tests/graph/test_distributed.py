"""Deltas that are cut over ranks: saved by the ranks, put together, cut for other ranks, loaded for evaluation."""

import concurrent.futures
import functools
import os
import pathlib
import shutil
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.parallel.auto_parallel import AutoParallel
from mindspore.train import CheckpointConfig, RunContext
from parallel import plan_llama
from sharded import Network
from sharded_delta import DELTA, LAYOUT, case, make

from mindpet.errors import CheckpointError
from mindpet.graph import (
    TrainableParamsCheckPoint,
    freeze_delta,
    gather_delta,
    load_delta,
    reshard,
    reshard_state,
    slice_delta,
)
from mindpet.graph.state_files import RunFolder, choose
from mindpet.graph.state_files import read as read_state
from mindpet.parallel import dry_run, dry_run_many, launcher
from mindpet.peft import LoraConfig, get_peft_model

ROOT = pathlib.Path(__file__).parents[2]
LAYOUTS = {
    "data and column": (8, LAYOUT, {}),
    "data and row": (8, {"n": 2, "i": 4}, {}),
    "four ranks": (4, {"o": 4}, {}),
    "parallel optimizer": (
        8,
        {"n": 4, "o": 2},
        {"enable_parallel_optimizer": True, "parallel_optimizer_config": {"parallel_optimizer_threshold": 0}},
    ),
}
TYPES = [ms.float32, ms.float16, ms.bfloat16]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Name of a layout -> (number of ranks, report, strategy file), by the real front end."""
    made = {}
    for name, (ranks, counts, settings) in LAYOUTS.items():
        file = str(tmp_path_factory.mktemp("strategy") / "strategy.ckpt")
        report = dry_run(case(**counts), ranks, strategy_ckpt_config={"save_file": file}, **settings)
        made[name] = ranks, report, file
    return made


def delta(dtype=ms.float32):
    return {name: Tensor(value, dtype) for name, value in DELTA.items()}


def bits(content):
    return {
        name: Tensor(value.data if hasattr(value, "init_mode") else value).get_bytes()
        for name, value in content.items()
    }


def read(file):
    return ms.load_checkpoint(str(file), format=pathlib.Path(file).suffix[1:])


def cut(value, plan, rank):
    """A rank's slice by the layout in a report."""
    places = np.unravel_index(rank, plan.device_matrix)
    for axis, cut_by in enumerate(plan.tensor_map):
        if cut_by >= 0:
            device_axis = len(plan.device_matrix) - 1 - cut_by
            value = np.split(value, plan.device_matrix[device_axis], axis)[places[device_axis]]
    return value


@pytest.mark.parametrize("name", ["data and column", "data and row", "four ranks"])
def test_slices_are_those_of_the_front_end(name, plans, tmp_path):
    ranks, report, strategy = plans[name]
    files = slice_delta(delta(), strategy, tmp_path / "slices")
    assert files == [str(tmp_path / f"slices/rank_{rank}/delta.ckpt") for rank in range(ranks)]
    for rank, file in enumerate(files):
        content = read(file)
        assert set(content) == set(DELTA)
        for key, value in DELTA.items():
            np.testing.assert_array_equal(content[key].asnumpy(), cut(value, report.parameter(key), rank))


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_slices_put_together_are_the_delta_bit_for_bit(name, dtype, plans, tmp_path):
    ranks, report, strategy = plans[name]
    slice_delta(delta(dtype), strategy, tmp_path)
    key = "cell.mindpet_delta_lora_b"
    assert tuple(read(tmp_path / "rank_0/delta.ckpt")[key].shape) == report.parameter(key).slice
    assert bits(gather_delta(tmp_path, strategy)) == bits(delta(dtype))


def test_from_one_cluster_size_to_another(plans, tmp_path):
    (_, _, eight), (_, _, four) = plans["data and column"], plans["four ranks"]
    slice_delta(delta(), eight, tmp_path / "eight")
    slice_delta(gather_delta(tmp_path / "eight", eight), four, tmp_path / "four")
    assert bits(gather_delta(tmp_path / "four", four)) == bits(delta())


def test_a_whole_file_can_be_cut(plans, tmp_path):
    ms.save_checkpoint([{"name": k, "data": v} for k, v in delta().items()], str(tmp_path / "whole.ckpt"))
    strategy = plans["four ranks"][2]
    slice_delta(tmp_path / "whole.ckpt", strategy, tmp_path / "slices")
    assert bits(gather_delta(tmp_path / "slices", strategy)) == bits(delta())


@pytest.mark.parametrize("way", [("data and column", "four ranks"), ("four ranks", "data and column")], ids=str)
def test_a_state_goes_from_one_cluster_size_to_another(way, plans, tmp_path, monkeypatch):
    (ranks, _, old), (new_ranks, report, new) = (plans[name] for name in way)
    values = {
        f"{of}{name}": value * k
        for k, of in ((1, ""), (2, "moment1."), (3, "moment2."))
        for name, value in DELTA.items()
    }
    slice_delta({name: Tensor(value) for name, value in values.items()}, old, tmp_path / "slices")
    names = {("training." if "moment" in name else "") + name: name for name in values}
    for rank in range(ranks):
        tensors = {
            key: read(tmp_path / f"slices/rank_{rank}/delta.ckpt")[name].asnumpy() for key, name in names.items()
        }
        tensors.update({"training.global_step": np.array([5]), "random.numpy": np.array([rank])})
        folder = RunFolder(tmp_path / "old", rank, ranks, 1)
        folder.run = 0
        folder.write(5, tensors, {"names": names})
    assert reshard_state(tmp_path / "old", old, new, tmp_path / "new") == 5
    step = choose(tmp_path / "new")
    assert step.ranks() == new_ranks
    for rank in range(new_ranks):
        tensors, record = read_state(step, rank, new_ranks)
        for key, name in names.items():
            np.testing.assert_array_equal(tensors[key], cut(values[name], report.parameter(name), rank))
        assert tensors["training.global_step"] == 5 and tensors["random.numpy"] == rank % ranks
    with pytest.raises(FileExistsError, match="has states already"):
        reshard_state(tmp_path / "old", old, new, tmp_path / "new")
    with pytest.raises(CheckpointError, match=f"has a step of {ranks} that is complete, for {new_ranks} ranks"):
        reshard_state(tmp_path / "old", new, old, tmp_path / "other")
    monkeypatch.setattr(reshard, "layouts_of", lambda strategy: {f"0-{name}": None for name in names})
    with pytest.raises(CheckpointError, match="is of pipeline stages"):
        reshard_state(tmp_path / "old", old, new, tmp_path / "other")
    monkeypatch.undo()
    (tmp_path / f"old/resume/run_0/step_5/rank_1_of_{ranks}.json").unlink()
    with pytest.raises(CheckpointError, match="has no step"), pytest.warns(UserWarning, match="lacks rank_1_of"):
        reshard_state(tmp_path / "old", old, new, tmp_path / "other")


@pytest.fixture
def slices(plans, tmp_path):
    """A folder of slices for four ranks, and its strategy."""
    strategy = plans["four ranks"][2]
    slice_delta(delta(), strategy, tmp_path / "slices")
    return tmp_path / "slices", strategy


def test_missing_surplus_and_empty_ranks_are_listed(slices):
    folder, strategy = slices
    shutil.rmtree(folder / "rank_1")
    shutil.copytree(folder / "rank_0", folder / "rank_4")
    os.chmod(folder / "rank_2/delta.ckpt", 0o600)
    (folder / "rank_2/delta.ckpt").write_bytes(b"")
    (folder / "rank_3/delta.ckpt").unlink()
    with pytest.raises(CheckpointError) as caught:
        gather_delta(folder, strategy)
    assert str(caught.value) == (
        f"{folder} does not fit a strategy for 4 ranks:\n  missing: rank_1\n  surplus: rank_4\n"
        "  empty: rank_2/delta.ckpt\n  missing: rank_3/delta.ckpt"
    )


def test_a_damaged_rank(slices):
    folder, strategy = slices
    file = folder / "rank_2/delta.ckpt"
    content = file.read_bytes()
    os.chmod(file, 0o600)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="rank_2/delta.ckpt: cannot be read"):
        gather_delta(folder, strategy)


def write_steps(folder, *names):
    """Have files in each rank's folder, the n-th with n times the delta, the later the older by their time."""
    for rank in sorted(folder.glob("rank_*")):
        content = read(rank / "delta.ckpt")
        (rank / "delta.ckpt").unlink()
        for number, name in enumerate(names, 1):
            changed = [{"name": key, "data": Tensor(value * number)} for key, value in content.items()]
            ms.save_checkpoint(changed, str(rank / name), format=pathlib.Path(name).suffix[1:])
            os.utime(rank / name, (2e9 - number, 2e9 - number))


def times(folder, strategy, **options):
    """How many times the delta comes out."""
    whole = gather_delta(folder, strategy, **options)
    (number,) = {int(whole[key].asnumpy().flat[-1] / value.flat[-1]) for key, value in DELTA.items()}
    assert bits(whole) == bits({key: Tensor(value * number) for key, value in DELTA.items()})
    return number


@pytest.mark.parametrize(
    "names",
    [
        ["x-1_9.ckpt", "x-1_10.ckpt"],
        ["x-1_10.safetensors", "x-2_1.safetensors"],
        ["x-3_10.ckpt", "x_1-1_1.ckpt", "x_1-1_2.ckpt"],
        ["x-1_2.ckpt", "x-1_2_breakpoint.ckpt"],
        ["x-1_9_breakpoint.ckpt", "x-1_10.ckpt"],
        ["my-run_3-1_2.ckpt", "my-run_3-1_10.ckpt"],
        ["latest.ckpt"],
    ],
    ids=lambda names: names[-1],
)
def test_the_last_step_by_its_name_whatever_the_times_are(names, slices):
    folder, strategy = slices
    write_steps(folder, *names)
    assert times(folder, strategy) == len(names)
    assert times(folder, strategy, name=names[0]) == 1


def test_the_last_step_that_all_ranks_have(slices):
    folder, strategy = slices
    write_steps(folder, "x-1_1.ckpt", "x-1_2.ckpt")
    shutil.copy(folder / "rank_0/x-1_2.ckpt", folder / "rank_0/x-1_3.ckpt")  # a rank was killed before its last save
    assert times(folder, strategy) == 2
    with pytest.raises(CheckpointError, match="missing: rank_1/x-1_3.ckpt"):
        gather_delta(folder, strategy, name="x-1_3.ckpt")


@pytest.mark.parametrize(
    "names",
    [
        ["x-1_1.ckpt", "y-1_2.ckpt"],
        ["lora_8-1_1.ckpt", "lora_16-1_1.ckpt"],
        ["x-1_1.ckpt", "latest.ckpt"],
        ["best.ckpt", "latest.ckpt"],
        ["x-1_1.ckpt", "x-1_1.safetensors"],
    ],
    ids=lambda names: names[-1],
)
def test_names_that_do_not_tell_the_last_step_are_listed(names, slices):
    folder, strategy = slices
    write_steps(folder, *names)
    with pytest.raises(CheckpointError, match="do not tell which is the last") as caught:
        gather_delta(folder, strategy)
    assert all(f"rank_{rank}: {', '.join(sorted(names))}" in str(caught.value) for rank in range(4))
    assert times(folder, strategy, name=names[1]) == 2


def test_a_rank_that_has_files_of_another_run(slices):
    folder, strategy = slices
    write_steps(folder, "x-1_1.ckpt")
    shutil.copy(folder / "rank_0/x-1_1.ckpt", folder / "rank_0/x_1-1_1.ckpt")
    with pytest.raises(
        CheckpointError, match="(?s)do not tell.*rank_0: x-1_1.ckpt, x_1-1_1.ckpt\n  rank_1: x-1_1.ckpt"
    ):
        gather_delta(folder, strategy)


def change(file, name, value, index=0):
    """Change one number in a checkpoint."""
    content = {key: param.asnumpy() for key, param in read(file).items()}
    content[name].flat[index] = value
    os.chmod(file, 0o600)
    ms.save_checkpoint([{"name": key, "data": Tensor(array)} for key, array in content.items()], str(file))


def test_replicas_that_differ_are_listed(plans, tmp_path):
    _, report, strategy = plans["data and column"]
    slice_delta(delta(), strategy, tmp_path)
    a, b = DELTA
    assert report.parameter(b).slice == (8, 8)  # ranks 0 and 4 have the same, and so on
    for rank in range(8):
        change(tmp_path / f"rank_{rank}/delta.ckpt", a, np.nan)
    for rank in (1, 5):
        change(tmp_path / f"rank_{rank}/delta.ckpt", b, np.nan)
    assert np.isnan(gather_delta(tmp_path, strategy)[b].asnumpy()).sum() == 1, "NaN is itself"
    change(tmp_path / "rank_5/delta.ckpt", b, -0.0)
    change(tmp_path / "rank_1/delta.ckpt", b, 0.0)
    change(tmp_path / "rank_7/delta.ckpt", a, 3)
    with pytest.raises(CheckpointError) as caught:
        gather_delta(tmp_path, strategy)
    assert str(caught.value) == (
        f"{tmp_path}: ranks that hold the same slice have other values for it:\n"
        f"  {a}: rank_0, rank_1, rank_2, rank_3, rank_4, rank_5, rank_6 / rank_7\n"
        f"  {b}: rank_1 / rank_5"
    )


def test_steps_that_differ_between_ranks_are_an_error(slices):
    folder, strategy = slices
    for rank in range(4):
        content = [{"name": key, "data": value} for key, value in read(folder / f"rank_{rank}/delta.ckpt").items()]
        content.append({"name": "step_num", "data": Tensor(10 if rank else 5)})
        os.chmod(folder / f"rank_{rank}/delta.ckpt", 0o600)
        ms.save_checkpoint(content, str(folder / f"rank_{rank}/delta.ckpt"))
    with pytest.raises(CheckpointError, match="step_num: rank_0 / rank_1, rank_2, rank_3"):
        gather_delta(folder, strategy)


def test_wrong_arguments(slices, tmp_path):
    folder, strategy = slices
    (tmp_path / "text.ckpt").write_text("no strategy")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        gather_delta(tmp_path / "nowhere", strategy)
    with pytest.raises(FileNotFoundError, match="strategy does not exist"):
        gather_delta(folder)
    with pytest.raises(TypeError, match="'folder' must be a path"):
        gather_delta(3, strategy)
    with pytest.raises(CheckpointError, match="text.ckpt is .*strategy file"):
        gather_delta(folder, tmp_path / "text.ckpt")
    with pytest.raises(CheckpointError, match="nothing has no strategy file"):
        gather_delta(folder, tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="'folder' must be new or empty"):
        slice_delta(delta(), strategy, folder)
    with pytest.raises(FileNotFoundError, match="no such file"):
        slice_delta(tmp_path / "nowhere.ckpt", strategy, tmp_path / "new")
    with pytest.raises(TypeError, match="'delta' must be a dict of Tensors"):
        slice_delta({"a": np.ones(3)}, strategy, tmp_path / "new")


def test_a_delta_that_does_not_fit_the_strategy(slices, tmp_path):
    _, strategy = slices
    wrong = {"other": Tensor(np.ones(4)), "cell.mindpet_delta_lora_b": Tensor(np.ones((30, 8)))}
    with pytest.raises(CheckpointError) as caught:
        slice_delta(wrong, strategy, tmp_path / "new")
    assert "other: not in the strategy" in str(caught.value)
    assert "cell.mindpet_delta_lora_b: (30, 8) cannot be cut into (4, 1)" in str(caught.value)
    assert not (tmp_path / "new").exists()


class Whole(nn.Cell):
    """The network as it is evaluated: not cut."""

    def __init__(self):
        super().__init__()
        self.cell = make()

    def construct(self, x):
        return self.cell(x)


def test_evaluation_after_a_distributed_run_is_one_call(slices, tmp_path, rng):
    folder, strategy = slices
    trained, fresh = Whole(), Whole()
    base = {name: param for name, param in trained.parameters_dict().items() if "mindpet_delta" not in name}
    ms.save_checkpoint([{"name": k, "data": v} for k, v in base.items()], str(tmp_path / "base.ckpt"))
    for name in DELTA:
        fresh.parameters_dict()[name].set_data(Tensor(np.zeros_like(DELTA[name])))
    load_delta(fresh, tmp_path / "base.ckpt", (folder, strategy))
    x = Tensor(rng.normal(size=(4, 16)).astype(np.float32))
    np.testing.assert_array_equal(fresh(x).asnumpy(), trained(x).asnumpy())
    freeze_delta(fresh, "lora")
    shutil.copytree(pathlib.Path(strategy).parent, folder / "strategy")
    load_delta(fresh, folder)
    with pytest.raises(CheckpointError, match="missing: rank_3"):
        shutil.rmtree(folder / "rank_3")
        load_delta(fresh, folder)


@pytest.mark.parametrize("format, way", [("ckpt", "context"), ("safetensors", "auto")])
def test_eight_ranks_save_by_the_callback(format, way, tmp_path):
    def run(rank):
        _, environment = launcher._environment(8, rank)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment["MS_OM_PATH"] = str(tmp_path)
        script = ROOT / "tests/graph/save_sharded_child.py"
        command = [sys.executable, script, tmp_path / "run", format, way]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, range(8)):
            assert done.returncode == 0, done.stderr[-3000:]
            assert "DeltaGuard: trainable parameters 384 of 928" in done.stdout
    name = "cell.mindpet_delta_lora_b"
    assert read(tmp_path / f"run/rank_5/DELTA_CKP-1_1.{format}")[name].shape == (8, 8)  # a quarter of 32 rows
    assert bits(gather_delta(tmp_path / "run")) == bits(delta())


def pissa(file, everything):
    """A layer whose inputs are cut, with a delta of which the start is saved, too, though it does not train."""
    network = Network(nn.Dense(16, 32), n=2)
    network.cell.matmul.shard(((2, 4), (1, 4)))
    get_peft_model(network, LoraConfig(r=8, target_modules=["cell"], init_lora_weights="pissa"))
    parallel = AutoParallel(network)
    parallel.save_param_strategy_file(str(file))
    if everything:
        parallel.disable_strategy_file_only_for_trainable_params()
    return parallel, Tensor(np.ones((16, 16), np.float32)), nn.Adam(network.trainable_params())


def test_a_delta_with_a_start_that_does_not_train(tmp_path, rng):
    names = {everything: tmp_path / f"{everything}.ckpt" for everything in (True, False)}
    dry_run_many([functools.partial(pissa, file, everything) for everything, file in names.items()], 8)
    shapes = {"delta_lora_a": (8, 16), "delta_lora_b": (32, 8), "lora_start_a": (8, 16), "lora_start_b": (32, 8)}
    whole = {
        f"cell.mindpet_{name}": Tensor(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()
    }
    files = slice_delta(whole, names[True], tmp_path / "slices")
    assert read(files[5])["cell.mindpet_lora_start_a"].shape == (8, 4)
    assert bits(gather_delta(tmp_path / "slices", names[True])) == bits(whole)
    with pytest.raises(
        CheckpointError, match=r"start_a: rank_0, rank_4 / .* \(the strategy file lacks it, for it did not"
    ):
        gather_delta(tmp_path / "slices", names[False])


def test_a_callback_follows_the_parallel_context(tmp_path):
    def begin():
        checkpoint.on_train_begin(RunContext({"train_network": network}))
        folder, file = checkpoint._directory, ms.get_auto_parallel_context("strategy_ckpt_save_file")
        return os.path.relpath(folder, tmp_path), file and os.path.relpath(file, tmp_path), checkpoint._config

    network = make()
    freeze_delta(network, "lora")
    config = CheckpointConfig(integrated_save=True)
    checkpoint = TrainableParamsCheckPoint(str(tmp_path), config=config)
    assert begin()[:2] == (".", "")
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=8, global_rank=5)
    try:
        folder, file, own = begin()
        assert (folder, file) == ("rank_5", "strategy/rank_5.ckpt") and not own.integrated_save
        assert (tmp_path / "rank_5").is_dir()
        assert ms.get_auto_parallel_context("strategy_ckpt_config")["only_trainable_params"] is False
        ms.set_auto_parallel_context(strategy_ckpt_config={"save_file": str(tmp_path / "mine.ckpt")})
        assert begin()[:2] == ("rank_5", "mine.ckpt")
    finally:
        ms.reset_auto_parallel_context()
    folder, _, own = begin()
    assert folder == "." and own.integrated_save and config.integrated_save


def test_pipeline_stages(tmp_path, rng):
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "lora_rank": 2}
    cuts = {"num_attention_heads": 2, "data_parallel": 2, "model_parallel": 2, "pipeline_stages": 2}
    build = functools.partial(plan_llama.make, seq_length=4, micro_batches=2, **sizes, **cuts)
    shapes = {}
    for rank in (0, 4):
        strategy = {"save_file": str(tmp_path / f"strategy/rank_{rank}.ckpt")}
        report = dry_run(build, 8, rank=rank, pipeline_stages=2, strategy_ckpt_config=strategy)
        shapes.update({plan.name: plan.shape for plan in report.parameters if plan.role == "trainable"})
    assert len(shapes) == 2 * 7 * 2
    whole = {name: Tensor(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    files = slice_delta(whole, tmp_path / "strategy", tmp_path / "slices")
    assert [len(read(file)) for file in files] == 8 * [14]  # each rank has its stage's
    assert bits(gather_delta(tmp_path / "slices", tmp_path / "strategy")) == bits(whole)

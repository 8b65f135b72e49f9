"""What can go wrong around a dry run: each is a clear error, and no process is left behind."""

import functools
import multiprocessing
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from sharded import build, build_with

from mindpet.errors import BuildError, DryRunError, ShardError
from mindpet.parallel import dry_run, dry_run_many, launcher, stubs
from mindpet.utils.files import open_staging

ROOT = pathlib.Path(__file__).parents[2]
GOOD = functools.partial(build, "lora", {"o": 8})


def raises():
    raise KeyError("no such layer")


def returns_nothing():
    return None


def returns_no_tensor():
    return nn.Dense(4, 4), np.ones((8, 4))


def does_not_compile():
    return nn.Dense(4, 4), Tensor(np.ones((8, 5), np.float32))


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def own_optimizer():
    network, x = GOOD()
    return network, x, nn.SGD(network.trainable_params(), momentum=0.9)


def own_train_step():
    network, x = GOOD()
    return nn.TrainOneStepCell(network, nn.SGD(network.trainable_params(), momentum=0.9)), x


def test_every_build_has_its_own_result():
    results = dry_run_many([raises, returns_nothing, returns_no_tensor, does_not_compile, GOOD], 8)
    assert [type(result).__name__ for result in results] == [*3 * ["BuildError"], "DryRunError", "Report"]
    assert "KeyError: 'no such layer'" in str(results[0]) and "in raises" in str(results[0])
    assert "must return (network, inputs)" in str(results[1]) and "None" in str(results[1])
    assert "must return (network, inputs)" in str(results[2])
    assert "does not compile" in str(results[3]) and "MatMul" in str(results[3])


def test_a_child_that_dies():
    with pytest.raises(DryRunError, match="the child process ended with exit code -9"):
        dry_run(dies, 8)


def test_a_child_that_takes_too_long():
    with pytest.raises(DryRunError, match="the child process took longer than 0.1 s"):
        dry_run(GOOD, 8, timeout=0.1)


def test_the_default_optimizer_is_adam_and_others_are_taken():
    adam, sgd, step = dry_run_many([GOOD, own_optimizer, own_train_step], 8)
    weights = sum(plan.bytes for plan in adam.parameters if plan.role == "trainable")
    assert adam.optimizer_bytes == 2 * weights + 16  # two moments, two powers of beta, learning rate, step
    assert sgd.parameters == step.parameters
    assert {plan.name.split(".")[0] for plan in sgd.parameters if plan.role == "optimizer"} >= {"accum", "stat"}


class Listed(nn.Cell):
    """A user's Cell with an attribute of the same name as the slot table."""

    def __init__(self):
        super().__init__()
        self.operators = nn.CellList([nn.Dense(4, 4)])

    def construct(self, x):
        return self.operators[0](x)


def listed():
    return Listed(), Tensor(np.ones((8, 4), np.float32))


def test_settings_of_this_process_do_not_reach_the_child_and_nothing_stays_in_its_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    monkeypatch.setenv("GLOG_v", "4")
    monkeypatch.syspath_prepend(pathlib.Path(nn.__file__).parent / "layer")  # has a math.py, as after amp's rewriting
    monkeypatch.chdir(tmp_path)
    refused = functools.partial(build_with, "lora", {"strategy_lora_add": ((3, 1), (3, 1))})
    report, error, refusal = dry_run_many([listed, does_not_compile, refused], 8, train=False)
    assert [plan.cell for plan in report.operators] == ["operators.0", "operators.0"]
    assert type(error) is DryRunError and isinstance(refusal, ShardError)
    assert not list(tmp_path.iterdir())


def test_settings_reach_the_parallel_context():
    report = dry_run(
        functools.partial(build, "lora", {"n": 8}),
        8,
        enable_parallel_optimizer=True,
        parallel_optimizer_config={"parallel_optimizer_threshold": 0},
    )
    a = report.parameter("cell.mindpet_delta_lora_a")
    assert (a.shape, a.slice, a.optimizer_shards) == ((4, 64), (4, 64), 1)  # 4 rows cannot be cut into 8
    b = report.parameter("cell.mindpet_delta_lora_b")
    assert (b.shape, b.slice, b.optimizer_shards) == ((128, 4), (16, 4), 8)
    assert report.parameter("moment1.cell.mindpet_delta_lora_b").slice == (16, 4)
    causes = {plan.cause: (plan.kind, plan.phase) for plan in report.collectives}
    assert causes["parts of cell.mindpet_delta_lora_b (parallel optimizer)"] == ("AllGather", "forward")
    assert causes["gradient of cell.mindpet_delta_lora_b"] == ("ReduceScatter", "backward")


def test_settings_that_mindspore_refuses_are_named():
    message = r"'settings' must be arguments of mindspore.set_auto_parallel_context, but got .'grad_scale': 2.: "
    with pytest.raises(DryRunError, match=message) as caught:
        dry_run(GOOD, 8, grad_scale=2)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The cache's folder, still to be made, for two small libraries."""
    symbols = {"libcuda.so.1": {"cuInit"}, "libcudart.so.11.0": {"cudaMalloc"}}
    monkeypatch.setattr(stubs, "_needed", lambda clients: symbols)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mindpet"


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged(folder):
    """Damages a stub folder in one way after the other."""
    library = folder / "lib64/libcuda.so.1"
    yield library.unlink()
    yield library.write_bytes(b"")
    yield library.write_bytes(library.read_bytes()[:-1] + b"x")
    yield (folder / "bin/nvcc").chmod(0o644)
    yield (folder / "digests.json").write_text("[")
    yield (folder / "lib64/more.so").write_bytes(b"")
    yield shutil.rmtree(folder) or folder.mkdir()
    yield shutil.rmtree(folder) or folder.write_text("")
    yield shutil.rmtree(folder) or folder.symlink_to("nowhere")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "no exchange"])
def test_a_damaged_stub_folder_is_built_again(cache, monkeypatch, exchange):
    if not exchange:  # a file system that cannot
        monkeypatch.setattr(stubs, "exchange", lambda *_: False)
    folder = stubs.stub_folder()
    good = content(folder)
    for _ in damaged(folder):
        assert stubs.stub_folder() == folder and content(folder) == good
        assert os.access(folder / "bin/nvcc", os.X_OK) and list(cache.iterdir()) == [folder]
    before = folder.stat()
    assert stubs.stub_folder() == folder and folder.stat() == before  # what is whole stays


def build_stubs(number):
    return content(stubs.stub_folder())


def test_processes_that_build_the_stubs_at_once(cache):
    """Some find nothing there, then some a damaged folder, while others use what is whole."""
    with multiprocessing.get_context("fork").Pool(3) as pool:
        first = pool.map(build_stubs, range(3), chunksize=1)
        (folder,) = cache.iterdir()
        (folder / "version.txt").unlink()
        second = pool.map(build_stubs, range(3), chunksize=1)
    assert all(found == content(folder) for found in first + second) and list(cache.iterdir()) == [folder]


def test_what_a_killed_build_has_left_is_removed(cache):
    folder = stubs.stub_folder()
    pid = os.fork()
    if pid == 0:
        open_staging(folder)
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(cache.iterdir())) == 2
    assert stubs.stub_folder() == folder and list(cache.iterdir()) == [folder]


def test_no_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 123456789)  # a user that the system does not know
    with pytest.raises(DryRunError, match="no home folder to build the stub libraries in; set XDG_CACHE_HOME"):
        dry_run(GOOD, 8)


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DryRunError, match=r"built with gcc and nm; not found: \['gcc', 'nm'\]"):
        dry_run(GOOD, 8)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DryRunError, match="cannot build .* in .*file/mindpet; set XDG_CACHE_HOME"):
        dry_run(GOOD, 8)


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    for tool, code in (("gcc", "echo broken >&2; exit 1"), ("nm", 'exec /usr/bin/nm "$@"')):
        (tmp_path / tool).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DryRunError, match="gcc failed for a stub library:\nbroken"):
        dry_run(GOOD, 8)
    assert not list((tmp_path / "cache/mindpet").iterdir())


@pytest.mark.parametrize("system, machine", [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_another_platform(system, machine, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(DryRunError, match=f"without CANN it needs Linux on x86_64, but this is {system} on {machine}"):
        dry_run(GOOD, 8)


def test_a_machine_with_cann_compiles_for_ascend(monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend/latest")
    target, environment = launcher._environment(8, 3)
    assert target == "Ascend" and "CUDA_HOME" not in environment
    assert (environment["RANK_SIZE"], environment["RANK_ID"]) == ("8", "3")


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"device_num": 0}, ValueError, "'device_num' must be 1, 2, 4 or a multiple of 8 up to 262144, but got 0"),
        ({"device_num": True}, TypeError, "'device_num' must be 1, 2, 4 or a multiple of 8"),
        ({"device_num": 12}, ValueError, "'device_num' must be 1, 2, 4 or a multiple of 8 up to 262144, but got 12"),
        ({"device_num": 10**12}, ValueError, "'device_num' .* up to 262144, but got 1000000000000"),
        ({"rank": -1}, ValueError, "'rank' must be an int from 0 to device_num - 1, with device_num=8, but got -1"),
        ({"rank": 8}, ValueError, "'rank' must be an int from 0 to device_num - 1, with device_num=8, but got 8"),
        ({"train": 1}, TypeError, "'train' must be a bool"),
        ({"timeout": 0}, ValueError, "'timeout' must be a number of seconds above 0, but got 0"),
        ({"timeout": float("nan")}, ValueError, "'timeout' must be a number of seconds above 0, but got nan"),
        ({"pipeline_stages": 0}, ValueError, "'pipeline_stages' must be a positive int that divides .*=8, but got 0"),
        ({"pipeline_stages": 3}, ValueError, "'pipeline_stages' must be a positive int that divides .*=8, but got 3"),
        ({"build": 3}, TypeError, "'build' must be a function or a str"),
        ({"build": "nowhere.py:build"}, ValueError, "'build' must be a function or 'FILE.py:name' of a file"),
        ({"build": lambda: None}, BuildError, "must be at the top level of a module or script"),
    ],
)
def test_wrong_arguments(change, error, match):
    with pytest.raises(error, match=match):
        dry_run(**{"build": GOOD, "device_num": 8, **change})


def run_script(text, folder):
    (folder / "script.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, folder / "script.py"], env=environment, capture_output=True, text=True)


SCRIPT = """
import mindspore as ms
import numpy as np
from mindspore import nn
from mindpet.parallel import dry_run

def build():
    return nn.Dense(4, 4), ms.Tensor(np.ones((8, 4), np.float32))
"""


def test_a_function_of_a_script(tmp_path):
    done = run_script(SCRIPT + "if __name__ == '__main__':\n    print(dry_run(build, 8, train=False))\n", tmp_path)
    assert done.returncode == 0 and "Rank 0 of 8, forward pass" in done.stdout, done.stderr


def test_a_script_without_a_guard(tmp_path):
    done = run_script(SCRIPT + "dry_run(build, 8)\n", tmp_path)
    assert done.returncode == 1 and "put the call under `if __name__ == '__main__':`" in done.stderr


def test_a_file_and_a_name(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    report, error = dry_run_many([f"{tmp_path}/mine.py:{name}" for name in ("build", "biuld")], 8, rank=5, train=False)
    assert (report.rank, report.device_num, report.mindspore) == (5, 8, ms.__version__)
    assert isinstance(error, BuildError) and "has no function 'biuld'" in str(error)

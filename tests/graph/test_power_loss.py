"""What is saved to resume from survives the loss of power, a full disk, a folder that goes, and a clock set back."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from unittest import mock

import numpy as np
import pytest
from faults import DONE, faults
from mindspore.train import Callback
from test_resume import Script, bits, there

from mindpet.errors import CheckpointError
from mindpet.graph import resume
from mindpet.graph.state_files import RunFolder, choose, read

CALLS = "fsync,fdatasync,rename,renameat,renameat2,openat"


def save(folder, step=1, rank=0, ranks=1, keep=1):
    RunFolder(folder, rank, ranks, keep).write(step, {"value": np.full(3, step, np.float32)}, {"step": step})


def by_strace(folder):
    """What the system is asked for while a step is saved: (call, path) in order."""
    trace = folder.parent / "trace"
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.write(ready[1], b".")
            os.read(go[0], 1)
            save(folder)
            os._exit(0)
        os._exit(1)
    os.read(ready[0], 1)
    command = ["strace", "-f", "-y", "-e", f"trace={CALLS}", "-o", trace, "-p", str(child)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        attached = b"attached" in tracer.stderr.readline()
        os.write(go[1], b".")
        _, status = os.waitpid(child, 0)
    assert status == 0
    if not attached:
        return None
    calls = []
    for line in trace.read_text().splitlines():
        synced = re.search(r"f(?:data)?sync\(\d+<(.*?)>\)\s+= 0", line)
        renamed = re.search(r'rename\w*\(.*"(.*?)".*"(.*?)".*\)\s+= 0', line)
        if synced:
            calls.append(("sync", synced[1]))
        elif renamed:
            calls.append(("name", renamed[2]))
    return calls


def by_wrapping(folder):
    """The same, as Python is asked for it."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        fsync(descriptor)
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def replaced(source, target):
        replace(source, target)
        calls.append(("name", os.fspath(target)))

    with mock.patch("os.fsync", synced), mock.patch("os.replace", replaced):
        save(folder)
    return calls


def test_a_marker_is_on_the_disk_after_all_that_it_stands_for(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    calls = [by_wrapping(folder)]
    if shutil.which("strace"):
        shutil.rmtree(folder / "resume")
        calls += filter(None, [by_strace(folder)])
    for each in calls:
        shown = [(call, re.sub(r"\.[^/]*incomplete", "STAGED", os.path.relpath(path, folder))) for call, path in each]
        place = "resume/run_0/step_1"
        assert shown == [
            ("sync", "."),
            ("sync", "resume"),
            ("sync", "resume/run_0"),
            ("sync", f"{place}/STAGED/rank_0_of_1.safetensors"),
            ("name", f"{place}/rank_0_of_1.safetensors"),
            ("sync", place),
            ("sync", f"{place}/STAGED/rank_0_of_1.json"),
            ("name", f"{place}/rank_0_of_1.json"),
            ("sync", place),
        ]


def test_a_marker_goes_before_what_it_stands_for_is_written_again(tmp_path):
    folder = RunFolder(tmp_path, 0, 1, 5)
    folder.write(1, {"value": np.zeros(3, np.float32)}, {})
    with mock.patch("os.replace", side_effect=OSError("no")), pytest.raises(OSError):
        folder.write(1, {"value": np.ones(3, np.float32)}, {})
    assert choose(tmp_path) is None


def test_a_step_is_there_when_it_is_of_all_ranks(tmp_path):
    ranks = [RunFolder(tmp_path, rank, 3, 1) for rank in range(3)]
    for step in (1, 2, 3):
        for rank in ranks[1:] if step == 3 else ranks[::-1]:
            rank.write(step, {"value": np.full(3, 10 * step + rank.rank, np.float32)}, {})
    assert there(tmp_path) == ["0/2", "0/3"]  # the first went when the second was complete
    with pytest.warns(UserWarning, match="step_3 lacks rank_0_of_3: it is passed over"):
        step = choose(tmp_path)
    assert (step.step, step.ranks()) == (2, 3)
    assert [read(step, rank, 3)[0]["value"][0] for rank in range(3)] == [20, 21, 22]
    ranks[0].write(3, {"value": np.zeros(3, np.float32)}, {})
    assert there(tmp_path) == ["0/3"]


def test_ranks_that_do_not_save_to_one_folder_are_told(tmp_path):
    folder = RunFolder(tmp_path, 0, 2, 1)
    with pytest.warns(UserWarning, match="step_1 lacks rank_1_of_2; do all ranks save to one folder"):
        for step in (1, 2, 3):
            folder.write(step, {"value": np.zeros(3, np.float32)}, {})
    assert there(tmp_path) == ["0/1", "0/2", "0/3"]


def test_two_processes_in_one_folder_have_a_run_each(tmp_path):
    one, other = RunFolder(tmp_path, 0, 1, 1), RunFolder(tmp_path, 0, 1, 1)
    for step in (1, 2):
        for folder in (one, other):
            folder.write(step, {"value": np.full(1, id(folder) % 100, np.float32)}, {})
    assert there(tmp_path) == ["0/2", "1/2"]


def test_a_save_that_ends_at_any_moment_leaves_the_last_complete_step(tmp_path):
    folder = tmp_path / "run"

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        run = RunFolder(folder, 0, 1, 1)
        run.write(1, {"value": np.ones(3, np.float32)}, {})
        return lambda: run.write(2, {"value": np.full(3, 2, np.float32)}, {})

    for fault, outcome in faults(folder, prepare):
        step = choose(folder)
        assert step is not None, fault
        np.testing.assert_array_equal(read(step, 0, 1)[0]["value"], np.full(3, step.step, np.float32))
        assert outcome != DONE or step.step == 2, fault


class At(Callback):
    """Does something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_step_end(self, run_context):
        if run_context.original_args().cur_step_num == self.step:
            self.act()


def test_a_full_disk_is_one_error(tmp_path):
    script = Script()
    whole = bits(script.train(tmp_path / "whole"))
    folder = tmp_path / "full"

    def fill():
        patched.enter_context(mock.patch("mindpet.graph.state_files.save_tensors", side_effect=OSError(28, "No space")))

    with contextlib.ExitStack() as patched, pytest.raises(CheckpointError, match="cannot save to .*No space"):
        script.train(folder, callbacks=[At(5, fill)])
    assert bits(script.train(folder, train=resume)) == whole
    assert script.done == 4


def test_a_folder_that_goes_is_made_again(tmp_path):
    script = Script()
    folder = tmp_path / "folder"
    with pytest.warns(UserWarning, match="has gone; it is made again"):
        whole = bits(script.train(folder, callbacks=[At(5, lambda: shutil.rmtree(folder))]))
    assert there(folder) == ["0/5", "0/6", "0/7", "0/8", "0/9"]
    shutil.rmtree(folder / "resume/run_0/step_9")
    assert bits(script.train(folder, train=resume)) == whole


def test_a_clock_that_is_set_back(tmp_path):
    script, clock = Script(), [time.time()]

    def tick():
        clock[0] += 100
        return clock[0]

    config = {"save_checkpoint_steps": None, "save_checkpoint_seconds": 1}
    with mock.patch("time.time", tick):
        back = At(4, lambda: clock.__setitem__(0, 0.0))
        whole = bits(script.train(tmp_path, callbacks=[back], config=config))
    assert [text for text in there(tmp_path) if text > "0/4"] == ["0/5", "0/6", "0/7", "0/8", "0/9"]
    shutil.rmtree(tmp_path / "resume/run_0/step_9")
    assert bits(script.train(tmp_path, train=resume)) == whole

"""A process that is killed while it saves leaves its last complete checkpoint."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import mindspore as ms
import numpy as np
import pytest

KILLS = 8
CHILD = pathlib.Path(__file__).parent / "kill_child.py"


def run_and_kill(directory, arguments, delay):
    """Start a child, kill it `delay` seconds after its first checkpoint; returns the number of its last save."""
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(directory), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHILD.parents[2],
        env={**os.environ, "PYTHONPATH": str(CHILD.parents[2])},
    )
    first = child.stdout.readline()
    while not list(directory.glob("*.[cs]*")):  # an asynchronous save may still be under way
        assert child.poll() is None, "the child has ended"
        time.sleep(0.001)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    finished = [int(line) for line in (first, *child.stdout) if line.strip()]
    child.wait()
    child.stdout.close()
    return finished[-1]


@pytest.mark.parametrize(
    "keep, async_save, file_format, callable_prefix",
    [
        ("1", "no", "ckpt", "no"),
        ("1", "no", "safetensors", "no"),
        ("1", "no", "ckpt", "yes"),
        ("2", "thread", "ckpt", "no"),
        ("1", "thread", "safetensors", "no"),
    ],
)
def test_sigkill_at_random_moments(keep, async_save, file_format, callable_prefix, tmp_path):
    chance = random.Random(f"{keep}{async_save}{file_format}{callable_prefix}")
    for attempt in range(KILLS):
        folder = tmp_path / str(attempt)
        last = run_and_kill(folder, [keep, async_save, file_format, callable_prefix], chance.uniform(0, 0.3))
        files = sorted(folder.glob(f"*.{file_format}"), key=os.path.getmtime)
        assert files, "no checkpoint is left"
        for file in files:
            content = ms.load_checkpoint(str(file), format=file_format)
            assert set(content) == {"delta"}
            number = np.unique(content["delta"].asnumpy())
            assert len(number) == 1
        # The newest file is of the last finished save, of the one under way, or (asynchronous) of the one before.
        assert last - (2 if async_save != "no" else 0) <= number[0] <= last + 1

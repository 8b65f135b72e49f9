"""A process that is killed while it saves leaves its last complete checkpoint."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from stepper import number, stepper

KILLS = 8


def run_and_kill(folder, delay, **config):
    """Fork a process that saves, kill it `delay` seconds after its first checkpoint; returns its last finished step."""
    finished, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            _, step = stepper(folder, size=100_000, **config)
            for position in range(1, 10**6):
                step(position)
                os.write(writing, b".")
        finally:
            os._exit(1)
    os.close(writing)
    while not list(folder.glob("[!.]*.[cs]*")):  # an asynchronous save may still be under way
        assert not os.waitpid(child, os.WNOHANG)[0], "the child has ended"
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(finished, "rb") as steps:
        return len(steps.read())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"format": "safetensors"},
        {"prefix": lambda callback_params: "latest"},
        {"async_save": "thread", "keep_checkpoint_max": 2},
        {"async_save": "thread", "format": "safetensors"},
    ],
    ids=["ckpt", "safetensors", "callable prefix", "thread", "thread and safetensors"],
)
def test_sigkill_at_random_moments(config, tmp_path):
    chance = random.Random(str(sorted(config)))
    for attempt in range(KILLS):
        folder = tmp_path / str(attempt)
        last = run_and_kill(folder, chance.uniform(0, 0.1), **{"keep_checkpoint_max": 1, **config})
        found = [number(file) for file in folder.glob("[!.]*.[cs]*")]
        # The newest file is of the last finished save, of the one under way, or (asynchronous) of the one before.
        assert last - (2 if "async_save" in config else 0) <= max(found) <= last + 1


def test_a_training_that_is_killed_and_resumed_ends_with_the_same_bits(request, tmp_path):
    kills = request.config.getoption("--kills")
    child = pathlib.Path(__file__).with_name("kill_resume_child.py")
    done = subprocess.run([sys.executable, child, tmp_path, str(kills), "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{kills} kills"), done.stdout

"""Trainings that are killed at random moments and resumed: kill_resume_child.py FOLDER KILLS SEED.

The process imports MindSpore, and forks one that trains for each life. It prints how often a training ended, and where
the killed ones went on.
"""

import hashlib
import os
import pathlib
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.train import Callback, CheckpointConfig, Model

from mindpet.graph import TrainableParamsCheckPoint, resume

EPOCHS, BATCHES, SIZE = 3, 4, 500


class Net(nn.Cell):
    """A factor that trains, and one that does not."""

    def __init__(self):
        super().__init__()
        self.delta = Parameter(Tensor(np.ones(SIZE, np.float32)), name="delta")
        self.base = Parameter(Tensor(np.ones(SIZE, np.float32)), name="base", requires_grad=False)
        self.dropout = nn.Dropout(p=0.5)

    def construct(self, x):
        return (self.dropout(x) * self.delta * self.base - 2).square().mean()


class Begin(Callback):
    """Tells that training begins."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_begin(self, run_context):
        os.write(self.pipe, b"begins ")


def live(folder, pipe):
    """Train to the end, from wherever that goes on; tells a hash of what training ends with."""
    ms.set_seed(1)
    network = Net()
    train = nn.TrainOneStepCell(network, nn.Momentum(network.trainable_params(), 0.1, 0.9))
    columns = {"x": np.random.default_rng(0).normal(size=(BATCHES * 2, SIZE)).astype(np.float32)}
    data = ds.NumpySlicesDataset(columns, shuffle=True).batch(2)
    checkpoint = TrainableParamsCheckPoint(str(folder), config=CheckpointConfig(keep_checkpoint_max=1), resumable=True)
    callbacks = [Begin(pipe), checkpoint]
    done = resume(Model(train), folder, EPOCHS, data, callbacks, missing_ok=True, dataset_sink_mode=False)
    bits = hashlib.md5(b"".join(param.asnumpy().tobytes() for param in train.get_parameters())).hexdigest()
    os.write(pipe, f"{done} {bits}".encode())


def fork(folder, delay=None):
    """A life, killed `delay` seconds after training has begun; returns how long it trained, and what it told."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            warnings.simplefilter("ignore")
            live(folder, writing)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    text = os.read(reading, 7)
    start = time.monotonic()
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as told:
        text = text.decode() + told.read()
    duration = time.monotonic() - start
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, status
    return duration, text.replace("begins ", "").split()


folder, kills, chance = pathlib.Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
fork(folder / "cold")
whole, (_, expected) = fork(folder / "whole")
ends, places, killed = 0, Counter(), 0
while killed < kills:
    life = folder / str(ends)
    _, told = fork(life, chance.uniform(0, whole))
    killed += not told
    if killed == kills and not told:
        _, told = fork(life)
    if told:
        done, bits = told
        assert bits == expected, f"{life}: other bits; it went on after step {done}"
        places[int(done)] += 1
        # One that goes is left if the kill came just before that, and no further step was saved; so is what there was
        # of a run that was killed before its first step was complete.
        steps = {path.parent.name for path in life.glob("resume/run_*/[!.]*/*.json")}
        (last,) = life.glob(f"*-{EPOCHS}_{BATCHES}.ckpt")
        deltas = list(life.glob(f"{last.name.partition('-')[0]}-*.ckpt"))
        assert f"step_{EPOCHS * BATCHES}" in steps and len(steps) <= 2 and len(deltas) <= 2, (steps, deltas)
        shutil.rmtree(life)
        ends += 1
print(f"{killed} kills, {ends} ends with equal bits, the last lives from steps {dict(sorted(places.items()))}")

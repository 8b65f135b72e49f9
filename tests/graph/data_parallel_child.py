"""One of several data-parallel processes that train a Toy: data_parallel_child.py FOLDER [STEP TO DIE AT].

Started by msrun, or alone with the joint batch. The last rank kills itself at the given step. Training goes on from
what is in the folder.
"""

import os
import signal
import sys

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.communication import get_group_size, get_rank, init
from mindspore.train import Callback, CheckpointConfig, Model
from toy import batch, lora

from mindpet.graph import TrainableParamsCheckPoint, resume

STEPS, ROWS = 12, 8


class Die(Callback):
    """Kills this process at a step."""

    def __init__(self, step):
        self.step = step

    def on_train_step_end(self, run_context):
        if run_context.original_args().cur_step_num == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


folder, *die_at = sys.argv[1:]
ms.set_context(mode=ms.GRAPH_MODE)
ms.set_device("CPU")
rank, size = 0, 1
if "MS_ROLE" in os.environ:
    init()
    rank, size = get_rank(), get_group_size()
    ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True)
ms.set_seed(3)
network = lora()
x, labels = (value.asnumpy() for value in batch(np.random.default_rng(5), ROWS))
mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)


def steps():
    """The same rows at every step, each time larger."""
    for step in range(STEPS):
        yield x[mine] * np.float32(1 + step / STEPS), labels[mine]


data = ms.dataset.GeneratorDataset(steps, ["x", "labels"], shuffle=False)
callbacks = [TrainableParamsCheckPoint(folder, config=CheckpointConfig(save_checkpoint_steps=3), resumable=True)]
if die_at and rank == size - 1:
    callbacks.append(Die(int(die_at[0])))
optimizer = nn.SGD(network.trainable_params(), 0.1, momentum=0.9)
model = Model(network, nn.CrossEntropyLoss(), optimizer)
done = resume(model, folder, 1, data, callbacks, missing_ok=True, dataset_sink_mode=False)
ms.save_checkpoint(network, os.path.join(folder, f"end_{size}_{rank}.ckpt"))
print(f"rank {rank} of {size} is done; it began after step {done}")

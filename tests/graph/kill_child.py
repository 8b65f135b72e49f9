"""Saves in a loop until it is killed: `kill_child.py DIRECTORY KEEP ASYNC FORMAT CALLABLE_PREFIX`.

Each checkpoint holds one number in all of its values, so that a reader can tell a whole file from a mixture.
"""

import sys

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.train import CheckpointConfig
from mindspore.train.callback import RunContext
from mindspore.train.callback._callback import InternalCallbackParam

from mindpet.graph import TrainableParamsCheckPoint

directory, keep, async_save, file_format, callable_prefix = sys.argv[1:]
network = nn.Cell()
network.delta = Parameter(np.zeros((256, 512), np.float32), name="delta")
network.base = Parameter(np.zeros((512, 512), np.float32), name="base", requires_grad=False)
prefix = (lambda callback_params: "latest") if callable_prefix == "yes" else "x"
config = CheckpointConfig(
    keep_checkpoint_max=int(keep), async_save={"no": False}.get(async_save, async_save), format=file_format
)
callback = TrainableParamsCheckPoint(directory, prefix, config)
context = InternalCallbackParam()
context.update(network=network, train_network=network, batch_num=10**9, cur_epoch_num=1, cur_step_num=0)
callback.on_train_begin(RunContext(context))
while True:
    context.cur_step_num += 1
    network.delta.set_data(Tensor(np.full((256, 512), context.cur_step_num, np.float32)))
    callback.on_train_step_end(RunContext(context))
    print(context.cur_step_num, flush=True)

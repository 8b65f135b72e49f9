"""What one rank of a cluster does, without the cluster: compile in semi-auto parallel, and save by the callback.

Usage: save_sharded_child.py FOLDER FORMAT. Runs in the environment of a dry run, where nothing can be executed; the
parameters are cut by MindSpore after it has compiled, and saved as they are.
"""

import sys

import mindspore as ms
from mindspore import nn
from mindspore.communication import get_rank, init
from mindspore.train import CheckpointConfig
from mindspore.train.callback import RunContext
from mindspore.train.callback._callback import InternalCallbackParam
from sharded_delta import LAYOUT, build

from mindpet.graph import TrainableParamsCheckPoint

folder, format = sys.argv[1:]
ms.set_context(mode=ms.GRAPH_MODE)
ms.set_device("GPU")
init()
ms.set_auto_parallel_context(
    parallel_mode="semi_auto_parallel", device_num=8, global_rank=get_rank(), dataset_strategy="full_batch"
)
network, x = build(**LAYOUT)
step = nn.TrainOneStepCell(network, nn.Adam(network.trainable_params())).set_train()
checkpoint = TrainableParamsCheckPoint(folder, config=CheckpointConfig(save_checkpoint_steps=1, format=format))
params = InternalCallbackParam(
    network=network, train_network=step, cur_step_num=1, cur_epoch_num=1, batch_num=1, epoch_num=1
)
context = RunContext(params)
checkpoint.on_train_begin(context)
step.compile(x)
checkpoint.on_train_step_end(context)

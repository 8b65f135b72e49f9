"""What one rank of a cluster does, without the cluster: train in semi-auto parallel, and save by the callback.

Usage: save_sharded_child.py FOLDER FORMAT auto|context. Runs in the environment of a dry run, where nothing can be
executed; the parameters are cut by MindSpore after it has compiled, and saved as they are. With `auto` the network is
in AutoParallel, which sets the parallel context while `Model` trains, and not when the callback is made.
"""

import sys

import mindspore as ms
from mindspore import nn
from mindspore.communication import get_rank, init
from mindspore.parallel.auto_parallel import AutoParallel
from mindspore.train import CheckpointConfig, Model
from sharded_delta import LAYOUT, build

from mindpet.graph import DeltaGuard, TrainableParamsCheckPoint

folder, format, way = sys.argv[1:]
ms.set_context(mode=ms.GRAPH_MODE)
ms.set_device("GPU")
init()
nn.TrainOneStepCell.__call__ = nn.TrainOneStepCell.compile  # a step is compiled, and changes nothing
config = CheckpointConfig(save_checkpoint_steps=1, format=format)
if way == "context":
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel", device_num=8, global_rank=get_rank(), dataset_strategy="full_batch"
    )
network, x = build(**LAYOUT)
checkpoint = TrainableParamsCheckPoint(folder, config=config)
optimizer = nn.Adam(network.trainable_params())
if way == "auto":
    network = AutoParallel(network)
    network.dataset_strategy("full_batch")
data = ms.dataset.NumpySlicesDataset({"x": x.asnumpy()}, shuffle=False).batch(len(x))
Model(network, optimizer=optimizer).train(1, data, callbacks=[DeltaGuard(), checkpoint], dataset_sink_mode=False)

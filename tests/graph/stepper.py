"""Steps without training, for callbacks that save; a file tells by its content which step it is of."""

import os

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.train import CheckpointConfig
from mindspore.train.callback import RunContext
from mindspore.train.callback._callback import InternalCallbackParam

from mindpet.graph import TrainableParamsCheckPoint


def stepper(directory, prefix="x", value=0, size=1000, **config):
    """A callback, and a function that makes a step: what is saved then is `value` plus the step's number."""
    network = nn.Cell()
    network.delta = Parameter(np.zeros(size, np.float32), name="delta")
    network.base = Parameter(np.zeros(size, np.float32), name="base", requires_grad=False)
    callback = TrainableParamsCheckPoint(str(directory), prefix, CheckpointConfig(**config))
    context = InternalCallbackParam()
    context.update(network=network, train_network=network, batch_num=10**9, cur_epoch_num=1, cur_step_num=0)

    def step(number):
        context.cur_step_num = number
        network.delta.set_data(Tensor(np.full(size, value + number, np.float32)))
        callback.on_train_step_end(RunContext(context))

    return callback, step


def load(path, **options):
    return ms.load_checkpoint(str(path), format=os.path.splitext(path)[1][1:], **options)


def number(path):
    """The number in a file of a `stepper`, which must be whole."""
    content = load(path)
    assert set(content) == {"delta"}
    (number,) = set(content["delta"].asnumpy().tolist())
    return number

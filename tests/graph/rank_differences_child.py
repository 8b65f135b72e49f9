"""One of two data-parallel processes whose networks differ: rank_differences_child.py FILE.

Rank N writes to FILE.N what DeltaGuard says in each case, in both modes, as JSON: "mode case" -> messages.
"""

import json
import sys
import warnings

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.communication import get_rank, init
from mindspore.train import Model
from toy import batch, lora

from mindpet.errors import NotLearningError
from mindpet.graph import DeltaGuard, freeze_modules


class AfterFirst(ms.train.Callback):
    """Has rank 1 do something after the first step."""

    def __init__(self, change):
        self.change = change

    def on_train_step_end(self, run_context):
        if rank == 1 and run_context.original_args().cur_step_num == 1:
            self.change()


def train(before=None, after=None, strict=True, seeds=(3, 3), layerwise=False, **settings):
    """The messages of a guard while a network trains that rank 1 changes before training and after the first step."""
    ms.set_auto_parallel_context(**{"parameter_broadcast": False, **settings})
    ms.set_seed(seeds[rank])
    network = lora()
    network.fc.bias.layerwise_parallel = layerwise
    optimizer = nn.SGD(network.trainable_params(), 0.1)
    if before and rank == 1:
        before(network)
    x, labels = (value.asnumpy() for value in batch(np.random.default_rng(rank), 4))
    data = ms.dataset.NumpySlicesDataset({"x": x, "labels": labels}, shuffle=False).batch(1)
    callbacks = [*([AfterFirst(lambda: after(network))] if after else []), DeltaGuard(2, strict)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            Model(network, nn.CrossEntropyLoss(), optimizer).train(1, data, callbacks, dataset_sink_mode=False)
        except NotLearningError as error:
            return [str(error)]
    return [str(warning.message) for warning in caught if "DeltaGuard" in str(warning.message)]


def shift(param):
    param.set_data(Tensor(param.asnumpy() + 1))


def shift_delta(network):
    shift(network.fc.mindpet_delta_lora_a)


def shift_bias(network):
    shift(network.fc.bias)


def freeze_all(network):
    freeze_modules(network, include=["*"])


def train_bias(network):
    freeze_modules(network, exclude=["fc.bias"])


CASES = {
    "seed": lambda: train(seeds=(3, 4)),
    "delta": lambda: train(shift_delta),
    "frozen": lambda: train(freeze_all),
    "warned": lambda: train(shift_delta, train_bias, strict=False),
}
MODES = {
    "graph": (ms.GRAPH_MODE, {"broadcast": lambda: train(shift_delta, shift_bias, parameter_broadcast=True)}),
    "pynative": (ms.PYNATIVE_MODE, {"layerwise": lambda: train(shift_bias, layerwise=True)}),
}

ms.set_device("CPU")
init()
rank = get_rank()
ms.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True)
messages = {}
for name, (mode, more) in MODES.items():
    ms.set_context(mode=mode)
    messages.update({f"{name} {case}": run() for case, run in {**CASES, **more}.items()})
with open(f"{sys.argv[1]}.{rank}", "w", encoding="utf-8") as file:
    json.dump(messages, file)

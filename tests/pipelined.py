"""A network in two pipeline stages, for dry runs."""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.parallel.auto_parallel import AutoParallel
from mindspore.parallel.nn import Pipeline

from mindpet.peft import LoraConfig, VeraConfig, get_peft_model

TARGETS = ["up", "down"]
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"]),
    "pissa": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"),
    "vera": VeraConfig(r=2, target_modules=TARGETS),  # all layers share its frozen projections, SHARED
}
SHARED = ["up.mindpet_vera_a", "up.mindpet_vera_b"]
STAGES = {"up": 0, "down": 1, "head": 1}  # of the Cells


class Staged(nn.Cell):
    """Two layers, a head, and a sum, the loss."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Dense(8, 8), nn.Dense(8, 8), nn.Dense(8, 4)
        self.sum = ops.ReduceSum()

    def construct(self, x):
        return self.sum(self.head(self.down(self.up(x))))


def adapted(name):
    """The network with an adapter."""
    network = Staged()
    get_peft_model(network, CONFIGS[name])
    return network


def build(name, file):
    """The network in its stages; what dry_run takes."""
    network = adapted(name)
    parallel = AutoParallel(Pipeline(network, 2, STAGES))
    parallel.dataset_strategy("full_batch")
    parallel.pipeline(2)
    parallel.save_param_strategy_file(str(file))
    parallel.disable_strategy_file_only_for_trainable_params()
    return parallel, Tensor(np.ones((4, 8), np.float32)), nn.Adam(network.trainable_params())

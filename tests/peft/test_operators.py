"""Operators that a training step has for a layer with a delta, beside those of the frozen layer: none too many."""

import mindspore as ms
import numpy as np
import pytest
from compiled import count_operators
from mindspore import Tensor, nn, ops

from mindpet.delta.registry import METHODS
from mindpet.peft import (
    AdaLoraConfig,
    AdapterConfig,
    CompacterConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LowRankAdapterConfig,
    MissConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)

INPUTS, OUTPUTS = 8, 12
LORA = {
    "MatMul": 6,
    "Mul": 2,
    "Add": 1,
    "AddN": 1,
}  # A, B; their gradients and those of their inputs; s, forth and back
BOTTLENECK = {"MatMul": 6, "BiasAdd": 2, "BiasAddGrad": 2, "GeLU": 1, "GeLUGrad": 1, "Add": 1, "AddN": 1}
# By name: configuration, and what a step has beside forward pass and input gradient of the frozen layer.
STEPS = {
    "lora": (LoraConfig(r=2), LORA),
    "rslora": (LoraConfig(r=2, use_rslora=True), LORA),
    "no_dropout": (LoraConfig(r=2, lora_dropout=0.0), LORA),
    "dropout": (LoraConfig(r=2, lora_dropout=0.1), {**LORA, "Dropout": 1, "DropoutGrad": 1}),
    "lora_bias": (LoraConfig(r=2, lora_bias=True), {**LORA, "BiasAdd": 1, "BiasAddGrad": 1}),
    "pissa": (LoraConfig(r=2, init_lora_weights="pissa"), {**LORA, "MatMul": 10, "Mul": 4, "Sub": 1, "Neg": 1}),
    "dora": (
        LoraConfig(r=2, use_dora=True),
        {
            **LORA,
            **{"Mul": 6, "Add": 5, "AddN": 2, "Sub": 2, "Neg": 1, "SumExt": 2, "Div": 2},
            **{"MatMulExt": 1, "Square": 1, "Sqrt": 1, "Equal": 1, "Cast": 1},  # the norm, and whether it is zero
        },
    ),
    "adalora": (AdaLoraConfig(init_r=2, target_r=1, total_step=9), {**LORA, "Mul": 5, "Reshape": 2, "SumExt": 1}),
    "ia3": (IA3Config(), {"Mul": 3, "Reshape": 4, "SumExt": 1}),
    "ia3_feedforward": (IA3Config(feedforward_modules=["fc"]), {"Mul": 3, "SumExt": 1}),
    "vera": (VeraConfig(r=2), {**LORA, "MatMul": 4, "Mul": 6, "Slice": 2, "SumExt": 2}),
    "hira": (HiraConfig(r=2), LORA),
    "miss": (MissConfig(r=2), {"MatMul": 3, "Add": 1, "AddN": 1, "ReduceSum": 1, "Reshape": 3, "Tile": 1}),
    "bat": (
        MissConfig(r=2, init_weights="bat"),
        {"MatMul": 3, "BatchMatMul": 2, "Add": 2, "AddN": 2, "ExpandDims": 1, "Reshape": 6, "SumExt": 1},
    ),
    "loha": (LoHaConfig(r=2, alpha=4), {**LORA, "MatMul": 14, "Mul": 8}),
    "lokr": (LoKrConfig(r=2, alpha=4), {**LORA, "Reshape": 10, "Transpose": 4}),
    "adapter": (AdapterConfig(bottleneck_size=2), BOTTLENECK),
    "parallel": (AdapterConfig(bottleneck_size=2, form="parallel", scale=2.0), {**BOTTLENECK, "Mul": 2}),
    "low_rank_adapter": (LowRankAdapterConfig(reduction_factor=2), {**BOTTLENECK, "MatMul": 12}),
    "compacter": (
        CompacterConfig(reduction_factor=3, phm_dim=2),
        {**BOTTLENECK, "MatMul": 12, "Mul": 6, "AddN": 2, "SumExt": 4, "Reshape": 24, "Transpose": 4},
    ),
    "oft": (
        OFTConfig(oft_block_size=4),
        {
            **{"BatchMatMul": 12, "Add": 5, "AddN": 3, "Mul": 4, "Gather": 1, "UnsortedSegmentSum": 1},
            **{"Reshape": 7, "Transpose": 6},
        },
    ),
}


class One(nn.Cell):
    """A network of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def construct(self, x):
        return self.fc(x)


class Step(nn.Cell):
    """The output of a network, and the gradients of its input and of what trains in it."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network, self.params = network, ms.ParameterTuple(network.trainable_params())
        self.gradients = ops.GradOperation(get_all=True, get_by_list=bool(self.params), sens_param=True)
        self.set_train()

    def construct(self, x, dout):
        function = self.gradients(self.network, self.params) if self.params else self.gradients(self.network)
        return self.network(x), function(x, dout)


def run(network, x):
    """The compiled Step of a network, once called with `x`."""
    step = Step(network)
    step(x, ops.ones((*x.shape[:-1], OUTPUTS), x.dtype))
    return step


def tensor(*shape, dtype=np.float32):
    return Tensor(np.random.default_rng(7).normal(size=shape).astype(dtype))


def frozen():
    network = One(nn.Dense(INPUTS, OUTPUTS))
    for param in network.get_parameters():
        param.requires_grad = False
    return network


@pytest.fixture(scope="module")
def floor():
    """Operators of the frozen layer, by the number of axes of its input."""
    ms.set_context(mode=ms.GRAPH_MODE)
    return {axes: count_operators(run(frozen(), tensor(*(2,) * (axes - 1), INPUTS))) for axes in (2, 3)}


def beside(floor, network, axes=2):
    """What a step has beside that of the frozen layer."""
    ms.set_context(mode=ms.GRAPH_MODE)
    counts = count_operators(run(network, tensor(*(2,) * (axes - 1), INPUTS)))
    counts.subtract(floor[axes])
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_no_operator_too_many(name, floor):
    config, expected = STEPS[name]
    config.target_modules = ["fc"]
    assert beside(floor, get_peft_model(frozen(), config)) == expected


def test_the_table_has_every_method_of_linear_layers():
    methods = {name for name, method in METHODS.items() if "linear" in method.deltas}
    assert {config.method_name for config, _ in STEPS.values()} == methods

"""The networks that are measured, with a method in them, and a step of their training."""

import re
from collections.abc import Iterable
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from models.bert import BertConfig, Layer

from benchmarks.methods import COMPUTE, METHODS
from mindpet.graph import freeze_delta
from mindpet.network.values import assign
from mindpet.peft import get_peft_model

TARGETS = r"(.*\.)?(query|key|value|dense|up|down)"


class Pair(nn.Cell):
    """Two Dense layers, the feed-forward block of a transformer: `(rows, width) -> (rows, width)`."""

    def __init__(self, width, inner):
        super().__init__()
        self.up, self.gelu, self.down = nn.Dense(width, inner), nn.GELU(approximate=False), nn.Dense(inner, width)

    def construct(self, x):
        return self.down(self.gelu(self.up(x)))


class Masked(nn.Cell):
    """A layer or encoder of a BERT on a batch without padding: `(batch, seq, width) -> (batch, seq, width)`."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.is_layer = inner, isinstance(inner, Layer)

    def construct(self, x):
        mask = ops.zeros((x.shape[0], 1, 1, x.shape[1]), x.dtype)
        return self.inner(x, mask, None) if self.is_layer else self.inner(x, mask)


def bert(layers, width):
    """A BERT's shape, without dropout."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(num_hidden_layers=layers, **sizes, **quiet)


def targets(network: nn.Cell) -> dict[str, nn.Dense]:
    """The Dense layers that the methods act on, by path."""
    return {
        path: cell
        for path, cell in network.cells_and_names()
        if isinstance(cell, nn.Dense) and re.fullmatch(TARGETS, path)
    }


def by_hand(network: nn.Cell, method: str) -> nn.Cell:
    """The network with its targets replaced by a method's hand-made layers, frozen."""
    for path, dense in targets(network).items():
        outer = network
        *outers, name = path.split(".")
        for part in outers:
            outer = outer[int(part)] if part.isdigit() else getattr(outer, part)
        layer = METHODS[method].dense(dense.in_channels, dense.out_channels, **COMPUTE)
        assign(layer.weight, dense.weight)
        assign(layer.bias, dense.bias)
        setattr(outer, name, layer)
    network.update_parameters_name()
    freeze_delta(network, method)
    return network


def by_config(network: nn.Cell, method: str) -> nn.Cell:
    """The network with a method put in by `get_peft_model`."""
    return get_peft_model(network, METHODS[method].config(TARGETS))


def step(network: nn.Cell, x: np.ndarray, weights: Iterable[ms.Parameter]) -> Callable[[], Any]:
    """A call that computes the gradients of the input and of the weights, and waits for them."""
    weights, x, probe = list(weights), Tensor(x), Tensor(np.ones_like(x))

    def loss(inputs):
        return (network(inputs) * probe).sum()

    gradients = ms.value_and_grad(loss, 0, weights or None)
    if ms.get_context("mode") == ms.GRAPH_MODE:
        gradients = ms.jit(gradients)

    def call():
        value, _ = gradients(x)
        return value.asnumpy()

    return call

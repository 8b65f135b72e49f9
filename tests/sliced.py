"""A network that changes the names of its parameters when it is called."""

from collections import OrderedDict

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindpet.delta import LoRADense

WIDTH, LABELS = 4, 2


class Sliced(nn.Cell):
    """Slices lists of layers in `construct`, so that MindSpore names their parameters anew: `0.weight`."""

    def __init__(self, lora=False):
        super().__init__()
        layer = dense_with_lora if lora else dense
        self.layers = nn.CellList([layer() for _ in range(3)])
        self.more = nn.SequentialCell(OrderedDict(first=layer(), second=layer()))
        self.head = nn.Dense(WIDTH, LABELS)

    def construct(self, x):
        for layer in self.layers[1:3]:
            x = layer(x)
        for layer in self.more[0:2]:
            x = layer(x)
        for layer in self.layers[:1]:
            x = layer(x)
        return self.head(x)


def dense():
    return nn.Dense(WIDTH, WIDTH)


def dense_with_lora():
    return LoRADense(WIDTH, WIDTH, 2, 4, compute_dtype=ms.float32)


def ones(width=WIDTH):
    return Tensor(np.ones((3, width), np.float32))

"""A network whose delta has known values."""

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor
from sharded import Network, strategy

from mindpet.delta import LoRADense
from mindpet.graph import freeze_delta
from mindpet.parallel import shard_like

LAYOUT = {"n": 2, "o": 4}
DELTA = {
    "cell.mindpet_delta_lora_a": np.arange(8 * 16, dtype=np.float32).reshape(8, 16),
    "cell.mindpet_delta_lora_b": -np.arange(32 * 8, dtype=np.float32).reshape(32, 8) / 7,
}


def make(dtype=ms.float32):
    """The layer alone; its weight is whole and fresh."""
    a, b = (Tensor(value) for value in DELTA.values())
    return LoRADense(16, 32, 8, 16, lora_a_init=a, lora_b_init=b, param_init_type=dtype, compute_dtype=ms.float32)


def build(n=1, i=1, o=1, dtype=ms.float32):
    """The network with its layer cut, frozen, and an input."""
    network = Network(shard_like(make(dtype), strategy(n, i, o)), n, i, o)
    freeze_delta(network, "lora")
    return network, Tensor(np.ones((16, 16), np.float32))


def case(**counts):
    """A `build` that can be pickled."""
    return functools.partial(build, **counts)

#!/usr/bin/env python3
"""Tensor parallelism in PyNative mode, by hand: the deltas of LoRA on layers that two processes share.

    msrun --worker_num=2 --local_worker_num=2 --join=True examples/parallel/pynative_tensor_parallel.py

Each process has its slices of two linear layers, cut as Megatron-LM cuts a feed-forward block (Shoeybi et al. 2019,
arXiv:1909.08053, section 3): the first by its outputs, the second by its inputs. A delta is put on the slices as on
any linear layer; what parallelism adds to it is one rule. A factor that is cut as its layer (B of the first, A of the
second) trains like the layer. The other one is the same in all processes, and its gradient is a sum over them. The
script trains both ways, whole and cut, and compares.
"""

import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank, init

from mindpet.peft import LoraConfig, get_peft_model

WIDTH, INNER, RANK, STEPS, RATE = 8, 16, 2, 5, 0.1
# Which factor of LoRA is the same in all processes.
SAME = {"up": "lora_a", "down": "lora_b"}


class Block(nn.Cell):
    """A feed-forward block, or a process's part of it: `(rows, WIDTH) -> (rows, WIDTH)`."""

    def __init__(self, parts=1):
        super().__init__()
        self.up = nn.Dense(WIDTH, INNER // parts, has_bias=False)
        self.down = nn.Dense(INNER // parts, WIDTH, has_bias=False)
        self.sum = ops.AllReduce() if parts > 1 else None

    def construct(self, x):
        out = self.down(ops.relu(self.up(x)))
        return out if self.sum is None else self.sum(out)


def part(name, value, rank, parts):
    """A process's slice of a Parameter: those of `up` are cut along the outputs, those of `down` along the inputs."""
    layer = "up" if "up." in name else "down"
    if SAME[layer] in name or value.ndim < 2:
        return value
    return np.split(value, parts, axis=0 if layer == "up" else 1)[rank]


def train(model, x, parts=1):
    """Train a block to give back its input; returns the losses."""
    params = model.trainable_params()
    same = [SAME["up" if "up." in param.name else "down"] in param.name for param in params]
    add_up = ops.AllReduce() if parts > 1 else None

    def loss_of(inputs):
        return ops.square(model(inputs) - inputs).mean()

    step = ms.value_and_grad(loss_of, None, params)
    losses = []
    for _ in range(STEPS):
        loss, gradients = step(x)
        losses.append(float(loss.asnumpy()))
        for param, gradient, is_same in zip(params, gradients, same):
            if (
                parts > 1
            ):  # AllReduce adds up in the backward pass, too, so that every gradient is `parts` times too large
                gradient = (add_up(gradient) if is_same else gradient) / parts
            param.set_data(param - RATE * gradient)
    return losses


def main():
    """Train both ways and compare; returns whether they differ, or do not learn."""
    init()
    rank, parts = get_rank(), get_group_size()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    rng = np.random.default_rng(0)
    config = LoraConfig(r=RANK, target_modules=["up", "down"])
    whole, cut = (get_peft_model(Block(count), config) for count in (1, parts))
    for (name, param), (_, other) in zip(whole.parameters_and_names(), cut.parameters_and_names()):
        if param.ndim:  # not the scale of LoRA
            value = rng.normal(size=param.shape, scale=0.3).astype(np.float32)
            param.set_data(Tensor(value))
            other.set_data(Tensor(part(name, value, rank, parts)))
    x = Tensor(rng.normal(size=(32, WIDTH)).astype(np.float32))
    losses, cut_losses = train(whole, x), train(cut, x, parts)
    worst = max(
        np.abs(part(name, param.asnumpy(), rank, parts) - other.asnumpy()).max()
        for (name, param), (_, other) in zip(whole.parameters_and_names(), cut.parameters_and_names())
    )
    print(
        f"rank {rank} of {parts}: losses {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"cut {cut_losses[0]:.4f} to {cut_losses[-1]:.4f}; parameters differ by {worst:.1e}"
    )
    return not (worst < 1e-5 and losses[-1] < 0.9 * losses[0])


if __name__ == "__main__":
    sys.exit(main())

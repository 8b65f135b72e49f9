#!/usr/bin/env python3
"""What frozen weights in fewer bits save, and what they cost: a training step of LoRA on a feed-forward block.

Times are those of the processor, so that other programs on the machine count little; the median of rounds in which all
variants take turns.
"""

import argparse
import statistics
import time

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindpet.graph import QuantizationConfig, quantize, summary
from mindpet.peft import LoraConfig, get_peft_model

VARIANTS = {
    "float32": {},
    "float16": {"frozen_dtype": ms.float16},
    "int8": {"bits": "int8"},
    "int4": {"bits": "int4"},
    "nf4": {"bits": "nf4"},
    "nf4, scales in float32": {"bits": "nf4", "double_quant": False},
}


class Block(nn.Cell):
    """A feed-forward block and a loss."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Dense(width, 4 * width, "normal"), nn.Dense(4 * width, width, "normal")
        self.relu = nn.ReLU()

    def construct(self, x):
        return ((self.down(self.relu(self.up(x))) - x) ** 2).mean()


def make(width, frozen_dtype=None, **quantization):
    """(training step, bytes of weights, gradients and optimizer, relative error of the weights)."""
    ms.set_seed(1)
    network, report = Block(width), []
    if quantization:
        report = quantize(network, QuantizationConfig(**quantization))
    model = get_peft_model(network, LoraConfig(r=8, target_modules=["up", "down"]), frozen_dtype=frozen_dtype)
    optimizer = nn.Adam(model.trainable_params(), 1e-3)
    cost = summary(model, optimizer)
    size = cost.weight_bytes + cost.gradient_bytes + cost.optimizer_bytes
    error = max((layer.relative_error for layer in report), default=0.0)
    return nn.TrainOneStepCell(model, optimizer).set_train(), size, error


def main(argv=None):
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768, help="features (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1024, help="of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    ms.set_context(mode=ms.GRAPH_MODE)
    x = Tensor(np.random.default_rng(0).normal(size=(arguments.rows, arguments.width)).astype(np.float32))
    made = {name: make(arguments.width, **options) for name, options in VARIANTS.items()}
    times = {name: [] for name in made}
    for number in range(arguments.rounds + 1):
        for name, (step, _, _) in made.items():
            begin = time.process_time()
            step(x).asnumpy()
            if number:  # the first one compiles
                times[name].append(1000 * (time.process_time() - begin))
    print("| frozen weights | MB | error of the weights, % | processor ms a step |\n|---|---:|---:|---:|")
    for name, (_, size, error) in made.items():
        print(f"| {name} | {size / 1e6:.1f} | {100 * error:.1f} | {statistics.median(times[name]):.0f} |")


if __name__ == "__main__":
    main()

"""What frozen weights in fewer bits save, and what they cost: a training step of LoRA on a feed-forward block.

Times are those of the processor, so that other programs on the machine count little; the median of rounds in which all
variants take turns.
"""

import statistics
import time

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from benchmarks.measure import report
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


def run(short: bool = False, turns: int = 15) -> None:
    """Print the table."""
    width, rows, turns = (64, 8, 1) if short else (768, 1024, turns)
    ms.set_context(mode=ms.GRAPH_MODE)
    x = Tensor(np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32))
    made = {name: make(width, **options) for name, options in VARIANTS.items()}
    times = {name: [] for name in made}
    for turn in range(turns + 1):
        for name, (step, _, _) in made.items():
            begin = time.process_time()
            step(x).asnumpy()
            if turn:  # the first one compiles
                times[name].append(1000 * (time.process_time() - begin))
    report(
        "frozen_bits",
        [
            {
                "frozen weights": name,
                "MB": size / 1e6,
                "error of the weights, %": 100 * error,
                "processor ms a step": statistics.median(times[name]),
            }
            for name, (_, size, error) in made.items()
        ],
    )

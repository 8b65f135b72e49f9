"""What a LLaMA of 32 layers with LoRA on all 224 linear layers costs before its first step is done.

Each candidate is compiled in a process of its own, in turn; the layers are narrow, for that does not change the graph.
`inject` is the time to put the deltas in, `first step` that of the first training step in graph mode, which compiles.
"""

import statistics
import time
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from models.llama import CausalLoss, LlamaConfig

from benchmarks.measure import in_child, report
from mindpet.graph import freeze_delta
from mindpet.peft import LoraConfig, get_peft_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CANDIDATES = ("full", "by hand", "by config")


def llama(layers: int, lora_rank: int) -> nn.Cell:
    """A loss network of LLaMA's shape, but narrow."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return CausalLoss(LlamaConfig(num_hidden_layers=layers, lora_rank=lora_rank, **sizes))


def first_step(candidate: str, layers: int) -> tuple[float, float]:
    """Seconds to put the deltas in, and of the first training step."""
    ms.set_context(mode=ms.GRAPH_MODE)
    network = llama(layers, 8 if candidate == "by hand" else 0)
    started = time.perf_counter()
    if candidate == "by hand":
        freeze_delta(network, "lora")
    elif candidate == "by config":
        network = get_peft_model(network, LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR))
    injected = time.perf_counter()
    step = nn.TrainOneStepCell(network, nn.SGD(network.trainable_params(), learning_rate=1e-3)).set_train()
    ids = Tensor(np.ones((2, 16), np.int32))
    step(ids, ids).asnumpy()
    return injected - started, time.perf_counter() - injected


def injection(layers: int) -> float:
    """Seconds to put LoRA in all of some Dense layers."""
    network = nn.SequentialCell([nn.Dense(8, 8) for _ in range(layers)])
    started = time.perf_counter()
    get_peft_model(network, LoraConfig(target_modules="all-linear"))
    return time.perf_counter() - started


def run(short: bool = False, turns: int = 3) -> None:
    """Print the table."""
    layers = 2 if short else 32
    times: dict[str, list[Any]] = {name: [] for name in CANDIDATES}
    for _ in range(1 if short else turns):
        for name in CANDIDATES:
            times[name].append(in_child(first_step, name, layers))
    steps = {name: [step for _, step in times[name]] for name in CANDIDATES}
    rows = [
        {
            "put in": name,
            "inject s": statistics.median(inject for inject, _ in times[name]),
            "first step s": statistics.median(steps[name]),
            "of full": statistics.median(a / b for a, b in zip(steps[name], steps["full"])),
        }
        for name in CANDIDATES
    ]
    report("compile_time", rows)
    many = 100 if short else 1000
    report("injection", [{"layers": many, "inject s": in_child(injection, many)}])

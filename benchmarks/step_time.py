"""Time of a training step without the optimizer: forward, and the gradients of the input and of what trains.

Each method is held against `floor`, the frozen network: forward and the gradient of the input. `needs` is what its own
multiply-adds come to in units of the floor, and `over` how far its time is above that.
"""

from collections.abc import Iterable
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import nn
from models.bert import Encoder, Layer

from benchmarks.measure import in_turns, ratio, report
from benchmarks.methods import METHODS
from benchmarks.networks import Masked, Pair, bert, by_config, by_hand, step, targets

# name -> (makes the network, shape of its input)
SUBJECTS = {
    "768-3072-768, 512 rows": (lambda: Pair(768, 3072), (512, 768)),
    "768-3072-768, 2048 rows": (lambda: Pair(768, 3072), (2048, 768)),
    "1024-4096-1024, 512 rows": (lambda: Pair(1024, 4096), (512, 1024)),
    "1024-4096-1024, 2048 rows": (lambda: Pair(1024, 4096), (2048, 1024)),
    "transformer layer 768, 4 x 128": (lambda: Masked(Layer(bert(1, 768))), (4, 128, 768)),
    "BERT, 6 layers 384, 8 x 64": (lambda: Masked(Encoder(bert(6, 384))), (8, 64, 384)),
}
SHORT = {"64-256-64, 32 rows": (lambda: Pair(64, 256), (32, 64))}


def candidates(make: Callable[[], nn.Cell], shape: tuple, methods: Iterable[str]) -> dict[str, Callable[[], Any]]:
    """The steps that are compared, by name."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    full, floor = make(), make()
    steps = {"floor": step(floor, x, ()), "full": step(full, x, full.trainable_params())}
    for way in (by_config, by_hand):
        for method in methods:
            network = way(make(), method)
            network.set_train()
            steps[f"{method}, {way.__name__}"] = step(network, x, network.trainable_params())
    return steps


def work(make: Callable[[], nn.Cell], rows: int, method: str) -> float:
    """What a method's own multiply-adds come to in units of the floor, of the targets alone."""
    shapes = [(cell.in_channels, cell.out_channels) for cell in targets(make()).values()]
    floor = sum(2 * rows * inputs * outputs for inputs, outputs in shapes)
    return 1 + sum(METHODS[method].work(rows, *one) for one in shapes) / floor


def run(short: bool = False, turns: int = 9, methods: Iterable[str] = tuple(METHODS)) -> None:
    """Print a table for each subject in each execution mode."""
    rows = []
    for mode, mode_name in ((ms.GRAPH_MODE, "graph"), (ms.PYNATIVE_MODE, "pynative")):
        ms.set_context(mode=mode)
        for subject, (make, shape) in (SHORT if short else SUBJECTS).items():
            times = in_turns(candidates(make, shape, methods), 2 if short else turns, 0.0 if short else 0.05)
            for name in times:
                method, _, way = name.partition(", ")
                of_floor = ratio(times, name, "floor")
                needs = work(make, int(np.prod(shape[:-1])), method) if way else None
                rows.append(
                    {
                        "mode": mode_name,
                        "subject": subject,
                        "method": method,
                        "put in": way.replace("_", " "),
                        "ms": 1000 * float(np.median(times[name])),
                        "of floor": of_floor,
                        "of full": ratio(times, name, "full"),
                        "needs": needs,
                        "over": of_floor / needs if needs else None,
                    }
                )
    report("step_time", rows)

"""Step times beside PyTorch with Hugging Face PEFT, on the same weights, one thread each; needs the extra `interop`."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import nn

from benchmarks.measure import in_turns, ratio, report
from benchmarks.methods import METHODS
from benchmarks.networks import TARGETS, Pair, by_config, step

# Name -> (width, inner width, rows) of the pair of layers.
SUBJECTS = {"768-3072-768, 512 rows": (768, 3072, 512), "1024-4096-1024, 2048 rows": (1024, 4096, 2048)}
SHORT = {"64-256-64, 32 rows": (64, 256, 32)}
SHARED = ("lora", "adalora", "vera", "ia3", "miss", "oft", "lokr", "loha", "hira")


def torch_step(network: nn.Cell, x: np.ndarray, method: str) -> Callable[[], Any]:
    """A step like `benchmarks.networks.step` in PyTorch, of a Pair with the same weights."""
    import peft
    import torch

    class TorchPair(torch.nn.Module):
        def __init__(self, width, inner):
            super().__init__()
            self.up, self.gelu, self.down = (
                torch.nn.Linear(width, inner),
                torch.nn.GELU(),
                torch.nn.Linear(inner, width),
            )

        def forward(self, x):
            return self.down(self.gelu(self.up(x)))

    torch.set_num_threads(1)
    model = TorchPair(network.up.in_channels, network.up.out_channels)
    weights = {param.name: torch.from_numpy(param.asnumpy().copy()) for param in network.get_parameters()}
    model.load_state_dict(weights)
    if method in METHODS:
        config = METHODS[method].config(TARGETS)
        fields = {key: value for key, value in config.to_dict().items() if key not in ("peft_type", "peft_version")}
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type.value]
        known = {field.name for field in dataclasses.fields(kind)}
        model = peft.get_peft_model(model, kind(**{key: value for key, value in fields.items() if key in known}))
    for param in model.parameters():
        param.requires_grad_(param.requires_grad and method != "floor")
    trained = [param for param in model.parameters() if param.requires_grad]
    inputs, probe = torch.from_numpy(x).requires_grad_(), torch.ones(x.shape)

    def call():
        loss = (model(inputs) * probe).sum()
        torch.autograd.grad(loss, [inputs, *trained])
        return loss.item()

    return call


def run(short: bool = False, turns: int = 9, methods: Iterable[str] = SHARED) -> None:
    """Print the table."""
    ms.set_context(mode=ms.GRAPH_MODE)
    rows = []
    for subject, (width, inner, count) in (SHORT if short else SUBJECTS).items():
        x = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
        steps = {}
        for method in ("floor", "full", *methods):
            network = Pair(width, inner)
            steps[f"{method}, torch"] = torch_step(network, x, method)
            if method in METHODS:
                network = by_config(network, method).set_train()
            steps[method] = step(network, x, () if method == "floor" else network.trainable_params())
        times = in_turns(steps, 2 if short else turns, 0.0 if short else 0.05)
        for method in ("floor", "full", *methods):
            rows.append(
                {
                    "subject": subject,
                    "method": method,
                    "mindpet ms": 1000 * float(np.median(times[method])),
                    "torch ms": 1000 * float(np.median(times[f"{method}, torch"])),
                    "mindpet of its floor": ratio(times, method, "floor"),
                    "torch of its floor": ratio(times, f"{method}, torch", "floor, torch"),
                    "mindpet of torch": ratio(times, method, f"{method}, torch"),
                }
            )
    report("against_torch", rows)

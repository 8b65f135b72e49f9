"""Plans of networks with quantised weights: what is communicated is what float32 weights communicate."""

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet.graph import QuantizationConfig, quantize
from mindpet.parallel import dry_run_many
from mindpet.peft import LoraConfig, get_peft_model
from mindpet.utils.quantization import Format

SIZES = {"up": (512, 128), "down": (128, 512)}


class Block(nn.Cell):
    """A column split and a row split, of rows that are cut in two."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Dense(128, 512, "normal"), nn.Dense(512, 128, "normal")
        self.relu, self.mean = ops.ReLU().shard(((2, 4),)), ops.ReduceMean().shard(((2, 1),))
        self.up.matmul.shard(((2, 1), (4, 1)))
        self.up.bias_add.shard(((2, 4), (4,)))
        self.down.matmul.shard(((2, 4), (1, 4)))
        self.down.bias_add.shard(((2, 1), (1,)))

    def construct(self, x):
        return self.mean(self.down(self.relu(self.up(x))))


def build(config=None, frozen_dtype=None):
    network = Block()
    if config is not None:
        quantize(network, QuantizationConfig(**config))
    lora = LoraConfig(r=4, target_modules=["up", "down"])
    model = get_peft_model(network, lora, frozen_dtype=frozen_dtype)
    return model, Tensor(np.ones((16, 128), np.float32))


FORMATS = [
    {"bits": "int8"},
    {"bits": "nf4", "group_size": 32},
    {"bits": "int4", "group_size": 32, "double_quant": False},
]


def collectives(report):
    """Kind, phase and bytes of what is communicated."""
    return sorted((one.kind, one.phase, one.ranks, one.bytes, one.count) for one in report.collectives)


def test_quantised_weights_are_cut_as_others_are():
    builds = [build, *(functools.partial(build, config) for config in FORMATS)]
    builds += [functools.partial(build, {**FORMATS[1], "compute_dtype": ms.bfloat16})]
    builds += [functools.partial(build, frozen_dtype=ms.bfloat16)]
    plain, *coded, brain, half = dry_run_many(builds, 8)
    for report, config in zip(coded, FORMATS):
        assert collectives(report) == collectives(plain), report
        form = Format(**config)
        for name, shape in SIZES.items():
            parts = {one.name: one for one in report.parameters if one.name.startswith(f"{name}.weight")}
            sizes = form.shapes(shape)
            assert {key.partition(".")[2] for key in parts} == set(sizes)
            weight = parts[f"{name}.weight"]
            assert 4 * np.prod(weight.slice) == np.prod(sizes["weight"][0]) and weight.device_matrix == (2, 4)
            assert weight.slice[0] == 128  # rows of `up` are cut in four, and all 128 of `down` are there
    assert {one.dtype for one in brain.collectives} >= {"BFloat16"}
    weights = {one.name: one.dtype for one in half.parameters if one.name.endswith(("up.weight", "down.weight"))}
    assert set(weights.values()) == {"BFloat16"}

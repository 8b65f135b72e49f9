"""Merging is tried on a small input, layer by layer, before anything is set."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops
from small import Compiles, Tiny, contents, graph_mode, ids, numbers, same

from mindpet.delta._base import Delta
from mindpet.delta.lora import BIAS, MAGNITUDE, SCALING, A, B
from mindpet.delta.registry import METHODS
from mindpet.errors import MergeError
from mindpet.network.kinds import layer_kind, register_layer
from mindpet.peft import LoraConfig, get_peft_model
from mindpet.peft.merge import FoldedDelta, fold
from mindpet.peft.patch import ConstructPatch
from mindpet.peft.probe import probe_merge


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0."""

    def construct(self, x):
        return self.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keep_dims=True))


class OtherWay(nn.Dense):
    """A square layer that is registered the wrong way round."""


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up."""

    def construct(self, ids):
        return 3 * self.gather(self.embedding_table, ids, 0)


class Hidden(nn.Dense):
    """An activation that nobody can switch off."""

    def construct(self, x):
        return ops.relu(ops.matmul(x, self.weight.T))


class Rounded(nn.Dense):
    """A layer that quantises its weight."""

    def construct(self, x):
        return ops.matmul(x, ops.round(self.weight * 8).T / 8)


class Pair(nn.Cell):
    """A layer that returns its bias."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.random.normal(size=(12, 9)).astype(np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(9, np.float32)), name="bias")

    def construct(self, x):
        return ops.matmul(x, self.weight), self.bias


class Batched(nn.Dense):
    """A layer for three axes only."""

    def construct(self, x):
        batch, seq, features = x.shape
        return ops.bmm(x, ops.tile(ops.expand_dims(self.weight.T, 0), (batch, 1, 1)))


class Refusing(nn.Dense):
    """A layer that takes no such input."""

    def construct(self, x):
        raise ValueError("not that")


register_layer(Standardised, "conv2d")
register_layer(OtherWay, fan_in_fan_out=True)
register_layer(Scaled, "embedding", "embedding_table")
register_layer(Pair, fan_in_fan_out=True, adds_bias=False)
for cls in (Hidden, Rounded, Batched, Refusing):
    register_layer(cls)

GOOD = {
    "dense": lambda: nn.Dense(12, 9),
    "activation": lambda: nn.Dense(12, 9, activation="relu"),
    "half": lambda: nn.Dense(12, 9, dtype=ms.float16),
    "embedding": lambda: nn.Embedding(20, 6),
    "mint": lambda: mint.nn.Linear(12, 9),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, pad_mode="pad", padding=2, dilation=2),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, pad_mode="pad", padding=1, group=2, has_bias=True),
    "conv3d": lambda: nn.Conv3d(4, 6, (3, 2, 1)),
    "pair": Pair,
    "batched": lambda: Batched(12, 9),
}
BAD = {
    "standardised": lambda: Standardised(4, 6, 3),
    "other way": lambda: OtherWay(12, 12),
    "scaled": lambda: Scaled(20, 6),
    "hidden": lambda: Hidden(12, 12),
    "rounded": lambda: Rounded(12, 9),
}


def merging(cell, count=1, use_dora=False, lora_bias=False, scaling=1.5):
    """What `probe_merge` takes: kind, deltas with random values, merged values."""
    kind, rng = layer_kind(cell), np.random.default_rng(1)
    weight = kind.weight_of(cell).asnumpy()
    group = kind.groups_of(cell)
    out, taps = kind.to_matrix(weight).shape[0], (1,) * (weight.ndim - 2)
    shapes = {A: (4, kind.to_matrix(weight).shape[1]), B: (out, 4)}
    if kind.is_convolution:
        kernel = weight.shape[-1:] if kind.name == "conv1d" else weight.shape[2:]
        taps = taps[: len(kernel)]
        shapes = {A: (4, weight.shape[1], *kernel), B: (out, 4 // group, *taps)}
    deltas = []
    arguments = {"rank": 4, "alpha": 4 * scaling, "use_dora": use_dora, "lora_bias": lora_bias}
    for _ in range(count):
        values = {name: 0.3 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        values[SCALING] = np.float32(scaling)
        if use_dora:
            norm = np.linalg.norm(kind.to_matrix(weight).astype(np.float32), axis=1)
            values[MAGNITUDE] = 1.2 * norm.reshape(1, -1, *taps) if kind.is_convolution else 1.2 * norm
        if lora_bias:
            values[BIAS] = rng.normal(size=out).astype(np.float32)
        deltas.append(FoldedDelta(METHODS["lora"].deltas[kind.name], arguments, values))
    merged = {kind.weight: fold(weight, kind, deltas)[0]}
    if lora_bias:
        bias = kind.bias_of(cell).asnumpy()
        merged[kind.bias] = (bias + sum(scaling * delta.values[BIAS] for delta in deltas)).astype(bias.dtype)
    return kind, deltas, merged


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layer", list(GOOD))
def test_layers_that_are_what_they_seem(layer, count, mode):
    cell = GOOD[layer]()
    assert probe_merge(cell, *merging(cell, count)) == (None, None)


@pytest.mark.parametrize("layer", ["dense", "half", "conv1d", "conv3d", "embedding", "pair"])
@pytest.mark.parametrize("count", [1, 2])
def test_dora(layer, count, mode):
    cell = GOOD[layer]()
    assert probe_merge(cell, *merging(cell, count, use_dora=True)) == (None, None)


@pytest.mark.parametrize("layer", ["dense", "activation", "half", "conv2d", "pair"])
def test_a_bias_of_the_delta(layer, mode):
    cell = GOOD[layer]()
    assert probe_merge(cell, *merging(cell, lora_bias=True)) == (None, None)
    kind, deltas, merged = merging(cell, lora_bias=True)
    merged[kind.bias] = merged[kind.bias] + 1
    assert "is off by 1," in probe_merge(cell, kind, deltas, merged).problem


@pytest.mark.parametrize("layer", list(BAD))
def test_layers_that_are_not(layer, mode):
    cell = BAD[layer]()
    problem, skipped = probe_merge(cell, *merging(cell))
    assert "computes something else with the merged weight than beside its delta" in problem and skipped is None


@pytest.mark.parametrize("layer", ["dense", "conv2d", "embedding"])
def test_a_wrong_value_is_found(layer, mode):
    cell = GOOD[layer]()
    kind, deltas, merged = merging(cell)
    merged[kind.weight] = merged[kind.weight] + 1e-3 * np.sign(merged[kind.weight])
    assert probe_merge(cell, kind, deltas, merged).problem
    merged[kind.weight] = np.full_like(merged[kind.weight], np.nan)
    assert "off by nan" in probe_merge(cell, kind, deltas, merged).problem


def test_rounding_is_no_problem():
    for seed in range(10):
        ms.set_seed(seed)
        for make in (lambda: nn.Dense(512, 256, dtype=ms.float16), lambda: nn.Conv2d(32, 16, 3)):
            cell = make()
            assert probe_merge(cell, *merging(cell, 2)) == (None, None)


def test_what_cannot_be_probed_says_why(mode):
    cell = Refusing(12, 9)
    assert probe_merge(cell, *merging(cell)) == (None, "it does not take the probe's input (ValueError: not that)")
    cell = nn.Dense(12, 9)
    arguments = merging(cell)
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    try:
        assert "in this parallel mode" in probe_merge(cell, *arguments).skipped
    finally:
        ms.reset_auto_parallel_context()


def test_nothing_changes(mode, rng):
    network, x = Tiny(), ids(rng)
    network.set_train()
    output = numbers(network, x)
    patch = ConstructPatch(network.query, layer_kind(network.query), Delta(auto_prefix=False))
    before, own = contents(network), {path: dict(vars(cell)) for path, cell in network.cells_and_names()}
    patch.apply()  # a delta that would fail if it was called
    assert probe_merge(network.query, *merging(network.query)) == (None, None)
    patch.revert()
    assert contents(network) == before and ms.get_context("mode") == mode
    assert {path: dict(vars(cell)) for path, cell in network.cells_and_names()} == own
    with Compiles() as compiles:
        same(numbers(network, x), output)
    assert compiles.count == 0 or not graph_mode()


def test_a_merge_that_would_be_wrong_is_refused_with_the_layers_name(mode, rng):
    network = nn.SequentialCell(nn.Dense(12, 12), OtherWay(12, 12))
    x = Tensor(rng.normal(size=(2, 12)).astype(np.float32))
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    output, before = numbers(model, x), contents(network)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="1 computes something else with the merged weight") as error:
            merge()
        assert "0 computes" not in str(error.value) and contents(network) == before
        same(numbers(model, x), output)

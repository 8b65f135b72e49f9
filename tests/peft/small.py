"""A small network with a layer of every kind, and what the tests of adapters do with it."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mindpet.errors import MergeError
from mindpet.peft import LoraConfig, PeftModel, get_peft_model, register_layer

VOCAB, WIDTH, LABELS = 10, 8, 3
TARGETS = ["embed", "query", "mlp.0", "turned", "shared", "conv"]
LAYERS = ["embed", "query", "mlp.0", "turned", "blocks.0.shared", "conv"]


class Turned(nn.Cell):
    """A linear layer of a model library: `x W + b` with `W (in, out)`."""

    def __init__(self):
        super().__init__()
        self.table = Parameter(Tensor(np.random.normal(size=(WIDTH, WIDTH)).astype(np.float32)), name="table")
        self.shift = Parameter(Tensor(np.random.normal(size=WIDTH).astype(np.float32)), name="shift")

    def construct(self, x):
        return ops.matmul(x, self.table) + self.shift


register_layer(Turned, weight="table", bias="shift", fan_in_fan_out=True)


class Block(nn.Cell):
    """A block that shares its layer with others."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.norm = nn.LayerNorm((WIDTH,))

    def construct(self, x):
        return self.norm(self.shared(x))


class Small(nn.Cell):
    """An embedding, linear layers, a shared one, a convolution and a head.

    Inputs:
        ids: `(batch, seq)`, int32.

    Outputs:
        logits `(batch, LABELS)`.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.query = nn.Dense(WIDTH, WIDTH, activation="tanh")
        self.mlp = nn.SequentialCell(nn.Dense(WIDTH, 6), nn.ReLU(), nn.Dense(6, WIDTH))
        self.turned = Turned()
        shared = nn.Dense(WIDTH, WIDTH, has_bias=False)
        self.blocks = nn.CellList([Block(shared), Block(shared)])
        self.conv = nn.Conv2d(1, 4, 3, stride=2, has_bias=True)
        self.classifier = nn.Dense(WIDTH + 4, LABELS)
        self.by_hand = (self.query,)  # a reference that MindSpore does not know of

    def construct(self, ids):
        hidden = self.by_hand[0](self.embed(ids))
        hidden = hidden + self.mlp(hidden)
        hidden = hidden + self.turned(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        image = self.conv(ops.expand_dims(hidden, 1)).mean((2, 3))
        return self.classifier(ops.concat((hidden.mean(1), image), 1))


class Tiny(nn.Cell):
    """The least that is compiled fast: `(batch, seq) -> (batch, LABELS)`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.query = nn.Dense(WIDTH, WIDTH)
        self.classifier = nn.Dense(WIDTH, LABELS)

    def construct(self, ids):
        return self.classifier(self.query(self.embed(ids)).mean(1))


class Tied(nn.Cell):
    """An embedding whose table is the head's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Dense(8, 10, has_bias=False)
        self.head.weight = self.embed.embedding_table

    def construct(self, ids):
        return self.head(self.embed(ids))


def config(**fields):
    """LoRA on every kind of layer."""
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **fields})


def move(model, seed):
    """Give what trains other values."""
    rng = np.random.default_rng(seed)
    for param in model.trainable_params():
        moved = param.asnumpy().astype(np.float32) + 0.3 * rng.normal(size=param.shape)
        param.set_data(Tensor(moved.astype(np.float32)).astype(param.dtype))


def ids(rng, rows=4):
    """Inputs."""
    return Tensor(rng.integers(0, VOCAB, (rows, 5)).astype(np.int32))


def contents(network):
    """Name, order, bytes and requires_grad of every parameter."""
    return [(param.name, param.asnumpy().tobytes(), param.requires_grad) for param in network.get_parameters()]


def numbers(cell, x):
    """A Cell's output as an array."""
    return cell(x).asnumpy()


def same(got, expected):
    """Outputs of the same computation: where an array lies in memory can change the last bit."""
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


class Compiles:
    """Counts what MindSpore compiles inside of a `with`."""

    def __enter__(self):
        from mindspore.common import api

        self.count, self.executor = 0, api._cell_graph_executor
        self.real = self.executor._graph_executor
        self.executor._graph_executor = self
        return self

    def __getattr__(self, name):
        self.count += name == "compile"
        return getattr(self.real, name)

    def __call__(self, *arguments):
        return self.real(*arguments)

    def __exit__(self, *error):
        self.executor._graph_executor = self.real


def graph_mode():
    """Whether this is graph mode."""
    return ms.get_context("mode") == ms.GRAPH_MODE


def check_turns(one, other, x, folder):
    """Adapters of one shape take turns: each gives what it gave alone, and none needs a new graph."""
    expected = {}
    for seed, (name, own) in enumerate({"a": one, "b": other}.items()):
        ms.set_seed(2)
        model = get_peft_model(Small(), own)
        move(model, seed)
        expected[name] = numbers(model, x)
        model.save_pretrained(folder / name)
    ms.set_seed(2)
    model = PeftModel.from_pretrained(Small(), folder / "a", "a")
    model.load_adapter(folder / "b", "b")
    same(numbers(model, x), expected["a"])
    with Compiles() as compiles:
        for name in ("b", "a", "b"):
            model.set_adapter(name)
            same(numbers(model, x), expected[name])
    assert compiles.count == 0 or not graph_mode()


def check_tied(own, x):
    """A delta on `head` of `Tied` is merged only into a weight that is made its own."""
    model = get_peft_model(Tied(), own)
    move(model, 1)
    tuned = numbers(model, x)
    with pytest.raises(MergeError, match="head has its weight in common with"):
        model.merge_and_unload()
    same(numbers(model, x), tuned)
    np.testing.assert_allclose(numbers(model.merge_and_unload(untie_weights=True), x), tuned, atol=1e-5)


def check_life(own, x, folder, least, look):
    """An adapter of `Small` from a fresh one to the merged network: hidden with NaN in it, copied, saved and loaded.

    Args:
        own (PeftConfig): of a method that starts as the identity.
        x (Tensor): an input.
        folder (Path): to save to.
        least (float): by how much other values change the output at least.
        look (callable): what is asked of the network while the adapter is in it.

    Returns:
        tuple: the merged network, and what `look` returned.
    """
    network = Small()
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, own)
    same(numbers(model, x), base)
    move(model, 1)
    tuned = numbers(model, x)
    assert np.abs(tuned - base).max() > least
    values = {param.name: param.asnumpy().copy() for param in model.trainable_params()}
    for param in model.trainable_params():
        param.set_data(Tensor(np.full(param.shape, np.nan, np.float32)))
    with model.disable_adapter():
        same(numbers(model, x), base)
    for param in model.trainable_params():
        param.set_data(Tensor(values[param.name]))
    twin = copy.deepcopy(model)
    model.save_pretrained(folder)
    seen = look(network)
    assert contents(model.unload()) == before
    again = PeftModel.from_pretrained(network, folder)
    same(numbers(again, x), tuned)
    again.merge_adapter()
    np.testing.assert_allclose(numbers(again, x), tuned, atol=1e-5)
    again.unmerge_adapter()
    same(numbers(again, x), tuned)
    merged = again.merge_and_unload()
    np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-5)
    same(numbers(twin, x), tuned)
    return merged, seen


def check_follows(own, x):
    """A delta that computes with the weight of its layer computes with that of another base, once it is loaded."""
    model = get_peft_model(Small(), own)
    move(model, 1)
    numbers(model, x)
    other = Small()
    ms.load_param_into_net(model.network, {param.name: Parameter(param.value()) for param in other.get_parameters()})
    values = {param.name: param for param in model.trainable_params()}
    alone = get_peft_model(other, own)
    for param in alone.trainable_params():
        param.set_data(Tensor(values[param.name].asnumpy()))
    same(numbers(model, x), numbers(alone, x))

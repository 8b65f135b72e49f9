"""Prefix methods in parallel: every rank computes the whole prefix, and takes its heads and samples of it."""

import functools
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from parallel.attention import build as build_attention

from mindpet.delta import PrefixEncoder, PrefixLayer
from mindpet.graph import freeze_delta
from mindpet.parallel import dry_run, dry_run_many

BATCH, LAYERS, HEADS, TOKENS, CHANNELS = 8, 3, 8, 4, 16
PERM = (2, 0, 3, 1, 4)


class Prefixes(nn.Cell):
    """The sum of all prefixes, weighed by a number for each sample."""

    def __init__(self, prefix, data_parallel, model_parallel):
        super().__init__()
        self.prefix = prefix
        layout = (1, data_parallel, model_parallel, 1, 1)
        self.weigh = ops.Mul().shard((layout, (1, data_parallel, 1, 1, 1)))
        self.sum = ops.ReduceSum().shard((layout,))
        self.add = ops.Add().shard(((), ()))

    def construct(self, x):
        total = 0.0
        for prefix in self.prefix(x.shape[1], ms.float32):
            total = self.add(self.sum(self.weigh(prefix, x)), total)
        return total


def build(data_parallel, model_parallel, projection, by_config):
    config = SimpleNamespace(data_parallel=data_parallel, model_parallel=model_parallel)
    arguments = {"prefix_projection": projection, "dropout_prob": 0.1, "parallel_config": config if by_config else None}
    prefix = PrefixEncoder(TOKENS, LAYERS, HEADS, CHANNELS, **arguments)
    if not by_config:
        assert prefix.shard(data_parallel, model_parallel) is prefix
    network = Prefixes(prefix, data_parallel, model_parallel)
    freeze_delta(network, "ptuning2")
    return network, Tensor(np.ones((1, BATCH, 1, 1, 1), np.float32))


CASES = [
    (dp, mp, projection, by_config)
    for dp, mp in ((2, 4), (1, 8), (4, 2), (4, 1))
    for projection in (False, True)
    for by_config in (False, True)
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_prefix_encoder(train):
    builds = [functools.partial(build, *case) for case in CASES]
    for case, report in zip(CASES, dry_run_many(builds, 8, train=train)):
        dp, mp, projection, _ = case
        assert not isinstance(report, Exception), report
        assert all(plan.slice == plan.shape for plan in report.parameters if plan.role != "optimizer")
        strategies = {plan.operator: plan.strategy for plan in report.operators if plan.cell == "prefix"}
        assert strategies["Tile"] == strategies["Transpose"] == ((dp, 1, 1, mp, 1),)
        assert strategies["Split"] == ((1, dp, mp, 1, 1),)
        assert all(plan.is_set for plan in report.operators), case
        forward = [plan.kind for plan in report.collectives if plan.phase == "forward"]
        assert forward == ["AllReduce"] * LAYERS, case  # of the sums
        backward = [plan for plan in report.collectives if plan.phase == "backward" and "mindpet" in plan.cause]
        trained = [plan for plan in report.parameters if plan.role == "trainable"]
        assert len(trained) == (5 if projection else 1)
        assert sorted((plan.kind, plan.group_size, plan.bytes) for plan in backward) == sorted(
            ("AllReduce", 8, plan.bytes) for plan in trained if train
        )


def test_prefix_layer_and_adapter_in_a_sharded_attention():
    report = dry_run(functools.partial(build_attention, 2, 4), 8)
    assert all(plan.is_set for plan in report.operators)
    weights = {plan.name: plan for plan in report.parameters if plan.role != "optimizer"}
    assert weights["query.weight"].slice == (16, 64) and weights["output.weight"].slice == (64, 16)
    delta = [plan for name, plan in weights.items() if "mindpet_delta" in name]
    assert len(delta) == 9 and all(plan.slice == plan.shape and plan.role == "trainable" for plan in delta)
    forward = [(plan.kind, plan.group_size, plan.cause) for plan in report.collectives if plan.phase == "forward"]
    assert sorted(forward) == [
        ("AllReduce", 2, "sum over sum"),
        ("AllReduce", 4, "sum over network.output.matmul"),
    ]


def test_the_attention_computes_on_a_cpu(mode, rng):
    loss, x = build_attention()
    loss.set_train(False)
    attention = loss.network
    past_key, past_value = (part.asnumpy() for part in attention.prefix())
    x = rng.normal(size=x.shape).astype(np.float32)

    def heads(value):
        return value.reshape(*value.shape[:-1], 8, 8).swapaxes(-3, -2)

    def project(dense, value):
        return value @ dense.weight.asnumpy().T + dense.bias.asnumpy()

    query, key, value = (heads(project(layer, x)) for layer in (attention.query, attention.key, attention.value))
    key, value = (
        np.concatenate([np.broadcast_to(heads(past), (len(x), 8, 4, 8)), part], 2)
        for past, part in ((past_key, key), (past_value, value))
    )
    scores = np.exp(query @ key.swapaxes(2, 3) / np.sqrt(8))
    context = (scores / scores.sum(-1, keepdims=True)) @ value
    expected = project(attention.output, context.swapaxes(1, 2).reshape(x.shape))  # a fresh adapter is the identity
    np.testing.assert_allclose(attention(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slices, error", [((0, 4), ValueError), ((2, True), TypeError), (("2", 4), TypeError)])
def test_prefix_encoder_refuses(slices, error):
    with pytest.raises(error, match="PrefixEncoder.shard: '(data|model)_parallel' must be a positive int"):
        PrefixEncoder(TOKENS, LAYERS, HEADS, CHANNELS).shard(*slices)


def test_prefix_layer_shard_reaches_every_operator():
    prefix = PrefixLayer(4, 1, 2, 8, 6, 5)
    assert prefix.shard() is prefix
    primitives = [p for _, cell in prefix.cells_and_names() for p in cell._primitives.values() if p is not None]
    unset = {p.name for p in primitives if getattr(p, "in_strategy", None) is None}
    assert unset <= {"Concat", "ExpandDims", "MatMul", "OneHot", "Reshape", "Shape"}, unset  # of them only Embedding's

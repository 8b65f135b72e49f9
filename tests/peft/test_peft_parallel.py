"""Deltas beside layers with strategies, in MindSpore's real parallel front end."""

import functools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Layout, Parameter, Tensor, nn, ops
from models.gpt2 import Gpt2Config, Gpt2ForCausalLM
from models.llama import CausalLoss, LlamaConfig

from mindpet.errors import AdapterError, ConfigError
from mindpet.graph import freeze_delta
from mindpet.network.kinds import layer_kind
from mindpet.parallel import dry_run_many
from mindpet.peft import (
    AdapterConfig,
    AdaptionPromptConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LowRankAdapterConfig,
    MissConfig,
    PrefixTuningConfig,
    Ptuning2Config,
    VeraConfig,
    get_peft_model,
    register_layer,
)
from mindpet.peft.strategies import carry_strategy
from mindpet.utils.layouts import get_strategy
from mindpet.utils.quote import quote

SHAPE = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(peft_config, data_parallel=2, model_parallel=4, context=None, **fields):
    """A LLaMA cut in slices, with its loss, its inputs and an optimizer; without configuration with LoRA by hand.

    `context` is what its attentions say of how they are cut.
    """
    shape = {**SHAPE, **fields}
    loss = CausalLoss(LlamaConfig(**shape, data_parallel=data_parallel, model_parallel=model_parallel))
    for _, cell in loss.cells_and_names():
        if context and hasattr(cell, "context_source"):
            cell.context_strategy = context
    if peft_config is None:
        freeze_delta(loss, "lora")
    else:
        get_peft_model(loss.network, peft_config)
    ids = Tensor(np.zeros((2 * data_parallel, 16), np.int32))
    return loss, (ids, ids), nn.Adam(loss.trainable_params(), 1e-3)


def by_hand():
    return make(None, lora_rank=4, lora_alpha=8)


def by_peft():
    return make(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))


def first_layer():
    return make(LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0]))


def adapter():
    return make(AdapterConfig(target_modules=["o_proj"], bottleneck_size=8))


def strategies(report):
    """(Cell of the base, slot, strategy) of the LoRA operators."""
    return {
        (plan.cell.replace(".mindpet_delta", ""), plan.slot, plan.strategy)
        for plan in report.operators
        if plan.slot.startswith("strategy_lora")
    }


OPTIONS = [{"lora_bias": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}]


@pytest.fixture(scope="module")
def reports():
    """Of LoRA made by hand and by get_peft_model, of some variants, and of each of OPTIONS."""
    configs = [LoraConfig(r=4, target_modules=TARGETS, **more) for more in OPTIONS]
    return dry_run_many(
        [by_hand, by_peft, first_layer, adapter, *(functools.partial(make, each) for each in configs)], 8
    )


def test_strategies_are_those_of_layers_made_by_hand(reports):
    hand, peft, first, behind = reports[:4]
    assert len(strategies(peft)) == 7 * 4  # the layers are compiled once
    differing = strategies(peft) ^ strategies(hand)  # made by hand it scales the outputs, else the fewer numbers of A x
    assert {(slot, strategy[0][0]) for _, slot, strategy in differing} == {("strategy_lora_mul", 2)}
    assert {strategy for _, slot, strategy in strategies(peft) if slot == "strategy_lora_mul"} == {((2, 1), ())}
    assert {collective_bytes(report) for report in (hand, peft)} == {collective_bytes(hand)}
    assert {(plan.cell, plan.count) for plan in first.operators if "mindpet_delta" in plan.cell} == {
        ("network.model.layers.0.self_attn.q_proj.mindpet_delta", 1)  # but not where their deltas differ
    }
    found = {plan.slot: plan.strategy for plan in behind.operators if "self_attn.o_proj.mindpet" in plan.cell}
    assert found["strategy_matmul_down_sampler"] == ((2, 1), (1, 1)) and "strategy_residual_add" in found


def collective_bytes(report):
    """Bytes that a rank communicates in a step."""
    return sum(plan.bytes * plan.count for plan in report.collectives)


PROJECTED = dict(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16)
# Configuration -> elements that it trains, whole on every rank: these deltas contract no axis that is cut.
WHOLE = {
    "prefix": (PrefixTuningConfig(num_virtual_tokens=4), 2 * 4 * 128),
    "projected": (PrefixTuningConfig(**PROJECTED), 2 * (4 * 64 + 16 * (64 + 1) + 128 * (16 + 1))),
    "ptuning2": (Ptuning2Config(**PROJECTED, dropout_prob=0.1), 2 * (4 * 128 + 16 * (128 + 1) + 128 * (16 + 1))),
    "embedding": (LoraConfig(r=4, target_modules=["embed_tokens"]), 4 * (64 + 64)),
    "adapter": (AdapterConfig(target_modules=["embed_tokens"], bottleneck_size=8), 8 * (64 + 1) + 64 * (8 + 1)),
    "low rank": (LowRankAdapterConfig(target_modules=["embed_tokens"], reduction_factor=32), 3 * 64 + 3 * 2),
}
# What a rank communicates for the network alone: per layer two sums of the hidden states of 2 samples of 16 tokens, and
# two for their gradients; the sum of the embeddings; of the loss five numbers a token and three for all.
BASE_BYTES = 4 * (2 * 4 * 2 * 16 * 64 + 2 * 16 * 64 + 5 * 2 * 16 + 3)


@pytest.mark.parametrize(
    "ranks, data_parallel, names",
    [(8, 2, list(WHOLE)), (64, 16, ["prefix", "projected", "embedding"])],
    ids=["8", "64"],
)
def test_prefixes_and_deltas_of_embeddings_communicate_their_gradients_only(ranks, data_parallel, names):
    builds = [functools.partial(make, WHOLE[name][0], data_parallel) for name in names]
    for name, report in zip(names, dry_run_many(builds, ranks)):
        elements = WHOLE[name][1]
        assert collective_bytes(report) == BASE_BYTES + 4 * elements, name
        assert {plan.kind for plan in report.collectives} == {"AllReduce"}, name  # nothing is gathered
        check_delta(report)


def strategies_inside(report):
    """(Cell, slot, strategy) of what a delta of attentions computes."""
    return [(plan.cell, plan.slot, plan.strategy) for plan in report.operators if "context_source" in plan.cell]


OURS = ("mindpet_", "prefix_source", "context_source")


def check_delta(report):
    """No operator of a delta is left to MindSpore, and every trained parameter has a sum of its gradient."""
    ours = [plan for plan in report.operators if any(part in plan.cell for part in OURS)]
    ours = [plan for plan in ours if plan.operator != "NeighborExchangeV2"]  # which convolutions need by themselves
    assert ours and all(plan.is_set for plan in ours), [plan for plan in ours if not plan.is_set]
    assert not [plan for plan in report.collectives if "layout" in plan.cause]
    trained = {plan.name for plan in report.parameters if plan.role == "trainable"}
    summed = {plan.cause for plan in report.collectives if "mindpet_delta" in plan.cause and "sum" not in plan.cause}
    for name in trained:  # the layers are compiled once, under the name of the first
        assert f"gradient of {name.replace('layers.1', 'layers.0')}" in summed


def test_prefix_of_grouped_heads_and_of_another_type():
    fields = [{"num_key_value_heads": 4, "compute_dtype": ms.float16}, {"num_key_value_heads": 4}]
    builds = [functools.partial(make, WHOLE[name][0], **more) for name, more in zip(("prefix", "projected"), fields)]
    for report in dry_run_many(builds, 8):
        check_delta(report)
        assert {plan.kind for plan in report.collectives} == {"AllReduce"}


def test_lora_bias_dropout_and_start_follow_too(reports):
    plain, (bias, dropout, start) = reports[1], reports[4:]
    for report in (bias, start):
        check_delta(report)
    per_layer = 3 * 64 // 4 + 64 + 2 * 128 // 4 + 64  # the biases on a rank: cut as the features that come out
    assert collective_bytes(bias) == collective_bytes(plain) + 4 * 2 * per_layer
    assert collective_bytes(dropout) == collective_bytes(plain)
    # Two row splits in two layers: the sum of A_0 x for 2 samples of 16 tokens, and that for its gradient.
    assert collective_bytes(start) == collective_bytes(plain) + 4 * 2 * 2 * 2 * (2 * 16 * 4)


FACTORS = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
VECTORS = VeraConfig(r=4, target_modules=TARGETS)
HEADS = AdapterConfig(target_modules=["self_attn"], bottleneck_size=2, form="multi_head")
GATED = AdaptionPromptConfig(adapter_len=4, adapter_layers=2)
BESIDE = AdapterConfig(target_modules=["mlp"], bottleneck_size=8, form="parallel", scale="learned")


@pytest.mark.parametrize("ranks, data_parallel", [(8, 2), (64, 16)])
def test_factors_and_vectors_communicate_what_they_need(ranks, data_parallel):
    configs = (FACTORS, VECTORS, BESIDE, HEADS)
    builds = [functools.partial(make, config, data_parallel) for config in configs]
    layout = Layout((data_parallel, 4), ("dp", "mp"))("dp", "mp")
    builds += [functools.partial(make, config, data_parallel, context=layout) for config in (HEADS, GATED)]
    ia3, vera, beside, heads, *by_layout = dry_run_many(builds, ranks)
    assert strategies_inside(by_layout[0]) == strategies_inside(heads)
    assert collective_bytes(by_layout[0]) == collective_bytes(heads)
    assert collective_bytes(by_layout[1]) == BASE_BYTES + 4 * 2 * (4 * 64 + 1)
    for report in by_layout:
        check_delta(report)
    # Of a block the rows alone are cut: nothing but the gradients of what is whole on every rank.
    assert collective_bytes(beside) == BASE_BYTES + 4 * 2 * (8 * (64 + 1) + 64 * (8 + 1) + 1)
    # Everything of a head is where the head is.
    assert collective_bytes(heads) == BASE_BYTES + 4 * 2 * (16 * (64 + 1) + 8 * (2 * 8 + 8)) // 4
    for report in (ia3, vera, beside, heads):
        check_delta(report)
        assert {plan.kind for plan in report.collectives} == {"AllReduce"}  # nothing is gathered
    own = {plan.cause: plan.bytes * plan.count for plan in ia3.collectives if "mindpet" in plan.cause}
    assert sum(own.values()) == 2 * 4 * (64 // 4 + 64 // 4 + 128 // 4)  # the factors on a rank, of two layers
    slices = {plan.name.split("layers.1.")[1]: plan.slice for plan in ia3.parameters if "layers.1" in plan.name}
    assert slices["self_attn.k_proj.mindpet_delta_ia3"] == (16, 1)
    assert slices["mlp.down_proj.mindpet_delta_ia3"] == (1, 32)
    own = [plan.bytes * plan.count for plan in vera.collectives if "gradient of model" in plan.cause]
    columns, rows = 3 * 64 + 2 * 128, 2 * 64  # outputs of the layers that are cut along these, and of the others
    assert sum(own) == 2 * 4 * (columns // 4 + rows + 7 * 4)


PRODUCTS = [LoHaConfig(r=2, target_modules=TARGETS), LoKrConfig(r=2, target_modules=TARGETS)]


def test_products_communicate_what_they_need():
    loha, lokr = dry_run_many([functools.partial(make, config) for config in PRODUCTS], 8)
    check_delta(loha)
    assert {plan.kind for plan in loha.collectives} == {"AllReduce"}
    sums = [plan.bytes * plan.count for plan in loha.collectives if "loha_b_matmul" in plan.cause]
    assert sum(sums) == 4 * 2 * 2 * 2 * (2 * 16 * 2**2)  # of two row splits in two layers, and of their gradients
    ours = [plan for plan in lokr.operators if "mindpet_" in plan.cell]
    assert ours and all(plan.is_set for plan in ours)
    # LoKr takes the inputs of two row splits whole: of 2 samples of 16 tokens, in two layers, and their gradients.
    gathered = {plan.kind: 0 for plan in lokr.collectives}
    for plan in lokr.collectives:
        gathered[plan.kind] += plan.bytes * plan.count
    assert gathered["AllGather"] == gathered["ReduceScatter"] == 4 * 2 * (2 * 16 * (64 + 128))
    assert set(gathered) == {"AllReduce", "AllGather", "ReduceScatter"}


GROUPED = {"num_key_value_heads": 4, "attention_bias": True}


@pytest.mark.parametrize("ranks, data_parallel, fields", [(8, 2, {}), (8, 2, GROUPED), (64, 16, GROUPED)])
def test_adaption_prompts_communicate_their_gradients_only(ranks, data_parallel, fields):
    (report,) = dry_run_many([functools.partial(make, GATED, data_parallel, **fields)], ranks)
    assert collective_bytes(report) == BASE_BYTES + 4 * 2 * (4 * 64 + 1)
    check_delta(report)
    assert {plan.kind for plan in report.collectives} == {"AllReduce"}
    cuts = {plan.slot: plan.strategy for plan in report.operators if "context_source" in plan.cell}
    assert cuts["strategy_key_matmul"] == ((data_parallel, 1), (4, 1))  # as the base's own


def test_adaption_prompts_are_refused_where_they_cannot_follow():
    network = Gpt2ForCausalLM(Gpt2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    network.transformer.h[0].attn.c_attn.matmul.shard(((2, 1), (1, 4)))
    network.transformer.h[0].attn.output_strategy = (2, 1)
    with pytest.raises(ConfigError, match="h.0.attn: no adaption prompt where an 'output_source'"):
        get_peft_model(network, AdaptionPromptConfig(adapter_len=2, adapter_layers=1))


def test_rows_of_a_batch_cannot_have_adapters_of_their_own():
    network = nn.SequentialCell(nn.Dense(8, 8))
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["0"]))
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    try:
        with pytest.raises(AdapterError, match="adapter_names: in semi-auto parallel mode all rows .* one adapter"):
            model(Tensor(np.ones((2, 8), np.float32)), adapter_names=["default", "__base__"])
    finally:
        ms.reset_auto_parallel_context()
    model(Tensor(np.ones((2, 8), np.float32)), adapter_names=["default", "__base__"])


class Picture(nn.Cell):
    """A convolution whose axes are cut: `(batch, 8, 16, 16)`."""

    def __init__(self, n=1, o=1, i=1, w=1):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, has_bias=True)
        self.conv.conv2d.shard(((n, i, 1, w), (o, i, 1, 1)))
        self.conv.bias_add.shard(((n, o, 1, w), (o,)))
        self.sum = ops.ReduceSum().shard(((n, o, 1, w),))

    def construct(self, x):
        return self.sum(self.conv(x))


class Words(nn.Cell):
    """An embedding whose axes are cut: `(batch, seq)`."""

    def __init__(self, n=1, o=1):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.embed.gather.shard(((1, o), (n,)))
        self.sum = ops.ReduceSum().shard(((n, 1, o),))

    def construct(self, ids):
        return self.sum(self.embed(ids))


def picture(peft_config, counts):
    network = Picture(**counts)
    get_peft_model(network, peft_config)
    return network, Tensor(np.zeros((32, 8, 16, 16), np.float32))


def words(peft_config, counts):
    network = Words(**counts)
    get_peft_model(network, peft_config)
    return network, Tensor(np.zeros((32, 4), np.int32))


# A delta (r=4, lora_bias) of Picture: where it is cut, and what is communicated for it in bytes, worked out by hand:
# the gradients of A (4, 8/i, 3, 3), B (16/o, 4) and bias (16/o), and if A's inputs are cut the sum of (32/n, 4, 16, 16)
# and that for its gradient.
PICTURES = {
    8: [{"n": 8}, {"n": 2, "o": 4}, {"n": 2, "i": 4}, {"n": 4, "w": 2}],
    64: [{"n": 16, "o": 4}, {"n": 16, "i": 4}],
}


WORDS = {8: [{"n": 2, "o": 4}, {"n": 8}], 64: [{"n": 16, "o": 4}]}


@pytest.mark.parametrize("ranks", PICTURES)
def test_convolutions_and_embeddings_cut_along_their_features(ranks):
    dropout = 0.1 * (ranks == 64)  # a cut image is exchanged once more if it differs from that of the layer
    config = LoraConfig(r=4, target_modules=["conv"], lora_bias=True, lora_dropout=dropout)
    builds = [functools.partial(picture, config, counts) for counts in PICTURES[ranks]]
    config = LoraConfig(r=4, target_modules=["embed"])
    builds += [functools.partial(words, config, counts) for counts in WORDS[ranks]]
    reports = dry_run_many(builds, ranks)
    for counts, report in zip(PICTURES[ranks], reports):
        n, o, i = (counts.get(axis, 1) for axis in "noi")
        gradients = 4 * (8 // i) * 9 + (16 // o) * 4 + 16 // o
        sums = 2 * (32 // n) * 4 * 256 * (i > 1)
        check_delta(report)
        assert delta_bytes(report) == 4 * (gradients + sums), counts
    for counts, report in zip(WORDS[ranks], reports[len(PICTURES[ranks]) :]):
        check_delta(report)
        assert delta_bytes(report) == 4 * (4 * 32 + 16 // counts.get("o", 1) * 4), counts


@pytest.mark.parametrize("inner", [None, ["conv"]])
def test_factors_of_a_convolution(inner):
    config = IA3Config(target_modules=["conv"], feedforward_modules=inner)
    for counts, report in zip(
        PICTURES[8], dry_run_many([functools.partial(picture, config, c) for c in PICTURES[8]], 8)
    ):
        ours = [plan for plan in report.operators if "mindpet_" in plan.cell and plan.operator == "Mul"]
        assert ours and all(plan.is_set for plan in ours)
        assert not [plan for plan in report.collectives if "layout" in plan.cause]
        (factor,) = [plan for plan in report.parameters if plan.role == "trainable"]
        cut = counts.get("i" if inner else "o", 1)
        assert factor.slice == (1, factor.shape[1] // cut, 1, 1)
        summed = [plan.bytes * plan.count for plan in report.collectives if "conv.mindpet_delta_ia3" in plan.cause]
        assert sum(summed) == 4 * factor.shape[1] // cut


def delta_bytes(report):
    """Bytes that a rank communicates for the delta in a step."""
    return sum(plan.bytes * plan.count for plan in report.collectives if "mindpet" in plan.cause)


class Turned(nn.Cell):
    """`x W` with W `(in, out)`."""

    def __init__(self):
        super().__init__()
        self.table = Parameter(Tensor(np.ones((8, 16), np.float32)), name="table")
        self.product = ops.MatMul()

    def construct(self, x):
        return self.product(x, self.table)


register_layer(Turned, weight="table", fan_in_fan_out=True)


class Layers(nn.Cell):
    """A layer of every kind, and an attention that takes a prefix."""

    def __init__(self):
        super().__init__()
        self.fc, self.turned, self.embed = nn.Dense(8, 16), Turned(), nn.Embedding(10, 8)
        self.conv, self.attention = nn.Conv2d(1, 4, 3), Attention()

    def construct(self, ids):
        return self.embed(ids)


class Attention(nn.Cell):
    """What a prefix needs to know of an attention."""

    def __init__(self):
        super().__init__()
        self.kv_heads, self.head_dim, self.prefix_source = 4, 8, None
        self.scores, self.context = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()

    def construct(self, query, key, value):
        return self.context(self.scores(query, key), value)


def test_the_strategy_of_a_turned_weight():
    network = Layers()
    network.turned.product.shard(((2, 4), (4, 3)))
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["turned"]))
    delta = network.turned.mindpet_delta
    assert delta.lora_a_matmul.in_strategy == ((2, 4), (1, 4)) and delta.lora_b_matmul.in_strategy == ((2, 1), (3, 1))
    model.add_adapter("wider", LoraConfig(r=3, target_modules=["turned"]))
    model.set_adapter("wider")  # the operators of the first delta are not taken for those of the layer
    assert network.turned.mindpet_delta.lora_b_matmul.in_strategy == ((2, 1), (3, 1))


@pytest.mark.parametrize("projection", [False, True])
def test_an_attention_can_say_how_it_is_cut(projection):
    network = Layers()
    network.attention.prefix_strategy = (2, 4)
    network.attention.scores.shard(((2, 4, 8, 1), (2, 4, 8, 1)))  # keys in a layout that tells nothing
    get_peft_model(network, PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=projection))
    assert network.attention.prefix_source.concat.in_strategy == ((2, 4, 1, 1),) * 2


@pytest.mark.parametrize("of_operator", [False, True])
def test_an_attention_can_be_cut_by_layouts(of_operator):
    network = Layers()
    if of_operator:
        network.attention.scores.shard((LAYOUT("dp", "mp", "None", "None"),) * 2)
    else:
        network.attention.prefix_strategy = LAYOUT("dp", "mp")
    get_peft_model(network, PrefixTuningConfig(num_virtual_tokens=2))
    assert network.attention.prefix_source.concat.in_strategy == ((2, 4, 1, 1),) * 2  # it takes no Layout


def test_the_layout_of_a_turned_weight():
    network = Layers()
    network.turned.product.shard((LAYOUT("mp", "None"), LAYOUT("None", "dp")))
    get_peft_model(network, LoraConfig(r=2, target_modules=["turned"]))
    delta = network.turned.mindpet_delta
    assert quote(get_strategy(delta.lora_b_matmul)) == quote((LAYOUT("mp", "None"), LAYOUT("dp", "None")))


def test_without_strategies_nothing_is_set():
    network = Layers()
    get_peft_model(network, PrefixTuningConfig(num_virtual_tokens=2))
    assert not hasattr(network.attention.prefix_source.concat, "in_strategy")


LAYOUT = Layout((2, 4), ("dp", "mp"))
WHOLE_HEADS = (2, 4, 1, 1)
LORA = functools.partial(LoraConfig, r=2)
PREFIX = functools.partial(PrefixTuningConfig, num_virtual_tokens=2)
REFUSED = {
    "layout of a gather": (
        lambda net: net.embed.gather.shard((LAYOUT("None", "mp"), LAYOUT("dp", "None"))),
        LORA(target_modules=["embed"]),
        "embed: no delta where the strategy of Gather is a Layout, which MindSpore refuses: give tuples",
    ),
    "layout that cuts the inputs in two ways": (
        lambda net: net.fc.matmul.shard((LAYOUT("dp", "mp"), LAYOUT("None", "None"))),
        LORA(target_modules=["fc"]),
        "fc: 'strategy of MatMul' must be one in which all inputs cut the axes alike that they have in common",
    ),
    "layout with an axis twice": (
        lambda net: net.fc.matmul.shard((LAYOUT("dp", "None"), LAYOUT("dp", "None"))),
        LORA(target_modules=["fc"]),
        "fc: 'strategy of MatMul' must be one in which a device axis cuts no two of the axes",
    ),
    "layout and a dropout": (
        lambda net: net.fc.matmul.shard((LAYOUT("mp", "None"), LAYOUT("dp", "None"))),
        LORA(target_modules=["fc"], lora_dropout=0.1),
        r"'strategy_lora_dropout' must be of tuples, for Dropout takes no Layout.* got .Layout\(.*'mp', 'None'",
    ),
    "dora beside a layout": (
        lambda net: net.fc.matmul.shard((LAYOUT("dp", "None"), LAYOUT("mp", "None"))),
        LORA(target_modules=["fc"], use_dora=True),
        "fc: no DoRA beside a layer with strategies",
    ),
    "bias only": (
        lambda net: net.fc.bias_add.shard(((2, 4), (4,))),
        LORA(target_modules=["fc"]),
        "fc: a delta takes its strategies from one MatMul, but 0 have one in this layer",
    ),
    "wrong rank": (
        lambda net: net.fc.matmul.shard(((2, 1, 1), (4, 1))),
        LORA(target_modules=["fc"]),
        "fc: 'strategy of MatMul' must be of 2 tuple.* but got .*2, 1, 1",
    ),
    "ids": (
        lambda net: net.embed.gather.shard(((1, 1), (2, 4))),
        LORA(target_modules=["embed"]),
        "embed: no delta where ids are cut along other axes than the first",
    ),
    "several": (
        lambda net: (net.embed.gather.shard(((1, 1), (2, 4))), net.fc.bias_add.shard(((2, 4), (4,)))),
        AdapterConfig(target_modules=["fc", "embed"]),
        "fc: a delta takes.*embed: no delta where ids",
    ),
    "dora of a convolution": (
        lambda net: net.conv.conv2d.shard(((2, 1, 1, 1), (4, 1, 1, 1))),
        LORA(target_modules=["conv"], use_dora=True),
        "conv: no DoRA beside a layer with strategies",
    ),
    "keys cut along the sequence": (
        lambda net: net.attention.context.shard(((2, 4, 1, 2), (2, 4, 2, 1))),
        PREFIX(),
        "attention: its batched matmuls do not tell .* give it an attribute 'prefix_strategy'",
    ),
    "keys and values differ": (
        lambda net: (
            net.attention.scores.shard((WHOLE_HEADS, WHOLE_HEADS)),
            net.attention.context.shard(((8, 1, 1, 1), (8, 1, 1, 1))),
        ),
        PREFIX(),
        "attention: its batched matmuls do not tell",
    ),
    "layout of an attention": (
        lambda net: net.attention.scores.shard((LAYOUT("mp", "dp", "None", "None"),) * 2),
        PREFIX(),
        r"no prefix or prompt where the batch and the heads are cut by Layout\(\(2, 4\), .*'mp', 'dp'",
    ),
    "heads": (
        lambda net: net.attention.scores.shard(((1, 8, 1, 1), (1, 8, 1, 1))),
        PREFIX(),
        "attention: its 'prefix_strategy' must be two positive ints, of which the second divides its 4 .* is .1, 8.",
    ),
    "wrong attribute": (
        lambda net: setattr(net.attention, "prefix_strategy", (2, 0)),
        PREFIX(),
        "attention: its 'prefix_strategy' must be two positive ints.* is .2, 0.",
    ),
    "layout of one axis": (
        lambda net: setattr(net.attention, "prefix_strategy", LAYOUT("dp")),
        PREFIX(),
        r"attention: its 'prefix_strategy' must be two positive ints.* is Layout\(\(2, 4\), \('dp', 'mp'\)\)\('dp'\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_strategies_that_a_delta_cannot_follow_are_refused(name):
    shard, config, message = REFUSED[name]
    network = Layers()
    shard(network)
    before = [(path, param.requires_grad) for path, param in network.parameters_and_names()]
    with pytest.raises(ConfigError, match=message):
        get_peft_model(network, config)
    assert [(path, param.requires_grad) for path, param in network.parameters_and_names()] == before


def test_a_kind_that_is_not_known_here_is_refused():
    layer = nn.Conv1d(1, 4, 3)
    layer.conv2d.shard(((2, 1, 1, 1), (4, 1, 1, 1)))
    with pytest.raises(ConfigError, match="no delta beside a layer with strategies of the kind 'conv1d'"):
        carry_strategy(layer, layer_kind(layer), nn.Cell())


def test_a_delta_without_a_table_of_operators_is_refused():
    layer = nn.Dense(8, 8)
    carry_strategy(layer, layer_kind(layer), nn.Cell())
    layer.matmul.shard(((2, 1), (4, 1)))
    with pytest.raises(ConfigError, match="Cell has no table 'operators'"):
        carry_strategy(layer, layer_kind(layer), nn.Cell())


def test_dora_beside_a_layer_with_strategies_is_refused():
    loss = CausalLoss(LlamaConfig(**SHAPE, data_parallel=2, model_parallel=4))
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj: no DoRA beside a layer with strategies"):
        get_peft_model(loss.network, LoraConfig(target_modules=["q_proj"], use_dora=True))


def test_hira_beside_a_layer_that_is_cut_along_several_axes_is_refused():
    loss = CausalLoss(LlamaConfig(**SHAPE, data_parallel=2, model_parallel=4))
    with pytest.raises(
        ConfigError, match=r"no HiRA beside a layer that is cut along several axes by tuples: \(\(2, 1\), \(4, 1\)\)"
    ):
        get_peft_model(loss.network, HiraConfig(target_modules=["q_proj"]))
    assert not [param.name for param in loss.get_parameters() if "mindpet" in param.name]


def test_hira_and_miss_follow_the_strategies_of_their_layers():
    configs = [(HiraConfig(r=4, target_modules=TARGETS), 1), (MissConfig(r=4, target_modules=TARGETS), 2)]
    builds = [functools.partial(make, config, data_parallel, 4) for config, data_parallel in configs]
    for build, (_, data_parallel) in zip(builds, configs):
        (report,) = dry_run_many([build], 4 * data_parallel)
        unset = [plan.slot for plan in report.operators if not plan.is_set and "mindpet_delta" in plan.cell]
        assert not unset
        own = [plan for plan in report.parameters if "mindpet_delta" in plan.name and plan.role == "trainable"]
        assert own and any(plan.slice != plan.shape for plan in own)

"""Frozen weights in half precision: the numbers of a cast in each step, without it."""

import mindspore as ms
import numpy as np
import pytest
from graphs import dumped, final_nodes, readers
from mindspore import Parameter, Tensor, mint, nn, ops

from mindpet.delta import LoRADense
from mindpet.errors import ConfigError, NoMatchError
from mindpet.graph import freeze_delta, load_delta, summary
from mindpet.layers import Dense
from mindpet.peft import BitFitConfig, LoraConfig, PeftModel, get_peft_model

HALF = ms.float16


class Network(nn.Cell):
    """Layers that have a type to compute in, and layers that compute in that of their weight.

    With `casts`, all of them have, so that the float32 weights are cast in each step.
    """

    def __init__(self, casts=False, dtype=ms.float16, has_bias=True):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        same = {"has_bias": has_bias, "weight_init": "normal"}
        self.lora = LoRADense(8, 8, 2, 4, compute_dtype=dtype, activation="relu", **same)
        self.plain = Dense(8, 8, compute_dtype=dtype, **same) if casts else nn.Dense(8, 8, **same)
        self.norm = nn.LayerNorm((8,))
        self.head = nn.Dense(8, 3)

    def construct(self, ids):
        hidden = self.lora(self.embed(ids))
        return self.head(self.norm(hidden + self.plain(hidden)).mean(1))


def pair(rng, dtype=ms.float16, has_bias=True):
    """Two networks with the same values; the second one casts its weights in each step."""
    network, casting = Network(dtype=dtype, has_bias=has_bias), Network(casts=True, has_bias=has_bias)
    for param, other in zip(casting.get_parameters(), network.get_parameters()):
        value = rng.normal(size=param.shape).astype(np.float32)
        param.set_data(Tensor(value))
        other.set_data(Tensor(value))
    table = casting.embed.embedding_table  # an embedding has no operator that could see other digits
    table.set_data(table.astype(HALF).astype(ms.float32))
    freeze_delta(network, "lora", exclude=["head.*"], frozen_dtype=HALF)
    freeze_delta(casting, "lora", exclude=["head.*"])
    return network, casting


def training_step(network):
    loss = nn.WithLossCell(network, nn.CrossEntropyLoss())
    return nn.TrainOneStepCell(loss, nn.Adam(network.trainable_params(), 0.02)).set_train()


def batch(rng):
    return Tensor(rng.integers(0, 10, (6, 5)).astype(np.int32)), Tensor(np.arange(6, dtype=np.int32) % 3)


def test_numbers_are_those_of_a_cast_in_each_step(mode, rng):
    network, casting = pair(rng, ms.float32)  # a hand-made layer computes in the new type, whichever it had
    data = batch(rng)
    np.testing.assert_array_equal(network(data[0]).asnumpy(), casting(data[0]).asnumpy())
    losses = [[float(step(*data).asnumpy()) for _ in range(4)] for step in map(training_step, (network, casting))]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    for param, other in zip(network.trainable_params(), casting.trainable_params()):
        assert param.dtype == ms.float32
        np.testing.assert_array_equal(param.asnumpy(), other.asnumpy())


def test_the_step_has_no_cast_of_a_frozen_weight(rng, tmp_path):
    ms.set_context(mode=ms.GRAPH_MODE)
    casts = []
    for name, network in zip(("half", "casting"), pair(rng)):
        with dumped(tmp_path / name):
            training_step(network)(*batch(rng))
        nodes = final_nodes(tmp_path / name)
        casts.append([key for key in ("lora.weight", "lora.bias", "plain.weight") if "Cast" in readers(nodes, key)])
        assert "Cast" in readers(nodes, "lora.mindpet_delta_lora_a")
    assert casts == [[], ["lora.weight", "lora.bias", "plain.weight"]]


def test_what_is_stored_and_what_is_not(rng):
    network, casting = pair(rng)
    halved = [name for name, param in network.parameters_and_names() if param.dtype == HALF]
    assert halved == ["embed.embedding_table", "lora.weight", "lora.bias", "plain.weight", "plain.bias"]
    full, half = summary(casting), summary(network)
    assert full.weight_bytes - half.weight_bytes == 2 * sum(network.parameters_dict()[name].size for name in halved)
    before = {name: param.asnumpy().copy() for name, param in network.parameters_and_names()}
    freeze_delta(network, "lora", exclude=["head.*"], frozen_dtype=HALF)  # a second time changes nothing
    for name, param in network.parameters_and_names():
        np.testing.assert_array_equal(param.asnumpy(), before[name])


@pytest.mark.parametrize("how, dtype", [("mindspore", ms.float32), ("load_delta", ms.float16)])
def test_checkpoints_of_either_type_load(how, dtype, mode, rng, tmp_path):
    network, casting = pair(rng)
    file = str(tmp_path / "base.ckpt")
    others = {name: rng.normal(size=param.shape).astype(np.float32) for name, param in casting.parameters_and_names()}
    ms.save_checkpoint([{"name": name, "data": Tensor(value).astype(dtype)} for name, value in others.items()], file)
    ids = batch(rng)[0]
    network(ids)  # compiled before
    if how == "mindspore":
        ms.load_checkpoint(file, network)
    else:
        load_delta(network, file)
    assert network.plain.weight.dtype == HALF and network.norm.gamma.dtype == ms.float32
    np.testing.assert_array_equal(network.plain.weight.asnumpy(), others["plain.weight"].astype(np.float16))
    ms.load_checkpoint(file, casting)
    if dtype == ms.float32:
        table = casting.embed.embedding_table
        table.set_data(table.astype(HALF).astype(ms.float32))
    np.testing.assert_array_equal(network(ids).asnumpy(), casting(ids).asnumpy())


class Layers(nn.Cell):
    """Layers for `get_peft_model`."""

    def __init__(self, casts=False):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, has_bias=True)
        self.query = Dense(8, 8, activation="gelu", compute_dtype=HALF) if casts else nn.Dense(8, 8, activation="gelu")
        self.value = Dense(8, 8, has_bias=False, compute_dtype=HALF) if casts else mint.nn.Linear(8, 8, bias=False)
        self.classifier = nn.Dense(8, 3)

    def construct(self, ids):
        hidden = self.conv(self.embed(ids).swapaxes(1, 2)).swapaxes(1, 2)
        return self.classifier((self.query(hidden) + self.value(hidden)).mean(1))


def layers(rng, casts=False):
    """`Layers` with seeded values."""
    network = Layers(casts)
    for param in network.get_parameters():
        param.set_data(Tensor(0.4 * rng.normal(size=param.shape).astype(np.float32)))
    return network


def test_adapters_on_half_a_base(mode, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    ids = batch(np.random.default_rng(1))[0]
    model = get_peft_model(layers(np.random.default_rng(2)), config, frozen_dtype=HALF)
    network = model.network
    # What trains as a copy stays what it is, and so does the copy.
    assert {param.dtype for param in (*model.trainable_params(), network.classifier.weight)} == {ms.float32}
    assert {network.embed.embedding_table.dtype, network.conv.bias.dtype, network.value.weight.dtype} == {HALF}
    tuned = model(ids).asnumpy()
    assert tuned.dtype == np.float32
    step = training_step(model)
    losses = [float(step(ids, Tensor(np.arange(6, dtype=np.int32) % 3)).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    tuned = model.set_train(False)(ids).asnumpy()
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    np.testing.assert_allclose(model(ids).asnumpy(), tuned, atol=0.02)
    assert {row.dtype for row in model.merge_report} == {"float16"}
    assert all(0 < row.largest_error < 2e-3 for row in model.merge_report)
    model.unmerge_adapter()
    np.testing.assert_array_equal(model(ids).asnumpy(), tuned)
    with model.disable_adapter():
        base = model(ids).asnumpy()
    np.testing.assert_allclose(
        model.unload()(ids).asnumpy(), base, atol=2e-3
    )  # the activation has half precision there
    again = PeftModel.from_pretrained(layers(np.random.default_rng(2)), tmp_path, frozen_dtype=HALF)
    np.testing.assert_array_equal(again(ids).asnumpy(), tuned)
    whole = PeftModel.from_pretrained(layers(np.random.default_rng(2)), tmp_path)  # the same base, in float32
    np.testing.assert_allclose(whole(ids).asnumpy(), tuned, atol=0.02)


def test_an_adapter_computes_as_on_layers_that_cast(mode, rng):
    config, outputs = LoraConfig(r=2, target_modules=["query", "value"]), []
    x = Tensor(rng.normal(size=(6, 8)).astype(np.float32))
    for casts, dtype in ((False, HALF), (True, None)):
        network = layers(np.random.default_rng(2), casts)
        network.query.bias.set_data(network.query.bias * 0)  # which kernel adds it makes no difference
        model = get_peft_model(network, config, frozen_dtype=dtype)
        values = np.random.default_rng(3)
        for param in model.trainable_params():
            param.set_data(Tensor(values.normal(size=param.shape).astype(np.float32)))
        outputs.append([model.query(x).asnumpy(), model.value(x).asnumpy()])
    np.testing.assert_array_equal(*outputs)


def test_biases_train_in_float32(mode, rng):
    model = get_peft_model(layers(rng), BitFitConfig(), frozen_dtype=HALF)
    assert model.network.query.weight.dtype == HALF
    assert {param.dtype for param in model.trainable_params()} == {ms.float32}
    step, ids = training_step(model), batch(rng)[0]
    losses = [float(step(ids, Tensor(np.arange(6, dtype=np.int32) % 3)).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]


class Odd(nn.Cell):
    """Frozen matrices that no layer can have in half precision."""

    def __init__(self):
        super().__init__()
        self.table = Parameter(Tensor(np.ones((8, 8), np.float32)))
        self.one_hot = nn.Embedding(10, 8, use_one_hot=True)
        self.lora = LoRADense(8, 8, 2, 4, compute_dtype=ms.float32)
        self.biased = mint.nn.Linear(8, 8)
        self.fixed = nn.Dense(8, 8).to_float(ms.float32)

    def construct(self, ids):
        return self.fixed(self.biased(self.lora(ops.matmul(self.one_hot(ids), self.table))))


def test_what_cannot_is_left_and_named(mode, rng):
    network, ids = Odd(), batch(rng)[0]
    with pytest.warns(UserWarning, match="stay in float32: ") as caught:
        freeze_delta(network, "lora", exclude=["biased.bias"], frozen_dtype=HALF)
    (text,) = [str(one.message) for one in caught if "stay in float32" in str(one.message)]
    for name, reason in {
        "table": "it is no weight of a layer",
        "one_hot.embedding_table": "one-hot",
        "biased.weight": "the bias of its layer trains",
        "fixed.weight": "computes in FP32, by to_float",
    }.items():
        assert reason in text.partition(f"{name} (")[2].partition(")")[0]
    assert [name for name, param in network.parameters_and_names() if param.dtype == HALF] == [
        "lora.weight",
        "lora.bias",
    ]
    assert network(ids).shape == (6, 5, 8)


def test_a_weight_in_two_places(mode, rng):
    class Tied(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed, self.lora = nn.Embedding(10, 8), LoRADense(8, 8, 2, 4)
            self.head = nn.Dense(8, 10, has_bias=False)
            self.head.weight = self.embed.embedding_table

        def construct(self, ids):
            return self.head(self.lora(self.embed(ids)))

    network, ids = Tied(), batch(rng)[0]
    before = network(ids).asnumpy()
    freeze_delta(network, "lora", frozen_dtype=HALF)
    assert network.head.weight is network.embed.embedding_table and network.head.weight.dtype == HALF
    np.testing.assert_allclose(network(ids).asnumpy(), before, atol=1e-4)


def test_errors_leave_the_network_as_it_was(rng):
    network = Network()
    network.plain.weight.set_data(Tensor(np.full((8, 8), 1e5, np.float32)))
    network.lora.bias.set_data(Tensor(np.full(8, np.nan, np.float32)))
    flags = [(param.requires_grad, param.dtype) for param in network.get_parameters()]
    with pytest.raises(ConfigError, match="'frozen_dtype': Float16 cannot hold .*bias has nan; .*weight has 100000"):
        freeze_delta(network, "lora", frozen_dtype=HALF)
    for wrong in (ms.float32, "float16", ms.int8):
        with pytest.raises(TypeError, match="'frozen_dtype' must be mindspore.float16, mindspore.bfloat16 or None"):
            freeze_delta(network, "lora", frozen_dtype=wrong)
        with pytest.raises(TypeError, match="'frozen_dtype' must be"):
            get_peft_model(Layers(), BitFitConfig(), frozen_dtype=wrong)
    with pytest.raises(NoMatchError, match="no layer has a frozen weight"):
        freeze_delta(network, "lora", exclude=["*.weight", "embed.*"], frozen_dtype=HALF)
    with pytest.raises(NoMatchError, match="matches no parameter"):
        freeze_delta(network, "lora", exclude=["haed.*"], frozen_dtype=HALF)
    assert [(param.requires_grad, param.dtype) for param in network.get_parameters()] == flags
    model = get_peft_model(Layers(), LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ConfigError, match=r"query'\] carry deltas of an adapter"):
        freeze_delta(model, "lora", frozen_dtype=HALF)
    assert {param.dtype for param in model.get_parameters()} == {ms.float32}


def test_bfloat16_is_stored(rng):
    """A CPU computes nothing with it."""
    network = Network(dtype=ms.bfloat16)
    before = network.plain.weight.asnumpy().copy()
    freeze_delta(network, "lora", exclude=["head.*"], frozen_dtype=ms.bfloat16)
    assert {network.plain.weight.dtype, network.lora.weight.dtype, network.lora.compute_dtype} == {ms.bfloat16}
    np.testing.assert_allclose(network.plain.weight.float().asnumpy(), before, rtol=2**-8)

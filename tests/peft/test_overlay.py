"""Layers that return pairs, take keywords, flatten their input or have an activation, with a delta beside them."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from small import contents, move, numbers

from mindpet.errors import AdapterError, ConfigError
from mindpet.network.kinds import register_layer
from mindpet.parallel import dry_run
from mindpet.peft import AdapterConfig, LoraConfig, get_peft_model
from mindpet.peft.batch import one_error

WIDTH = 6


class Pair(nn.Cell):
    """A linear layer of a model library: it returns its bias beside the output, and takes more than the input."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.weight = Parameter(Tensor(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)), name="weight")
        self.bias = Parameter(Tensor(rng.normal(size=WIDTH).astype(np.float32)), name="bias")

    def construct(self, x, group_list=None, times=1):
        out = times * ops.matmul(x, self.weight.T)
        return (out if group_list is None else out + group_list), self.bias


register_layer(Pair, adds_bias=False)


class Paired(nn.Cell):
    """Calls a Pair with keywords."""

    def __init__(self):
        super().__init__()
        self.fc = Pair()

    def construct(self, x, shift):
        out, bias = self.fc(x, group_list=shift, times=1)
        return out + 2 * bias


def lora_of(model, path="fc"):
    values = {name: param.asnumpy() for name, param in model.parameters_and_names()}
    found = {name.split("mindpet_delta_lora_")[-1]: value for name, value in values.items() if path in name}
    return found["a"], found["b"], found.get("magnitude")


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_pair_has_the_delta_in_its_output(use_dora, mode, rng):
    network = Paired()
    x, shift = (Tensor(rng.normal(size=(2, 3, WIDTH)).astype(np.float32)) for _ in range(2))
    base = network(x, shift).asnumpy()
    model = get_peft_model(network, LoraConfig(r=2, lora_alpha=3, target_modules=["fc"], use_dora=use_dora))
    np.testing.assert_allclose(model(x, shift).asnumpy(), base, atol=1e-5)
    move(model, 0)
    a, b, magnitude = lora_of(model)
    weight = network.fc.weight.asnumpy() + 1.5 * b @ a
    if use_dora:
        weight = weight * (magnitude / np.linalg.norm(weight, axis=1))[:, None]
        shift = shift * 0  # what the layer adds besides belongs to its output, and DoRA scales it
    expected = x.asnumpy() @ weight.T + shift.asnumpy() + 2 * network.fc.bias.asnumpy()
    np.testing.assert_allclose(model(x, shift).asnumpy(), expected, atol=1e-4)


def test_pairs_in_mixed_batches(mode, rng):
    network = Paired()
    x, shift = (Tensor(rng.normal(size=(3, 2, WIDTH)).astype(np.float32)) for _ in range(2))
    config = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    model = get_peft_model(network, config, "one")
    model.add_adapter("two", config)
    names = ["two", "__base__", "one"]
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = model(x, shift).asnumpy()
    with model.disable_adapter():
        alone["__base__"] = model(x, shift).asnumpy()
    got = model(x, shift, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [alone[name][row] for row, name in enumerate(names)], atol=1e-5)


class OfRows(nn.Cell):
    """Gives its layers `(batch * seq, features)`, as many model libraries do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Dense(WIDTH, WIDTH, activation="tanh")

    def construct(self, x):
        return ops.reshape(self.fc(ops.reshape(x, (-1, WIDTH))), x.shape)


class Pooled(OfRows):
    """Its layer does not see a multiple of the batch."""

    def construct(self, x):
        return self.fc(ops.reshape(x, (-1, WIDTH))[1:])


def two_adapters(network):
    config = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    model = get_peft_model(network, config, "one")
    model.add_adapter("two", config)
    return model


def test_rows_of_a_sample_have_its_adapter(mode, rng):
    model = two_adapters(OfRows())
    x = Tensor(rng.normal(size=(4, 3, WIDTH)).astype(np.float32))
    names = ["two", "one", "__base__", "two"]
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = numbers(model, x)
    with model.disable_adapter():
        alone["__base__"] = numbers(model, x)
    got = model(x, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [alone[name][row] for row, name in enumerate(names)], atol=1e-5)


def test_rows_that_belong_to_no_sample_are_one_error(mode, rng):
    network = Pooled()
    model = two_adapters(network)
    x = Tensor(rng.normal(size=(2, 3, WIDTH)).astype(np.float32))
    before, output = contents(network), numbers(model, x)
    with pytest.raises(ValueError, match="adapter_names: .*fc returns 5 rows, .*no multiple of the 2 names"):
        model(x, adapter_names=["one", "two"])
    assert contents(network) == before
    np.testing.assert_allclose(numbers(model, x), output, atol=1e-6)


def test_one_error_leaves_other_errors_alone():
    with pytest.raises(AdapterError, match=r"^adapter_names: no\.$"), one_error():
        raise ValueError("'adapter_names: no.'\n\n---\n- C++ Call Stack")
    with pytest.raises(ValueError, match="^something else$"), one_error():
        raise ValueError("something else")


@pytest.mark.parametrize("make", [LoraConfig, AdapterConfig])
def test_an_activation_gets_what_the_layer_gives_it(make, mode, rng):
    network = nn.SequentialCell(nn.Dense(WIDTH, 4, activation=nn.Softmax(axis=1)))  # of rows: over the features
    x = Tensor(rng.normal(size=(2, 3, WIDTH)).astype(np.float32))
    base = numbers(network, x)
    np.testing.assert_allclose(base.sum(-1), 1, atol=1e-5)
    model = get_peft_model(network, make(target_modules=["0"]))
    np.testing.assert_allclose(numbers(model, x), base, atol=1e-5)


class OfItsOwn(nn.Dense):
    """Its activation sees the output as it is."""

    def construct(self, x):
        out = ops.matmul(x, self.weight.T) + self.bias
        return self.activation(out) if self.activation_flag else out


register_layer(OfItsOwn, flattens=False)


def test_an_activation_that_gets_the_whole_output(mode, rng):
    network = nn.SequentialCell(OfItsOwn(WIDTH, 4, activation=nn.Softmax(axis=1)))
    x = Tensor(rng.normal(size=(2, 3, WIDTH)).astype(np.float32))
    base = numbers(network, x)
    np.testing.assert_allclose(base.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(numbers(get_peft_model(network, LoraConfig(target_modules=["0"])), x), base, atol=1e-5)


class Activated(nn.Cell):
    """A sharded Dense with an activation, and its loss."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Dense(16, 32, activation="relu")
        self.fc.matmul.shard(((2, 1), (4, 1)))
        self.fc.bias_add.shard(((2, 4), (4,)))
        self.fc.activation.relu.shard(((2, 4),))

    def construct(self, x):
        return self.fc(x).mean()


def sharded():
    """Three axes go into the Dense, its activation is sharded for two."""
    network = Activated()
    get_peft_model(network, LoraConfig(r=4, target_modules=["fc"]))
    return network, (Tensor(np.zeros((4, 8, 16), np.float32)),), nn.Adam(network.trainable_params(), 1e-3)


def test_a_sharded_activation_compiles():
    found = {plan.slot: plan.strategy for plan in dry_run(sharded, 8).operators if "fc" in plan.cell}
    assert ((2, 4),) in found.values() and found["strategy_lora_b_matmul"] == ((2, 1), (4, 1))


def test_unload_leaves_nothing(mode, rng):
    network = Paired()
    own, before = sorted(vars(network.fc)), contents(network)
    model = get_peft_model(network, LoraConfig(target_modules=["fc"]))
    assert model.unload() is network and contents(network) == before
    assert set(vars(network.fc)) - set(own) <= {"parameter_layout_dict", "_param_prefix"}
    x, shift = (Tensor(rng.normal(size=(2, WIDTH)).astype(np.float32)) for _ in range(2))
    assert network(x, shift).dtype == ms.float32


class Squared(nn.Dense):
    """Not W x + b."""

    def construct(self, x):
        return ops.matmul(x, self.weight.T) ** 2


def test_a_layer_that_cannot_carry_a_delta_says_why():
    with pytest.raises(ConfigError, match=r"0 \(Squared has construct of its own, .* than a Dense; .*register_layer"):
        get_peft_model(nn.SequentialCell(Squared(4, 4)), LoraConfig(target_modules=["0"]))


def test_rows_that_belong_to_no_sample_are_a_short_error(mode, rng):
    model = two_adapters(Pooled())
    with pytest.raises(AdapterError) as error:
        model(Tensor(rng.normal(size=(2, 3, WIDTH)).astype(np.float32)), adapter_names=["one", "two"])
    assert "\n" not in str(error.value)

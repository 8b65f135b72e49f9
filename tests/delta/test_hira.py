"""HiRA: hand-made layers, deltas beside every kind of layer, files and merging."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import Small, Tied, check_follows, check_life, check_tied, check_turns, contents, ids, move, numbers, same

from mindpet.delta import HiraDense
from mindpet.errors import CheckpointError, ConfigError
from mindpet.files.convert import convert
from mindpet.files.merge import merge
from mindpet.files.tensors import TensorFile
from mindpet.graph import load_delta
from mindpet.peft import HiraConfig, LoraConfig, PeftModel, get_peft_model

A, B = "mindpet_delta_hira_a", "mindpet_delta_hira_b"
TARGETS = ["embed", "query", "mlp.0", "turned", "shared", "conv"]
TENSORS = "adapter_model.safetensors"


def config(**fields):
    return HiraConfig(**{"r": 3, "target_modules": TARGETS, **fields})


def factors(delta):
    """B A as a matrix."""
    a, b = (getattr(delta, name).asnumpy() for name in (A, B))
    return b.reshape(len(b), -1) @ a.reshape(len(a), -1)


def test_the_layer_is_that_of_the_formula(mode, rng):
    cell = HiraDense(4, 6, 3, activation="relu", compute_dtype=ms.float32, bias_init="ones", init_weights=False)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    weight, bias = cell.weight.asnumpy(), cell.bias.asnumpy()
    tuned = weight + weight * factors(cell)
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ tuned.T + bias, 0), atol=1e-5)
    np.testing.assert_allclose(cell.merged_weight().asnumpy(), tuned, atol=1e-6)
    np.testing.assert_array_equal(cell.merged_bias().asnumpy(), bias)
    cell.weight.set_data(Tensor(-weight))
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ -tuned.T + bias, 0), atol=1e-5)
    getattr(cell, B).set_data(Tensor(np.full((6, 3), np.nan, np.float32)))
    cell.reset()
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ -weight.T + bias, 0), atol=1e-6)


def test_names_and_shapes_of_a_fresh_layer():
    cell = HiraDense(4, 6, 3)
    assert [(param.name, param.shape) for param in cell.get_parameters()] == [
        ("weight", (6, 4)),
        ("bias", (6,)),
        (A, (3, 4)),
        (B, (6, 3)),
    ]


@pytest.mark.parametrize(
    "init, deviations",
    [(True, (1 / np.sqrt(3 * 256), 0)), ("gaussian", (1 / 64, 0)), (False, (1, 1)), (None, (1, 1))],
)
def test_initial_values(init, deviations):
    cell = HiraDense(256, 128, 64, init_weights=init)
    np.testing.assert_allclose([getattr(cell, name).asnumpy().std() for name in (A, B)], deviations, rtol=0.05)


@pytest.mark.parametrize("init, deviations", [(True, (0, 1)), ("gaussian", (0, 1)), (False, (1, 1)), (None, (0, 1))])
def test_initial_values_of_an_embedding(init, deviations):
    network = nn.SequentialCell(nn.Embedding(200, 64))
    delta = get_peft_model(network, config(r=32, target_modules=["0"], init_weights=init)).network[0].mindpet_delta
    np.testing.assert_allclose([getattr(delta, name).asnumpy().std() for name in (A, B)], deviations, rtol=0.05)


def test_dropout_acts_on_the_delta_while_training():
    cell = HiraDense(64, 4, 8, hira_dropout=0.5, compute_dtype=ms.float32, init_weights=False)
    x = Tensor(np.ones((1, 64), np.float32))
    still = numbers(cell.set_train(False), x)
    np.testing.assert_array_equal(numbers(cell, x), still)
    assert np.abs(numbers(cell.set_train(), x) - still).max() > 1e-3
    cell.reset()
    same(numbers(cell.set_train(), x), cell.weight.asnumpy().sum(1)[None] + cell.bias.asnumpy())


def test_wrong_arguments_are_all_told():
    with pytest.raises(ValueError, match="'hira_rank' .* got 0.*'hira_dropout' .* got 1.0.*'init_weights' .* got 'x'"):
        HiraDense(4, 6, 0, hira_dropout=1.0, init_weights="x")
    with pytest.raises(ValueError, match="'r' .* got 0.*'hira_dropout' .* got 2.*'fan_in_fan_out' .*'init_weights' .*"):
        HiraConfig(r=0, hira_dropout=2, fan_in_fan_out=1, init_weights=1)


LAYERS = {
    "linear": (lambda: nn.Dense(4, 6), (2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, has_bias=True), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (2, 3), stride=2, pad_mode="valid", has_bias=True), (2, 4, 5, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, has_bias=True), (1, 4, 3, 3, 4)),
    "embedding": (lambda: nn.Embedding(10, 6), (2, 3)),
}


@pytest.mark.parametrize("layer", list(LAYERS))
def test_each_kind_of_layer_computes_with_its_merged_weight(layer, mode, rng, tmp_path):
    make, shape = LAYERS[layer]
    network, is_embedding = nn.SequentialCell(make()), "embedding" in layer
    x = Tensor((10 * rng.random(shape)).astype(np.int32 if is_embedding else np.float32))
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, config(target_modules=["0"], hira_dropout=0.1))
    same(numbers(model, x), base)
    move(model, 1)
    tuned = numbers(model, x)
    assert np.abs(tuned - base).max() > 1e-3
    (weight,) = (param for param in network.get_parameters() if "weight" in param.name or "table" in param.name)
    gain = 1 + factors(network[0].mindpet_delta)
    expected = weight.asnumpy() * (gain.T if is_embedding else gain.reshape(weight.shape))
    model.save_pretrained(tmp_path)
    ending = "embedding_" if is_embedding else ""
    shapes = TensorFile(tmp_path / TENSORS).shapes
    assert {key.split("model.")[-1]: shape for key, shape in shapes.items()} == {
        f"0.hira_{ending}A": getattr(network[0].mindpet_delta, A).shape,
        f"0.hira_{ending}B": getattr(network[0].mindpet_delta, B).shape,
    }
    model.unload()
    assert contents(network) == before
    merged = PeftModel.from_pretrained(network, tmp_path).merge_and_unload()
    np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-4)
    np.testing.assert_allclose(weight.asnumpy(), expected, atol=1e-5)


def test_a_convolution_in_groups_is_refused():
    with pytest.raises(ConfigError, match="0: no HiRA beside a convolution in groups"):
        get_peft_model(nn.SequentialCell(nn.Conv2d(4, 6, 3, group=2)), config(target_modules=["0"]))


def test_a_network_with_layers_of_every_kind(mode, rng, tmp_path):
    def look(network):
        assert network.mlp[0].mindpet_delta.mindpet_delta_hira_a.shape == (2, 8)
        return network.turned.table.asnumpy() * (1 + factors(network.turned.mindpet_delta)).T

    merged, turned = check_life(config(rank_pattern={"mlp.0": 2}), ids(rng), tmp_path, 1e-3, look)
    np.testing.assert_allclose(merged.turned.table.asnumpy(), turned, atol=1e-6)


def test_the_delta_follows_another_base(mode, rng):
    check_follows(config(), ids(rng))


def test_a_step_moves_the_delta_alone_as_its_gradient_says(mode, rng):
    network, x = nn.SequentialCell(nn.Dense(4, 6)), rng.normal(size=(5, 4)).astype(np.float32)
    model = get_peft_model(network, config(target_modules=["0"], init_weights=False))
    delta, weight = network[0].mindpet_delta, network[0].weight.asnumpy().copy()
    a, b = (getattr(delta, name).asnumpy().copy() for name in (A, B))

    def loss(x):
        return model(x).sum()

    optimizer = nn.SGD(model.trainable_params(), 0.1)
    optimizer(ms.value_and_grad(loss, None, optimizer.parameters)(Tensor(x))[1])
    inner = weight * x.sum(0)  # the gradient of B A
    np.testing.assert_allclose(getattr(delta, A).asnumpy(), a - 0.1 * b.T @ inner, atol=1e-5)
    np.testing.assert_allclose(getattr(delta, B).asnumpy(), b - 0.1 * inner @ a.T, atol=1e-5)
    np.testing.assert_array_equal(network[0].weight.asnumpy(), weight)


def test_files_without_a_network(rng, tmp_path):
    network, x = Small(), ids(rng)
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    targets = ["query", "mlp.0", "shared", "conv"]  # a file cannot tell that `turned` is turned
    model = get_peft_model(network, config(target_modules=targets, rank_pattern={"query": 2}))
    move(model, 1)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    convert(tmp_path / "adapter", tmp_path / "delta.safetensors")
    for param in model.trainable_params():
        param.set_data(Tensor(np.zeros(param.shape, np.float32)))
    load_delta(network, tmp_path / "delta.safetensors")
    same(numbers(model, x), tuned)
    own = config(target_modules=targets, rank_pattern={"query": 2})
    convert(tmp_path / "delta.safetensors", tmp_path / "back", own)
    for key, value in TensorFile(tmp_path / "back" / TENSORS).read_all().items():
        np.testing.assert_array_equal(value, TensorFile(tmp_path / "adapter" / TENSORS).read_all()[key])
    with pytest.raises(CheckpointError, match=r"query.hira_A: \[3, 8\] is needed, but it is \[2, 8\]"):
        convert(tmp_path / "delta.safetensors", tmp_path / "wrong", config(target_modules=targets))
    merged = TensorFile(tmp_path / "merged.safetensors").read_all()
    for path, param in model.merge_and_unload().parameters_and_names():
        np.testing.assert_allclose(merged[path], param.asnumpy(), atol=1e-6, err_msg=path)


def test_adapters_in_one_batch(mode, rng):
    network, x = Small(), ids(rng, 4)
    expected = {"__base__": numbers(network, x)}
    model = get_peft_model(network, config(), "one")
    model.add_adapter("two", config(target_modules=["query", "embed"], r=2))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "turned", "embed"]))
    for seed, name in enumerate(("one", "two", "lora")):
        model.set_adapter(name)
        move(model, seed)
        expected[name] = numbers(model, x)
    names = ["two", "lora", "__base__", "one"]
    got = model(x, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)


def test_two_adapters_are_merged_one_after_the_other(rng):
    network = Small()
    start = network.query.weight.asnumpy().copy()
    model = get_peft_model(network, config(target_modules=["query", "embed", "conv"]), "one")
    model.add_adapter("two", config(target_modules=["query", "embed"], r=2))
    gains = []
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        move(model, seed)
        gains.append(1 + factors(network.query.mindpet_delta))
    merged = model.merge_and_unload(adapter_names=["one", "two"])
    np.testing.assert_allclose(merged.query.weight.asnumpy(), start * gains[0] * gains[1], atol=1e-5)


def test_adapters_of_one_shape_take_turns_without_a_new_graph(mode, rng, tmp_path):
    check_turns(config(), config(), ids(rng), tmp_path)


@pytest.mark.parametrize("target", ["head", "embed"])
def test_a_weight_in_common_with_another_layer(target, mode, rng):
    if target == "head":
        check_tied(config(target_modules=["head"]), ids(rng))
    network, x = Tied(), ids(rng)
    model = get_peft_model(network, config(target_modules=[target]))
    move(model, 1)
    table, gain = network.head.weight.asnumpy(), 1 + factors(getattr(network, target).mindpet_delta)
    embed, head = (table, table * gain) if target == "head" else (table * gain.T, table)
    np.testing.assert_allclose(numbers(model, x), embed[x.asnumpy()] @ head.T, atol=1e-5)


def test_layers_of_half_precision(mode, rng):
    network = nn.SequentialCell(nn.Dense(4, 6, dtype=ms.float16))
    model = get_peft_model(network, config(target_modules=["0"]))
    x = Tensor(rng.normal(size=(3, 4)).astype(np.float16))
    move(model, 1)
    assert model(x).dtype == ms.float16
    assert {param.dtype for param in model.trainable_params()} == {ms.float32}
    merged = numbers(model, x)
    np.testing.assert_allclose(numbers(model.merge_and_unload(), x), merged, atol=2e-2)

"""MiSS and its variants: hand-made layers, deltas in a network, files and merging."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import Small, Tied, check_follows, check_life, check_tied, check_turns, ids, move, numbers, same

from mindpet.delta import MissDense
from mindpet.errors import CheckpointError, ConfigError
from mindpet.files.convert import convert
from mindpet.files.merge import merge
from mindpet.files.tensors import TensorFile
from mindpet.graph import load_delta
from mindpet.peft import LoraConfig, MissConfig, PeftModel, get_peft_model

BLOCK = "mindpet_delta_miss"
TARGETS = ["query", "mlp.0", "turned", "shared"]  # mlp.0 has 6 outputs of 8 inputs, the others 8 of 8
TENSORS = "adapter_model.safetensors"
VARIANTS = {
    "plain": {"r": 2},
    "padded": {"r": 3},
    "one shard": {"r": 8},
    "mini": {"r": 3, "mini_r": 2, "init_weights": "mini", "target_modules": ["query", "mlp.0", "shared"]},
    "bat": {"r": 2, "init_weights": "bat"},
}
EVERY = pytest.mark.parametrize("variant", list(VARIANTS))


def config(variant="plain", **fields):
    return MissConfig(**{"target_modules": TARGETS, **VARIANTS[variant], **fields})


def change(weight, block):
    """What a block adds to a weight `(out, in)`, number by number."""
    rows, columns = np.indices(weight.shape)
    if block.ndim == 2:
        return block[columns % block.shape[0], rows % block.shape[1]]
    rank = block.shape[1]
    start = columns - columns % rank  # of the square block
    own = block[rows // rank, :, columns % rank]  # a column of D_j for each number
    inputs = weight[rows[..., None], start[..., None] + np.arange(rank)]
    return (inputs * own).sum(-1) + block[rows // rank, rows % rank, columns % rank]


def made(variant, outs=6, ins=8, **keywords):
    """A hand-made layer with a block of random numbers."""
    own = {"r": "miss_rank", "mini_r": "mini_r", "init_weights": "init_weights"}
    fields = {own[name]: value for name, value in VARIANTS[variant].items() if name in own}
    cell = MissDense(ins, outs, **fields, **{"compute_dtype": ms.float32, **keywords})
    block = np.random.default_rng(3).normal(size=cell.mindpet_delta_miss.shape).astype(np.float32)
    cell.mindpet_delta_miss.set_data(Tensor(block))
    return cell, block


@EVERY
def test_the_layer_is_that_of_the_formula(variant, mode, rng):
    cell, block = made(variant, activation="relu", bias_init="ones")
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    weight, bias = cell.weight.asnumpy(), cell.bias.asnumpy()
    tuned = weight + change(weight, block)
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ tuned.T + bias, 0), atol=1e-5)
    np.testing.assert_allclose(cell.merged_weight().asnumpy(), tuned, atol=1e-6)
    np.testing.assert_array_equal(cell.merged_bias().asnumpy(), bias)
    assert numbers(cell, Tensor(np.zeros((0, 8), np.float32))).shape == (0, 6)
    cell.mindpet_delta_miss.set_data(Tensor(np.full(block.shape, np.nan, np.float32)))
    cell.reset()
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ weight.T + bias, 0), atol=1e-6)


def test_names_and_shapes_of_fresh_layers():
    shapes = {"plain": (2, 6), "padded": (3, 6), "one shard": (8, 6), "mini": (3, 2), "bat": (3, 2, 2)}
    for variant, shape in shapes.items():
        cell, _ = made(variant)
        names = [(param.name, param.shape) for param in cell.get_parameters()]
        assert names == [("weight", (6, 8)), ("bias", (6,)), (BLOCK, shape)]
    assert not MissDense(8, 6, 2).mindpet_delta_miss.asnumpy().any()
    random = MissDense(128, 256, 64, init_weights=False).mindpet_delta_miss.asnumpy()
    assert 0.98 / 16 < np.abs(random).max() <= 1 / 16 and abs(random.std() * np.sqrt(3) * 16 - 1) < 0.02


@pytest.mark.parametrize("variant", ["padded", "mini", "bat"])
def test_dropout_acts_on_the_delta_while_training(variant):
    cell, _ = made(variant, miss_dropout=0.5)
    x = Tensor(np.ones((20, 8), np.float32))
    still = numbers(cell.set_train(False), x)
    np.testing.assert_array_equal(numbers(cell, x), still)
    assert np.abs(numbers(cell.set_train(), x) - still).max() > 1e-3
    cell.reset()
    expected = np.ones((20, 1)) * cell.weight.asnumpy().sum(1) + cell.bias.asnumpy()
    np.testing.assert_allclose(numbers(cell.set_train(), x), expected, atol=1e-6)


def test_wrong_arguments_are_all_told():
    message = "'miss_rank' .* got 0.*'miss_dropout' .* got 1.0.*'init_weights' .* got 'x'.*'mini_r' .* got -1"
    with pytest.raises(ValueError, match=message):
        MissDense(4, 6, 0, miss_dropout=1.0, mini_r=-1, init_weights="x")
    with pytest.raises(ValueError, match="the rank, 5, must be at most the number of its inputs, 4"):
        MissDense(4, 6, 5)
    with pytest.raises(ValueError, match="with 'bat' the rank, 4, must divide its inputs and outputs, 4 and 6"):
        MissDense(4, 6, 4, init_weights="bat")
    with pytest.raises(ValueError, match="mini_r, 4, must divide the number of its outputs, 6"):
        MissDense(4, 6, 2, mini_r=4, init_weights="mini")
    with pytest.raises(ValueError, match="'mini_r' must be 1 where init_weights is not 'mini', but got 2"):
        MissConfig(mini_r=2)
    with pytest.raises(ValueError, match="'r' .*'miss_dropout' .*'init_weights' .*'bias' .*'fan_in_fan_out'"):
        MissConfig(r=0, miss_dropout=1, init_weights=None, bias="lora_only", fan_in_fan_out=1)


def test_what_does_not_fit_a_layer_is_told_with_its_path():
    network = Small()
    with pytest.raises(ConfigError, match="query: the rank, 9, must .*; mlp.0: the rank, 9, must .* inputs, 8"):
        get_peft_model(network, config(r=9))
    with pytest.raises(ConfigError, match="mlp.0: with 'bat' the rank, 4, must divide its inputs and outputs, 8 and 6"):
        get_peft_model(network, config("bat", r=4))
    with pytest.raises(ConfigError, match="mlp.0: mini_r, 4, must divide .*; turned: no 'mini' beside a weight that"):
        get_peft_model(network, config("mini", mini_r=4, target_modules=TARGETS))
    with pytest.raises(ConfigError, match="of a type that cannot carry it: .'embed .Embedding.', 'conv .Conv2d"):
        get_peft_model(network, config(target_modules=["embed", "query", "conv"]))
    assert not [param.name for param in network.get_parameters() if "mindpet" in param.name]


def block_of(layer):
    return getattr(layer.mindpet_delta, BLOCK).asnumpy()


@EVERY
def test_a_network_with_layers_of_several_sizes(variant, mode, rng, tmp_path):
    chosen = config(variant, miss_dropout=0.1)

    def look(network):
        weight = network.mlp[0].weight.asnumpy()
        found = {"mlp.0": weight + change(weight, block_of(network.mlp[0]))}
        if "turned" in chosen.target_modules:
            table = network.turned.table.asnumpy()
            found["turned"] = table + change(table.T, block_of(network.turned)).T
        return found

    merged, expected = check_life(chosen, ids(rng), tmp_path, 0.1, look)
    np.testing.assert_allclose(merged.mlp[0].weight.asnumpy(), expected["mlp.0"], atol=1e-6)
    if "turned" in chosen.target_modules:
        np.testing.assert_allclose(merged.turned.table.asnumpy(), expected["turned"], atol=1e-6)


def test_bat_follows_another_base(mode, rng):
    check_follows(config("bat"), ids(rng))


@pytest.mark.parametrize("variant", ["padded", "mini", "bat"])
def test_a_step_moves_the_block_and_the_biases_alone(variant, mode, rng):
    model, x = get_peft_model(Small(), config(variant, miss_dropout=0.1, bias="miss_only")), ids(rng)
    move(model, 1)
    before = {param.name: param.asnumpy().copy() for param in model.get_parameters()}

    def loss(x):
        return (model(x) ** 2).mean()

    optimizer = nn.SGD(model.trainable_params(), 0.5)
    optimizer(ms.value_and_grad(loss, None, optimizer.parameters)(x)[1])
    moved = {name for name, param in model.parameters_dict().items() if np.any(param.asnumpy() != before[name])}
    assert moved == {param.name for param in model.trainable_params()}
    biases = {"query.mindpet_trained_bias", "mlp.0.mindpet_trained_bias", "turned.mindpet_trained_shift"}
    is_turned = "turned" in config(variant).target_modules
    assert {name for name in moved if BLOCK not in name} == (biases if is_turned else biases - {max(biases)})


@pytest.mark.parametrize("variant", ["padded", "mini", "bat"])
def test_files_without_a_network(variant, rng, tmp_path):
    network, x = Small(), ids(rng)
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    own = config(variant, target_modules=["query", "mlp.0", "shared"])
    model = get_peft_model(network, own)
    move(model, 1)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path / "adapter")
    assert "fan_in_fan_out" not in (tmp_path / "adapter/adapter_config.json").read_text()
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    convert(tmp_path / "adapter", tmp_path / "delta.safetensors")
    for param in model.trainable_params():
        param.set_data(Tensor(np.zeros(param.shape, np.float32)))
    load_delta(network, tmp_path / "delta.safetensors")
    same(numbers(model, x), tuned)
    convert(tmp_path / "delta.safetensors", tmp_path / "back", own)
    back, there = (TensorFile(tmp_path / name / TENSORS).read_all() for name in ("back", "adapter"))
    assert set(back) == set(there)
    for key, value in back.items():
        np.testing.assert_array_equal(value, there[key])
    with pytest.raises(CheckpointError, match="query.miss_block: .* is needed"):
        convert(tmp_path / "delta.safetensors", tmp_path / "wrong", config(r=7))
    merged = TensorFile(tmp_path / "merged.safetensors").read_all()
    for path, param in model.merge_and_unload().parameters_and_names():
        np.testing.assert_allclose(merged[path], param.asnumpy(), atol=1e-6, err_msg=path)


@pytest.mark.parametrize("variant", ["padded", "bat"])
def test_files_of_a_base_that_is_turned(variant, rng, tmp_path):
    """The shapes tell of weights that are not square, else `fan_in_fan_out` of the configuration."""
    network = Small()
    weights = {"mlp.0.weight": np.ascontiguousarray(network.mlp[0].weight.asnumpy().T)}
    weights["query.weight"] = np.ascontiguousarray(network.query.weight.asnumpy().T)
    for targets, fields in ((["query", "mlp.0"], {}), (["query"], {"fan_in_fan_out": True})):
        model = get_peft_model(network, config(variant, target_modules=targets, **fields))
        move(model, 1)
        folder = tmp_path / f"{len(targets)}"
        model.save_pretrained(folder / "adapter")
        ms.save_checkpoint(
            [{"name": name, "data": Tensor(value)} for name, value in weights.items()],
            str(folder / "base.safetensors"),
            format="safetensors",
        )
        merge(folder / "base.safetensors", folder / "adapter", folder / "merged.safetensors", force=True)
        merged = TensorFile(folder / "merged.safetensors").read_all()
        own = getattr(network.query.mindpet_delta, BLOCK).asnumpy()
        weight = model.unload().query.weight.asnumpy()
        np.testing.assert_allclose(merged["query.weight"], (weight + change(weight, own)).T, atol=1e-6)


def test_a_file_that_says_mini_r_for_nothing_is_read(rng, tmp_path):
    network, x = Small(), ids(rng)
    model = get_peft_model(network, config())
    move(model, 1)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path)
    model.unload()
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"mini_r": 1', '"mini_r": 5'))
    same(numbers(PeftModel.from_pretrained(network, tmp_path, force=True), x), tuned)


def test_adapters_in_one_batch(mode, rng):
    network, x = Small(), ids(rng, 6)
    expected = {"__base__": numbers(network, x)}
    model = get_peft_model(network, config(), "one")
    for variant in ("padded", "mini", "bat"):
        model.add_adapter(variant, config(variant))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "turned", "embed"]))
    for seed, name in enumerate(("one", "padded", "mini", "bat", "lora")):
        model.set_adapter(name)
        move(model, seed)
        expected[name] = numbers(model, x)
    names = ["padded", "lora", "__base__", "bat", "one", "mini"]
    got = model(x, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)


@pytest.mark.parametrize("variant", ["mini", "bat"])
def test_adapters_of_one_shape_take_turns_without_a_new_graph(variant, mode, rng, tmp_path):
    check_turns(config(variant), config(variant), ids(rng), tmp_path)


def test_blocks_of_one_shape_and_another_meaning_do_not_share_a_slot(rng, tmp_path):
    """A block of 8 columns is that of 'mini' of 16 outputs, and of 8 outputs."""
    network, x = nn.SequentialCell(nn.Dense(16, 16)), Tensor(rng.normal(size=(3, 16)).astype(np.float32))
    expected = {}
    for name, fields in {"two": {"mini_r": 8}, "one": {"mini_r": 16}}.items():
        model = get_peft_model(network, MissConfig(r=4, init_weights="mini", target_modules=["0"], **fields))
        move(model, 1)
        expected[name] = numbers(model, x)
        model.save_pretrained(tmp_path / name)
        model.unload()
    model = PeftModel.from_pretrained(network, tmp_path / "two", "two")
    model.load_adapter(tmp_path / "one", "one")
    for name in ("two", "one", "two"):
        model.set_adapter(name)
        same(numbers(model, x), expected[name])


@pytest.mark.parametrize("variant", ["plain", "bat"])
def test_a_weight_in_common_with_another_layer(variant, mode, rng):
    check_tied(config(variant, target_modules=["head"]), ids(rng))
    network, x = Tied(), ids(rng)
    model = get_peft_model(network, config(variant, target_modules=["head"]))
    move(model, 1)
    table, block = network.head.weight.asnumpy(), network.head.mindpet_delta.mindpet_delta_miss.asnumpy()
    np.testing.assert_allclose(numbers(model, x), table[x.asnumpy()] @ (table + change(table, block)).T, atol=1e-5)


@pytest.mark.parametrize("variant", ["padded", "mini", "bat"])
def test_layers_of_half_precision(variant, mode, rng):
    network = nn.SequentialCell(nn.Dense(8, 6, dtype=ms.float16))
    model = get_peft_model(network, config(variant, target_modules=["0"]))
    x = Tensor(rng.normal(size=(3, 8)).astype(np.float16))
    move(model, 1)
    assert model(x).dtype == ms.float16
    assert {param.dtype for param in model.trainable_params()} == {ms.float32}
    merged = numbers(model, x)
    np.testing.assert_allclose(numbers(model.merge_and_unload(), x), merged, atol=2e-2)

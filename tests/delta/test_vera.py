"""VeRA: hand-made layers, deltas in a network, files and merging."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import Small, check_tied, check_turns, contents, ids, move, numbers, same

from mindpet.delta import VeraDense
from mindpet.errors import CheckpointError, ConfigError, MergeError
from mindpet.files.adapter import save_adapter
from mindpet.files.convert import convert, read_delta
from mindpet.files.merge import merge
from mindpet.files.names import NameMap, to_torch
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import freeze_delta, load_delta
from mindpet.graph.ckpt_util import saved_parameters
from mindpet.peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model

TARGETS = ["query", "mlp.0", "turned", "shared"]  # mlp.0 has 6 outputs of 8 inputs, the others 8 of 8
LAMBDA_B, LAMBDA_D = "mindpet_delta_vera_lambda_b", "mindpet_delta_vera_lambda_d"
KEYS = ["base_model.vera_A", "base_model.vera_B"]
TENSORS = "adapter_model.safetensors"


def config(**fields):
    return VeraConfig(**{"r": 4, "d_initial": 0.5, "target_modules": TARGETS, **fields})


def vectors(rng, delta):
    """Give a delta other vectors; returns A and B as this layer has them, and the vectors."""
    for name in (LAMBDA_B, LAMBDA_D):
        param = getattr(delta, name)
        param.set_data(Tensor(rng.normal(size=param.shape).astype(np.float32)))
    a, b = delta.mindpet_vera_a.asnumpy()[:, : delta.ins], delta.mindpet_vera_b.asnumpy()[: delta.outs]
    return a.copy(), b.copy(), getattr(delta, LAMBDA_B).asnumpy().copy(), getattr(delta, LAMBDA_D).asnumpy().copy()


def test_the_layer_is_that_of_the_formula(mode, rng):
    cell = VeraDense(4, 6, 3, activation="relu", compute_dtype=ms.float32, bias_init="ones")
    a, b, lambda_b, lambda_d = vectors(rng, cell)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    weight, bias = cell.weight.asnumpy(), cell.bias.asnumpy()
    inner = x @ weight.T + bias + lambda_b * (lambda_d * (x @ a.T) @ b.T)
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), np.maximum(inner, 0), atol=1e-5)
    expected = weight + np.diag(lambda_b) @ b @ np.diag(lambda_d) @ a
    np.testing.assert_allclose(cell.merged_weight().asnumpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(cell.merged_bias().asnumpy(), bias)
    getattr(cell, LAMBDA_B).set_data(Tensor(np.full(6, np.nan, np.float32)))
    cell.reset()
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), np.maximum(x @ weight.T + bias, 0), atol=1e-6)


def test_names_shapes_and_values_of_a_fresh_layer():
    cell = VeraDense(4, 6, 3, d_initial=0.25)
    assert [(p.name, p.shape, p.requires_grad) for p in cell.get_parameters()] == [
        ("weight", (6, 4), True),
        ("bias", (6,), True),
        ("mindpet_vera_a", (3, 4), False),
        ("mindpet_vera_b", (6, 3), False),
        (LAMBDA_B, (6,), True),
        (LAMBDA_D, (3,), True),
    ]
    assert not getattr(cell, LAMBDA_B).asnumpy().any() and (getattr(cell, LAMBDA_D).asnumpy() == 0.25).all()
    large, same_seed, other = VeraDense(64, 64, 32), VeraDense(64, 64, 32), VeraDense(64, 64, 32, seed=1)
    for name, size in (("mindpet_vera_a", 64), ("mindpet_vera_b", 32)):
        value = getattr(large, name).asnumpy()
        assert np.abs(value).max() <= np.sqrt(6 / size) < 1.02 * np.abs(value).max()  # Kaiming uniform
        np.testing.assert_array_equal(value, getattr(same_seed, name).asnumpy())
        assert np.abs(value - getattr(other, name).asnumpy()).max() > 0.1


def test_dropout_acts_on_the_delta_while_training():
    cell = VeraDense(64, 4, 8, vera_dropout=0.5, compute_dtype=ms.float32, weight_init="zeros")
    getattr(cell, LAMBDA_B).set_data(Tensor(np.ones(4, np.float32)))
    x = Tensor(np.ones((1, 64), np.float32))
    still = cell.set_train(False)(x).asnumpy()
    np.testing.assert_array_equal(cell(x).asnumpy(), still)
    assert np.abs(cell.set_train()(x).asnumpy() - still).max() > 1e-3


def test_wrong_arguments_are_all_told():
    with pytest.raises(
        ValueError, match="'vera_rank' .* got 0.*'vera_dropout' .* got 1.0.*'d_initial' .*'seed' .* got"
    ):
        VeraDense(4, 6, 0, vera_dropout=1.0, d_initial=0, seed="a")
    small = VeraDense(4, 6, 2)
    with pytest.raises(ValueError, match=r"'shared' must be of rank 2, and at least as large as \(5, 6\), but got"):
        VeraDense(5, 6, 2, shared=small)
    with pytest.raises(TypeError, match="'shared' must be a VeraDense or None"):
        VeraDense(5, 6, 2, shared=nn.Dense(5, 6))


class Pair(nn.Cell):
    """Two layers that share the matrices of the second, which is the larger one."""

    def __init__(self, is_shared=True):
        super().__init__()
        large = VeraDense(6, 8, 3, compute_dtype=ms.float32)
        self.small = VeraDense(4, 6, 3, compute_dtype=ms.float32, shared=large if is_shared else None)
        self.large = large

    def construct(self, x):
        return self.large(self.small(x))


class Plain(nn.Cell):
    """The same without deltas."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Dense(4, 6), nn.Dense(6, 8)

    def construct(self, x):
        return self.large(self.small(x))


def test_hand_made_layers_share_their_matrices(mode, rng, tmp_path):
    network = Pair()
    freeze_delta(network, "vera")
    names = [f"{layer}.{name}" for layer in ("small", "large") for name in (LAMBDA_B, LAMBDA_D)]
    assert [param.name for param in network.trainable_params()] == names
    assert network.small.mindpet_vera_a is network.large.mindpet_vera_a
    vectors(rng, network.small), vectors(rng, network.large)
    x = rng.normal(size=(5, 4)).astype(np.float32)
    expected = x
    for cell in (network.small, network.large):
        expected = expected @ cell.merged_weight().asnumpy().T + cell.merged_bias().asnumpy()
    np.testing.assert_allclose(numbers(network, Tensor(x)), expected, atol=1e-5)

    saved = saved_parameters(network)
    assert len(saved) == 6
    ms.save_checkpoint([{"name": name, "data": param} for name, param in saved.items()], f"{tmp_path}/d.ckpt")
    again = Pair()
    freeze_delta(again, "vera")
    base = {name: param for name, param in network.parameters_dict().items() if "vera" not in name}
    ms.load_param_into_net(again, base)
    again.large.mindpet_vera_a.set_data(Tensor(np.zeros((3, 6), np.float32)))
    load_delta(again, tmp_path / "d.ckpt")
    np.testing.assert_array_equal(numbers(again, Tensor(x)), numbers(network, Tensor(x)))

    convert(tmp_path / "d.ckpt", tmp_path / "adapter", VeraConfig(r=3))
    file = TensorFile(tmp_path / "adapter" / TENSORS)
    assert [file.shapes[key] for key in KEYS] == [(3, 6), (8, 3)] and len(file.shapes) == 6
    plain = Plain()
    ms.load_param_into_net(plain, base)
    same(numbers(PeftModel.from_pretrained(plain, tmp_path / "adapter"), Tensor(x)), numbers(network, Tensor(x)))
    convert(tmp_path / "adapter", tmp_path / "back.safetensors")
    load_delta(again, tmp_path / "back.safetensors")
    np.testing.assert_array_equal(numbers(again, Tensor(x)), numbers(network, Tensor(x)))


def test_hand_made_layers_with_matrices_of_their_own_make_no_adapter(tmp_path):
    network = Pair(is_shared=False)
    freeze_delta(network, "vera")
    saved = saved_parameters(network)
    assert len(saved) == 8
    ms.save_checkpoint([{"name": name, "data": param} for name, param in saved.items()], f"{tmp_path}/d.ckpt")
    with pytest.raises(CheckpointError, match="share one tensor, but these differ: .*small.mindpet_vera_a.*large"):
        convert(tmp_path / "d.ckpt", tmp_path / "adapter", VeraConfig(r=3))
    with pytest.raises(CheckpointError, match="keys that mean the same parameter"):
        load_delta(Pair(), tmp_path / "d.ckpt")


def test_a_network_with_layers_of_several_sizes(mode, rng, tmp_path):
    network, x = Small(), ids(rng)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, config())
    same(numbers(model, x), base)
    shapes = {param.name: param.shape for param in network.get_parameters() if "mindpet" in param.name}
    assert {name: shape for name, shape in shapes.items() if "mindpet_vera" in name} == {
        "query.mindpet_vera_a": (4, 8),
        "query.mindpet_vera_b": (8, 4),
    }
    assert len(model.trainable_params()) == 2 * len(TARGETS) == len(shapes) - 2
    move(model, 1)
    tuned = numbers(model, x)
    assert np.abs(tuned - base).max() > 0.1
    a, b, lambda_b, lambda_d = vectors(rng, network.mlp[0].mindpet_delta)
    tuned = numbers(model, x)
    kept = model.query.mindpet_delta.mindpet_vera_a.asnumpy().copy()
    with model.disable_adapter():
        same(numbers(model, x), base)
    np.testing.assert_array_equal(model.query.mindpet_delta.mindpet_vera_a.asnumpy(), kept)
    twin = copy.deepcopy(model)
    assert twin.query.mindpet_delta.mindpet_vera_a is twin.turned.mindpet_delta.mindpet_vera_a
    assert twin.query.mindpet_delta.mindpet_vera_a is not model.query.mindpet_delta.mindpet_vera_a
    same(numbers(twin, x), tuned)
    model.save_pretrained(tmp_path)
    file = TensorFile(tmp_path / TENSORS)
    assert [file.shapes[key] for key in KEYS] == [(4, 8), (8, 4)] and len(file.shapes) == 2 + 2 * len(TARGETS)
    weight = network.mlp[0].weight.asnumpy().copy()
    assert contents(model.unload()) == before
    again = PeftModel.from_pretrained(network, tmp_path)
    same(numbers(again, x), tuned)
    again.merge_adapter()
    np.testing.assert_allclose(numbers(again, x), tuned, atol=1e-5)
    again.unmerge_adapter()
    same(numbers(again, x), tuned)
    merged = again.merge_and_unload()
    np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-5)
    expected = weight + np.diag(lambda_b) @ b @ np.diag(lambda_d) @ a
    np.testing.assert_allclose(merged.mlp[0].weight.asnumpy(), expected, atol=1e-5)
    same(numbers(twin, x), tuned)


def test_infinite_matrices_that_were_forced_in_leave_the_base_exact(mode, rng, tmp_path):
    network, x = Small(), ids(rng)
    base = numbers(network, x)
    model = get_peft_model(network, config())
    tensors = {**model.adapter_tensors("default"), KEYS[0]: np.full((4, 8), np.nan, np.float32)}
    model.unload()
    save_adapter(tmp_path, config(), tensors, {})
    model = PeftModel.from_pretrained(network, tmp_path, force=True)
    assert np.isnan(numbers(model, x)).any()
    with model.disable_adapter():
        same(numbers(model, x), base)
    assert np.isnan(numbers(model, x)).any()


def test_a_step_moves_the_vectors_and_not_the_matrices(mode, rng):
    model, x = get_peft_model(Small(), config(vera_dropout=0.1, bias="vera_only")), ids(rng)
    move(model, 1)
    before = {param.name: param.asnumpy().copy() for param in model.get_parameters()}

    def loss(x):
        return (model(x) ** 2).mean()

    optimizer = nn.SGD(model.trainable_params(), 0.5)
    optimizer(ms.value_and_grad(loss, None, optimizer.parameters)(x)[1])
    moved = {name for name, param in model.parameters_dict().items() if np.any(param.asnumpy() != before[name])}
    assert moved == {param.name for param in model.trainable_params()}
    assert {name for name in moved if "vera" not in name} == {
        "query.mindpet_trained_bias",
        "mlp.0.mindpet_trained_bias",
        "turned.mindpet_trained_shift",
    }


def test_merging_files_gives_the_merged_network(rng, tmp_path):
    network = Small()
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    model = get_peft_model(network, config(target_modules=["query", "mlp.0", "shared"], bias="vera_only"))
    move(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = TensorFile(tmp_path / "merged.safetensors").read_all()
    for path, param in model.merge_and_unload().parameters_and_names():
        np.testing.assert_allclose(merged[path], param.asnumpy(), atol=1e-6, err_msg=path)


def damaged(tmp_path, change):
    """The folder of an adapter whose tensors were changed, and a file of its base."""
    network = Plain()
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    tensors = get_peft_model(network, VeraConfig(r=3, target_modules=["small", "large"])).adapter_tensors("default")
    change(tensors)
    save_adapter(tmp_path / "adapter", VeraConfig(r=3, target_modules=["small", "large"]), tensors, {})
    return tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors"


DAMAGES = {
    "missing": (lambda tensors: tensors.pop(KEYS[0]), r"missing: base_model.vera_A \[3, 'in'\]"),
    "rank": (lambda tensors: tensors.update({KEYS[0]: np.zeros((2, 6), np.float32)}), r"vera_A: \[3, 6\] is needed"),
    "short": (lambda tensors: tensors.update({KEYS[1]: np.zeros((7, 3), np.float32)}), r"vera_B: \[8, 3\] is needed"),
    "axes": (lambda tensors: tensors.update({KEYS[1]: np.zeros(8, np.float32)}), r"vera_B: \[8, 3\] is needed"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_matrices_that_do_not_fit_are_refused(damage, tmp_path):
    change, message = DAMAGES[damage]
    base, adapter, out = damaged(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        merge(base, adapter, out)
    with pytest.raises(CheckpointError, match=message):
        convert(adapter, tmp_path / "d.safetensors")
    assert not out.exists()
    network = Plain()
    with pytest.raises(CheckpointError, match="vera_"):
        PeftModel.from_pretrained(network, adapter)
    assert len(network.trainable_params()) == 4


def test_a_base_that_is_larger_than_the_matrices_is_refused(tmp_path):
    base, adapter, out = damaged(tmp_path, lambda tensors: tensors.update({KEYS[0]: np.zeros((3, 5), np.float32)}))
    with pytest.raises(MergeError, match=r"large.weight: \[8, 6\] in the base, but the adapter has .*vera_a \[3, 5\]"):
        merge(base, adapter, out)
    assert not out.exists()


def test_other_names_for_the_layers(rng, tmp_path):
    def there(name):
        return to_torch(name.replace("mlp.0", "ffn.wi").replace("query", "mha.q"))

    def here(name):
        return name.replace("ffn.wi", "mlp.0").replace("mha.q", "query")

    names, x = NameMap(there, here), ids(rng)
    ms.set_seed(1)
    network = Small()
    model = get_peft_model(network, config(target_modules=["query", "mlp.0"]), name_map=names)
    move(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    assert VeraConfig.from_pretrained(tmp_path / "adapter").target_modules == ["ffn.wi", "mha.q"]
    assert set(KEYS) < set(TensorFile(tmp_path / "adapter" / TENSORS).shapes)
    expected = numbers(model, x)
    # Of a file the first layer has the matrices, whichever that is in the network.
    convert(tmp_path / "adapter", tmp_path / "delta.safetensors", name_map=names)
    assert {"mlp.0.mindpet_vera_a", "query.mindpet_vera_a"} & set(read_delta(tmp_path / "delta.safetensors"))
    renamed = {
        name.replace("query.mindpet_vera", "mlp.0.mindpet_vera"): value
        for name, value in read_delta(tmp_path / "delta.safetensors").items()
    }
    save_tensors(tmp_path / "renamed.safetensors", renamed)
    for file in ("delta", "renamed"):
        for param in model.network.get_parameters():
            if "vera" in param.name:
                param.set_data(Tensor(np.zeros(param.shape, np.float32)))
        load_delta(network, tmp_path / f"{file}.safetensors")
        same(numbers(model, x), expected)


def test_adapters_in_one_batch(mode, rng):
    network, x = Small(), ids(rng, 5)
    base = numbers(network, x)
    model = get_peft_model(network, config(), "one")
    model.add_adapter("two", config(target_modules=["query", "mlp.0"], projection_prng_key=5))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "turned", "embed"]))
    model.add_adapter("ia3", IA3Config(target_modules=["mlp.0"], feedforward_modules=["mlp.0"]))
    expected = {"__base__": base}
    for seed, name in enumerate(("one", "two", "lora", "ia3")):
        model.set_adapter(name)
        move(model, seed)
        expected[name] = numbers(model, x)
    names = ["two", "lora", "__base__", "ia3", "one"]
    got = model(x, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)


def test_adapters_of_one_shape_take_turns_without_a_new_graph(mode, rng, tmp_path):
    check_turns(config(projection_prng_key=0), config(projection_prng_key=1), ids(rng), tmp_path)


def test_a_weight_in_common_with_another_layer(mode, rng):
    check_tied(config(target_modules=["head"]), ids(rng))


def test_layers_that_are_not_linear_are_refused():
    with pytest.raises(ConfigError, match="of a type that cannot carry it: .'embed .Embedding.', 'conv .Conv2d"):
        get_peft_model(Small(), config(target_modules=["embed", "query", "conv"]))


def test_layers_of_half_precision(mode, rng):
    network = nn.SequentialCell(nn.Dense(4, 6, dtype=ms.float16))
    model = get_peft_model(network, config(target_modules=["0"]))
    x = Tensor(rng.normal(size=(3, 4)).astype(np.float16))
    move(model, 1)
    assert model(x).dtype == ms.float16
    assert {param.dtype for param in model.trainable_params()} == {ms.float32}
    merged = model(x).asnumpy()
    np.testing.assert_allclose(model.merge_and_unload()(x).asnumpy(), merged, atol=2e-2)

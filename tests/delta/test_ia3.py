"""IA3: hand-made layers, deltas in a network, files and merging."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from small import Small, check_tied, check_turns, contents, ids, move, numbers, same

from mindpet.delta import IA3Dense
from mindpet.errors import CheckpointError, ConfigError, MergeError, NoMatchError
from mindpet.files.convert import convert, read_delta
from mindpet.files.merge import merge
from mindpet.files.names import NameMap, to_torch
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import freeze_delta, load_delta
from mindpet.network.kinds import register_layer
from mindpet.peft import IA3Config, LoraConfig, PeftModel, get_peft_model

TARGETS = ["query", "mlp.0", "turned", "shared", "conv"]
INNER = ["mlp.0", "turned", "conv"]
SHAPES = {"query": (8, 1), "mlp.0": (1, 8), "turned": (1, 8), "blocks.0.shared": (8, 1), "conv": (1, 1, 1, 1)}
FACTOR = "mindpet_delta_ia3"


def config(**fields):
    return IA3Config(**{"target_modules": TARGETS, "feedforward_modules": INNER, **fields})


def factors(rng, cell):
    """Give a layer other factors; returns them as a vector."""
    value = rng.normal(size=cell.mindpet_delta_ia3.shape).astype(np.float32)
    cell.mindpet_delta_ia3.set_data(Tensor(value))
    return value.ravel()


@pytest.mark.parametrize("feedforward", [False, True])
def test_the_layer_is_that_of_the_formula(feedforward, mode, rng):
    cell = IA3Dense(4, 6, feedforward, activation="relu", compute_dtype=ms.float32, bias_init="ones")
    factor, x = factors(rng, cell), rng.normal(size=(2, 3, 4)).astype(np.float32)
    weight, bias = cell.weight.asnumpy(), cell.bias.asnumpy()
    inner = (factor * x) @ weight.T + bias if feedforward else factor * (x @ weight.T + bias)
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), np.maximum(inner, 0), atol=1e-6)
    expected = weight * factor if feedforward else weight * factor[:, None]
    np.testing.assert_allclose(cell.merged_weight().asnumpy(), expected, atol=1e-6)
    np.testing.assert_allclose(cell.merged_bias().asnumpy(), bias if feedforward else bias * factor, atol=1e-6)
    cell.mindpet_delta_ia3.set_data(Tensor(np.full(cell.mindpet_delta_ia3.shape, np.nan, np.float32)))
    cell.reset()
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), np.maximum(x @ weight.T + bias, 0), atol=1e-6)


def test_names_and_shapes_of_the_layer():
    assert [(p.name, p.shape) for p in IA3Dense(4, 6).get_parameters()] == [
        ("weight", (6, 4)),
        ("bias", (6,)),
        (FACTOR, (6, 1)),
    ]
    assert nn.SequentialCell(IA3Dense(4, 6, True)).parameters_dict()[f"0.{FACTOR}"].shape == (1, 4)
    assert IA3Dense(4, 6, has_bias=False).merged_bias() is None


def test_wrong_arguments_are_all_told():
    with pytest.raises(
        TypeError, match="'feedforward' must be a bool, but got 1.*'in_channels' must be .* but got 1.5"
    ):
        IA3Dense(1.5, 6, feedforward=1)


@pytest.mark.parametrize("feedforward", [False, True])
def test_freezing_training_and_files_of_a_hand_made_network(feedforward, mode, rng, tmp_path):
    def build():
        return nn.SequentialCell(IA3Dense(4, 3, feedforward, compute_dtype=ms.float32))

    network = build()
    freeze_delta(network, "ia3")
    assert [param.name for param in network.trainable_params()] == [f"0.{FACTOR}"]
    x = rng.normal(size=(5, 4)).astype(np.float32)

    def total(x):
        return network(x).sum()

    gradient = ms.grad(total, None, network.trainable_params())(Tensor(x))[0].asnumpy()
    weight = network[0].weight.asnumpy()
    expected = (weight.sum(0) * x.sum(0))[None] if feedforward else (x @ weight.T).sum(0)[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    factors(rng, network[0])
    ms.save_checkpoint([{"name": p.name, "data": p} for p in network.trainable_params()], f"{tmp_path}/d.ckpt")
    convert(tmp_path / "d.ckpt", tmp_path / "adapter", IA3Config(feedforward_modules=["0"] if feedforward else None))
    convert(tmp_path / "adapter", tmp_path / "back.safetensors")
    again = build()
    ms.load_param_into_net(again, {name: p for name, p in network.parameters_dict().items() if FACTOR not in name})
    load_delta(again, tmp_path / "back.safetensors")
    np.testing.assert_array_equal(numbers(again, Tensor(x)), numbers(network, Tensor(x)))
    plain = nn.SequentialCell(nn.Dense(4, 3, weight_init=network[0].weight, bias_init=network[0].bias))
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    same(numbers(model, Tensor(x)), numbers(network, Tensor(x)))
    with pytest.raises(CheckpointError, match=r"0.ia3_l: \[.*\] is needed, but it is \["):
        convert(tmp_path / "d.ckpt", tmp_path / "no", IA3Config(feedforward_modules=None if feedforward else ["0"]))


def test_a_network_of_every_kind_of_layer(mode, rng, tmp_path):
    network, x = Small(), ids(rng)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, config())
    same(numbers(model, x), base)
    found = {path[: -len(FACTOR) - 1]: param.shape for path, param in network.parameters_and_names() if FACTOR in path}
    assert {p.name: p.shape for p in model.trainable_params()} == {f"{k}.{FACTOR}": v for k, v in SHAPES.items()}
    assert len(found) == len(SHAPES)
    move(model, 1)
    tuned = numbers(model, x)
    assert np.abs(tuned - base).max() > 0.1
    model.query.mindpet_delta.mindpet_delta_ia3.set_data(Tensor(np.full((8, 1), np.nan, np.float32)))
    with model.disable_adapter():
        same(numbers(model, x), base)
    move(model, 1)
    model.query.mindpet_delta.mindpet_delta_ia3.set_data(Tensor(np.full((8, 1), 2, np.float32)))
    tuned = numbers(model, x)
    twin = copy.deepcopy(model)
    same(numbers(twin, x), tuned)
    model.save_pretrained(tmp_path)
    file = TensorFile(tmp_path / "adapter_model.safetensors")
    assert file.shapes == {f"base_model.model.{path}.ia3_l": shape for path, shape in SHAPES.items()}
    assert contents(model.unload()) == before
    again = PeftModel.from_pretrained(network, tmp_path)
    same(numbers(again, x), tuned)
    again.merge_adapter()
    np.testing.assert_allclose(numbers(again, x), tuned, atol=1e-5)
    again.unmerge_adapter()
    same(numbers(again, x), tuned)
    merged = again.merge_and_unload()
    np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-5)
    same(numbers(twin, x), tuned)
    assert [(name, shape) for name, shape in ((p.name, p.shape) for p in merged.get_parameters())] == [
        (p.name, p.shape) for p in Small().get_parameters()
    ]


LAYERS = {
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), pad_mode="valid", has_bias=True),
    "conv2d in groups": lambda: nn.Conv2d(4, 6, 3, group=2, has_bias=True),
    "conv3d": lambda: nn.Conv3d(4, 6, (2, 1, 2), has_bias=True),
}


@pytest.mark.parametrize("inner", [None, ["0"]], ids=["behind", "before"])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_convolutions(layer, inner, mode, rng, tmp_path):
    network = nn.SequentialCell(LAYERS[layer]())
    cell = network[0]
    if "groups" in layer and inner:
        with pytest.raises(ConfigError, match="0: no factors before a convolution in groups"):
            get_peft_model(network, IA3Config(target_modules=["0"], feedforward_modules=inner))
        return
    axes = cell.weight.ndim - 2
    x = rng.normal(size=(2, 4, *(5, 6, 4)[:axes])).astype(np.float32)
    weight, bias = cell.weight.asnumpy().copy(), cell.bias.asnumpy().copy()
    model = get_peft_model(network, IA3Config(target_modules=["0"], feedforward_modules=inner))
    factor = factors(rng, cell.mindpet_delta)
    assert cell.mindpet_delta.mindpet_delta_ia3.shape == (1, 4 if inner else 6, *(1,) * axes)
    got = numbers(model, Tensor(x))
    base = LAYERS[layer]()
    along = (-1, *(1,) * axes)
    base.weight.set_data(Tensor(weight * (factor.reshape(along) if inner else factor.reshape(-1, 1, *along[1:]))))
    base.bias.set_data(Tensor(bias if inner else bias * factor))
    np.testing.assert_allclose(got, numbers(base, Tensor(x)), atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    save_tensors(tmp_path / "base.safetensors", {"0.weight": weight, "0.bias": bias})
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged, files = model.merge_and_unload(), TensorFile(tmp_path / "merged.safetensors").read_all()
    for name in ("weight", "bias"):
        np.testing.assert_allclose(getattr(merged[0], name).asnumpy(), getattr(base, name).asnumpy(), atol=1e-6)
        np.testing.assert_allclose(files[f"0.{name}"], getattr(base, name).asnumpy(), atol=1e-6)


def test_files_of_another_base_are_refused(rng, tmp_path):
    network = nn.SequentialCell(LAYERS["conv2d"]())
    get_peft_model(network, IA3Config(target_modules=["0"], feedforward_modules=["0"])).save_pretrained(tmp_path / "a")
    save_tensors(tmp_path / "base.safetensors", {"0.weight": np.zeros((6, 8, 3, 2), np.float32)})
    with pytest.raises(MergeError, match=r"0.weight: \[6, 8, 3, 2\] in the base, but the adapter has .*\[1, 4, 1, 1\]"):
        merge(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out.safetensors", force=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_merging_files_gives_the_merged_network(rng, tmp_path):
    network = Small()
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    targets = [name for name in TARGETS if name != "turned"]
    model = get_peft_model(network, config(target_modules=targets, feedforward_modules=["mlp.0", "conv"]))
    move(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = TensorFile(tmp_path / "merged.safetensors").read_all()
    for path, param in model.merge_and_unload().parameters_and_names():
        np.testing.assert_allclose(merged[path], param.asnumpy(), atol=1e-6, err_msg=path)


def test_other_names_for_the_layers(rng, tmp_path):
    def there(name):
        return to_torch(name.replace("mlp.0", "ffn.wi").replace("query", "mha.q"))

    def here(name):
        return name.replace("ffn.wi", "mlp.0").replace("mha.q", "query")

    names, x = NameMap(there, here), ids(rng)
    ms.set_seed(1)
    model = get_peft_model(
        Small(), config(target_modules=["query", "mlp.0"], feedforward_modules=["mlp.0"]), name_map=names
    )
    move(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    written = IA3Config.from_pretrained(tmp_path / "adapter")
    assert written.target_modules == ["ffn.wi", "mha.q"] and written.feedforward_modules == r"(?:ffn\.wi)"
    assert set(TensorFile(tmp_path / "adapter/adapter_model.safetensors").shapes) == {
        "base_model.model.ffn.wi.ia3_l",
        "base_model.model.mha.q.ia3_l",
    }
    ms.set_seed(1)
    again = PeftModel.from_pretrained(Small(), tmp_path / "adapter", name_map=names)
    same(numbers(again, x), numbers(model, x))
    convert(tmp_path / "adapter", tmp_path / "delta.safetensors", name_map=names)
    assert set(read_delta(tmp_path / "delta.safetensors")) == {f"query.{FACTOR}", f"mlp.0.{FACTOR}"}


def test_adapters_in_one_batch(mode, rng):
    network, x = Small(), ids(rng, 5)
    base = numbers(network, x)
    model = get_peft_model(network, config(), "inner")
    move(model, 1)
    model.add_adapter("outer", config(target_modules=["query", "mlp.0"], feedforward_modules=None))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "turned", "embed"]))
    expected = {"__base__": base, "inner": numbers(model, x)}
    for seed, name in enumerate(("outer", "lora")):
        model.set_adapter(name)
        move(model, seed)
        expected[name] = numbers(model, x)
    names = ["inner", "lora", "__base__", "outer", "inner"]
    got = model(x, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)


def test_adapters_of_one_shape_take_turns_without_a_new_graph(mode, rng, tmp_path):
    check_turns(config(), config(), ids(rng), tmp_path)


def test_a_weight_in_common_with_another_layer(mode, rng):
    check_tied(IA3Config(target_modules=["head"]), ids(rng))


class Beside(nn.Cell):
    """A linear layer that returns its bias beside its output, for the caller to add."""

    def __init__(self):
        super().__init__()
        self.weight = ms.Parameter(Tensor(np.ones((4, 4), np.float32)), name="weight")
        self.bias = ms.Parameter(Tensor(np.ones(4, np.float32)), name="bias")

    def construct(self, x):
        return ops.matmul(x, self.weight.T), self.bias


register_layer(Beside, adds_bias=False)


def test_a_bias_that_the_caller_adds_cannot_be_multiplied():
    network = nn.SequentialCell(Beside())
    with pytest.raises(ConfigError, match="0: no factors on an output without its bias, which would not be multiplied"):
        get_peft_model(network, IA3Config(target_modules=["0"]))
    get_peft_model(network, IA3Config(target_modules=["0"], feedforward_modules=["0"]))


def test_feedforward_modules_that_are_no_targets():
    with pytest.raises(ValueError, match=r"'feedforward_modules' must be among the target_modules, but got \['fc'\]"):
        IA3Config(target_modules=["query"], feedforward_modules=["fc"])
    for fields in ({"target_modules": r"query|conv", "feedforward_modules": ["mlp.0"]}, {"feedforward_modules": "mlp"}):
        with pytest.raises(NoMatchError, match="'feedforward_modules': no layer matches 'mlp"):
            get_peft_model(Small(), config(**{"target_modules": ["query"], **fields}))


def test_factors_that_do_not_start_as_ones(rng):
    network, x = Small(), ids(rng)
    base = numbers(network, x)
    model = get_peft_model(network, config(init_ia3_weights=False))
    assert np.abs(numbers(model, x) - base).max() > 0.1
    with model.disable_adapter():
        same(numbers(model, x), base)


def test_layers_of_half_precision(mode, rng):
    dtype = ms.float16
    network = nn.SequentialCell(nn.Dense(4, 6, dtype=dtype))
    model = get_peft_model(network, IA3Config(target_modules=["0"]))
    x = Tensor(rng.normal(size=(3, 4)).astype(np.float32)).astype(dtype)
    assert model(x).dtype == dtype and network[0].mindpet_delta.mindpet_delta_ia3.dtype == ms.float32
    kept = get_peft_model(
        nn.SequentialCell(nn.Dense(4, 6, dtype=dtype)), IA3Config(target_modules=["0"]), autocast_adapter_dtype=False
    )
    assert kept.trainable_params()[0].dtype == dtype and kept(x).dtype == dtype

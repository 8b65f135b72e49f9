"""Networks that were not written for mindpet, and dropout in the training of every method."""

import mindspore as ms
import numpy as np
import pytest
from foreign import FOREIGN, LABELS, SEQ, VOCAB, Attending, Colliding, Sliced
from mindspore import Tensor, nn
from small import contents, move, numbers, same

from mindpet.files.tensors import TensorFile
from mindpet.graph import freeze_delta, load_delta
from mindpet.peft import (
    AdapterConfig,
    BitFitConfig,
    LoraConfig,
    LowRankAdapterConfig,
    PeftModel,
    PrefixTuningConfig,
    Ptuning2Config,
    get_peft_model,
)

HEAD = {"modules_to_save": ["classifier"]}


@pytest.fixture(autouse=True)
def synchronous():
    """In PyNative mode threads that wait for one another take most of the time of a small network."""
    ms.set_context(pynative_synchronize=True)
    yield
    ms.set_context(pynative_synchronize=False)


def ids(rng):
    return Tensor(rng.integers(0, VOCAB, (4, SEQ)).astype(np.int32))


def made(cls, rng):
    """A network whose embedding matters."""
    network = cls()
    for _, param in network.parameters_and_names():
        param.set_data(Tensor(0.6 * rng.normal(size=param.shape).astype(np.float32)))
    return network


def values(network):
    """path -> array; names can change."""
    return {path: param.asnumpy().copy() for path, param in network.parameters_and_names()}


def like(network):
    """Another network of the class with the same values."""
    other = type(network)()
    found = values(network)
    for path, param in other.parameters_and_names():
        param.set_data(Tensor(found[path]))
    return other


LABELS_OF_IDS = Tensor(np.arange(4).astype(np.int32) % LABELS)


def loss(model, x):
    """The loss in evaluation."""
    return float(nn.CrossEntropyLoss()(model.set_train(False)(x), LABELS_OF_IDS).asnumpy())


def train(model, x, steps):
    """Train some steps with a new optimizer."""
    optimizer = nn.Adam(model.trainable_params(), 0.02)
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), optimizer).set_train()
    for _ in range(steps):
        step(x, LABELS_OF_IDS).asnumpy()


# Foreign networks

METHODS = {
    "lora, head": lambda targets: LoraConfig(r=2, target_modules=targets, **HEAD),
    "dora": lambda targets: LoraConfig(r=2, target_modules=targets, use_dora=True),
    "biases": lambda targets: LoraConfig(r=2, target_modules=targets, bias="all"),
    "adapter": lambda targets: AdapterConfig(target_modules=targets, bottleneck_size=3),
    "bitfit": lambda targets: BitFitConfig(),
}


# In graph mode, which takes longer, one method.
CASES = [(ms.PYNATIVE_MODE, method) for method in METHODS] + [(ms.GRAPH_MODE, "lora, head")]


@pytest.mark.parametrize("own_mode, method", CASES)
@pytest.mark.parametrize("cls", list(FOREIGN), ids=lambda cls: cls.__name__)
def test_a_foreign_network(cls, own_mode, method, rng, tmp_path):
    ms.set_context(mode=own_mode)
    targets, paths = FOREIGN[cls]
    network, x = made(cls, rng), ids(rng)
    untouched = values(network)
    base = numbers(network, x)
    model = get_peft_model(network, METHODS[method](targets))
    assert sorted(layer.path for layer in model.adapters["default"].plan.targets) == (
        [] if method == "bitfit" else sorted(paths)
    )
    same(numbers(model, x), base)
    before = model.adapters["default"].values

    before_training = loss(model, x)
    train(model, x, 4)
    assert loss(model, x) < before_training
    after = model.adapters["default"].values
    still = {path for path, value in after.items() if np.array_equal(value, before[path])}
    assert all("scaling" in path for path in still), still
    tuned = numbers(model, x)
    assert np.abs(tuned - base).max() > 1e-3

    model.save_pretrained(tmp_path)
    keys = set(TensorFile(tmp_path / "adapter_model.safetensors").shapes)
    assert all(any(f"base_model.model.{path}." in key for key in keys) for path in paths if method != "bitfit")
    with model.disable_adapter():
        same(numbers(model, x), base)
    same(numbers(model, x), tuned)
    if method != "adapter":
        model.merge_adapter()
        np.testing.assert_allclose(numbers(model, x), tuned, atol=1e-5)
        model.unmerge_adapter()
        same(numbers(model, x), tuned)

    assert model.unload() is network
    same(numbers(network, x), base)
    assert list(values(network)) == list(untouched)
    assert all(np.array_equal(value, untouched[path]) for path, value in values(network).items())

    loaded = PeftModel.from_pretrained(like(network), tmp_path)
    same(numbers(loaded, x), tuned)
    if own_mode == ms.PYNATIVE_MODE:
        loaded.add_adapter("other", METHODS["adapter"](targets[:1]))
        loaded.set_adapter("other")
        same(numbers(loaded, x), base)
        loaded.set_adapter("default")
    if method != "adapter":
        merged = loaded.merge_and_unload()
        np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-5)
        assert list(values(merged)) == list(untouched)


def test_a_sliced_network_trains_and_saves_all_layers_when_its_names_have_changed(rng, tmp_path):
    network, x = made(Sliced, rng), ids(rng)
    names = [param.name for param in network.get_parameters()]
    numbers(network, x)
    assert [param.name for param in network.get_parameters()] != names  # what this is about
    model = get_peft_model(network, METHODS["lora, head"](["fc"]))
    freeze_delta(model, "lora", exclude=["classifier.*"])
    train(model, x, 3)
    assert len(model.trainable_params()) == 2 * 3 + 2
    tuned = numbers(model.set_train(False), x)
    ms.save_checkpoint(
        [{"name": path, "data": Tensor(value)} for path, value in _trained(model).items()], str(tmp_path / "d.ckpt")
    )
    other = get_peft_model(like(model.unload()), METHODS["lora, head"](["fc"]))
    load_delta(other, str(tmp_path / "d.ckpt"))
    same(numbers(other, x), tuned)


def _trained(model):
    adapter = model.adapters["default"]
    return {path: value for path, value in adapter.values.items() if "scaling" not in path}


@pytest.mark.parametrize("target, paths", [("fc", ["fc"]), (["block.fc"], ["block.fc"]), (["fc"], ["fc", "block.fc"])])
def test_paths_that_end_alike(target, paths, mode, rng, tmp_path):
    """A regular expression is for the whole path, and the path of a layer in a sum or a file, too."""
    network, x = made(Colliding, rng), ids(rng)
    config = LoraConfig(r=2, target_modules=target, modules_to_save=["block.classifier"])
    plain = LoraConfig(r=3, target_modules=target, init_lora_weights=False)
    model = get_peft_model(network, config)
    assert sorted(model.adapters["default"].slot.deltas) == sorted(paths)
    assert list(model.adapters["default"].plan.trained) == ["block.classifier.weight", "block.classifier.bias"]
    move(model, 1)
    tuned = numbers(model, x)
    model.add_adapter("plain", plain)
    for combination in ("cat", "svd", "linear"):
        model.add_weighted_adapter(["plain"], [1.0], combination, combination)
        assert sorted(model.adapters[combination].slot.deltas) == sorted(paths)
    model.set_adapter("plain")
    expected = numbers(model, x)
    model.set_adapter("cat")
    np.testing.assert_allclose(numbers(model, x), expected, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["default", "cat"])
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    same(numbers(loaded, x), tuned)
    loaded.load_adapter(tmp_path / "cat", "cat")
    loaded.set_adapter("cat")
    np.testing.assert_allclose(numbers(loaded, x), expected, atol=1e-5)


# Dropout

LINEAR = ["qkv", "out"]
TOKENS = {"num_virtual_tokens": 3}
PROJECTED = {**TOKENS, "prefix_projection": True, "encoder_hidden_size": 6}
# Every method -> configuration; those of the first half have dropout.
EVERY = {
    "lora": LoraConfig(r=2, target_modules=LINEAR, lora_dropout=0.1),
    "rslora": LoraConfig(r=2, target_modules=LINEAR, lora_dropout=0.1, use_rslora=True, bias="all"),
    "dora": LoraConfig(r=2, target_modules=LINEAR, lora_dropout=0.1, use_dora=True),
    "pissa": LoraConfig(r=2, target_modules=LINEAR, lora_dropout=0.1, init_lora_weights="pissa"),
    "olora": LoraConfig(r=2, target_modules=LINEAR, lora_dropout=0.1, init_lora_weights="olora", use_dora=True),
    "lora_bias": LoraConfig(r=2, target_modules=LINEAR, lora_dropout=0.1, lora_bias=True, **HEAD),
    "convolution": LoraConfig(r=2, target_modules=["conv"], lora_dropout=0.1),
    "ptuning2": Ptuning2Config(**TOKENS, dropout_prob=0.1),
    "ptuning2, projected": Ptuning2Config(**PROJECTED, dropout_prob=0.1),
    "embedding": LoraConfig(r=2, target_modules=["embed"], lora_dropout=0.1),  # not on ids, as in Hugging Face PEFT
    "prefix": PrefixTuningConfig(**TOKENS),
    "prefix, projected": PrefixTuningConfig(**PROJECTED),
    "adapter": AdapterConfig(target_modules=LINEAR, bottleneck_size=3),
    "low rank adapter": LowRankAdapterConfig(target_modules=LINEAR, reduction_factor=2),
    "bitfit": BitFitConfig(**HEAD),
}
DROPS = list(EVERY)[: list(EVERY).index("embedding")]
OTHER = LoraConfig(r=3, target_modules=["out"], lora_dropout=0.1, init_lora_weights=False)


def drops(model, x):
    """Whether dropout is on: the outputs differ from call to call."""
    first = numbers(model, x)
    return any(np.abs(numbers(model, x) - first).max() > 1e-4 for _ in range(4))


def modes(model):
    """Whether the Cells train: one answer, or both."""
    return {cell.training for _, cell in model.cells_and_names()}


@pytest.mark.parametrize("name", list(EVERY))
def test_every_method_trains_with_dropout_and_is_evaluated_without(name, rng):
    network, x = made(Attending, rng).set_train(), ids(rng)
    base = contents(network)
    model = get_peft_model(network, EVERY[name])
    assert modes(model) == {True}
    before = model.adapters["default"].values
    move(model, 1)
    assert drops(model, x) == (name in DROPS)
    before_training = loss(model, x)
    train(model, x, 20)
    assert modes(model) == {True} and loss(model, x) < before_training
    trained = {path: value for path, value in model.adapters["default"].values.items() if path in _trains(model)}
    assert all(not np.array_equal(value, before[path]) for path, value in trained.items())
    assert modes(model) == {False} and not drops(model, x)
    model.unload()
    assert contents(network) == base


def _trains(model):
    adapter = model.adapters["default"]
    return {path for path, param in adapter.slot.params.items() if param.requires_grad}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_follows_the_network_whichever_adapter_comes(name, rng, tmp_path):
    """Adapters of other shapes are put in and taken out, and the network goes from training to evaluation between."""
    x = ids(rng)
    model = get_peft_model(made(Attending, rng).set_train(), OTHER)
    model.add_adapter("two", EVERY[name])
    model.set_adapter("two")
    move(model, 1)
    assert modes(model) == {True} and drops(model, x)
    model.save_pretrained(tmp_path)
    assert modes(model) == {True} and drops(model, x)
    model.load_adapter(tmp_path / "two", "three")
    with model.disable_adapter():
        assert modes(model) == {True} and not drops(model, x)
    assert modes(model) == {True} and drops(model, x)
    model.set_adapter("default")
    model.set_train(False)
    for adapter in ("two", "three", "default", "two"):
        model.set_adapter(adapter)
        assert modes(model) == {False} and not drops(model, x)
    model.set_train()
    for adapter in ("two", "three", "default"):
        model.set_adapter(adapter)
        assert modes(model) == {True} and drops(model, x)


def test_dropout_follows_in_graphs(mode, rng):
    x = ids(rng)
    model = get_peft_model(made(Attending, rng).set_train(), OTHER)
    model.add_adapter("two", EVERY["ptuning2"])
    assert drops(model, x)
    model.set_train(False)
    model.set_adapter("two")
    assert not drops(model, x)
    model.set_train()
    assert drops(model, x)
    model.set_adapter("default")
    assert drops(model, x)


def test_layers_that_recompute_go_on_training_when_an_adapter_is_added(rng, tmp_path):
    """Every call that takes the deltas out for a moment must renew what recomputes."""
    network, x = made(Colliding, rng), ids(rng)
    network.fc.recompute()
    model = get_peft_model(network, METHODS["lora, head"](["fc"]))
    model.save_pretrained(tmp_path)
    for call in (
        lambda: model.add_adapter("two", METHODS["dora"](["fc"])),
        lambda: model.add_adapter("plain", LoraConfig(target_modules=["fc"])),
        lambda: model.load_adapter(tmp_path, "three"),
        lambda: model(x, adapter_names=["two"] * 4),
        lambda: model.add_weighted_adapter(["plain"], [1.0], "sum", "cat"),
        lambda: model.delete_adapter("two"),
    ):
        call()
        before = model.adapters["default"].values
        train(model, x, 1)
        after = model.adapters["default"].values
        assert not np.array_equal(after["fc.mindpet_delta_lora_b"], before["fc.mindpet_delta_lora_b"])

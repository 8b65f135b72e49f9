"""Networks with BatchNorms: their running statistics belong to the base, or to an adapter."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import numbers, same

from mindpet.files.tensors import TensorFile
from mindpet.peft import LoraConfig, PeftModel, get_peft_model


class Convolutional(nn.Cell):
    """`(batch, 2, 6, 6) -> (batch, 3)`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Dense(4, 3)

    def construct(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def made():
    ms.set_seed(3)
    network = Convolutional()
    rng = np.random.default_rng(1)
    network.bn.moving_mean.set_data(Tensor(rng.normal(size=4).astype(np.float32)))
    network.bn.moving_variance.set_data(Tensor(rng.uniform(0.5, 2, size=4).astype(np.float32)))
    return network


def statistics(network):
    """The base's own statistics."""
    return [network.bn._params[name].asnumpy().copy() for name in ("moving_mean", "moving_variance")]


def images(rng):
    return Tensor((3 + rng.normal(size=(4, 2, 6, 6))).astype(np.float32))


def train(model, x, steps=3):
    # A decay of weights would change statistics that an optimizer gets.
    optimizer = nn.SGD(model.trainable_params(), 0.1, weight_decay=0.3)
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), optimizer).set_train()
    for _ in range(steps):
        step(x, Tensor(np.array([0, 1, 2, 0], np.int32)))
    model.set_train(False)


CONFIG = {"r": 2, "target_modules": ["conv"], "init_lora_weights": "gaussian"}


@pytest.mark.parametrize("modules", [None, ["head"]])
def test_statistics_of_the_base_stay_while_an_adapter_trains(modules, mode, rng, tmp_path):
    network, x = made(), images(rng)
    expected, before = numbers(network.set_train(False), x), statistics(network)
    model = get_peft_model(network, LoraConfig(**CONFIG, modules_to_save=modules))
    train(model, x)
    tuned = numbers(model, x)
    assert np.abs(tuned - expected).max() > 1e-4
    with model.disable_adapter():
        same(numbers(model, x), expected)
    model.save_pretrained(tmp_path)
    assert not [name for name in TensorFile(tmp_path / "adapter_model.safetensors").shapes if "running" in name]
    assert model.unload() is network and network.bn.use_batch_statistics is None
    same(numbers(network, x), expected)
    assert all(map(np.array_equal, statistics(network), before))
    same(numbers(PeftModel.from_pretrained(made(), tmp_path), x), tuned)


@pytest.mark.parametrize("how", ["modules_to_save", "batch_statistics"])
def test_statistics_that_move_belong_to_the_adapter(how, mode, rng, tmp_path):
    network, x = made(), images(rng)
    expected, before = numbers(network.set_train(False), x), statistics(network)
    if how == "modules_to_save":
        model = get_peft_model(network, LoraConfig(**CONFIG, modules_to_save=["bn"]))
    else:
        model = get_peft_model(network, LoraConfig(**CONFIG), batch_statistics=True)
    assert not [param.name for param in model.trainable_params() if "moving" in param.name]
    train(model, x)
    tuned = numbers(model, x)
    moved = network.bn.moving_mean.asnumpy()  # what the layer computes with
    assert np.abs(moved - before[0]).max() > 1e-2 and all(map(np.array_equal, statistics(network), before))
    with model.disable_adapter():
        same(numbers(model, x), expected)
    model.add_adapter("plain", LoraConfig(**{**CONFIG, "init_lora_weights": True}))
    model.set_adapter("plain")
    same(numbers(model, x), expected)
    model.set_adapter("default")
    same(numbers(model, x), tuned)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    tensors = TensorFile(tmp_path / "adapter_model.safetensors").read_all()
    np.testing.assert_array_equal(tensors["base_model.model.bn.running_mean"], moved)
    assert ("base_model.model.bn.weight" in tensors) == (how == "modules_to_save")
    same(numbers(model.unload(), x), expected)
    same(numbers(PeftModel.from_pretrained(made(), tmp_path), x), tuned)
    merged = PeftModel.from_pretrained(made(), tmp_path).merge_and_unload()
    np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-5)


def test_a_fresh_adapter_in_training_computes_with_the_statistics_of_the_base(mode, rng):
    network, x = made(), images(rng)
    expected = numbers(network.set_train(False), x)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["conv"])).set_train()
    same(numbers(model, x), expected)
    mixed = model(x, adapter_names=["default", "__base__"] * 2)
    np.testing.assert_allclose(mixed.asnumpy(), expected, atol=1e-5)
    assert model.unload().set_train() is network
    before = statistics(network)
    numbers(network, x)  # and without adapters they move again
    assert np.abs(statistics(network)[0] - before[0]).max() > 1e-3

"""LoRA on convolutions along one, two and three axes, of `nn` and of `mint.nn`."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn, ops
from safetensors.numpy import load_file
from small import contents, move, numbers

from mindpet.errors import ConfigError
from mindpet.network.kinds import register_layer
from mindpet.peft import LoraConfig, PeftModel, get_peft_model

SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def on_cpu(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """What the convolutions of `mint.nn` compute; MindSpore has their operators on accelerators only."""
    axes = weight.ndim - 2
    stride, padding, dilation = ((1,) * (2 - axes) + tuple(value) for value in (stride, padding, dilation))
    x, weight = (value if axes == 2 else ops.expand_dims(value, 2) for value in (x, weight))
    padding = (0,) * (2 - axes) + padding[-axes:]
    out = ops.conv2d(x, weight, bias, stride, "pad", padding, dilation, groups)
    return out if axes == 2 else ops.squeeze(out, 2)


def of_mint(cls, *arguments, **keywords):
    cell = cls(*arguments, **keywords)
    setattr(cell, "conv2d" if hasattr(cell, "conv2d") else "conv1d", on_cpu)
    return cell


# Name -> (axes, how to make it).
LAYERS = {
    "conv1d": (1, lambda: nn.Conv1d(4, 6, 3, has_bias=True)),
    "conv1d strided": (1, lambda: nn.Conv1d(4, 6, 3, stride=2, pad_mode="pad", padding=2, dilation=2, has_bias=True)),
    "conv1d in groups": (1, lambda: nn.Conv1d(4, 6, 2, pad_mode="valid", group=2)),
    "conv2d": (2, lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), pad_mode="valid", dilation=(2, 1), has_bias=True)),
    "conv3d": (3, lambda: nn.Conv3d(4, 6, (3, 2, 1), stride=(1, 2, 1), has_bias=True)),
    "conv3d padded": (3, lambda: nn.Conv3d(4, 6, 3, pad_mode="pad", padding=(1, 1, 0, 1, 1, 1))),
    "conv3d in groups": (3, lambda: nn.Conv3d(4, 6, 2, group=2, has_bias=True)),
    "mint conv1d": (1, lambda: of_mint(mint.nn.Conv1d, 4, 6, 3, stride=2, padding=1)),
    "mint conv2d": (2, lambda: of_mint(mint.nn.Conv2d, 4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1))),
    "mint conv2d in groups": (2, lambda: of_mint(mint.nn.Conv2d, 4, 6, 3, padding=1, groups=2)),
}


def image(axes, rng):
    return Tensor(rng.normal(size=(2, 4, *SIZES[axes])).astype(np.float32))


def lora_of(model):
    values = {param.name.split("mindpet_delta_lora_")[-1]: param.asnumpy() for param in model.get_parameters()}
    return values["a"], values["b"], values.get("magnitude")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_the_delta_is_that_of_the_formula(layer, use_dora, mode, rng, tmp_path):
    axes, make = LAYERS[layer]
    if use_dora and "groups" in layer:
        return  # refused, see below
    network, x = nn.SequentialCell(make()), image(axes, rng)
    base = numbers(network, x)
    before = contents(network)
    model = get_peft_model(network, LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=use_dora))
    np.testing.assert_allclose(numbers(model, x), base, atol=1e-5)
    move(model, 1)
    a, b, magnitude = lora_of(model)
    weight = network[0].weight.asnumpy()
    group = getattr(network[0], "group", getattr(network[0], "groups", 1))
    kernel = weight.shape[-axes:]
    assert a.shape == (4, 4 // group, *kernel) and b.shape == (6, 4 // group, *(1,) * axes)
    parts = [b.reshape(group, 6 // group, -1)[g] @ a.reshape(group, 4 // group, -1)[g] for g in range(group)]
    tuned = weight + 1.5 * np.concatenate(parts).reshape(weight.shape)
    if use_dora:
        assert magnitude.shape == (1, 6, *(1,) * axes)
        norm = np.sqrt((tuned.reshape(6, -1) ** 2).sum(1))
        tuned = tuned * (magnitude.ravel() / norm).reshape(-1, *(1,) * (tuned.ndim - 1))
    got = numbers(model, x)
    assert np.abs(got - base).max() > 0.1

    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {
        name.split(".0.")[-1]: value.shape for name, value in saved.items() if "lora_A" in name or "lora_B" in name
    } == {
        "lora_A.weight": a.shape,
        "lora_B.weight": b.shape,
    }
    model.unload()
    assert contents(network) == before
    loaded = PeftModel.from_pretrained(network, str(tmp_path))
    np.testing.assert_allclose(numbers(loaded, x), got, atol=1e-5)
    merged = loaded.merge_and_unload()
    np.testing.assert_allclose(numbers(merged, x), got, atol=1e-4)
    np.testing.assert_allclose(merged[0].weight.asnumpy(), tuned, atol=1e-5)


@pytest.mark.parametrize("layer", ["conv1d", "conv3d in groups", "mint conv2d"])
def test_only_the_delta_gets_a_gradient(layer, mode, rng):
    axes, make = LAYERS[layer]
    network, x = nn.SequentialCell(make()), image(axes, rng)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.5))
    model.set_train()
    weights = model.trainable_params()

    def loss(x):
        return (model(x) ** 2).mean()

    gradients = ms.value_and_grad(loss, None, weights)(x)[1]
    assert len(gradients) == 2 and all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)


def test_a_convolution_of_half_precision(mode, rng):
    network = nn.SequentialCell(nn.Conv1d(4, 6, 3, dtype=ms.float16))
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["0"]))
    assert numbers(model, image(1, rng).astype(ms.float16)).dtype == np.float16


@pytest.mark.parametrize("layer", ["conv1d in groups", "conv3d in groups", "mint conv2d in groups"])
def test_groups_need_a_fitting_rank_and_no_dora(layer):
    network = nn.SequentialCell(LAYERS[layer][1]())
    with pytest.raises(ConfigError, match="the rank, 3, must be a multiple of its 2 groups.*no DoRA beside a conv"):
        get_peft_model(network, LoraConfig(r=3, target_modules=["0"], use_dora=True))


class Flat(mint.nn.Conv2d):
    """A convolution along one axis as a model library writes it: the kernel of two axes, the weight of one."""

    def __init__(self, in_channels, out_channels, kernel):
        super().__init__(in_channels, out_channels, (1, kernel), padding=(0, 1))
        self.conv2d = on_cpu
        weight = self.weight.asnumpy()[:, :, 0]
        self.weight = ms.Parameter(Tensor(weight), name="weight")

    def construct(self, x):
        weight = ops.expand_dims(self.weight, 2)
        out = self.conv2d(ops.expand_dims(x, 2), weight, self.bias, self.stride, self.padding, self.dilation, 1)
        return ops.squeeze(out, 2)


register_layer(Flat, "conv1d")


def test_a_flat_convolution_of_a_library(mode, rng):
    network, x = nn.SequentialCell(Flat(4, 6, 3)), image(1, rng)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    got = numbers(model, x)
    a, b, _ = lora_of(model)
    assert a.shape == (2, 4, 3) and b.shape == (6, 2, 1)
    np.testing.assert_allclose(numbers(model.merge_and_unload(), x), got, atol=1e-5)

"""AdapterDrop: adapters without their lowest layers, and training that gets them used to it."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, train
from small import Compiles, graph_mode, move, numbers, same

from mindpet.delta._base import Delta
from mindpet.errors import AdapterError
from mindpet.files.tensors import TensorFile
from mindpet.peft import (
    AdapterDrop,
    BottleneckConfig,
    CompacterConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    UnionConfig,
    VeraConfig,
    drop_adapter_layers,
    get_peft_model,
)

CONFIGS = {
    "adapter": BottleneckConfig(bottleneck_size=3, target_modules=["out"]),
    "compacter": CompacterConfig(reduction_factor=2, phm_dim=2, target_modules=["out"]),
    "vera": VeraConfig(r=3, target_modules=["out"], d_initial=0.5),
    "lora": LoraConfig(r=2, target_modules=["out", "stem"], bias="lora_only", modules_to_save=["head"]),
    "union": UnionConfig(
        configs=[LoraConfig(r=2, target_modules=["out"]), BottleneckConfig(bottleneck_size=3, target_modules=["in_"])]
    ),
}


class Block(nn.Cell):
    """A residual block of two layers."""

    def __init__(self):
        super().__init__()
        self.in_, self.out = nn.Dense(8, 6), nn.Dense(6, 8)

    def construct(self, x):
        return x + self.out(self.in_(x).tanh())


class Deep(nn.Cell):
    """A layer without a number, blocks with numbers, and a head."""

    def __init__(self, depth=3):
        super().__init__()
        self.stem, self.head = nn.Dense(8, 8), nn.Dense(8, 2)
        self.blocks = nn.CellList([Block() for _ in range(depth)])

    def construct(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def x(rng):
    return Tensor(rng.normal(size=(4, 8)).astype(np.float32))


def silence(model, number):
    """What the network gives if the deltas of the lowest layers change nothing."""
    found = {f"blocks.{index}" for index in range(number)}
    cells = [cell for path, cell in model.network.cells_and_names() if path[:8] in found and isinstance(cell, Delta)]
    for cell in cells:
        vars(cell)["construct"] = lambda x, out: out
    return cells


def without(model, number, x):
    """The output, computed in PyNative mode, without the deltas of the lowest layers."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    cells = silence(model, number)
    found = numbers(model, x)
    for cell in cells:
        del vars(cell)["construct"]
    ms.set_context(mode=mode)
    return found


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_without_its_lowest_layers(method, mode, x, tmp_path):
    model = get_peft_model(Deep(), CONFIGS[method])
    move(model, 1)
    tuned, expected = numbers(model, x), without(model, 2, x)
    assert np.abs(tuned - expected).max() > 1e-3
    drop_adapter_layers(model, 2, "upper")
    same(numbers(model, x), tuned)
    model.set_adapter("upper")
    if method != "lora":  # whose biases are gone with the layers
        same(numbers(model, x), expected)
    deltas = [path for path, cell in model.network.cells_and_names() if path.endswith("mindpet_delta")]
    assert {path[:8] for path in deltas} == {"blocks.2", *(["stem.min"] if method == "lora" else [])}
    upper = numbers(model, x)
    model.save_pretrained(tmp_path, selected_adapters=["upper"])
    keys = TensorFile(tmp_path / "upper" / "adapter_model.safetensors").shapes
    assert not any("blocks.0" in key or "blocks.1" in key for key in keys)
    same(numbers(PeftModel.from_pretrained(model.unload(), tmp_path / "upper"), x), upper)


def test_what_is_left_follows_the_base_as_the_whole_does(x, tmp_path):
    network = Deep()
    own = LoraConfig(r=2, target_modules=["out"], init_lora_weights="pissa", modules_to_save=["head"])
    model = get_peft_model(network, own)
    drop_adapter_layers(model, 1, "upper")
    for param in network.get_parameters():
        if "mindpet" not in param.name:
            param.set_data(Tensor(2 * param.asnumpy()))
    with model.disable_adapter():
        base = numbers(model, x)
    for name in ("default", "upper"):
        model.set_adapter(name)
        np.testing.assert_allclose(numbers(model, x), base, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    move(model, 1)
    network.blocks[2].out.weight.set_data(Tensor(np.ones((8, 6), np.float32)))
    drop_adapter_layers(model, 1, "later")
    with pytest.raises(AdapterError, match="'later'.*start from the base's weights"):
        model.save_pretrained(tmp_path, selected_adapters=["later"])


def test_what_cannot_be_dropped():
    model = get_peft_model(Deep(), CONFIGS["adapter"])
    with pytest.raises(ValueError, match="'number' must be a positive int, but got 0"):
        drop_adapter_layers(model, 0, "upper")
    with pytest.raises(AdapterError, match="without the layers below 3 no delta is left"):
        drop_adapter_layers(model, 3, "upper")
    with pytest.raises(AdapterError, match="'default'"):
        drop_adapter_layers(model, 1, "default")
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        drop_adapter_layers(model, 1, "upper", "other")
    assert list(model.adapters) == ["default"]
    model.add_adapter("stem", LoraConfig(r=2, target_modules=["stem"]))
    with pytest.raises(AdapterError, match=r"no delta is in a layer below 1; the numbers are \[\]"):
        drop_adapter_layers(model, 1, "upper", "stem")
    with pytest.raises(ValueError, match="'most' must be a positive int, but got 0.*'seed' must be an int or None"):
        AdapterDrop(model, 0, "a")
    model.add_adapter("ia3", IA3Config(target_modules=["out"], feedforward_modules=["out"]))
    model.set_adapter("ia3")
    with pytest.raises(AdapterError, match="deltas of .'blocks.0.out', 'blocks.1.out'. act on more than the output"):
        AdapterDrop(model).__enter__()


@pytest.mark.parametrize("method", ["adapter", "vera"])
def test_a_step_leaves_out_the_lowest_layers_and_compiles_nothing(method, mode, x):
    model = get_peft_model(Deep(), CONFIGS[method])
    move(model, 1)
    before = [(param.name, param.requires_grad) for param in model.get_parameters()]
    expected = [without(model, number, x) for number in range(3)]
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.MSELoss()), nn.SGD(model.trainable_params(), 0.1))
    target = Tensor(np.zeros((4, 2), np.float32))
    with AdapterDrop(model, seed=3) as drop:
        assert {drop.draw() for _ in range(30)} == {0, 1, 2}
        for number in (2, 0):
            drop.leave_out(number)
            same(numbers(model, x), expected[number])
        with Compiles() as compiles:
            for number in (1, 2, 0, 1):
                drop.leave_out(number)
                same(numbers(model, x), expected[number])
        assert compiles.count == 0 or not graph_mode()
        step.set_train()(x, target)
        assert np.abs(numbers(model.set_train(False), x) - expected[1]).max() > 1e-4
    assert [(param.name, param.requires_grad) for param in model.get_parameters()] == before
    same(numbers(model, x), without(model, 0, x))


def test_what_is_left_out_does_not_train(mode, x):
    model = get_peft_model(Deep(), CONFIGS["adapter"])
    move(model, 1)
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.MSELoss()), nn.SGD(model.trainable_params(), 0.1))
    step.set_train()
    target = Tensor(np.zeros((4, 2), np.float32))

    def moved():
        before = {param.name: param.asnumpy().copy() for param in model.trainable_params()}
        step(x, target)
        return {param.name[:8] for param in model.trainable_params() if np.any(param.asnumpy() != before[param.name])}

    with pytest.raises(AdapterError, match="training has not begun"):
        AdapterDrop(model).draw()
    with AdapterDrop(model) as drop:
        with pytest.raises(ValueError, match="'number' must be an int from 0 to 2, but got 3"):
            drop.leave_out(3)
        drop.leave_out(2)
        assert moved() == {"blocks.2"}
        with Compiles() as compiles:
            drop.leave_out(0)
            assert moved() == {"blocks.0", "blocks.1", "blocks.2"}
            drop.leave_out(1)
            assert moved() == {"blocks.1", "blocks.2"}
        assert compiles.count == 0 or not graph_mode()


def test_the_callback_draws_for_each_step(mode, x):
    model = get_peft_model(Deep(), CONFIGS["adapter"])
    optimizer = nn.SGD(model.trainable_params(), 0.1)
    drop, seen = AdapterDrop(model, most=1, seed=1), []
    deltas = [cell for _, cell in model.network.cells_and_names() if isinstance(cell, Delta)]

    class Note(train.Callback):
        def on_train_step_begin(self, run_context):
            seen.append(drop.number)
            assert all("construct" in vars(delta) for delta in deltas[:1]) and "construct" not in vars(deltas[2])

    rows = ms.dataset.NumpySlicesDataset((x.asnumpy(), np.zeros((4, 2), np.float32)), shuffle=False).batch(2)
    fitted = train.Model(model, nn.MSELoss(), optimizer, metrics={"mse"})
    fitted.fit(6, rows, rows, callbacks=[drop, Note()], dataset_sink_mode=False)
    assert len(seen) == 12 and set(seen) == {0, 1} and drop.number == 0
    assert len(deltas) == 3 and not any("construct" in vars(delta) for delta in deltas)

    class Fails(train.Callback):
        def on_train_step_begin(self, run_context):
            raise KeyError("enough")

    with pytest.raises(KeyError):
        fitted.train(1, rows, callbacks=[drop, Fails()], dataset_sink_mode=False)
    assert not any("construct" in vars(delta) for delta in deltas)

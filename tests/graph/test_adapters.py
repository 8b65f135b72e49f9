"""Graph operations on a network with adapters, whose parameters get other names when it is called."""

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.train import Model
from sliced import LABELS, WIDTH, Sliced, ones

from mindpet.graph import DeltaGuard, TrainableParamsCheckPoint, freeze_delta, freeze_modules, load_delta
from mindpet.network.parameters import model_parameters, trainable_parameters
from mindpet.peft import AdapterConfig, BitFitConfig, LoraConfig, get_peft_model

LAYERS = ["layers.0", "layers.1", "layers.2", "more.first", "more.second"]
SIDES = [f"{layer}.mindpet_delta_lora_{side}" for layer in LAYERS for side in "ab"]
HEAD = ["head.mindpet_trained_weight", "head.mindpet_trained_bias"]
CONFIGS = {
    "lora": lambda: LoraConfig(target_modules=LAYERS, modules_to_save=["head"]),
    "pissa": lambda: LoraConfig(target_modules=LAYERS, init_lora_weights="pissa", r=2),
    "bias": lambda: LoraConfig(target_modules=LAYERS, bias="all"),
    "bitfit": lambda: BitFitConfig(),
    "adapter": lambda: AdapterConfig(target_modules=LAYERS, bottleneck_size=2),
}


def base():
    """The same base every time."""
    network = Sliced()
    rng = np.random.default_rng(1)
    for param in network.get_parameters():
        param.set_data(Tensor(rng.normal(size=param.shape).astype(np.float32)))
    return network


def fit(model, *callbacks):
    rng = np.random.default_rng(2)
    columns = {"x": rng.normal(size=(8, WIDTH)).astype(np.float32), "y": np.arange(8, dtype=np.int32) % LABELS}
    data = ds.NumpySlicesDataset(columns, shuffle=False).batch(4)
    optimizer = nn.Adam(model.trainable_params(), 0.05)
    trainer = Model(model, nn.CrossEntropyLoss(), optimizer)
    trainer.train(2, data, callbacks=list(callbacks), dataset_sink_mode=False)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_was_trained_comes_back(kind, mode, tmp_path):
    model = get_peft_model(base(), CONFIGS[kind]())
    before = list(model_parameters(model))
    assert before == [param.name for param in model.get_parameters()]
    checkpoint = TrainableParamsCheckPoint(str(tmp_path))
    fit(model, DeltaGuard(steps=3), checkpoint)
    assert list(model_parameters(model)) == before
    fresh = get_peft_model(base(), CONFIGS[kind]())
    start = fresh(ones()).asnumpy()
    load_delta(fresh, checkpoint.latest_ckpt_file_name)
    expected = model(ones()).asnumpy()
    assert np.abs(expected - start).max() > 0.01
    np.testing.assert_array_equal(fresh(ones()).asnumpy(), expected)


def test_a_file_of_pissa_has_the_start_that_it_goes_with(tmp_path):
    model = get_peft_model(base(), CONFIGS["pissa"]())
    checkpoint = TrainableParamsCheckPoint(str(tmp_path))
    fit(model, checkpoint)
    starts = [key.replace("delta_lora", "lora_start") for key in SIDES]
    assert set(ms.load_checkpoint(checkpoint.latest_ckpt_file_name)) == {*SIDES, *starts}
    other = get_peft_model(Sliced(), CONFIGS["pissa"]())  # the base comes after the adapter
    values = str(tmp_path / "base.ckpt")
    ms.save_checkpoint([{"name": key, "data": param} for key, param in model_parameters(base()).items()], values)
    load_delta(other, values, checkpoint.latest_ckpt_file_name)
    np.testing.assert_array_equal(other(ones()).asnumpy(), model(ones()).asnumpy())


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("pattern", ["head.*", "head.mindpet_trained_*", "*head*"])
def test_freezing_an_adapter_trains_its_copies_and_never_the_base(pattern, called):
    model = get_peft_model(base(), CONFIGS["lora"]())
    if called:
        model(ones())
    freeze_delta(model, "lora")
    assert set(trainable_parameters(model)) == set(SIDES)
    freeze_delta(model, "lora", exclude=[pattern])
    assert set(trainable_parameters(model)) == {*SIDES, *HEAD}
    freeze_modules(model, include=["layers.*", "head.bias"])
    assert set(trainable_parameters(model)) == {*SIDES[6:], HEAD[0]}
    freeze_delta(model, "bitfit")
    others = {f"{layer}.bias" for layer in LAYERS}
    assert set(trainable_parameters(model)) == {*others, HEAD[1]}


def test_keys_of_a_second_adapter_are_those_of_the_first():
    model = get_peft_model(base(), CONFIGS["lora"]())
    before = list(model_parameters(model))
    model.add_adapter("other", CONFIGS["lora"]())
    model.set_adapter("other")
    assert list(model_parameters(model)) == before
    model(ones())
    assert list(model_parameters(model)) == before

"""An adapter of a method on layers, in Hugging Face PEFT and here: what must be equal, for any such method."""

import warnings

import numpy as np
import peft
import torch
from mindspore import Tensor
from pairs import WIDTH, disturb, inputs, make_colliding, make_pair, move, step_both, their_logits

from mindpet.files.adapter import without_doubles
from mindpet.files.convert import convert
from mindpet.files.keys import without_ties
from mindpet.files.merge import merge
from mindpet.files.names import to_torch
from mindpet.files.tensors import TensorFile
from mindpet.graph import load_delta
from mindpet.peft import PeftModel, get_peft_model

TENSORS = "adapter_model.safetensors"


SIZE = 0.3  # of the noise on trained values


def close(got, expected):
    """Equal but for rounding."""
    np.testing.assert_allclose(got, expected, atol=1e-5)


def same_tensors(ours, theirs, config=None):
    """The same keys and, but for rounding, values, in two files; with the configuration, but for those of ties."""
    ours, theirs = (without_doubles(TensorFile(file).read_all()) for file in (ours, theirs))
    if config is not None:
        theirs = without_ties(theirs, config)
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], atol=2e-6, err_msg=key)


def theirs_loads_and_merges(kind, their_config, rng, folder):
    """Forward, the base within `disable_adapter`, and every merged weight: online, and of the files."""
    theirs, ours = make_pair(kind, folder / "base")
    wrapped = peft.get_peft_model(theirs, their_config).eval()
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(folder / "adapter")
    torch_inputs, our_inputs = inputs(kind, rng)
    expected, base = their_logits(wrapped, torch_inputs), ours(*our_inputs).asnumpy()
    model = PeftModel.from_pretrained(ours, folder / "adapter")
    close(model(*our_inputs).asnumpy(), expected)
    assert np.abs(base - expected).max() > 1e-2
    with model.disable_adapter():
        close(model(*our_inputs).asnumpy(), base)
    model.save_pretrained(folder / "again")
    same_tensors(folder / "again" / TENSORS, folder / "adapter" / TENSORS)
    network, merged = model.merge_and_unload(), wrapped.merge_and_unload()
    close(network(*our_inputs).asnumpy(), expected)
    weights = {name: value.numpy() for name, value in merged.state_dict().items()}
    for path, param in network.parameters_and_names():
        close(param.asnumpy(), weights[to_torch(path)])
    merge(folder / "base", folder / "adapter", folder / "merged")
    for name, value in TensorFile(folder / "merged/model.safetensors").read_all().items():
        close(value, weights[name if name in weights else f"transformer.{name}"])


def ours_loads_there(kind, our_config, rng, folder):
    """An adapter that was made here gives the same logits there, also by way of a delta file."""
    theirs, ours = make_pair(kind, folder / "base")
    model = get_peft_model(ours, our_config)
    move(model, rng, SIZE)
    model.save_pretrained(folder / "adapter")
    torch_inputs, our_inputs = inputs(kind, rng)
    expected = model(*our_inputs).asnumpy()
    wrapped = peft.PeftModel.from_pretrained(theirs, folder / "adapter").eval()
    close(their_logits(wrapped, torch_inputs), expected)
    convert(folder / "adapter", folder / "delta.safetensors")
    if not any("mindpet_trained" in param.name for param in ours.get_parameters()):
        for param in model.trainable_params():
            param.set_data(Tensor(np.zeros(param.shape, np.float32)))
        load_delta(model, folder / "delta.safetensors")
    config = model.peft_config["default"]
    convert(folder / "delta.safetensors", folder / "back", config)
    same_tensors(folder / "back" / TENSORS, folder / "adapter" / TENSORS, config)
    close(model(*our_inputs).asnumpy(), expected)


def a_step_gives_the_same(kind, their_config, rng, folder):
    """One step of SGD from the same start."""
    theirs, ours = make_pair(kind, folder / "base")
    wrapped = peft.get_peft_model(theirs, their_config).eval()
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(folder / "start")
    torch_inputs, our_inputs = inputs(kind, rng)
    model = PeftModel.from_pretrained(ours, folder / "start", is_trainable=True)
    step_both(wrapped, model, torch_inputs, our_inputs)
    wrapped.save_pretrained(folder / "theirs")
    model.save_pretrained(folder / "ours")
    same_tensors(folder / "ours" / TENSORS, folder / "theirs" / TENSORS)
    start, end = (TensorFile(folder / name / TENSORS).read_all() for name in ("start", "ours"))
    assert max(np.abs(end[key] - start[key]).max() for key in end) > 1e-4


def several_adapters(their_configs, rng, folder):
    """Two adapters in one network whose names end alike, one with a module of its own, there and here and there."""
    theirs, ours = make_colliding()
    one, two = their_configs
    wrapped = peft.get_peft_model(theirs, one, adapter_name="one").eval()
    disturb(wrapped, rng, SIZE)
    wrapped.add_adapter("two", two)
    wrapped.set_adapter("two")
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(folder / "theirs")
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)
    expected = {}
    for name in ("one", "two"):
        wrapped.set_adapter(name)
        with torch.no_grad():
            expected[name] = wrapped(torch.tensor(x)).numpy()
    model = PeftModel.from_pretrained(ours, folder / "theirs/one", "one")
    model.load_adapter(folder / "theirs/two", "two")
    for name in ("two", "one", "two"):
        model.set_adapter(name)
        close(model(Tensor(x)).asnumpy(), expected[name])
    model.save_pretrained(folder / "ours")
    for name in ("one", "two"):
        again = peft.PeftModel.from_pretrained(make_colliding()[0], folder / "ours" / name).eval()
        with torch.no_grad():
            close(again(torch.tensor(x)).numpy(), expected[name])
    assert np.abs(expected["one"] - expected["two"]).max() > 1e-2
    return model, Tensor(x), expected


def ours_loads_there_without_a_warning(our_config, rng, folder):
    """Layers are chosen by what only one of the two libraries knows; every field of the file is known there."""
    theirs, ours = make_colliding()
    model = get_peft_model(ours, our_config)
    move(model, rng, SIZE)
    model.save_pretrained(folder)
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = peft.PeftModel.from_pretrained(theirs, folder).eval()
    with torch.no_grad():
        close(wrapped(torch.tensor(x)).numpy(), model(Tensor(x)).asnumpy())

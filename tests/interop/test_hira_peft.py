"""HiRA from Hugging Face PEFT to mindpet and back."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.errors import CheckpointError
from mindpet.files.tensors import TensorFile
from mindpet.peft import HiraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
FIELDS = {
    "bert": {"target_modules": ["query", "value", "output.dense", "word_embeddings"]},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}
KINDS = pytest.mark.parametrize("kind", list(TASKS))


def fields(kind, **more):
    """The keywords of the configuration, there and here."""
    return {"r": 6, "task_type": TASKS[kind], **FIELDS[kind], **more}


def theirs(kind, **more):
    import peft

    return peft.HiraConfig(**fields(kind, **more))


def test_the_defaults_are_theirs():
    import peft

    ours, there = HiraConfig().to_dict(), peft.HiraConfig().to_dict()
    assert ours == {**there, "peft_version": ours["peft_version"]}


@KINDS
def test_it_loads_and_merges(kind, mode, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, theirs(kind), rng, tmp_path)


@KINDS
def test_ours_loads_there(kind, rng, tmp_path):
    from both_ways import ours_loads_there

    ours_loads_there(kind, HiraConfig(**fields(kind)), rng, tmp_path)


@KINDS
def test_a_step_of_sgd_gives_the_same_adapter(kind, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same(kind, theirs(kind), rng, tmp_path)


def test_several_adapters_and_a_module_that_is_saved(rng, tmp_path):
    import peft
    from both_ways import several_adapters

    one = peft.HiraConfig(r=4, target_modules=["fc", "attn"], modules_to_save=["my_classifier"])
    two = peft.HiraConfig(r=3, target_modules=["fc"])
    several_adapters((one, two), rng, tmp_path)


def test_a_rank_pattern(rng, tmp_path):
    """Hugging Face PEFT (0.21) keeps to it in an adapter that joins another one, and passes over it in the first."""
    import peft
    import torch
    from both_ways import SIZE, close
    from pairs import WIDTH, disturb, make_colliding

    config = {"r": 4, "target_modules": ["fc", "attn"], "rank_pattern": {"block.fc": 2, "1.attn": 3}}
    theirs_model, ours = make_colliding()
    wrapped = peft.get_peft_model(theirs_model, peft.HiraConfig(**config), "first").eval()
    wrapped.add_adapter("second", peft.HiraConfig(**config))
    wrapped.set_adapter("second")
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(tmp_path)
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)
    model = PeftModel.from_pretrained(ours, tmp_path / "second")
    with torch.no_grad():
        close(model(Tensor(x)).asnumpy(), wrapped(torch.tensor(x)).numpy())
    network = model.unload()
    with pytest.raises(CheckpointError, match=r"block.fc.hira_A: \[2, 6\] is needed, but it is \[4, 6\]"):
        PeftModel.from_pretrained(network, tmp_path / "first")


CONVOLUTIONS = {"Conv1d": (7,), "Conv2d": (5, 6), "Conv3d": (4, 5, 4)}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, rng, tmp_path):
    import peft
    import torch
    from both_ways import SIZE, close
    from pairs import disturb

    torch.manual_seed(3)
    model = torch.nn.Sequential(getattr(torch.nn, name)(4, 6, 3, padding=1)).eval()
    convolution = getattr(nn, name)(4, 6, 3, pad_mode="pad", padding=1, has_bias=True)
    for leaf in ("weight", "bias"):
        param = getattr(convolution, leaf)
        param.set_data(Tensor(getattr(model[0], leaf).detach().numpy().reshape(param.shape)))
    x = rng.normal(size=(2, 4, *CONVOLUTIONS[name])).astype(np.float32)
    wrapped = peft.get_peft_model(model, peft.HiraConfig(r=4, target_modules=["0"])).eval()
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = wrapped(torch.tensor(x)).numpy()
    ours = PeftModel.from_pretrained(nn.SequentialCell(convolution), tmp_path)
    close(ours(Tensor(x)).asnumpy(), expected)
    ours.save_pretrained(tmp_path / "ours")
    assert TensorFile(tmp_path / "ours/adapter_model.safetensors").shapes == (
        TensorFile(tmp_path / "adapter_model.safetensors").shapes
    )
    weight = ours.merge_and_unload()[0].weight.asnumpy()
    close(weight.ravel(), wrapped.merge_and_unload()[0].weight.detach().numpy().ravel())


@pytest.mark.parametrize("init", [True, False, "gaussian", None])
@pytest.mark.parametrize("layer", ["Linear", "Embedding", "Conv2d"])
def test_the_start_is_as_large_as_theirs(layer, init, tmp_path):
    """Other random numbers, but of the same distribution."""
    import peft
    import torch

    sizes = (128, 64, 3) if layer == "Conv2d" else (128, 64)
    ours = {"Linear": nn.Dense, "Embedding": nn.Embedding, "Conv2d": nn.Conv2d}[layer](*sizes)
    config = {"r": 32, "target_modules": ["0"], "init_weights": init}
    model = torch.nn.Sequential(getattr(torch.nn, layer)(*sizes))
    peft.get_peft_model(model, peft.HiraConfig(**config)).save_pretrained(tmp_path / "theirs")
    get_peft_model(nn.SequentialCell(ours), HiraConfig(**config)).save_pretrained(tmp_path / "ours")
    found = [TensorFile(tmp_path / who / "adapter_model.safetensors").read_all() for who in ("ours", "theirs")]
    assert set(found[0]) == set(found[1])
    for key, value in found[0].items():
        np.testing.assert_allclose(value.std(), found[1][key].std(), rtol=0.05)
        if init is True:  # of a uniform distribution
            np.testing.assert_allclose(np.abs(value).max(), np.abs(found[1][key]).max(), rtol=0.3)


@pytest.mark.parametrize(
    "choice", [{"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": "fc"}]
)
def test_a_choice_of_layers_is_understood_there(choice, rng, tmp_path):
    from both_ways import ours_loads_there_without_a_warning

    ours_loads_there_without_a_warning(HiraConfig(r=4, target_modules=["fc", "attn"], **choice), rng, tmp_path)

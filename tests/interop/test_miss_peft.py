"""MiSS from Hugging Face PEFT to mindpet and back."""

import numpy as np
import pytest
from mindspore import nn

from mindpet.files.tensors import TensorFile
from mindpet.peft import MissConfig, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}  # Hugging Face PEFT has no MiSS on the layers of GPT-2
FIELDS = {
    "bert": {"target_modules": ["query", "value", "output.dense"]},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}
VARIANTS = {
    "plain": {"r": 8},
    "padded": {"r": 7},
    "mini": {"r": 6, "mini_r": 4, "init_weights": "mini"},
    "bat": {"r": 8, "init_weights": "bat"},
}
KINDS = pytest.mark.parametrize("kind", list(TASKS))
EVERY = pytest.mark.parametrize("variant", list(VARIANTS))


def fields(kind, variant="padded", **more):
    """The keywords of the configuration, there and here."""
    return {"task_type": TASKS[kind], **FIELDS[kind], **VARIANTS[variant], **more}


def theirs(kind, variant="padded", **more):
    import peft

    return peft.MissConfig(**fields(kind, variant, **more))


def test_the_defaults_are_theirs():
    import peft

    ours, there = MissConfig().to_dict(), peft.MissConfig().to_dict()
    assert ours == {**there, "peft_version": ours["peft_version"]}


@KINDS
@EVERY
def test_it_loads_and_merges(kind, variant, mode, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, theirs(kind, variant), rng, tmp_path)


@pytest.mark.parametrize("bias", ["all", "miss_only"])
def test_biases_that_train_along(bias, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges("bert", theirs("bert", bias=bias), rng, tmp_path)


@EVERY
@pytest.mark.parametrize("bias", ["none", "all", "miss_only"])
def test_ours_loads_there(variant, bias, rng, tmp_path):
    from both_ways import ours_loads_there

    kind = "llama" if bias == "none" else "bert"  # LLaMA has no biases
    ours_loads_there(kind, MissConfig(**fields(kind, variant, bias=bias)), rng, tmp_path)


@EVERY
def test_a_step_of_sgd_gives_the_same_adapter(variant, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same("bert", theirs("bert", variant), rng, tmp_path)


def test_several_adapters_and_a_module_that_is_saved(rng, tmp_path):
    import peft
    from both_ways import several_adapters

    one = peft.MissConfig(r=4, target_modules=["fc", "attn"], modules_to_save=["my_classifier"])
    two = peft.MissConfig(r=3, init_weights=False, target_modules=["fc"])
    several_adapters((one, two), rng, tmp_path)


def test_a_random_start_is_as_large_as_theirs(tmp_path):
    """Other random numbers, but of the same distribution: uniform, with the same bounds."""
    import peft
    import torch

    config = {"r": 32, "target_modules": ["0"], "init_weights": False}
    model = torch.nn.Sequential(torch.nn.Linear(64, 128))
    peft.get_peft_model(model, peft.MissConfig(**config)).save_pretrained(tmp_path / "theirs")
    get_peft_model(nn.SequentialCell(nn.Dense(64, 128)), MissConfig(**config)).save_pretrained(tmp_path / "ours")
    found = [TensorFile(tmp_path / who / "adapter_model.safetensors").read_all() for who in ("ours", "theirs")]
    ours, there = (values["base_model.model.0.miss_block"] for values in found)
    assert abs(np.abs(ours).max() / np.abs(there).max() - 1) < 0.02 and abs(ours.std() / there.std() - 1) < 0.05


@pytest.mark.parametrize(
    "choice", [{"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": "fc"}]
)
def test_a_choice_of_layers_is_understood_there(choice, rng, tmp_path):
    from both_ways import ours_loads_there_without_a_warning

    ours_loads_there_without_a_warning(MissConfig(r=4, target_modules=["fc", "attn"], **choice), rng, tmp_path)

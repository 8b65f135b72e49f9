"""VeRA from Hugging Face PEFT to mindpet and back."""

import numpy as np
import pytest

from mindpet.files.tensors import TensorFile
from mindpet.peft import PeftModel, VeraConfig, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
FIELDS = {
    "bert": {"target_modules": ["query", "value", "output.dense"]},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}
KINDS = pytest.mark.parametrize("kind", list(TASKS))


def fields(kind, **more):
    """The keywords of the configuration, there and here."""
    return {"r": 6, "d_initial": 0.5, "task_type": TASKS[kind], **FIELDS[kind], **more}


def theirs(kind, **more):
    import peft

    return peft.VeraConfig(**fields(kind, **more))


@KINDS
def test_it_loads_and_merges(kind, mode, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, theirs(kind), rng, tmp_path)


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_biases_that_train_along(bias, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges("bert", theirs("bert", bias=bias), rng, tmp_path)


@KINDS
@pytest.mark.parametrize("bias", ["none", "all", "vera_only"])
def test_ours_loads_there(kind, bias, rng, tmp_path):
    from both_ways import ours_loads_there

    if kind != "llama" or bias == "none":  # LLaMA has no biases
        ours_loads_there(kind, VeraConfig(**fields(kind, bias=bias)), rng, tmp_path)


@KINDS
def test_a_step_of_sgd_gives_the_same_adapter(kind, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same(kind, theirs(kind), rng, tmp_path)


def test_several_adapters_and_a_module_that_is_saved(rng, tmp_path):
    """Hugging Face PEFT wants one seed for all; each has matrices of its own all the same."""
    import peft
    from both_ways import several_adapters

    one = peft.VeraConfig(r=4, d_initial=0.5, target_modules=["fc", "attn"], modules_to_save=["my_classifier"])
    two = peft.VeraConfig(r=4, d_initial=0.5, target_modules=["fc"])
    several_adapters((one, two), rng, tmp_path)


def test_the_matrices_are_once_in_the_file(tmp_path):
    import peft
    from pairs import make_pair

    theirs_model, ours = make_pair("bert", tmp_path / "base")
    get_peft_model(ours, VeraConfig(**fields("bert"))).save_pretrained(tmp_path / "ours")
    peft.get_peft_model(theirs_model, theirs("bert")).save_pretrained(tmp_path / "theirs")
    shapes = [TensorFile(tmp_path / who / "adapter_model.safetensors").shapes for who in ("ours", "theirs")]
    assert shapes[0] == shapes[1]
    assert shapes[0]["base_model.vera_A"] == (6, 48) and shapes[0]["base_model.vera_B"] == (32, 6)


def test_a_file_without_its_matrices_is_refused(tmp_path):
    import peft
    from pairs import make_pair

    theirs_model, ours = make_pair("bert", tmp_path / "base")
    wrapped = peft.get_peft_model(theirs_model, theirs("bert", save_projection=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="'save_projection' must be True, but got False"):
        PeftModel.from_pretrained(ours, tmp_path / "adapter")
    assert not [param for param in ours.get_parameters() if "mindpet" in param.name]


def test_the_start_is_as_large_as_theirs(tmp_path):
    """Other random numbers, but of the same distribution: uniform, with the same bounds."""
    import peft
    from pairs import make_pair

    theirs_model, ours = make_pair("llama", tmp_path)
    config = fields("llama", r=64)
    peft.get_peft_model(theirs_model, peft.VeraConfig(**config)).save_pretrained(tmp_path / "theirs")
    get_peft_model(ours, VeraConfig(**config)).save_pretrained(tmp_path / "ours")
    found = [TensorFile(tmp_path / who / "adapter_model.safetensors").read_all() for who in ("ours", "theirs")]
    for key in ("base_model.vera_A", "base_model.vera_B"):
        mine, other = (values[key] for values in found)
        assert abs(np.abs(mine).max() / np.abs(other).max() - 1) < 0.02 and abs(mine.std() / other.std() - 1) < 0.05
    for key in set(found[0]) - {"base_model.vera_A", "base_model.vera_B"}:
        np.testing.assert_array_equal(found[0][key], found[1][key])


@pytest.mark.parametrize(
    "choice", [{"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": "fc"}]
)
def test_a_choice_of_layers_is_understood_there(choice, rng, tmp_path):
    from both_ways import ours_loads_there_without_a_warning

    config = VeraConfig(r=4, d_initial=0.5, target_modules=["fc", "attn"], **choice)
    ours_loads_there_without_a_warning(config, rng, tmp_path)

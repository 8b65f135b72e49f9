"""LayerNorm tuning from Hugging Face PEFT to mindpet and back."""

import warnings

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.files.tensors import TensorFile
from mindpet.peft import LNTuningConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
FIELDS = {
    "bert": {"target_modules": ["attention.output.LayerNorm", "embeddings.LayerNorm"]},
    "gpt2": {"target_modules": ["ln_1", "ln_f"]},
    "llama": {"target_modules": ["input_layernorm", "norm"]},
}
KINDS = pytest.mark.parametrize("kind", list(TASKS))


def fields(kind, **more):
    """The keywords of the configuration, there and here."""
    return {"task_type": TASKS[kind], **FIELDS[kind], **more}


def theirs(kind, **more):
    import peft

    return peft.LNTuningConfig(**fields(kind, **more))


@KINDS
def test_it_loads_and_merges(kind, mode, rng, tmp_path):
    """Without the head of a task, which Hugging Face PEFT does not merge with this method."""
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, theirs(kind, task_type=None), rng, tmp_path)


@KINDS
def test_ours_loads_there(kind, rng, tmp_path):
    from both_ways import ours_loads_there

    ours_loads_there(kind, LNTuningConfig(**fields(kind)), rng, tmp_path)


@KINDS
def test_a_step_of_sgd_gives_the_same_adapter(kind, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same(kind, theirs(kind), rng, tmp_path)


def test_several_adapters_and_a_module_that_is_saved(rng, tmp_path):
    """Also a layer that is no norm, which Hugging Face PEFT trains all the same; there all have the same targets."""
    import peft
    from both_ways import several_adapters

    one = peft.LNTuningConfig(target_modules=["norm", "attn"], modules_to_save=["my_classifier"])
    two = peft.LNTuningConfig(target_modules=["norm", "attn"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        several_adapters((one, two), rng, tmp_path)


def test_regular_expressions_and_exclusions_mean_the_same_norms(rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    choice = {"target_modules": r".*layernorm", "exclude_modules": r".*\.0\..*"}
    theirs_loads_and_merges("llama", theirs("llama", **choice), rng, tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_norms_are_found_by_themselves(kind, tmp_path):
    import peft
    from pairs import make_pair

    their_model, ours = make_pair(kind, tmp_path)
    get_peft_model(ours, LNTuningConfig()).save_pretrained(tmp_path / "ours")
    peft.get_peft_model(their_model, peft.LNTuningConfig()).save_pretrained(tmp_path / "theirs")
    files = [TensorFile(tmp_path / who / "adapter_model.safetensors").read_all() for who in ("ours", "theirs")]
    assert set(files[0]) == set(files[1])
    for key, value in files[0].items():
        np.testing.assert_array_equal(value, files[1][key])


def test_a_batch_norm_with_its_statistics(rng, tmp_path):
    import peft
    import torch
    from both_ways import SIZE, close
    from pairs import disturb

    def make():
        torch.manual_seed(3)
        norms = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), *norms)

    model, x = make(), rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    convolution = nn.Conv2d(3, 4, 3, pad_mode="valid", has_bias=True)
    for leaf in ("weight", "bias"):
        getattr(convolution, leaf).set_data(Tensor(getattr(model[0], leaf).detach().numpy()))
    ours = nn.SequentialCell(convolution, *(nn.BatchNorm2d(4, momentum=0.9) for _ in range(2))).set_train(False)
    wrapped = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["1"]))
    disturb(wrapped, rng, SIZE)
    wrapped.train()(torch.tensor(x))
    model[2].reset_running_stats()  # of the base, which moved as well
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = wrapped(torch.tensor(x)).numpy()
    loaded = PeftModel.from_pretrained(ours, tmp_path / "theirs")
    close(loaded(Tensor(x, ms.float32)).asnumpy(), expected)
    loaded.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    with torch.no_grad():
        close(again(torch.tensor(x)).numpy(), expected)
    close(loaded.merge_and_unload()(Tensor(x)).asnumpy(), expected)

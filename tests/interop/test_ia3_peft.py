"""IA3 from Hugging Face PEFT to mindpet and back."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.peft import IA3Config, PeftModel

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
FIELDS = {
    "bert": {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}
EXPRESSIONS = {"target_modules": r".*\.(k_proj|up_proj)", "feedforward_modules": r".*1\..*up_proj"}
KINDS = pytest.mark.parametrize("kind", list(TASKS))


def theirs(kind, **fields):
    import peft

    return peft.IA3Config(**{"task_type": TASKS[kind], **FIELDS[kind], **fields})


@KINDS
def test_it_loads_and_merges(kind, mode, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, theirs(kind), rng, tmp_path)


def test_regular_expressions_mean_the_same_layers(rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges("llama", theirs("llama", **EXPRESSIONS), rng, tmp_path)


@KINDS
def test_ours_loads_there(kind, rng, tmp_path):
    from both_ways import ours_loads_there

    ours_loads_there(kind, IA3Config(task_type=TASKS[kind], **FIELDS[kind]), rng, tmp_path)


@KINDS
def test_a_step_of_sgd_gives_the_same_adapter(kind, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same(kind, theirs(kind), rng, tmp_path)


def test_several_adapters_and_a_module_that_is_saved(rng, tmp_path):
    import peft
    from both_ways import several_adapters

    one = peft.IA3Config(target_modules=["fc", "attn"], feedforward_modules=["attn"], modules_to_save=["my_classifier"])
    two = peft.IA3Config(target_modules=["fc"], feedforward_modules=[])
    several_adapters((one, two), rng, tmp_path)


def test_the_end_of_a_name_chooses_a_layer_there_and_here(rng, tmp_path):
    """Also inside of a part of it: `my_classifier` is one of `classifier`."""
    import peft
    from both_ways import several_adapters

    inner = peft.IA3Config(target_modules=["classifier", "my_classifier"], feedforward_modules=["classifier"])
    other = peft.IA3Config(target_modules=["fc"], feedforward_modules=["fc"])
    model, _, _ = several_adapters((inner, other), rng, tmp_path)
    chosen = [target.arguments["feedforward"] for target in model.adapters["one"].plan.targets]
    assert chosen == [True, True]


CONVOLUTIONS = {
    "of two axes": ("Conv2d", {}, []),
    "of two axes, before": ("Conv2d", {}, ["0"]),
    "in groups": ("Conv2d", {"groups": 2}, []),
    "of three axes": ("Conv3d", {}, []),
    "of three axes, before": ("Conv3d", {}, ["0"]),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, rng, tmp_path):
    import peft
    import torch
    from both_ways import SIZE, close
    from pairs import disturb

    cls, keywords, inner = CONVOLUTIONS[name]
    torch.manual_seed(3)
    model = torch.nn.Sequential(getattr(torch.nn, cls)(4, 6, 3, padding=1, **keywords)).eval()
    convolution = getattr(nn, cls)(
        4, 6, 3, pad_mode="pad", padding=1, has_bias=True, **({"group": 2} if keywords else {})
    )
    for leaf in ("weight", "bias"):
        getattr(convolution, leaf).set_data(Tensor(getattr(model[0], leaf).detach().numpy()))
    x = rng.normal(size=(2, 4, *(5,) * (2 if cls == "Conv2d" else 3))).astype(np.float32)
    wrapped = peft.get_peft_model(model, peft.IA3Config(target_modules=["0"], feedforward_modules=inner)).eval()
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = wrapped(torch.tensor(x)).numpy()
    ours = PeftModel.from_pretrained(nn.SequentialCell(convolution), tmp_path)
    close(ours(Tensor(x)).asnumpy(), expected)
    ours.save_pretrained(tmp_path / "ours")
    merged = ours.merge_and_unload()
    close(merged(Tensor(x)).asnumpy(), expected)
    close(merged[0].weight.asnumpy(), wrapped.merge_and_unload()[0].weight.detach().numpy())


@pytest.mark.parametrize(
    "choice", [{"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": "fc"}]
)
def test_a_choice_of_layers_is_understood_there(choice, rng, tmp_path):
    from both_ways import ours_loads_there_without_a_warning

    config = IA3Config(target_modules=["fc", "attn"], feedforward_modules=["attn"], **choice)
    ours_loads_there_without_a_warning(config, rng, tmp_path)

"""LoHa and LoKr from Hugging Face PEFT to mindpet and back."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.files.tensors import TensorFile
from mindpet.peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}  # there neither is for the Conv1D of GPT-2
TARGETS = {"bert": ["query", "value", "output.dense"], "llama": ["q_proj", "v_proj", "down_proj"]}
OURS = {"LoHa": LoHaConfig, "LoKr": LoKrConfig}
# The method, and its own fields.
VARIANTS = {
    "loha": ("LoHa", {"r": 3, "alpha": 5}),
    "loha of a high rank": ("LoHa", {"r": 20, "alpha": 5}),
    "lokr": ("LoKr", {"r": 2, "alpha": 5}),
    "lokr of whole matrices": ("LoKr", {"r": 100, "alpha": 150}),
    "lokr of four factors": ("LoKr", {"r": 1, "alpha": 2, "decompose_both": True}),
    "lokr of a short matrix": ("LoKr", {"r": 3, "alpha": 5, "decompose_factor": 4}),
}
EVERY = pytest.mark.parametrize("variant", list(VARIANTS))
KINDS = pytest.mark.parametrize("kind", list(TASKS))
PATTERNS = {"rank_pattern": {"query": 5, r".*0.*value": 1}, "alpha_pattern": {"output.dense": 7}}


def make(variant, kind=None, is_ours=False, **more):
    """A configuration, here or there."""
    import peft

    name, fields = VARIANTS[variant]
    cls = OURS[name] if is_ours else getattr(peft, f"{name}Config")
    given = {"task_type": TASKS[kind], "target_modules": TARGETS[kind]} if kind else {}
    return cls(**{"init_weights": False, **given, **fields, **more})


@EVERY
@KINDS
def test_it_loads_and_merges(kind, variant, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, make(variant, kind), rng, tmp_path)


@EVERY
def test_ours_loads_there(variant, mode, rng, tmp_path):
    from both_ways import ours_loads_there

    ours_loads_there("llama", make(variant, "llama", is_ours=True), rng, tmp_path)


@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_ranks_and_alphas_of_single_layers(variant, rng, tmp_path):
    from both_ways import ours_loads_there, theirs_loads_and_merges

    theirs_loads_and_merges("bert", make(variant, "bert", **PATTERNS), rng, tmp_path / "theirs")
    ours_loads_there("bert", make(variant, "bert", is_ours=True, **PATTERNS), rng, tmp_path / "ours")


@EVERY
def test_a_step_of_sgd_gives_the_same_adapter(variant, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same("bert", make(variant, "bert"), rng, tmp_path)


@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_several_adapters_and_a_module_that_is_saved(variant, rng, tmp_path):
    from both_ways import several_adapters

    one = make(variant, target_modules=["fc", "attn"], modules_to_save=["my_classifier"])
    two = make(variant, target_modules=["fc"], r=1)
    several_adapters((one, two), rng, tmp_path)


@pytest.mark.parametrize("variant", ["loha", "lokr"])
@pytest.mark.parametrize(
    "choice", [{"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": "fc"}]
)
def test_a_choice_of_layers_is_understood_there(variant, choice, rng, tmp_path):
    from both_ways import ours_loads_there_without_a_warning

    config = make(variant, is_ours=True, target_modules=["fc", "attn"], **choice)
    ours_loads_there_without_a_warning(config, rng, tmp_path)


SIZES = [(1, 7), (2, 3), (12, 30), (48, 32), (64, 36), (97, 100)]  # features that come out, and that go in
FACTORS = (-1, 1, 2, 4, 5, 12, 50)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 4, 1000])
def test_the_small_matrices_have_their_shapes(rank, both):
    """Which number of features makes which two matrices, and which of them is factored."""
    import peft
    import torch

    for outs, ins in SIZES:
        for factor in FACTORS:
            fields = {"r": rank, "decompose_both": both, "decompose_factor": factor, "target_modules": ["0"]}
            theirs = peft.get_peft_model(
                torch.nn.Sequential(torch.nn.Linear(ins, outs, device="meta")), peft.LoKrConfig(**fields)
            )
            expected = {
                name.replace("base_model.model.0.", "").replace(".default", ""): tuple(param.shape)
                for name, param in theirs.named_parameters()
                if param.requires_grad
            }
            ours = get_peft_model(nn.SequentialCell(nn.Dense(ins, outs)), LoKrConfig(**fields))
            found = {param.name.rpartition("mindpet_delta_")[2]: param.shape for param in ours.trainable_params()}
            assert found == expected, (outs, ins, factor)


STARTS = [
    (variant, init)
    for variant in VARIANTS
    for init in (True, False, "lycoris")
    if init != "lycoris" or VARIANTS[variant][0] == "LoKr"
]


@pytest.mark.parametrize("variant, init", STARTS)
def test_the_start_is_as_large_as_theirs(variant, init, tmp_path):
    """Other random numbers, but of the same distribution: uniform, with the same bounds."""
    import peft
    import torch

    fields = {"init_weights": init, "target_modules": ["0"]}
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(900, 900)), make(variant, **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = get_peft_model(nn.SequentialCell(nn.Dense(900, 900)), make(variant, is_ours=True, **fields))
    ours.save_pretrained(tmp_path / "ours")
    found = [TensorFile(tmp_path / who / "adapter_model.safetensors").read_all() for who in ("ours", "theirs")]
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        sizes = [np.abs(values[key]).max() for values in found]
        if not sizes[1]:
            assert not sizes[0], key
        elif value.size > 500:
            assert abs(sizes[0] / sizes[1] - 1) < 0.03 and abs(value.std() / found[1][key].std() - 1) < 0.1, key
        else:
            assert 0.4 < sizes[0] / sizes[1] < 2.5, key


CONVOLUTIONS = {  # as PyTorch has it, and what MindSpore calls otherwise
    "of one axis": ("Conv1d", (12, 16, 3), {"padding": 1}, {"pad_mode": "pad"}),
    "of one axis and tap": ("Conv1d", (12, 16, 1), {}, {}),
    "of two axes": ("Conv2d", (12, 16, 3), {"padding": 1, "stride": 2}, {"pad_mode": "pad"}),
    "of another shape": ("Conv2d", (12, 16, (3, 2)), {}, {}),
    "of one tap": ("Conv2d", (12, 16, 1), {}, {}),
    "in groups": ("Conv2d", (12, 16, 3), {"groups": 2}, {"group": 2}),
}


# Along one axis LoKr is not the Kronecker product there (0.21) where its second matrix is whole, so it is not here.
CASES = [
    (name, variant)
    for name, (cls, *_) in CONVOLUTIONS.items()
    for variant in ("loha", "lokr", "lokr of whole matrices", "lokr of four factors")
    if cls == "Conv2d" or variant == "loha"
]


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("name, variant", CASES)
def test_convolutions(name, variant, effective, rng, tmp_path):
    import peft
    import torch
    from both_ways import SIZE, close, same_tensors
    from pairs import disturb

    cls, arguments, keywords, own = CONVOLUTIONS[name]
    torch.manual_seed(3)
    model = torch.nn.Sequential(getattr(torch.nn, cls)(*arguments, **keywords)).eval()
    same = {key: value for key, value in keywords.items() if key != "groups"}
    convolution = getattr(nn, cls)(*arguments, has_bias=True, **{"pad_mode": "valid", **same, **own})
    for leaf in ("weight", "bias"):
        param = getattr(convolution, leaf)
        param.set_data(Tensor(getattr(model[0], leaf).detach().numpy().reshape(param.shape)))
    x = rng.normal(size=(2, 12, *(6,) * (len(model[0].weight.shape) - 2))).astype(np.float32)
    wrapped = peft.get_peft_model(model, make(variant, target_modules=["0"], use_effective_conv2d=effective)).eval()
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected, base = wrapped(torch.tensor(x)).numpy(), model[0].base_layer(torch.tensor(x)).numpy()
    assert np.abs(expected - base).max() > 1e-2
    ours = PeftModel.from_pretrained(nn.SequentialCell(convolution), tmp_path / "theirs")
    close(ours(Tensor(x)).asnumpy(), expected)
    ours.save_pretrained(tmp_path / "ours")
    same_tensors(*(tmp_path / who / "adapter_model.safetensors" for who in ("ours", "theirs")))
    merged = ours.merge_and_unload()
    close(merged(Tensor(x)).asnumpy(), expected)
    weight = wrapped.merge_and_unload()[0].weight.detach().numpy()
    close(merged[0].weight.asnumpy().reshape(weight.shape), weight)


@pytest.mark.parametrize("rescales", [False, True])
@pytest.mark.parametrize("name", ["LoHa", "LoKr"])
def test_dropout_of_rows_does_what_it_does_there(name, rescales, rng):
    """In both the same rows are zero for every sample, and the others have the same factor, by how many they are."""
    import peft
    import torch

    fields = {"r": 2, "alpha": 3, "rank_dropout": 0.5, "init_weights": False, "target_modules": ["0"]}
    fields.update({"rank_dropout_scale": rescales} if name == "LoKr" else {})
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 12)), getattr(peft, f"{name}Config")(**fields))
    ours = get_peft_model(nn.SequentialCell(nn.Dense(6, 12)), OURS[name](**fields))
    x = rng.normal(size=(5, 6)).astype(np.float32)

    def their_delta():
        return (theirs(torch.tensor(x)) - theirs.base_model.model[0].base_layer(torch.tensor(x))).detach().numpy()

    def our_delta():
        base = ours.network[0]
        return ours(Tensor(x)).asnumpy() - x @ base.weight.asnumpy().T - base.bias.asnumpy()

    factors = []
    for model, delta in ((theirs, their_delta), (ours, our_delta)):
        getattr(model, "eval", lambda: ours.set_train(False))()
        whole, found = delta(), {}
        getattr(model, "train", ours.set_train)()
        for _ in range(30):
            ratio = delta() / whole
            assert np.ptp(ratio, axis=0).max() < 1e-2
            found[int((ratio[0] > 0.5).sum())] = float(ratio[0].max())
        factors.append(found)
    common = set(factors[0]) & set(factors[1]) - {0}
    assert len(common) >= 3
    for kept in common:
        expected = 12 / kept if rescales or name == "LoHa" else 1
        for found in factors:
            assert found[kept] == pytest.approx(expected, rel=1e-2)


def test_a_file_in_half_precision(rng, tmp_path):
    import peft
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(8, 6)).half()
    wrapped = peft.get_peft_model(model, make("lokr", target_modules=["0"]), autocast_adapter_dtype=False)
    wrapped.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(nn.SequentialCell(nn.Dense(8, 6, dtype=ms.float16)), tmp_path)
    assert ours(Tensor(rng.normal(size=(2, 8)).astype(np.float16))).dtype == ms.float16

"""OFT from Hugging Face PEFT to mindpet and back."""

import itertools

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet.errors import ConfigError
from mindpet.files.adapter import VERSION
from mindpet.peft import OFTConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}  # it has no OFT for the layers of GPT-2
FIELDS = {
    "bert": {"target_modules": ["query", "value", "output.dense"]},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}
KINDS = pytest.mark.parametrize("kind", list(TASKS))
VARIANTS = {
    "exact": {"use_cayley_neumann": False},
    "seven terms": {"num_cayley_neumann_terms": 7},
    "three terms": {"num_cayley_neumann_terms": 3},
    "two terms": {"num_cayley_neumann_terms": 2},
    "shared": {"block_share": True},
    "constrained": {"coft": True, "eps": 0.5},
    "constrained and shared": {"coft": True, "eps": 0.2, "block_share": True, "use_cayley_neumann": False},
    "blocks": {"r": 2, "oft_block_size": 0},
    "all biases": {"bias": "all"},
    "the targets' biases": {"bias": "oft_only"},
    "another size": {"oft_block_size": 7},  # 8 divides 32 and 48
}


def fields(kind, variant=None):
    """The keywords of the configuration, there and here."""
    return {"oft_block_size": 8, "task_type": TASKS[kind], **FIELDS[kind], **VARIANTS.get(variant, {})}


def theirs(kind, variant=None):
    import peft

    return peft.OFTConfig(**fields(kind, variant))


@KINDS
def test_it_loads_and_merges(kind, mode, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, theirs(kind), rng, tmp_path)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_loads_and_merges(variant, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges("bert", theirs("bert", variant), rng, tmp_path)


@KINDS
@pytest.mark.parametrize("variant", [None, "exact", "shared", "blocks"])
def test_ours_loads_there(kind, variant, rng, tmp_path):
    from both_ways import ours_loads_there

    ours_loads_there(kind, OFTConfig(**fields(kind, variant)), rng, tmp_path)


@pytest.mark.parametrize("variant", [None, "exact", "shared", "three terms"])
def test_a_step_of_sgd_gives_the_same_adapter(variant, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same("bert", theirs("bert", variant), rng, tmp_path)


def test_constrained_training_takes_the_same_way(mode, rng, tmp_path):
    """Each step starts from the nearest rotation that is allowed."""
    import peft
    import torch
    from both_ways import TENSORS, disturb, same_tensors
    from pairs import WIDTH, make_colliding

    model, ours = make_colliding()
    config = peft.OFTConfig(target_modules=["fc"], oft_block_size=3, coft=True, eps=0.3)
    wrapped = peft.get_peft_model(model, config).train()
    disturb(wrapped, rng, 1.0)
    wrapped.save_pretrained(tmp_path / "start")
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)
    optimizer = torch.optim.SGD([param for param in wrapped.parameters() if param.requires_grad], lr=0.5)
    ours = PeftModel.from_pretrained(ours, tmp_path / "start", is_trainable=True)

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.model = ours

        def construct(self, x):
            return ops.square(self.model(x)).mean()

    step = nn.TrainOneStepCell(Loss(), nn.SGD(ours.trainable_params(), 0.5)).set_train()
    for number in range(3):
        optimizer.zero_grad()
        wrapped(torch.tensor(x)).square().mean().backward()
        optimizer.step()
        step(Tensor(x))
        wrapped.save_pretrained(tmp_path / f"theirs{number}")
        ours.save_pretrained(tmp_path / f"ours{number}")
        same_tensors(tmp_path / f"ours{number}" / TENSORS, tmp_path / f"theirs{number}" / TENSORS)


@pytest.mark.parametrize("variant", [None, "exact", "shared", "constrained"])
def test_embeddings(variant, mode, rng, tmp_path):
    import peft
    import torch
    from both_ways import TENSORS, close, disturb, same_tensors

    fields = {"oft_block_size": 4, "target_modules": ["0"], **VARIANTS.get(variant, {})}
    wrapped = peft.get_peft_model(torch.nn.Sequential(torch.nn.Embedding(10, 12)), peft.OFTConfig(**fields)).eval()
    disturb(wrapped, rng, 0.3)
    wrapped.save_pretrained(tmp_path / "theirs")
    ids, table = rng.integers(0, 10, (3, 5)), wrapped.base_model.model[0].base_layer.weight.detach().numpy().copy()
    expected = wrapped(torch.tensor(ids)).detach().numpy()
    ours = nn.SequentialCell(nn.Embedding(10, 12, embedding_table=Tensor(table)))
    model = PeftModel.from_pretrained(ours, tmp_path / "theirs")
    close(model(Tensor(ids.astype(np.int32))).asnumpy(), expected)
    model.save_pretrained(tmp_path / "ours")
    if variant != "constrained":  # there it changes what is trained where it is called
        same_tensors(tmp_path / "ours" / TENSORS, tmp_path / "theirs" / TENSORS)
    merged = model.merge_and_unload()
    close(merged[0].embedding_table.asnumpy(), wrapped.merge_and_unload()[0].weight.detach().numpy())


def test_several_adapters_and_a_module_that_is_saved(rng, tmp_path):
    import peft
    from both_ways import several_adapters

    one = peft.OFTConfig(oft_block_size=3, target_modules=["fc", "attn"], modules_to_save=["my_classifier"])
    two = peft.OFTConfig(oft_block_size=2, target_modules=["fc"], use_cayley_neumann=False)
    several_adapters((one, two), rng, tmp_path)


@pytest.mark.parametrize(
    "choice", [{"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": "fc"}]
)
def test_a_choice_of_layers_is_understood_there(choice, rng, tmp_path):
    from both_ways import ours_loads_there_without_a_warning

    ours_loads_there_without_a_warning(
        OFTConfig(oft_block_size=3, target_modules=["fc", "attn"], **choice), rng, tmp_path
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["r", "oft_block_size"])
def test_the_nearest_block_size_is_the_same_there(name):
    import peft
    import torch

    for features, size in itertools.product((8, 12, 30, 100), (2, 3, 7, 25, 40)):
        fields = {"target_modules": ["0"], "r": 0, "oft_block_size": 0, name: size}
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(features, 4)), peft.OFTConfig(**fields))
        expected, ours = tuple(model.base_model.model[0].oft_R["default"].weight.shape), nn.Dense(features, 4)
        if 0 in expected:
            with pytest.raises(ConfigError, match="in blocks of one, which cannot be rotated"):
                get_peft_model(nn.SequentialCell(ours), OFTConfig(**fields))
        else:
            ours = get_peft_model(nn.SequentialCell(ours), OFTConfig(**fields))
            assert ours.trainable_params()[0].shape == expected


def test_its_version_can_be_taken_apart():
    from packaging.version import Version

    assert Version("0.18.0") <= Version(VERSION)

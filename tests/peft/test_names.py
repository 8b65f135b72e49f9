"""Between the names of a network and those of the PyTorch model, where names end alike."""

import numpy as np
import pytest
from mindspore import nn

from mindpet.errors import CheckpointError
from mindpet.files.names import to_mindspore, to_torch
from mindpet.peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    NameMap,
    PeftModel,
    TaskType,
    VeraConfig,
    get_peft_model,
    plan_targets,
)
from mindpet.peft.state import portable, to_network


class Part(nn.Cell):
    def __init__(self):
        super().__init__()
        self.fc, self.attn = nn.Dense(4, 4), nn.Dense(4, 4)
        self.norm, self.prenorm = nn.LayerNorm((4,)), nn.LayerNorm((4,))


class Colliding(nn.Cell):
    """Paths that are ends of others, and names that are ends of others."""

    def __init__(self):
        super().__init__()
        self.fc, self.block, self.blocks = nn.Dense(4, 4), Part(), nn.CellList([Part(), Part()])
        self.norm, self.prenorm = nn.LayerNorm((4,)), nn.LayerNorm((4,))
        self.classifier, self.my_classifier = nn.Dense(4, 2), nn.Dense(4, 2)


RENAMED = NameMap(lambda name: to_torch(f"model.{name}"), lambda name: to_mindspore(name[len("model.") :]))
NAMES = {"same": NameMap(), "renamed": RENAMED}


def file_of(plan, names):
    """The tensors of an adapter, as far as their keys and ranks count."""
    tensors, ranks = {}, {}
    for layer in plan.targets:
        rank = ranks[layer.path] = plan.config.delta_arguments(layer.path)["rank"]
        start = f"base_model.model.{names.to_torch(layer.path)}.lora_"
        tensors.update({f"{start}A.weight": np.zeros((rank, 4)), f"{start}B.weight": np.zeros((4, rank))})
    for layer in plan.modules_to_save:
        for name, param in layer.cell.parameters_and_names():
            tensors[f"base_model.model.{names.to_torch(f'{layer.path}.{name}')}"] = param.asnumpy()
    return tensors, ranks


CHOICES = {
    "one of two": {"target_modules": "fc"},
    "regex": {"target_modules": r"fc|block\.attn"},
    "ranks": {"target_modules": ["fc"], "rank_pattern": {"^fc": 3, "block.fc": 2}, "alpha_pattern": {"^fc": 5}},
    "numbers": {"target_modules": r".*\.fc", "layers_to_transform": [1]},
    "numbers of a list": {"target_modules": ["fc", "attn"], "layers_to_transform": 0},
    "all": {"target_modules": "all-linear", "layers_to_transform": [0, 1]},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["block.fc", "my_classifier"]},
    "modules": {"target_modules": ["attn"], "modules_to_save": ["norm"]},
    "head": {"target_modules": ["attn"], "task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize("names", list(NAMES.values()), ids=list(NAMES))
@pytest.mark.parametrize("choice", list(CHOICES))
def test_what_is_written_means_the_same_layers(choice, names):
    network = Colliding()
    plan = plan_targets(network, LoraConfig(r=4, lora_alpha=6, **CHOICES[choice]))
    tensors, ranks = file_of(plan, names)
    content, config = portable(tensors, plan.config, plan, network, names)
    assert config.layers_to_transform is None and config.target_modules != "all-linear"
    again = plan_targets(network, to_network(config, content, network, names))
    assert [layer.path for layer in again.targets] == [layer.path for layer in plan.targets]
    for path, rank in ranks.items():
        assert (
            again.config.delta_arguments(path) == plan.config.delta_arguments(path)
            and again.config.delta_arguments(path)["rank"] == rank
        )
    # What Hugging Face PEFT takes for a module to save is there as well.
    ends = (*(config.modules_to_save or ()), *(("classifier", "score") if config.task_type else ()))
    for path, cell in network.cells_and_names():
        if path and names.to_torch(path).endswith(ends):
            for name, _ in cell.parameters_and_names():
                assert f"base_model.model.{names.to_torch(f'{path}.{name}')}" in content


def test_a_layer_in_several_places_is_written_with_all_of_them():
    network, shared = nn.CellList([Part(), Part()]), nn.Dense(4, 4)
    for part in network:
        part.fc = shared
    plan = plan_targets(network, LoraConfig(target_modules="all-linear", rank_pattern={"0.fc": 3}))
    tensors, _ = file_of(plan, NameMap())
    _, config = portable(tensors, plan.config, plan, network, NameMap())
    assert config.target_modules == ["0.attn", "0.fc", "1.attn", "1.fc"]
    again = plan_targets(network, config)
    assert [layer.paths for layer in again.targets] == [layer.paths for layer in plan.targets]
    assert again.config.delta_arguments("0.fc")["rank"] == again.config.delta_arguments("1.fc")["rank"] == 3


def test_what_needs_no_change_is_left_as_it_is():
    network = Colliding()
    config = LoraConfig(target_modules=["fc"], rank_pattern={"fc": 2}, modules_to_save=["my_classifier"])
    plan = plan_targets(network, config)
    tensors, _ = file_of(plan, NameMap())
    content, again = portable(tensors, plan.config, plan, network, NameMap())
    assert again.to_dict() == config.to_dict() and content.keys() == tensors.keys()


def test_modules_are_found_at_the_ends_of_names():
    """Hugging Face PEFT finds every 'prenorm' with 'norm': the file has the base's own values for them."""
    network, written = Colliding(), ["block.norm", "blocks.0.norm", "blocks.1.norm", "norm"]
    plan = plan_targets(network, LoraConfig(target_modules=["fc"], modules_to_save=["norm"]))
    assert sorted(layer.path for layer in plan.modules_to_save) == written
    tensors, _ = file_of(plan, NameMap())
    content, config = portable(tensors, plan.config, plan, network, NameMap())
    assert config.modules_to_save == written
    surplus = [path.replace("norm", "prenorm") for path in written]
    added = content.keys() - tensors.keys()
    assert added == {f"base_model.model.{path}.{name}" for path in surplus for name in ("weight", "bias")}
    np.testing.assert_array_equal(content["base_model.model.prenorm.weight"], network.prenorm.gamma.asnumpy())
    again = plan_targets(network, to_network(config, content, network, NameMap()))
    assert sorted(layer.path for layer in again.modules_to_save) == sorted(written + surplus)


def test_modules_are_written_in_full_where_their_ends_are_those_of_others():
    network = nn.SequentialCell()
    network.insert_child_to_cell("model", Part())
    plan = plan_targets(network, LoraConfig(target_modules=["fc"], modules_to_save=["norm"]))
    tensors, _ = file_of(plan, NameMap())
    content, config = portable(tensors, plan.config, plan, network, NameMap())
    assert config.modules_to_save == ["model.norm"] and content.keys() == tensors.keys()


def test_modules_of_a_file_of_hugging_face():
    """The file has 'prenorm' too, for it ends with 'norm'; an entry that is not in the network stays."""
    network = Colliding()
    plan = plan_targets(network, LoraConfig(target_modules=["fc"], modules_to_save=["norm", "prenorm"]))
    tensors, _ = file_of(plan, NameMap())
    config = LoraConfig(target_modules=["fc"], modules_to_save={"norm", "score"})
    config = to_network(config, tensors, network, NameMap())
    assert sorted(config.modules_to_save) == sorted([*(layer.path for layer in plan.modules_to_save), "score"])


def test_a_str_of_modules_is_written_as_a_list():
    network = Colliding()
    plan = plan_targets(network, LoraConfig(target_modules=["fc"], modules_to_save="my_classifier"))
    assert portable({}, plan.config, plan, network, NameMap())[1].modules_to_save == ["my_classifier"]


def test_a_start_that_was_computed_exactly_is_written_as_such():
    network = Colliding()
    plan = plan_targets(network, LoraConfig(target_modules=["fc"], init_lora_weights="pissa_niter_4"))
    assert portable({}, plan.config, plan, network, NameMap())[1].init_lora_weights == "pissa"
    assert plan.config.init_lora_weights == "pissa_niter_4"


def test_statistics_have_the_names_of_pytorch():
    network = nn.SequentialCell(nn.Dense(4, 4), nn.BatchNorm1d(4))
    plan = plan_targets(network, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    content, _ = portable(file_of(plan, NameMap())[0], plan.config, plan, network, NameMap())
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert {key for key in content if ".1." in key} == {f"base_model.model.1.{leaf}" for leaf in leaves}
    assert content["base_model.model.1.num_batches_tracked"].shape == ()


def fused_file(rng, path):
    parts = {"q": 4, "k": 2}
    tensors = {}
    for part, size in parts.items():
        start = f"base_model.model.{path}{part}.lora_"
        tensors[f"{start}A.weight"] = rng.normal(size=(2, 4)).astype(np.float32)
        tensors[f"{start}B.weight"] = rng.normal(size=(size, 2)).astype(np.float32)
    return tensors


def test_a_fused_layer_beside_one_whose_path_ends_alike(rng):
    """'a.w' is fused and has rank 4; 'block.a.w' is another layer, of rank 2."""
    names = NameMap(fused={"w": {"q": 4, "k": 2}})
    tensors, config = names.fuse(fused_file(rng, "a."), LoraConfig(r=2, lora_alpha=2, target_modules=["q", "k"]))
    assert config.delta_arguments("a.w")["rank"] == 4 and config.delta_arguments("block.a.w")["rank"] == 2
    assert config.scaling("a.w") == config.scaling("block.a.w") == 1
    back, config = names.split(tensors, config)
    assert config.rank_pattern == {} and config.alpha_pattern == {}
    assert back.keys() == fused_file(rng, "a.").keys()


def test_parts_of_a_fused_layer_that_do_not_fit(rng):
    with pytest.raises(CheckpointError, match="a.q: 3 output features are expected, but it has 4"):
        NameMap(fused={"w": {"q": 3, "k": 2}}).fuse(fused_file(rng, "a."), LoraConfig(r=2, target_modules=["q"]))


def test_tasks_bring_heads():
    network = Colliding()
    plan = plan_targets(network, LoraConfig(target_modules=["fc"], task_type=TaskType.SEQ_CLS))
    tensors, _ = file_of(plan, NameMap())
    content, config = portable(tensors, plan.config, plan, network, NameMap())
    added = content.keys() - tensors.keys()
    assert added == {f"base_model.model.my_classifier.{name}" for name in ("weight", "bias")}
    again = plan_targets(network, to_network(config, content, network, NameMap()))
    assert [layer.path for layer in again.modules_to_save] == ["classifier", "my_classifier"]


class Fused(nn.Cell):
    """A layer that the PyTorch model has two in place of."""

    def __init__(self):
        super().__init__()
        self.w_qv, self.out = nn.Dense(4, 8), nn.Dense(8, 4)


class Apart(nn.Cell):
    """The two."""

    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Dense(4, 4), nn.Dense(4, 4)


@pytest.mark.parametrize("cls", [IA3Config, VeraConfig, LoHaConfig])
def test_layers_are_fused_for_lora_alone(cls, tmp_path):
    names = NameMap(fused={"w_qv": {"q": 4, "v": 4}})
    model = get_peft_model(Fused(), cls(target_modules=["w_qv", "out"]), name_map=names)
    method = cls.peft_type.value
    with pytest.raises(CheckpointError, match=rf"'fused' is for LoRA; {method} has deltas of \['w_qv'\]"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    get_peft_model(Apart(), cls(target_modules=["q", "v"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"'fused' is for LoRA; {method} has deltas of \['q', 'v'\]"):
        PeftModel.from_pretrained(Fused(), tmp_path, name_map=names)

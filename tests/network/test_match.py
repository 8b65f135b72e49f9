"""Which layers a configuration means."""

import pytest
from mindspore import nn

from mindpet.delta import LoRADense
from mindpet.errors import ConfigError, NoMatchError
from mindpet.network.match import check_patterns, exact_targets, exactly, find_targets, list_layers, pattern_value
from mindpet.peft import LoraConfig


class Block(nn.Cell):
    def __init__(self, shared):
        super().__init__()
        self.query, self.value, self.out = nn.Dense(4, 4), nn.Dense(4, 4), nn.Dense(4, 4)
        self.norm = nn.LayerNorm((4,))
        self.shared = shared
        self.experts = nn.CellList([nn.Dense(4, 4), nn.Dense(4, 4)])


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        shared = nn.Dense(4, 4)
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.CellList([Block(shared) for _ in range(3)])
        self.value_head = nn.Dense(4, 4)
        self.classifier = nn.SequentialCell(nn.Dense(4, 4), nn.ReLU())


def supported(cell):
    return isinstance(cell, nn.Dense)


def paths(**fields):
    return [layer.path for layer in find_targets(Network(), LoraConfig(**fields), supported)]


QUERIES = [f"layers.{number}.query" for number in range(3)]
VALUES = [f"layers.{number}.value" for number in range(3)]


def both(names, other):
    return [path for pair in zip(names, other) for path in pair]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"target_modules": ["query"]}, QUERIES),
        ({"target_modules": {"value", "query"}}, both(QUERIES, VALUES)),
        ({"target_modules": ["1.query", "layers.2.value"]}, ["layers.1.query", "layers.2.value"]),
        ({"target_modules": r".*\.(query|value)"}, both(QUERIES, VALUES)),
        ({"target_modules": r"layers\.[02]\.query"}, ["layers.0.query", "layers.2.query"]),
        ({"target_modules": ["query"], "exclude_modules": ["1.query"]}, ["layers.0.query", "layers.2.query"]),
        ({"target_modules": ["query"], "exclude_modules": r".*\.1\..*"}, ["layers.0.query", "layers.2.query"]),
        ({"target_modules": ["query"], "layers_to_transform": 1}, ["layers.1.query"]),
        (
            {"target_modules": ["query"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
            ["layers.0.query", "layers.2.query"],
        ),
        (
            {"target_modules": ["experts.0", "experts.1"], "layers_to_transform": [1], "layers_pattern": ["experts"]},
            [f"layers.{number}.experts.1" for number in range(3)],
        ),
        (
            {"target_modules": ["query", "experts.0"], "layers_to_transform": [1], "layers_pattern": ["x", "layers"]},
            ["layers.1.query", "layers.1.experts.0"],
        ),
        (
            {"target_modules": ["query", "layers.2.query"], "layers_to_transform": 0},
            ["layers.0.query", "layers.2.query"],
        ),
        ({"target_modules": ["query"], "layers_to_transform": []}, QUERIES),
        ({"target_modules": ["shared"]}, ["layers.0.shared"]),
        ({}, both(QUERIES, VALUES)),
    ],
)
def test_matching(fields, expected):
    assert paths(**fields) == expected


def test_a_name_matches_whole_parts_only():
    assert "value_head" not in paths(target_modules=["value"])
    assert paths(target_modules=["value_head"]) == ["value_head"]


def test_all_linear_leaves_out_output_layers():
    found = paths(target_modules="all-linear")
    assert "layers.2.experts.1" in found and "value_head" in found and "classifier.0" in found
    network = nn.SequentialCell(nn.Dense(4, 4))
    network._cells["lm_head"] = nn.Dense(4, 4)
    assert [layer.path for layer in find_targets(network, LoraConfig(target_modules="all-linear"), supported)] == ["0"]


def test_a_shared_layer_is_one_with_all_its_places():
    network = Network()
    (layer,) = find_targets(network, LoraConfig(target_modules=["shared"]), supported)
    assert layer.paths == [f"layers.{number}.shared" for number in range(3)]
    assert [(parent, key) for parent, key in layer.places] == [(block, "shared") for block in network.layers]
    assert all(parent._cells[key] is layer.cell for parent, key in layer.places)


def test_part_of_a_shared_layer_is_refused():
    with pytest.raises(ConfigError, match=r"\['layers.1.shared'\] is the same layer as \['layers.0.shared', 'layers.2"):
        paths(target_modules=["1.shared"])
    with pytest.raises(NoMatchError, match="(?s)'nix'.*is the same layer as"):
        paths(target_modules=["1.shared", "nix"])


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"target_modules": ["qeury", "value"]}, r"'target_modules': no layer matches 'qeury'; near: \['query'"),
        ({"target_modules": r".*\.(qeury|vlaue)"}, "'target_modules': no layer matches"),
        ({"target_modules": ["query"], "exclude_modules": ["1.qery"]}, "'exclude_modules': no layer matches '1.qery'"),
        ({"target_modules": ["query"], "layers_to_transform": [0, 7]}, r"no layer \[7\]; the numbers are \[0, 1, 2\]"),
        (
            {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            r"no layer \[0\]; those of \['blocks'\] are \[\]",
        ),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error(fields, match):
    with pytest.raises(NoMatchError, match="LoraConfig: .*" + match):
        paths(**fields)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_configuration_excludes_only_what_the_network_has(inference_mode):
    with pytest.raises(NoMatchError, match="'exclude_modules': no layer matches 'vision_tower'"):
        paths(target_modules=["query"], exclude_modules=["vision_tower"], inference_mode=inference_mode)


LOOSE = {
    "target_modules": ["query", "gate_proj"],
    "exclude_modules": ["vision_tower"],
    "layers_to_transform": [1, 7],
    "rank_pattern": {"query": 2, "gate_proj": 3},
    "alpha_pattern": {"up_proj": 3},
}


def test_entries_of_a_file_that_match_nothing_are_noted():
    config, unmatched = LoraConfig(**LOOSE), []
    found = find_targets(Network(), config, supported, unmatched)
    check_patterns(config, found, unmatched)
    assert [layer.path for layer in found] == ["layers.1.query"]
    text = "\n".join(unmatched)
    for entry in ("'gate_proj'", "'vision_tower'", "[7]", "'rank_pattern': no layer matches 'gate_proj'", "'up_proj'"):
        assert entry in text
    assert len(unmatched) == 5
    with pytest.raises(NoMatchError, match="(?s)gate_proj.*vision_tower.*7"):
        find_targets(Network(), config, supported)


@pytest.mark.parametrize("targets", [["gate_proj"], "gate_proj", ["gate_proj", "up_proj"]])
def test_a_file_of_which_nothing_matches_is_refused(targets):
    unmatched = []
    with pytest.raises(NoMatchError, match="'target_modules': no layer matches 'gate_proj'"):
        find_targets(Network(), LoraConfig(target_modules=targets), supported, unmatched)
    assert not unmatched


def test_layers_of_a_file_that_cannot_carry_it_are_refused_all_the_same():
    with pytest.raises(ConfigError, match="of a type that cannot carry it"):
        find_targets(Network(), LoraConfig(target_modules=["embed", "nix"]), supported, [])


class Colliding(nn.Cell):
    """Paths that are ends of others."""

    def __init__(self):
        super().__init__()
        self.fc, self.block = nn.Dense(4, 4), nn.SequentialCell()
        self.block.insert_child_to_cell("fc", nn.Dense(4, 4))
        self.block.insert_child_to_cell("attn", nn.Dense(4, 4))


KNOWN = ["fc", "block", "block.fc", "block.attn"]


@pytest.mark.parametrize(
    "chosen, known, expected",
    [
        (["fc"], KNOWN, "(?:fc)"),
        (["block.attn", "fc"], KNOWN, r"(?:block\.attn|fc)"),
        (["block.fc"], KNOWN, ["block.fc"]),
        (["fc", "block.fc", "fc"], KNOWN, ["block.fc", "fc"]),
        (["block.fc"], None, r"(?:block\.fc)"),
    ],
)
def test_exact_targets(chosen, known, expected):
    targets = exact_targets(chosen, known)
    assert targets == expected
    found = [layer.path for layer in find_targets(Colliding(), LoraConfig(target_modules=targets), supported)]
    assert found == sorted(set(chosen), key=KNOWN.index)


def test_an_exact_key_fits_one_path():
    keys = {exactly("fc"): 2, exactly("a.b-c"): 3}
    assert [pattern_value(keys, path, 8) for path in ("fc", "block.fc", "a.b-c", "x.a.b-c", "axb-c")] == [2, 8, 3, 8, 8]


def test_all_that_match_nothing_are_in_one_error():
    with pytest.raises(NoMatchError, match="(?s)'qeury'.*'vlaue'.*'exclude_modules'"):
        paths(target_modules=["qeury", "vlaue"], exclude_modules=["nothing"])


def test_layers_that_cannot_carry_it():
    with pytest.raises(ConfigError, match=r"of a type that cannot carry it: \['embed \(Embedding\)'\]"):
        paths(target_modules=["embed", "query"])


def test_a_second_delta_is_refused():
    network = Network()
    network.layers[1].query = LoRADense(4, 4, 2, 4)
    with pytest.raises(ConfigError, match=r"carry a delta already: \['layers.1.query'\]"):
        find_targets(network, LoraConfig(target_modules=["query"]), supported, deltas=(LoRADense,))


def test_no_targets_are_known():
    with pytest.raises(ConfigError, match="'target_modules' must be given"):
        find_targets(nn.SequentialCell(nn.Dense(4, 4)), LoraConfig(), supported)


def test_patterns_of_rank_and_alpha():
    patterns = {"layers.1.query": 2, "query": 3, r"value|out": 4}
    values = [pattern_value(patterns, path, 8) for path in ("layers.1.query", "layers.0.query", "x.out", "myquery")]
    assert values == [2, 3, 4, 8]
    layers = list_layers(Network())
    check_patterns(LoraConfig(rank_pattern={"query": 2}, alpha_pattern={"layers.2.value": 1}), layers)
    with pytest.raises(NoMatchError, match="(?s)'rank_pattern': no layer matches 'qeury'.*'alpha_pattern': .*'nix'"):
        check_patterns(LoraConfig(rank_pattern={"qeury": 2}, alpha_pattern={"nix": 1}), layers)


def test_every_cell_is_listed_once():
    network = Network()
    layers = list_layers(network)
    assert len({id(layer.cell) for layer in layers}) == len(layers)
    assert {id(layer.cell) for layer in layers} == {id(cell) for _, cell in network.cells_and_names()} - {id(network)}

"""Keys of parameters: paths in the network, whatever `Parameter.name` has become."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from sliced import Sliced, ones

from mindpet.delta import AdapterDense, LoRADense
from mindpet.delta.adapter import AdapterDelta
from mindpet.delta.ptuning2 import PrefixEncoderDelta
from mindpet.network.kinds import AttentionKind, layer_kind
from mindpet.network.parameters import model_parameters, outer_prefix, trainable_parameters

SLICED = [
    *(f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")),
    *(f"more.{name}.{part}" for name in ("first", "second") for part in ("weight", "bias")),
    "head.weight",
    "head.bias",
]


class Around(nn.Cell):
    """A Cell around another one, with or without `auto_prefix`."""

    def __init__(self, network, auto_prefix=True):
        super().__init__(auto_prefix=auto_prefix)
        self.network = network

    def construct(self, x):
        return self.network(x)


def names(network):
    return [param.name for param in network.get_parameters()]


def assert_paths(network):
    """Keys are paths that lead to their Parameter."""
    for key, param in model_parameters(network).items():
        *parts, name = key.split(".")
        cell = network
        for part in parts:
            cell = cell._cells[part]
        assert cell._params[name] is param


def test_slices_of_lists_do_not_change_keys(mode):
    network = Sliced()
    assert names(network) == list(model_parameters(network)) == SLICED
    for _ in range(2):
        network(ones())
        assert list(model_parameters(network)) == SLICED
    assert names(network) != SLICED
    assert_paths(network)


def test_renamed_parameters_of_equal_names_are_all_there():
    network = Sliced()
    network(ones())
    assert len(set(names(network))) < len(names(network))
    assert [id(param) for param in model_parameters(network).values()] == [id(p) for p in network.get_parameters()]
    network.layers[2].weight.requires_grad = False
    assert list(trainable_parameters(network)) == [key for key in SLICED if key != "layers.2.weight"]


@pytest.mark.parametrize("called", [False, True])
def test_keys_inside_of_other_cells_are_names_of_an_uncalled_network(called, mode):
    prefixed, plain = Around(Sliced()), Around(Sliced(), auto_prefix=False)
    inside = Around(plain)  # MindSpore leaves out nothing below a Cell that has auto_prefix
    expected = names(inside)
    assert expected[0] == "network.network.layers.0.weight"
    trained = Sliced()
    train = nn.TrainOneStepCell(nn.WithLossCell(trained, nn.MSELoss()), nn.SGD(trained.trainable_params()))
    if called:
        for cell in (prefixed, inside):
            cell(ones())
        train(ones(), ones(2))
    assert list(model_parameters(prefixed)) == [f"network.{key}" for key in SLICED]
    assert list(model_parameters(inside)) == expected
    assert list(model_parameters(train)) == SLICED  # the optimizer's state is left out
    # What is inside of another network keeps what that has put before its names.
    assert list(model_parameters(prefixed.network)) == [f"network.{key}" for key in SLICED]
    assert list(model_parameters(plain.network)) == expected
    assert outer_prefix(prefixed.network) == "network."
    assert outer_prefix(prefixed) == outer_prefix(train) == ""


def test_parameters_of_the_network_itself_keep_their_own_names():
    lora = LoRADense(4, 4, 1, 1)
    expected = ["weight", "bias", "mindpet_delta_lora_A", "mindpet_delta_lora_B"]
    assert list(model_parameters(lora)) == expected
    assert list(model_parameters(Around(lora, auto_prefix=False))) == expected
    assert list(model_parameters(Around(lora))) == [
        "network.weight",
        "network.bias",
        "network.mindpet_delta_lora_a",
        "network.mindpet_delta_lora_b",
    ]


class Tied(nn.Cell):
    """Two layers with one weight; `last` says which of them names it."""

    def __init__(self, last):
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 4), nn.Dense(4, 4, has_bias=False)
        self.head.weight = self.embed.embedding_table
        if last:
            self.head.weight.name = "head.weight"


@pytest.mark.parametrize("last, key", [(False, "embed.embedding_table"), (True, "head.weight")])
def test_a_shared_parameter_has_one_key_the_one_that_it_is_named_by(last, key):
    network = Tied(last)
    assert list(model_parameters(network)) == names(network) == [key]
    network.head.weight.name = "0.weight"  # tells no place
    assert list(model_parameters(network)) == ["embed.embedding_table"]


def test_equal_keys_are_told_apart_by_their_whole_paths():
    class Pair(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.left, self.right = Around(nn.Dense(2, 2)), Around(nn.Dense(2, 2, has_bias=False))
            self.own = Parameter(Tensor(np.ones(1, np.float32)), name="left.network.weight")

    network = Pair()
    params = model_parameters(network)
    assert list(params) == ["own", "left.network.weight", "network.bias", "right.network.weight"]
    assert params["own"] is network.own and params["left.network.weight"] is network.left.network.weight


def test_cells_that_refer_to_each_other():
    network = Around(nn.Dense(2, 2))
    network.network._cells["parent"] = network
    assert list(model_parameters(network)) == ["network.weight", "network.bias"]


def test_a_tuple_of_parameters_names_no_other_places():
    network = Sliced()
    network.weights = ms.ParameterTuple(network.trainable_params())
    own = Parameter(Tensor(np.ones(1, np.float32)), name="own")
    network.extra = ms.ParameterTuple([own])
    network(ones())
    params = model_parameters(network)
    assert sorted(params) == sorted([*SLICED, "own"]) and params["own"] is own


def test_a_tuple_of_parameters_that_have_left_the_network():
    trained = Sliced()
    train = nn.TrainOneStepCell(trained, nn.SGD(trained.trainable_params()))
    old, trained.head = trained.head, nn.Dense(4, 2)
    params = model_parameters(train)
    assert params["weights.head.weight"] is old.weight and params["network.head.weight"] is trained.head.weight
    assert list(params)[:4] == SLICED[:4] and len(params) == len(SLICED) + 2


def test_deltas_have_the_path_of_their_layer():
    network = Around(nn.CellList([AdapterDense(4, 4, bottleneck_size=2), nn.Dense(4, 4), nn.Dense(4, 4)]))
    layer, attention = network.network[1], network.network[2]
    arguments = {"bottleneck_size": 2, "non_linearity": "gelu"}
    layer._cells["mindpet_delta"] = AdapterDelta.create(layer, layer_kind(layer), **arguments)
    attention._cells["prefix_source"] = PrefixEncoderDelta.create(attention, AttentionKind(2, 2), 3)
    keys = [key for key in model_parameters(network) if "mindpet_delta" in key]
    inner = keys[:4]
    assert inner[0] == (
        "network.0.mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter_down_sampler.weight"
    )
    assert keys[4:8] == [key.replace("network.0.", "network.1.") for key in inner]
    assert keys[8:] == [
        "network.2.mindpet_delta_ptuning2_prefix",
        "network.2.mindpet_delta_ptuning2_embedding.embedding_table",
    ]


def test_a_recomputed_layer_is_listed_once(mode):
    if mode == ms.PYNATIVE_MODE:
        network = Sliced()
        network.layers[0].recompute()
        network(ones())
        assert list(model_parameters(network)) == SLICED

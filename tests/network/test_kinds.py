"""Which Cells are known to compute `W x + b`, and what `register_layer` says about others."""

import types

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops

from mindpet.delta import AdapterDense, LoRADense
from mindpet.layers import Dense
from mindpet.network.kinds import KINDS, layer_kind, register_layer, why_not


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Takes back what a test registers."""
    for cls in list(KINDS):
        monkeypatch.setitem(KINDS, cls, KINDS[cls])
    before = set(KINDS)
    yield
    for cls in set(KINDS) - before:
        del KINDS[cls]


@pytest.mark.parametrize(
    "cell, name, weight, matrix",
    [
        (nn.Dense(3, 2), "linear", "weight", (2, 3)),
        (Dense(3, 2), "linear", "weight", (2, 3)),
        (mint.nn.Linear(3, 2), "linear", "weight", (2, 3)),
        (nn.Embedding(4, 3), "embedding", "embedding_table", (3, 4)),
        (mint.nn.Embedding(4, 3), "embedding", "weight", (3, 4)),
        (nn.Conv1d(4, 6, 3), "conv1d", "weight", (6, 12)),
        (mint.nn.Conv1d(4, 6, 3), "conv1d", "weight", (6, 12)),
        (nn.Conv2d(4, 6, 3), "conv2d", "weight", (6, 36)),
        (mint.nn.Conv2d(4, 6, (3, 2)), "conv2d", "weight", (6, 24)),
        (nn.Conv3d(4, 6, 3, group=2), "conv3d", "weight", (6, 54)),
        (mint.nn.Conv3d(4, 6, 3), "conv3d", "weight", (6, 108)),
    ],
)
def test_layers_of_mindspore(cell, name, weight, matrix):
    kind = layer_kind(cell)
    assert (kind.name, kind.weight) == (name, weight) and kind.weight_of(cell) is getattr(cell, weight)
    value = kind.weight_of(cell).asnumpy()
    assert kind.to_matrix(value).shape == matrix
    np.testing.assert_array_equal(kind.from_matrix(kind.to_matrix(value), value.shape), value)
    assert kind.compute_dtype == ms.float32 and kind.adds_bias and why_not(cell) is None


def test_groups_and_types():
    assert layer_kind(nn.Conv2d(4, 6, 3, group=2)).groups_of(nn.Conv2d(4, 6, 3, group=2)) == 2
    assert layer_kind(mint.nn.Conv2d(4, 6, 3)).groups_of(mint.nn.Conv2d(4, 6, 3, groups=2)) == 2
    assert layer_kind(nn.Dense(3, 2)).groups_of(types.SimpleNamespace(group=8)) == 1
    assert layer_kind(nn.Dense(3, 2, dtype=ms.float16)).compute_dtype == ms.float16
    assert layer_kind(Dense(3, 2, dtype=ms.float16, compute_dtype=ms.float32)).compute_dtype == ms.float32


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0."""

    def construct(self, x):
        return self.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keep_dims=True))


class ByMethod(nn.Cell):
    """A linear layer whose `construct` leaves it to a method."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.eye(3, dtype=np.float32)), name="weight")

    def construct(self, x):
        return self.product(x)

    def product(self, x):
        return ops.matmul(x, self.weight)


class Cubed(ByMethod):
    """One that computes something else in that method."""

    def product(self, x):
        return ops.matmul(x, self.weight**3)


class Named(nn.Dense):
    """A subclass that computes as its class does."""

    def __init__(self):
        super().__init__(3, 2)

    def extend_repr(self):
        return "named"


def test_a_subclass_is_known_if_it_computes_as_its_class_does():
    assert layer_kind(Named()).name == "linear"
    conv = Standardised(2, 3, 3)
    assert layer_kind(conv) is None
    assert "Standardised has construct of its own" in why_not(conv) and "than a Conv2d" in why_not(conv)
    register_layer(Standardised, "conv2d")
    assert layer_kind(conv).name == "conv2d" and why_not(conv) is None


def test_a_method_that_construct_calls_counts():
    assert layer_kind(ByMethod()) is None and why_not(ByMethod()) is None  # not registered, not even a base
    register_layer(ByMethod)
    assert layer_kind(ByMethod()).name == "linear"
    assert layer_kind(Cubed()) is None and "Cubed has product of its own" in why_not(Cubed())


@pytest.mark.parametrize("cell", [LoRADense(4, 4, 2, 4), AdapterDense(4, 4, bottleneck_size=2)])
def test_layers_with_a_delta_by_hand_are_no_plain_ones(cell):
    assert layer_kind(cell) is None and why_not(cell)


class Either(nn.Cell):
    """A linear layer of a model library: the object knows which way round its weight is, and what it computes in."""

    def __init__(self, transpose_b, dtype=ms.float16, skip=False):
        super().__init__()
        self.weight = Parameter(Tensor(np.eye(3, dtype=np.float32)), name="weight")
        self.transpose_b, self.dtype, self.skip_bias_add = transpose_b, dtype, skip

    def construct(self, x):
        return x


def test_what_the_object_decides():
    register_layer(Either, fan_in_fan_out=lambda cell: not cell.transpose_b, compute_dtype="dtype")
    assert not layer_kind(Either(True)).transposed and layer_kind(Either(False)).transposed
    assert layer_kind(Either(True)).compute_dtype == ms.float16
    register_layer(Either, "linear", "weight", "bias", "transpose_b", lambda cell: ms.float32, "skip_bias_add")
    assert layer_kind(Either(True)).transposed and layer_kind(Either(True)).compute_dtype == ms.float32
    assert not layer_kind(Either(True)).adds_bias and layer_kind(Either(True, skip=True)).adds_bias


def test_a_class_by_its_path():
    path = f"{Either.__module__}.Either"
    register_layer(path, fan_in_fan_out=True, batch_axis=1, flattens=False)
    kind = layer_kind(Either(True))
    assert kind.transposed and kind.batch_axis == 1 and not kind.flattens
    register_layer(Either)  # the class itself comes first
    assert not layer_kind(Either(True)).transposed


def test_layers_of_libraries_that_are_not_imported_are_in_the_table():
    linear = type("Linear", (Either,), {"__module__": "mindformers.modules.layers"})
    assert layer_kind(linear(False)).transposed and not layer_kind(linear(True)).transposed
    assert layer_kind(linear(True)).compute_dtype == ms.float16
    path = "mindformers.experimental.graph.tensor_parallel.layers"
    parallel = type("RowParallelLinear", (Either,), {"__module__": path})
    assert layer_kind(parallel(True)).adds_bias and not layer_kind(parallel(True, skip=True)).adds_bias
    assert layer_kind(Either(True)) is None


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"weight": None}, "it has no weight of its own: 'weight' is None"),
        ({"weight": Parameter(Tensor(np.zeros((2, 3, 4), np.float32)))}, r"must have 2 axes, but has the shape \(2, 3"),
        ({"data_format": "NHWC"}, "the channels must be the second axis, but 'data_format' is 'NHWC'"),
        ({"max_norm": 1.0}, "the layer rewrites its table, but 'max_norm' is 1.0"),
    ],
)
def test_objects_that_cannot_carry_a_delta(change, reason):
    cell = nn.Dense(3, 2)
    for name, value in change.items():
        cell._params[name] = value
        if not isinstance(value, Parameter):
            del cell._params[name]
            vars(cell)[name] = value
    assert layer_kind(cell) is None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(why_not(cell))


@pytest.mark.parametrize(
    "arguments, error, rule",
    [
        ((3,), TypeError, "'cls' must be a subclass of Cell"),
        ((int,), TypeError, "'cls' must be a subclass of Cell"),
        ((Either, "conv4d"), ValueError, "'name' must be one of"),
        ((Either, "linear", 3), TypeError, "'weight' must be a str"),
        ((Either, "linear", "weight", "bias", 1), TypeError, "'fan_in_fan_out' must be a bool, an attribute's name"),
        ((Either, "linear", "weight", "bias", True, 16), TypeError, "'compute_dtype' must be a type"),
        ((Either, "linear", "weight", "bias", True, None, 1), TypeError, "'adds_bias' must be a bool"),
        ((Either, "linear", "weight", "bias", True, None, True, 1), TypeError, "'flattens' must be a bool"),
        ((Either, "linear", "weight", "bias", True, None, True, True, -1), ValueError, "'batch_axis' must be at least"),
        ((Either, "linear", "weight", "bias", True, None, True, True, 0.5), TypeError, "'batch_axis' must be an int"),
    ],
)
def test_arguments_are_checked(arguments, error, rule):
    before = dict(KINDS)
    with pytest.raises(error, match=f"register_layer: .*{rule}"):
        register_layer(*arguments)
    assert before == KINDS


def test_all_wrong_arguments_are_in_one_error():
    with pytest.raises(TypeError, match="'weight'.*'bias'.*'flattens'"):
        register_layer(Either, weight=1, bias=2, flattens="yes")

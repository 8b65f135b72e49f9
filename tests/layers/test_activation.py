"""Activations against their formulas, by name, and their operators."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet.layers import get_activation as from_layers
from mindpet.layers.activation import ACTIVATIONS, Activation, activation_operators, get_activation
from mindpet.utils.version_control import get_activation as from_version_control
from mindpet.utils.version_control import get_dropout


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FORMULAS = {
    "elu": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "fast_gelu": lambda x: x / (1 + np.exp(-1.702 * np.abs(x))) * np.exp(0.851 * (x - np.abs(x))),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "hshrink": lambda x: np.where(np.abs(x) > 0.5, x, 0),
    "hsigmoid": lambda x: np.clip((x + 3) / 6, 0, 1),
    "hswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "leakyrelu": lambda x: np.where(x > 0, x, 0.2 * x),
    "logsigmoid": lambda x: np.log(sigmoid(x)),
    "logsoftmax": lambda x: np.log(softmax(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "prelu": lambda x: np.where(x > 0, x, 0.25 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "softmax": softmax,
    "softmin": lambda x: softmax(-x),
    "softshrink": lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "tanh": np.tanh,
    "tanhshrink": lambda x: x - np.tanh(x),
}
# MindSpore's tanh on CPU is an approximation, off by up to 1e-4 where it saturates.
TOLERANCE = {"tanh": 1e-4, "tanhshrink": 1e-4}
SPECIAL = {"rrelu", "softmax2d"}


def test_every_name_has_a_formula():
    assert set(FORMULAS) | SPECIAL == set(ACTIVATIONS)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name, mode, rng):
    x = rng.normal(0, 2, (5, 7)).astype(np.float32)
    np.testing.assert_allclose(
        get_activation(name)(Tensor(x)).asnumpy(), FORMULAS[name](x), rtol=1e-5, atol=TOLERANCE.get(name, 1e-5)
    )


def test_rrelu_and_softmax2d(mode, rng):
    x = rng.normal(size=(1, 3, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(get_activation("softmax2d")(Tensor(x)).asnumpy().sum(1), 1, rtol=1e-5)
    slopes = get_activation("rrelu")(Tensor(-np.ones((50, 4), np.float32))).asnumpy()
    assert (-1 / 3 <= slopes).all() and (slopes <= -1 / 8).all()


@pytest.mark.parametrize("name", [name for name in FORMULAS if isinstance(get_activation(name), Activation)])
def test_gradients_of_our_own_are_finite_far_out(name, mode):
    x = Tensor(np.array([[-200.0, -50.0, 0.3, 50.0]], np.float32))
    activation = get_activation(name)
    assert np.isfinite(ms.grad(activation)(x).asnumpy()).all()


def test_logsigmoid_is_finite_where_the_naive_formula_is_not(mode):
    x = Tensor(np.array([-200.0, 200.0], np.float32))
    np.testing.assert_allclose(get_activation("logsigmoid")(x).asnumpy(), [-200.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"rrelu"}))
def test_all_operators_can_be_reached(name):
    activation = get_activation(name)
    operators = activation_operators(activation)
    primitives = {id(prim) for prim in activation._primitives.values() if prim.name != "Shape"}
    assert operators and {id(primitive) for primitive, _ in operators} == primitives


def test_an_activation_whose_operators_cannot_be_reached():
    assert activation_operators(nn.GELU()) == [] and activation_operators(get_activation("rrelu")) == []
    primitive = ops.ReLU()
    assert activation_operators(primitive) == [(primitive, "x")]


def test_names():
    assert get_activation(None) is None
    assert isinstance(get_activation("relu"), nn.ReLU)
    assert get_activation is from_layers is from_version_control
    with pytest.raises(KeyError, match="'name' must be one of .* but got 'nonsense'"):
        get_activation("nonsense")
    with pytest.raises(KeyError, match="GELU"):
        get_activation("GELU")


def test_get_dropout(mode):
    dropout = get_dropout(0.5)
    assert isinstance(dropout, nn.Dropout) and isinstance(dropout.dropout, ops.Primitive)
    ones = Tensor(np.ones((20, 20), np.float32))
    assert set(np.unique(dropout.set_train()(ones).asnumpy())) == {0.0, 2.0}
    assert (get_dropout(0.0).set_train()(ones).asnumpy() == 1).all()

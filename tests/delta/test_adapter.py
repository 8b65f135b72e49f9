"""AdapterLayer and AdapterDense against their formulas, and their arguments."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.common.initializer import Normal

from mindpet.delta import AdapterDense, AdapterLayer
from mindpet.delta.adapter import AdapterDelta
from mindpet.delta.adapter import AdapterDense as ByModule

FLOAT = {"compute_dtype": ms.float32}
GOOD = {"in_channels": 4, "out_channels": 6, "bottleneck_size": 3}


def randomise(cell, rng):
    """Give every parameter a random value, and return them by the last two parts of their names."""
    for param in cell.get_parameters():
        param.set_data(Tensor(rng.normal(0, 0.5, param.shape).astype(np.float32), param.dtype))
    return {
        ".".join(name.split(".")[-2:]): param.asnumpy().astype(np.float64)
        for name, param in cell.parameters_and_names()
    }


def adapter(h, p):
    return h + bottleneck(h, p)


def bottleneck(h, p):
    down, up = "mindpet_delta_adapter_down_sampler", "mindpet_delta_adapter_up_sampler"
    return np.tanh(h @ p[f"{down}.weight"].T + p[f"{down}.bias"]) @ p[f"{up}.weight"].T + p[f"{up}.bias"]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)])
def test_layer_formula(shape, mode, rng):
    cell = AdapterLayer(6, 3, "tanh", compute_dtype=ms.float32)
    p = randomise(cell, rng)
    h = rng.normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(cell(Tensor(h)).asnumpy(), adapter(h, p), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_dense_formula(shape, has_bias, mode, rng):
    cell = AdapterDense(**GOOD, has_bias=has_bias, activation="relu", non_linearity="tanh", compute_dtype=ms.float32)
    p = randomise(cell, rng)
    x = rng.normal(size=shape).astype(np.float32)
    hidden = np.maximum(x @ p["weight"].T + (p["bias"] if has_bias else 0), 0)
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), adapter(hidden, p), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [4.0, "learned"])
def test_beside_a_layer_with_a_scale(scale, mode, rng):
    cell = AdapterDense(**GOOD, activation="relu", non_linearity="tanh", form="parallel", scale=scale, **FLOAT)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    fresh = np.maximum(x @ cell.weight.asnumpy().T + cell.bias.asnumpy(), 0)
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), fresh, rtol=1e-5, atol=1e-5)
    p = randomise(cell, rng)
    hidden = np.maximum(x @ p["weight"].T + p["bias"], 0)
    factor = p["mindpet_delta_adapter.mindpet_delta_adapter_scale"] if scale == "learned" else scale
    expected = hidden + factor * bottleneck(x, p)
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), expected, rtol=1e-5, atol=1e-5)
    for param in cell.mindpet_delta_adapter.get_parameters():
        param.set_data(Tensor(np.full(param.shape, np.nan, np.float32)))
    cell.reset()
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), hidden, rtol=1e-5, atol=1e-5)


def test_parameters_of_the_forms_as_the_paper_counts_them():
    layer = AdapterLayer(768, 64, form="parallel", in_channels=512, scale="learned")
    assert sum(param.size for param in layer.trainable_params()) == 512 * 64 + 64 + 64 * 768 + 768 + 1
    assert layer.mindpet_delta_adapter_scale.asnumpy() == [1.0]


def test_a_fresh_layer_leaves_a_float32_input_bit_for_bit_even_with_float16_inside(mode, rng):
    h = rng.normal(size=(3, 6)).astype(np.float32)
    np.testing.assert_array_equal(AdapterLayer(6)(Tensor(h)).asnumpy(), h)


def test_import_paths_and_defaults():
    assert AdapterDense is ByModule
    layer = AdapterLayer(8)
    assert (layer.bottleneck_size, layer.non_linearity, layer.param_init_type, layer.compute_dtype) == (
        64,
        "gelu",
        ms.float32,
        ms.float16,
    )


def test_arguments_are_attributes():
    arguments = {
        "bottleneck_size": 3,
        "non_linearity": "tanh",
        "param_init_type": ms.float16,
        "compute_dtype": ms.float32,
    }
    layer, dense = AdapterLayer(6, **arguments), AdapterDense(4, 6, has_bias=False, **arguments)
    for cell, more in ((layer, {"hidden_size": 6}), (dense, {"in_channels": 4, "out_channels": 6, "has_bias": False})):
        assert {name: getattr(cell, name) for name in (*arguments, *more)} == {**arguments, **more}


@pytest.mark.parametrize("non_linearity", ["gelu", "sigmoid", "softmax", "prelu", "logsigmoid"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -3.0])
def test_reset_is_the_identity_whatever_the_parameters_hold(value, non_linearity, mode, rng):
    cell = AdapterLayer(6, 3, non_linearity, compute_dtype=ms.float32)
    h = rng.normal(size=(2, 6)).astype(np.float32)
    for param in cell.get_parameters():
        param.set_data(Tensor(np.full(param.shape, value, np.float32)))
    assert not np.array_equal(cell(Tensor(h)).asnumpy(), h)
    delta = AdapterDelta(auto_prefix=False)
    delta.mindpet_delta_adapter = cell
    delta.reset()
    np.testing.assert_array_equal(cell(Tensor(h)).asnumpy(), h)
    np.testing.assert_array_equal(delta(None, Tensor(h)).asnumpy(), h)


@pytest.mark.parametrize("init", ["ones", Normal(), Tensor(np.ones((6, 4), np.float32)), 0.5])
def test_every_kind_of_initialiser(init):
    assert np.isfinite(AdapterDense(**GOOD, weight_init=init).weight.asnumpy()).all()


COMMON = [
    ({"bottleneck_size": "3"}, TypeError, "'bottleneck_size' must be a positive int, but got '3'"),
    ({"bottleneck_size": True}, TypeError, "'bottleneck_size' must be a positive int"),
    ({"bottleneck_size": 0}, ValueError, "'bottleneck_size' must be a positive int, but got 0"),
    ({"non_linearity": 1}, TypeError, "'non_linearity' must be a str, but got 1"),
    ({"non_linearity": None}, TypeError, "'non_linearity' must be a str"),
    ({"non_linearity": nn.ReLU()}, TypeError, "'non_linearity' must be a str"),
    ({"non_linearity": "nonsense"}, ValueError, "'non_linearity' must be one of"),
    ({"param_init_type": 1}, TypeError, "'param_init_type' must be mindspore.float16"),
    ({"param_init_type": ms.int8}, TypeError, "'param_init_type' must be"),
    ({"compute_dtype": "float16"}, TypeError, "'compute_dtype' must be"),
    ({"compute_dtype": ms.float64}, TypeError, "'compute_dtype' must be"),
    ({"form": "beside"}, ValueError, "'form' must be one of .*'parallel', 'sequential'"),
    ({"form": None}, TypeError, "'form' must be a str"),
    ({"scale": 0}, ValueError, "'scale' must .* got 0"),
    ({"scale": "big"}, TypeError, "'scale' must .* got 'big'"),
]


@pytest.mark.parametrize(
    "changes, error, match",
    [
        *COMMON,
        ({"hidden_size": 6.0}, TypeError, "'hidden_size' must be a positive int, but got 6.0"),
        ({"hidden_size": False}, TypeError, "'hidden_size' must be a positive int"),
        ({"hidden_size": -6}, ValueError, "'hidden_size' must be a positive int, but got -6"),
    ],
)
def test_wrong_layer_arguments(changes, error, match):
    with pytest.raises(error, match=match):
        AdapterLayer(**{"hidden_size": 6, **changes})


@pytest.mark.parametrize(
    "changes, error, match",
    [
        *COMMON,
        ({"in_channels": "4"}, TypeError, "'in_channels' must be a positive int"),
        ({"out_channels": 6.0}, TypeError, "'out_channels' must be a positive int"),
        ({"has_bias": "yes"}, TypeError, "'has_bias' must be a bool"),
        ({"activation": 3}, TypeError, "'activation' must be a str, a Cell, a Primitive or None"),
        ({"weight_init": []}, TypeError, "'weight_init' must be one of"),
        ({"bias_init": None}, TypeError, "'bias_init' must be one of"),
        ({"weight_init": "nonsense"}, ValueError, "'weight_init' must be a name"),
        ({"bias_init": "nonsense"}, ValueError, "'bias_init' must be a name"),
        ({"weight_init": Tensor(np.ones((4, 6), np.float32))}, ValueError, "'weight_init' must be of shape \\(6, 4\\)"),
        ({"bias_init": Tensor(np.ones((6, 1), np.float32))}, ValueError, "'bias_init' must be of shape \\(6,\\)"),
        ({"in_channels": 0}, ValueError, "'in_channels' must be a positive int"),
        ({"out_channels": -2}, ValueError, "'out_channels' must be a positive int"),
        ({"activation": "nonsense"}, KeyError, "'activation' must be one of"),
    ],
)
def test_wrong_dense_arguments(changes, error, match):
    with pytest.raises(error, match=match):
        AdapterDense(**{**GOOD, **changes})


def test_shard_example_of_the_reference():
    dense = AdapterDense(in_channels=1 * 28 * 28, out_channels=512, bottleneck_size=64, activation="relu")
    dense.shard(
        strategy_matmul_org=((2, 4), (1, 4)),
        strategy_bias_org=((2, 1), (1,)),
        strategy_activation_org=((2, 1),),
        strategy_matmul_down_sampler=((2, 1), (1, 1)),
        strategy_bias_down_sampler=((2, 1), (1,)),
        strategy_non_linearity=((2, 1),),
        strategy_matmul_up_sampler=((2, 1), (1, 1)),
        strategy_bias_up_sampler=((2, 1), (1,)),
        strategy_residual_add=((2, 1), (2, 1)),
    )
    assert dense.matmul.in_strategy == ((2, 4), (1, 4))
    block = dense.mindpet_delta_adapter.mindpet_delta_adapter_block
    assert block[1].gelu.in_strategy == ((2, 1),)


def test_a_bad_strategy_for_the_adapter_leaves_the_base_alone():
    dense = AdapterDense(**GOOD)
    with pytest.raises(ValueError, match="'strategy_residual_add'"):
        dense.shard(strategy_matmul_org=((2, 4), (1, 4)), strategy_residual_add=((0, 1), (2, 1)))
    assert getattr(dense.matmul, "in_strategy", None) is None

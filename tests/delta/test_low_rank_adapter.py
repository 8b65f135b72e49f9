"""LowRankAdapterLayer and LowRankAdapterDense against their formulas, and their arguments."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.common.initializer import Normal

from mindpet.delta import LowRankAdapterDense, LowRankAdapterLayer
from mindpet.delta.adapter import LowRankAdapterDense as ByModule
from mindpet.delta.adapter import LowRankAdapterLayer as LayerByModule

GOOD = {"in_channels": 4, "out_channels": 6, "reduction_factor": 2}


def randomise(cell, rng):
    """Give every parameter a random value, and return them by where they are and what."""
    values = {}
    for name, param in cell.parameters_and_names():
        param.set_data(Tensor(rng.normal(0, 0.5, param.shape).astype(np.float32), param.dtype))
        where = next((part for part in ("down", "up") if f"{part}_sampler" in name), "")
        values[where + name.split("_")[-1].split(".")[-1]] = param.asnumpy().astype(np.float64)
    return values


def adapter(h, p):
    inner = np.tanh(h @ (p["downleft"] @ p["downright"]) + p["downbias"])
    return h + inner @ (p["upleft"] @ p["upright"]) + p["upbias"]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)])
def test_layer_formula(shape, mode, rng):
    cell = LowRankAdapterLayer(6, 2, 2, non_linearity="tanh", compute_dtype=ms.float32)
    p = randomise(cell, rng)
    h = rng.normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(cell(Tensor(h)).asnumpy(), adapter(h, p), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_dense_formula(shape, has_bias, mode, rng):
    cell = LowRankAdapterDense(
        **GOOD, has_bias=has_bias, activation="relu", non_linearity="tanh", compute_dtype=ms.float32
    )
    p = randomise(cell, rng)
    x = rng.normal(size=shape).astype(np.float32)
    hidden = np.maximum(x @ p["weight"].T + (p["bias"] if has_bias else 0), 0)
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), adapter(hidden, p), rtol=1e-5, atol=1e-5)


def test_import_paths_and_inner_size():
    assert LowRankAdapterDense is ByModule and LowRankAdapterLayer is LayerByModule
    assert LowRankAdapterLayer(768, 32).bottleneck_size == 24
    assert LowRankAdapterLayer(7, 2).bottleneck_size == 3


def test_arguments_are_attributes():
    arguments = {
        "reduction_factor": 2,
        "low_rank_size": 3,
        "low_rank_w_init": "normal",
        "non_linearity": "tanh",
        "param_init_type": ms.float16,
        "compute_dtype": ms.float32,
    }
    layer, dense = LowRankAdapterLayer(6, **arguments), LowRankAdapterDense(4, 6, has_bias=False, **arguments)
    for cell, more in ((layer, {"hidden_size": 6}), (dense, {"in_channels": 4, "out_channels": 6, "has_bias": False})):
        assert {name: getattr(cell, name) for name in (*arguments, *more)} == {**arguments, **more}


@pytest.mark.parametrize("non_linearity", ["gelu", "sigmoid", "softmax", "prelu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -3.0])
def test_reset_is_the_identity_whatever_the_parameters_hold(value, non_linearity, mode, rng):
    cell = LowRankAdapterLayer(6, 2, 2, non_linearity=non_linearity, compute_dtype=ms.float32)
    h = rng.normal(size=(2, 6)).astype(np.float32)
    for param in cell.get_parameters():
        param.set_data(Tensor(np.full(param.shape, value, np.float32)))
    assert not np.array_equal(cell(Tensor(h)).asnumpy(), h)
    cell.reset()
    np.testing.assert_array_equal(cell(Tensor(h)).asnumpy(), h)


@pytest.mark.parametrize("init", ["ones", Normal(), Tensor(np.ones((6, 4), np.float32)), 0.5])
def test_every_kind_of_initialiser(init):
    assert np.isfinite(LowRankAdapterDense(**GOOD, weight_init=init).weight.asnumpy()).all()


@pytest.mark.parametrize("init", ["ones", Normal()])
def test_every_kind_of_low_rank_initialiser(init):
    cell = LowRankAdapterLayer(6, 2, low_rank_w_init=init)
    assert np.abs(
        cell.mindpet_delta_low_rank_adapter_up_sampler.mindpet_delta_low_rank_adapter_weight_left.asnumpy()
    ).any()


COMMON = [
    ({"reduction_factor": "2"}, TypeError, "'reduction_factor' must be a positive int, but got '2'"),
    ({"reduction_factor": True}, TypeError, "'reduction_factor' must be a positive int"),
    ({"low_rank_size": 1.0}, TypeError, "'low_rank_size' must be a positive int"),
    ({"low_rank_w_init": 1}, TypeError, "'low_rank_w_init' must be one of str, Initializer"),
    ({"low_rank_w_init": Tensor(np.ones((2, 2), np.float32))}, TypeError, "'low_rank_w_init' must be one of"),
    ({"non_linearity": 1}, TypeError, "'non_linearity' must be a str"),
    ({"param_init_type": 1}, TypeError, "'param_init_type' must be mindspore.float16"),
    ({"compute_dtype": ms.int32}, TypeError, "'compute_dtype' must be"),
    ({"reduction_factor": 0}, ValueError, "'reduction_factor' must be a positive int, but got 0"),
    ({"low_rank_size": -1}, ValueError, "'low_rank_size' must be a positive int, but got -1"),
    ({"low_rank_w_init": "nonsense"}, ValueError, "'low_rank_w_init' must be a name"),
    ({"non_linearity": "nonsense"}, ValueError, "'non_linearity' must be one of"),
    ({"reduction_factor": 7}, ValueError, "'reduction_factor' must be at most the hidden size, 6, but got 7"),
]


@pytest.mark.parametrize(
    "changes, error, match",
    [
        *COMMON,
        ({"hidden_size": "6"}, TypeError, "'hidden_size' must be a positive int"),
        ({"hidden_size": 0}, ValueError, "'hidden_size' must be a positive int, but got 0"),
    ],
)
def test_wrong_layer_arguments(changes, error, match):
    with pytest.raises(error, match=match):
        LowRankAdapterLayer(**{"hidden_size": 6, "reduction_factor": 2, **changes})


@pytest.mark.parametrize(
    "changes, error, match",
    [
        *COMMON,
        ({"in_channels": 4.0}, TypeError, "'in_channels' must be a positive int"),
        ({"out_channels": "6"}, TypeError, "'out_channels' must be a positive int"),
        ({"has_bias": 0}, TypeError, "'has_bias' must be a bool"),
        ({"activation": 3}, TypeError, "'activation' must be a str, a Cell, a Primitive or None"),
        ({"weight_init": ()}, TypeError, "'weight_init' must be one of"),
        ({"bias_init": []}, TypeError, "'bias_init' must be one of"),
        ({"weight_init": "nonsense"}, ValueError, "'weight_init' must be a name"),
        ({"weight_init": Tensor(np.ones((6,), np.float32))}, ValueError, "'weight_init' must be of shape \\(6, 4\\)"),
        ({"bias_init": Tensor(np.ones((5,), np.float32))}, ValueError, "'bias_init' must be of shape \\(6,\\)"),
        ({"in_channels": -4}, ValueError, "'in_channels' must be a positive int"),
        ({"out_channels": 0}, ValueError, "'out_channels' must be a positive int"),
        ({"activation": "nonsense"}, KeyError, "'activation' must be one of"),
    ],
)
def test_wrong_dense_arguments(changes, error, match):
    with pytest.raises(error, match=match):
        LowRankAdapterDense(**{**GOOD, **changes})


def test_shard_examples_of_the_reference():
    strategies = dict(
        strategy_matmul_down_sampler_weight=((1, 1), (1, 1)),
        strategy_matmul_down_sampler_input=((2, 1), (1, 1)),
        strategy_bias_down_sampler=((2, 1), (1,)),
        strategy_non_linearity=((2, 1),),
        strategy_matmul_up_sampler_weight=((1, 1), (1, 1)),
        strategy_matmul_up_sampler_input=((2, 1), (1, 1)),
        strategy_bias_up_sampler=((2, 1), (1,)),
        strategy_residual_add=((2, 1), (2, 1)),
    )
    layer = LowRankAdapterLayer(hidden_size=512, reduction_factor=8, low_rank_size=1).shard(**strategies)
    assert layer.residual_add.in_strategy == ((2, 1), (2, 1))
    dense = LowRankAdapterDense(in_channels=1 * 28 * 28, out_channels=512, reduction_factor=8, activation="leakyrelu")
    dense.shard(
        strategy_matmul_org=((2, 4), (1, 4)),
        strategy_bias_org=((2, 1), (1,)),
        strategy_activation_org=((2, 1),),
        **strategies,
    )
    assert dense.activation.mul.in_strategy == ((2, 1), ())
    assert dense.activation.maximum.in_strategy == ((2, 1), (2, 1))

"""LoRADense against its formula, its arguments, and how model libraries use it."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Normal, One, initializer

from mindpet.delta import LoRADense
from mindpet.delta.lora import LoRADense as LoRADenseByModule

GOOD = {"in_channels": 4, "out_channels": 6, "lora_rank": 2, "lora_alpha": 3}


def array(param):
    return param.asnumpy().astype(np.float64)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 2, 4), (0, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_formula(shape, has_bias, mode, rng):
    cell = LoRADense(
        **GOOD,
        lora_b_init="normal",
        has_bias=has_bias,
        bias_init="normal",
        activation="tanh",
        weight_init=Normal(0.5),
        compute_dtype=ms.float32,
    )
    x = rng.normal(size=shape).astype(np.float32)
    w, a, b = (array(p) for p in (cell.weight, cell.mindpet_delta_lora_a, cell.mindpet_delta_lora_b))
    bias = array(cell.bias) if has_bias else 0
    expected = np.tanh(x @ w.T + bias + 3 / 2 * (x @ a.T) @ b.T)
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), expected, rtol=1e-5, atol=1e-5)


def test_float16_is_near_the_formula(mode, rng):
    cell = LoRADense(**GOOD, lora_b_init="normal")
    x = rng.normal(size=(5, 4)).astype(np.float32)
    w, a, b = (array(p) for p in (cell.weight, cell.mindpet_delta_lora_a, cell.mindpet_delta_lora_b))
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), x @ w.T + 3 / 2 * (x @ a.T) @ b.T, atol=2e-3)


def test_dropout_acts_on_the_delta_only_and_only_while_training(mode, rng):
    cell = LoRADense(
        **GOOD, lora_dropout=0.5, lora_a_init="ones", lora_b_init="ones", weight_init="zeros", compute_dtype=ms.float32
    )
    x = Tensor(np.ones((200, 4), np.float32))
    assert set(cell.set_train(False)(x).asnumpy().ravel()) == {12.0}
    dropped = cell.set_train(True)(x).asnumpy()[:, 0]  # 3/2 * 2 ranks * (kept of 4, each doubled)
    assert set(dropped) <= {0.0, 6.0, 12.0, 18.0, 24.0} and len(set(dropped)) > 1
    assert abs(dropped.mean() - 12) < 2


def test_names_when_alone_and_when_nested():
    cell = LoRADense(**GOOD)
    assert [p.name for p in cell.get_parameters()] == ["weight", "bias", "mindpet_delta_lora_A", "mindpet_delta_lora_B"]
    nested = nn.SequentialCell(cell)
    assert [p.name for p in nested.get_parameters()] == [
        "0.weight",
        "0.bias",
        "0.mindpet_delta_lora_a",
        "0.mindpet_delta_lora_b",
    ]
    assert LoRADense is LoRADenseByModule


def test_default_initial_values():
    cell = LoRADense(64, 6, 8, 3)
    a = cell.mindpet_delta_lora_a.asnumpy()
    assert np.abs(a).max() <= 1 / math.sqrt(64) < 1.2 * np.abs(a).max()  # kaiming uniform with a = sqrt(5)
    assert not cell.mindpet_delta_lora_b.asnumpy().any() and not cell.bias.asnumpy().any()


@pytest.mark.parametrize("kind", ["str", "Initializer", "Tensor", "number"])
def test_every_kind_of_initialiser(kind):
    def init(shape):
        return {
            "str": "ones",
            "Initializer": HeUniform(),
            "Tensor": Tensor(np.full(shape, 0.5, np.float32)),
            "number": 0.25,
        }[kind]

    cell = LoRADense(
        **GOOD,
        lora_a_init=init((2, 4)),
        lora_b_init=init((6, 2)),
        weight_init=init((6, 4)),
        bias_init=init((6,)) if kind != "Initializer" else Normal(),
    )
    value = {"str": 1, "Tensor": 0.5, "number": 0.25}.get(kind)
    for param in cell.get_parameters():
        assert np.isfinite(param.asnumpy()).all()
        assert value is None or (param.asnumpy() == value).all()


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.int8])
@pytest.mark.parametrize(
    "lazy",
    [
        lambda shape, dtype: initializer("ones", shape, dtype),
        lambda shape, dtype: Tensor(shape=shape, dtype=dtype, init=One()),
        lambda shape, dtype: Parameter(initializer(One(), shape, dtype)),
        lambda shape, dtype: Tensor(np.ones(shape), dtype),
    ],
    ids=["initializer", "init", "Parameter", "values"],
)
def test_tensors_with_and_without_values_of_every_type(lazy, dtype):
    inits = {
        "lora_a_init": lazy((2, 4), dtype),
        "lora_b_init": lazy((6, 2), dtype),
        "weight_init": lazy((6, 4), dtype),
        "bias_init": lazy((6,), dtype),
    }
    cells = [LoRADense(**GOOD, **inits, compute_dtype=ms.float32) for _ in range(2)]
    for cell in cells:
        assert cell.mindpet_delta_lora_a.dtype == cell.mindpet_delta_lora_b.dtype == ms.float32
        for param in cell.get_parameters():
            np.testing.assert_array_equal(param.asnumpy(), np.ones(param.shape))
        # W x + b = 5, alpha / rank * B A x = 1.5 * 8
        np.testing.assert_allclose(cell(Tensor(np.ones((3, 4), np.float32))).asnumpy(), np.full((3, 6), 17.0))
    ops.assign(cells[0].mindpet_delta_lora_a, Tensor(np.zeros((2, 4), np.float32)))
    assert cells[1].mindpet_delta_lora_a.asnumpy().all()  # what two layers start from is not shared


def test_a_random_tensor_without_values_has_its_distribution():
    cell = LoRADense(64, 6, 32, 3, lora_a_init=initializer(Normal(0.5), [32, 64]), param_init_type=ms.float16)
    assert cell.mindpet_delta_lora_a.dtype == ms.float16
    assert 0.45 < cell.mindpet_delta_lora_a.asnumpy().astype(np.float32).std() < 0.55


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_a_tensor_of_another_type_becomes_param_init_type(dtype):
    cell = LoRADense(**GOOD, lora_a_init=Tensor(np.ones((2, 4), np.float32)), param_init_type=dtype)
    assert cell.mindpet_delta_lora_a.dtype == cell.mindpet_delta_lora_b.dtype == dtype


def wrong(shape):
    return Tensor(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"in_channels": "4"}, TypeError, "'in_channels' must be a positive int, but got '4' \\(str\\)"),
        ({"in_channels": 4.0}, TypeError, "'in_channels' must be a positive int"),
        ({"in_channels": True}, TypeError, "'in_channels' must be a positive int, but got True \\(bool\\)"),
        ({"out_channels": None}, TypeError, "'out_channels' must be a positive int"),
        ({"lora_rank": 2.0}, TypeError, "'lora_rank' must be a positive int"),
        ({"lora_rank": True}, TypeError, "'lora_rank' must be a positive int"),
        ({"lora_alpha": "3"}, TypeError, "'lora_alpha' must be an int or a float, but got '3'"),
        ({"lora_alpha": True}, TypeError, "'lora_alpha' must be an int or a float"),
        ({"has_bias": 1}, TypeError, "'has_bias' must be a bool, but got 1"),
        ({"lora_dropout": 0}, TypeError, "'lora_dropout' must be a float"),
        ({"lora_dropout": "0.1"}, TypeError, "'lora_dropout' must be a float"),
        ({"activation": 1}, TypeError, "'activation' must be a str, a Cell, a Primitive or None, but got 1"),
        ({"activation": nn.ReLU}, TypeError, "'activation' must be"),
        ({"param_init_type": ms.int32}, TypeError, "'param_init_type' must be mindspore.float16"),
        ({"param_init_type": "float32"}, TypeError, "'param_init_type' must be"),
        ({"compute_dtype": ms.float64}, TypeError, "'compute_dtype' must be mindspore.float16"),
        ({"weight_init": [1]}, TypeError, "'weight_init' must be one of Tensor, str, Initializer, Number"),
        ({"bias_init": {}}, TypeError, "'bias_init' must be one of"),
        ({"lora_a_init": None}, TypeError, "'lora_a_init' must be one of"),
        ({"lora_b_init": True}, TypeError, "'lora_b_init' must be one of"),
        ({"in_channels": 0}, ValueError, "'in_channels' must be a positive int, but got 0"),
        ({"out_channels": -1}, ValueError, "'out_channels' must be a positive int, but got -1"),
        ({"lora_rank": 0}, ValueError, "'lora_rank' must be a positive int, but got 0"),
        ({"lora_alpha": 0}, ValueError, "'lora_alpha' must be finite and not zero, but got 0"),
        ({"lora_alpha": math.nan}, ValueError, "'lora_alpha' must be finite"),
        ({"lora_dropout": 1.0}, ValueError, "'lora_dropout' must be in \\[0, 1\\), but got 1.0"),
        ({"lora_dropout": -0.1}, ValueError, "'lora_dropout' must be in"),
        ({"lora_dropout": math.nan}, ValueError, "'lora_dropout' must be in"),
        (
            {"lora_a_init": wrong((2, 5))},
            ValueError,
            "'lora_a_init' must be of shape \\(2, 4\\), but got a Tensor of shape \\(2, 5\\)",
        ),
        ({"lora_a_init": wrong((8,))}, ValueError, "'lora_a_init' must be of shape"),
        ({"lora_b_init": wrong((2, 6))}, ValueError, "'lora_b_init' must be of shape \\(6, 2\\)"),
        ({"weight_init": wrong((4, 6))}, ValueError, "'weight_init' must be of shape \\(6, 4\\)"),
        ({"bias_init": wrong((4,))}, ValueError, "'bias_init' must be of shape \\(6,\\)"),
        ({"weight_init": "nonsense"}, ValueError, "'weight_init' must be a name that initializer\\(\\) knows"),
        ({"activation": "nonsense"}, KeyError, "'activation' must be one of"),
    ],
)
def test_wrong_arguments(changes, error, match):
    with pytest.raises(error, match=match):
        LoRADense(**{**GOOD, **changes})


def test_all_problems_are_in_one_error():
    with pytest.raises(TypeError, match="(?s)'lora_rank'.*'lora_alpha'.*'in_channels'.*'activation'"):
        LoRADense("4", 6, "2", 0, activation="nonsense")


def test_used_as_model_libraries_use_it(mode, rng):
    """They hand over the old layer's operators and parameters and shard the primitives themselves."""
    old = nn.Dense(4, 6, "normal")
    old.matmul.shard(((2, 1), (4, 1)))
    cell = LoRADense(
        in_channels=old.in_channels,
        out_channels=old.out_channels,
        lora_rank=2,
        lora_alpha=4,
        lora_dropout=0.0,
        param_init_type=ms.float32,
        compute_dtype=ms.float32,
        has_bias=old.has_bias,
        activation=old.activation,
    )
    cell.matmul, cell.weight, cell.bias, cell.bias_add = old.matmul, old.weight, old.bias, ops.Add()
    cell.lora_dropout.dropout.shard(((2, 1),))
    cell.lora_a_matmul.shard(((2, 1), (1, 1)))
    cell.lora_b_matmul.shard(((2, 1), (4, 1)))
    cell.mul.shard(((2, 4), ()))
    cell.add.shard(((2, 4), (2, 4)))
    assert cell.add.in_strategy == ((2, 4), (2, 4)) and cell.lora_dropout.dropout.in_strategy == ((2, 1),)
    x = Tensor(rng.normal(size=(3, 4)).astype(np.float32))
    np.testing.assert_allclose(cell(x).asnumpy(), old(x).asnumpy(), rtol=1e-5, atol=1e-6)


def test_shard_example_of_the_reference():
    dense = LoRADense(in_channels=1 * 28 * 28, out_channels=512, lora_rank=8, lora_alpha=16, activation="gelu")
    dense.shard(
        strategy_org_dense_matmul=((2, 1), (4, 1)),
        strategy_org_bias_add=((2, 4), (4,)),
        strategy_lora_dropout=((2, 1),),
        strategy_lora_a_matmul=((2, 1), (1, 1)),
        strategy_lora_b_matmul=((2, 1), (4, 1)),
        strategy_lora_mul=((2, 4), ()),
        strategy_lora_add=((2, 4), (2, 4)),
        strategy_activation=((2, 4), (2, 4)),
    )
    assert dense.matmul.in_strategy == ((2, 1), (4, 1)) and dense.activation.gelu.in_strategy == ((2, 4),)

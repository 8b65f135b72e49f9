"""What apply_strategies accepts, refuses and sets."""

import mindspore as ms
import pytest
from mindspore import nn, ops

from mindpet.delta import AdapterDense, AdapterLayer, LoRADense, LowRankAdapterDense


def lora(**changes):
    return LoRADense(8, 8, 2, 4, **changes)


@pytest.mark.parametrize(
    "strategy, error, match",
    [
        ("((1, 1), (1, 1))", TypeError, "must be a tuple of tuples of int"),
        ([(1, 1), (1, 1)], TypeError, "must be a tuple of tuples of int"),
        ((1, 1), TypeError, "must be a tuple of tuples of int"),
        (((1, 1), [1, 1]), TypeError, "must be a tuple of tuples of int"),
        (((1, 1.0), (1, 1)), TypeError, "must be a tuple of tuples of int"),
        (((1, True), (1, 1)), TypeError, "must be a tuple of tuples of int"),
        (((1, 0), (1, 1)), ValueError, "counts of at least 1"),
        (((1, -2), (1, 1)), ValueError, "counts of at least 1"),
        ((), ValueError, "of 2 tuple.*, one for each input, with 2 and 2 counts"),
        (((1, 1),), ValueError, "of 2 tuple.*, one for each input, with 2 and 2 counts"),
        (((1, 1), (1,)), ValueError, "with 2 and 2 counts"),
        (((1, 1), (1, 1), (1, 1)), ValueError, "with 2 and 2 counts"),
    ],
)
def test_a_bad_strategy_names_its_slot_and_sets_nothing(strategy, error, match):
    cell = lora()
    with pytest.raises(error, match="LoRADense.shard: 'strategy_lora_add' .*" + match):
        cell.shard(strategy_org_dense_matmul=((2, 1), (4, 1)), strategy_lora_add=strategy)
    assert getattr(cell.matmul, "in_strategy", None) is None


def test_repeated_entries_of_a_one_input_operator_mean_that_layout():
    cell = lora(activation="relu").shard(strategy_activation=((2, 4), (2, 4)), strategy_lora_dropout=((2, 1),))
    assert cell.activation.relu.in_strategy == ((2, 4),)
    with pytest.raises(ValueError, match="'strategy_activation' must be of 1 tuple.*, with 2 counts"):
        cell.shard(strategy_activation=((2, 4), (4, 2)))


@pytest.mark.parametrize("activation", [ops.ReLU(), nn.ReLU(), "relu"])
def test_an_activation_may_be_a_primitive_a_cell_or_a_name(activation):
    cell = lora(activation=activation).shard(strategy_activation=((2, 4), (2, 4)))
    primitive = cell.activation if isinstance(cell.activation, ops.Primitive) else cell.activation.relu
    assert primitive.in_strategy == ((2, 4),)


@pytest.mark.parametrize(
    "channel, strategy, expected",
    [
        (1, ((2, 4),), ((2, 4), (1,))),
        (8, ((2, 4),), ((2, 4), (4,))),
        (8, ((2, 4), (2, 4)), ((2, 4), (4,))),
        (8, ((2, 4), (4,)), ((2, 4), (4,))),
    ],
)
def test_the_weight_of_a_prelu_is_cut_with_the_features(channel, strategy, expected):
    cell = lora(activation=nn.PReLU(channel=channel)).shard(strategy_activation=strategy)
    assert cell.activation.prelu.in_strategy == expected


@pytest.mark.parametrize("weight, error", [([4], TypeError), ((4, 1), ValueError), ((0,), ValueError)])
def test_a_bad_strategy_of_the_weight_of_a_prelu(weight, error):
    with pytest.raises(error, match="'strategy_activation' must be"):
        lora(activation="prelu").shard(strategy_activation=((2, 4), weight))


def test_an_activation_cell_without_primitives():
    with pytest.raises(
        ValueError, match="must be for an activation given as a str, since the operators of GELU cannot be reached"
    ):
        lora(activation=nn.GELU()).shard(strategy_activation=((2, 4),))


def test_a_strategy_for_what_is_not_there_is_a_warning():
    with pytest.warns(UserWarning, match="'strategy_org_bias_add' is ignored, because this Cell has no such operator"):
        lora(has_bias=False).shard(strategy_org_bias_add=((2, 4), (4,)))
    with pytest.warns(UserWarning, match="'strategy_activation' is ignored"):
        lora().shard(strategy_activation=((2, 4),))


def test_all_bad_strategies_are_in_one_error():
    with pytest.raises(
        TypeError, match="(?s)'strategy_org_bias_add' must.*'strategy_lora_mul' must.*'strategy_lora_add'"
    ):
        lora().shard(strategy_org_bias_add=1, strategy_lora_mul=((1, 1),), strategy_lora_add=((0, 1), (1, 1)))


@pytest.mark.parametrize(
    "slot, strategy", [("strategy_lora_mul", ((2, 4), (2, 4))), ("strategy_lora_dropout", ((2,),))]
)
def test_the_number_of_axes_is_that_of_the_input(slot, strategy):
    with pytest.raises(ValueError, match=f"'{slot}' must be of"):
        lora().shard(**{slot: strategy})


def test_none_leaves_a_slot_alone():
    cell = lora().shard(strategy_lora_add=((2, 4), (2, 4)))
    assert cell.shard() is cell and cell.add.in_strategy == ((2, 4), (2, 4))


CELLS = [
    ("strategy_activation", lambda: lora(activation="logsoftmax")),
    ("strategy_activation_org", lambda: AdapterDense(8, 8, activation=nn.LogSoftmax())),
    ("strategy_activation_org", lambda: LowRankAdapterDense(8, 8, activation=ops.LogSoftmax())),
    ("strategy_non_linearity", lambda: AdapterLayer(8, non_linearity="logsoftmax")),
]


@pytest.mark.parametrize("slot, make", CELLS)
def test_logsoftmax_cannot_be_sharded(slot, make):
    with pytest.raises(
        ValueError, match=f"'{slot}' must be for another activation, since LogSoftmax cannot be sharded"
    ):
        make().shard(**{slot: ((2, 1),)})


@pytest.mark.parametrize("slot, make", CELLS)
@pytest.mark.parametrize("parallel_mode", ["semi_auto_parallel", "auto_parallel"])
def test_logsoftmax_is_refused_in_a_parallel_mode(slot, make, parallel_mode):
    cell = make()
    assert cell.shard() is cell
    ms.set_auto_parallel_context(parallel_mode=parallel_mode)
    try:
        with pytest.raises(ValueError, match=f"'{slot}' must be for another activation, since LogSoftmax"):
            cell.shard()
    finally:
        ms.reset_auto_parallel_context()

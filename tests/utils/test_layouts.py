"""Layouts and the tuples that they mean."""

import numpy as np
import pytest
from mindspore import Layout, Tensor, nn, ops

from mindpet.delta import LoRADense
from mindpet.parallel import shard_like
from mindpet.utils.layouts import counts_of, cuts_of, describe, get_strategy, set_strategy, strategy_of, tuples_of
from mindpet.utils.quote import quote

MESH = Layout((2, 4, 1), ("dp", "mp", "one"))
INTERLEAVED = Layout((2, 4, 2), ("dp", "mp", "interleaved_parallel"))
MATMUL = (MESH("dp", "None"), MESH("mp", "None"))


def written(strategy):
    return [describe(layout) for layout in strategy]


@pytest.mark.parametrize(
    "axes, counts, tuples",
    [
        (("dp", "mp"), (2, 4), (2, 4)),
        (("dp", "None"), (2, 1), (2, 1)),
        (("None", "None"), (1, 1), (1, 1)),
        ((("dp", "mp"), "one"), (8, 1), (8, 1)),
        (("None", ("dp", "None", "mp")), (1, 8), (1, 8)),
        (("mp", "dp"), (4, 2), None),  # on other ranks than tuples would put it
        (("None", "mp"), (1, 4), None),
        ((("mp", "dp"),), (8,), None),
        ((), (), ()),
    ],
)
def test_counts_and_tuples_of_a_layout(axes, counts, tuples):
    strategy = (MESH(*axes),)
    assert counts_of(strategy) == (counts,)
    assert tuples_of(strategy) == (None if tuples is None else (tuples,))
    assert counts_of(strategy_of(cuts_of(strategy))) == (counts,)


def test_all_inputs_must_be_cut_over_the_device_axes_of_the_first():
    assert tuples_of((MESH("dp", "mp"), MESH("mp"))) == ((2, 4), (4,))
    assert tuples_of((MESH("dp"), MESH("mp"))) is None


def test_what_is_interleaved_stays_on_its_rank_and_no_tuples_mean_it():
    strategy = (INTERLEAVED(("dp", "interleaved_parallel"), "mp"),)
    assert counts_of(strategy) == ((2, 4),) and tuples_of(strategy) is None
    assert written(strategy_of(cuts_of(strategy))) == written(strategy)


def test_a_layout_in_a_message():
    assert quote(MESH(("dp", "mp"), "None")) == "Layout((2, 4, 1), ('dp', 'mp', 'one'))(('dp', 'mp'), 'None')"
    assert quote(Layout((2,), ("dp",))) == "Layout((2,), ('dp',))"


def test_a_strategy_takes_the_place_of_one_of_the_other_kind():
    matmul = ops.MatMul(transpose_b=True)
    assert get_strategy(matmul) is None
    matmul.shard(((1, 1), (8, 1)))
    matmul.shard(MATMUL)  # MindSpore keeps both, and takes this
    assert written(get_strategy(matmul)) == written(MATMUL)
    set_strategy(matmul, ((2, 1), (4, 1)))
    assert get_strategy(matmul) == ((2, 1), (4, 1)) and "in_layout" not in matmul.attrs
    set_strategy(matmul, MATMUL)
    assert written(get_strategy(matmul)) == written(MATMUL) and "in_strategy" not in matmul.attrs


def lora(**changes):
    return LoRADense(8, 8, 2, 4, **changes)


@pytest.mark.parametrize(
    "strategy, error, match",
    [
        ((MESH("dp", "mp"), (2, 4)), TypeError, r"a tuple of tuples of int, or of Layouts.*Layout\(.*\(2, 4\)\)"),
        ((MESH("dp", "mp"), Layout((2, 4), ("dp", "mp"))), ValueError, "of Layouts that were called"),
        ((MESH("dp", "mp"), Layout((4, 2), ("mp", "dp"))("dp", "mp")), ValueError, "with one device matrix"),
        ((Layout((2, 4), ("dp", "mp"), [1, 0, 2, 3, 4, 5, 6, 7])("dp", "mp"),) * 2, ValueError, "without a rank_list"),
        ((MESH("dp", "mp"),), ValueError, "of 2 tuple.*, one for each input, with 2 and 2 counts"),
        ((MESH("dp", "mp"), MESH("dp")), ValueError, "with 2 and 2 counts"),
        (MESH("dp", "mp"), TypeError, "a tuple of tuples of int, or of Layouts"),
    ],
)
def test_a_bad_layout_names_its_slot_and_sets_nothing(strategy, error, match):
    cell = lora()
    with pytest.raises(error, match="LoRADense.shard: 'strategy_lora_add' .*" + match):
        cell.shard(strategy_org_dense_matmul=MATMUL, strategy_lora_add=strategy)
    assert get_strategy(cell.matmul) is None


def test_the_cuts_of_a_base_go_to_the_axes_of_the_delta():
    cell = shard_like(lora(activation="gelu", lora_dropout=0.1), MATMUL)
    assert written(get_strategy(cell.lora_a_matmul)) == written((MESH("dp", "None"), MESH("None", "None")))
    assert written(get_strategy(cell.lora_b_matmul)) == written(MATMUL)
    assert written(get_strategy(cell.mul)) == written((MESH("dp", "mp"), MESH()))
    assert written(get_strategy(cell.activation.gelu)) == written((MESH("dp", "mp"),))
    assert get_strategy(cell.lora_dropout.dropout) == ((2, 1),)  # it takes no Layout
    rows = (INTERLEAVED(("dp", "interleaved_parallel"), "mp"), INTERLEAVED("None", "mp"))
    assert written(get_strategy(shard_like(lora(), rows).lora_a_matmul)) == written(rows)


def test_layouts_change_no_number_outside_of_a_parallel_mode(mode, rng):
    cell, x = lora(activation="gelu"), Tensor(rng.normal(size=(4, 8)).astype(np.float32))
    before = cell(x).asnumpy()
    np.testing.assert_array_equal(shard_like(cell, MATMUL)(x).asnumpy(), before)


@pytest.mark.parametrize(
    "strategy, match",
    [
        ((MESH("dp", "mp"), MESH("None", "None")), "all inputs cut the axes alike that they have in common"),
        ((MESH("dp", "None"), MESH("dp", "None")), "a device axis cuts no two of the axes"),
    ],
)
def test_a_base_that_no_delta_can_follow(strategy, match):
    cell = lora()
    with pytest.raises(ValueError, match=f"shard_like: 'in_strategy' must be one in which {match}"):
        shard_like(cell, strategy)
    assert get_strategy(cell.lora_a_matmul) is None


@pytest.mark.parametrize(
    "strategy", [(MESH("mp", "None"), MESH("dp", "None")), (MESH("None", "mp"), MESH("None", "mp"))]
)
def test_an_operator_without_layouts_is_refused_with_its_slot_unless_it_never_runs(strategy):
    cell = lora(lora_dropout=0.1)
    with pytest.raises(ValueError, match="'strategy_lora_dropout' must be of tuples, for Dropout takes no Layout"):
        shard_like(cell, strategy)
    assert get_strategy(cell.lora_a_matmul) is None
    assert written(get_strategy(shard_like(lora(), strategy).matmul)) == written(strategy)


def test_the_weight_of_a_prelu_goes_with_the_features():
    cell = lora(activation=nn.PReLU(channel=8)).shard(strategy_activation=(MESH("dp", "mp"),))
    assert get_strategy(cell.activation.prelu) == ((2, 4), (4,))
    cell.shard(strategy_activation=(MESH("dp", "mp"), MESH("mp")))
    assert get_strategy(cell.activation.prelu) == ((2, 4), (4,))

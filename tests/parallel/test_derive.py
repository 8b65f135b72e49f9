"""What shard_like sets and refuses; that strategies change no number outside of a parallel mode."""

import numpy as np
import pytest
from mindspore import nn
from sharded import CELLS, DENSE, example, strategy

from mindpet.parallel import shard_like

BY_HAND = {
    "lora": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_lora_dropout": ((2, 4),),
        "strategy_lora_a_matmul": ((2, 4), (1, 4)),
        "strategy_lora_b_matmul": ((2, 1), (3, 1)),
        "strategy_lora_mul": ((2, 3), ()),
        "strategy_lora_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "ia3": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_ia3_mul": ((2, 3, 1), (3, 1)),
        "strategy_activation": ((2, 3),),
    },
    "ia3_feedforward": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_ia3_mul": ((2, 4), (1, 4)),
        "strategy_activation": ((2, 3),),
    },
    "vera": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_vera_dropout": ((2, 4),),
        "strategy_vera_a_slice": ((1, 1),),
        "strategy_vera_a_matmul": ((2, 4), (1, 4)),
        "strategy_vera_d_mul": ((2, 1), (1,)),
        "strategy_vera_b_slice": ((1, 1),),
        "strategy_vera_b_matmul": ((2, 1), (3, 1)),
        "strategy_vera_b_mul": ((2, 3), (3,)),
        "strategy_vera_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "hira": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_hira_dropout": ((2, 4),),
        "strategy_hira_ab_matmul": ((3, 1), (1, 4)),
        "strategy_hira_mul": ((3, 4), (3, 4)),
        "strategy_hira_matmul": ((2, 4), (3, 4)),
        "strategy_hira_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "miss": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_miss_dropout": ((2, 4),),
        "strategy_miss_sum": ((2, 4, 1),),
        "strategy_miss_matmul": ((2, 1), (1, 3)),
        "strategy_miss_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "miss_mini": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_miss_dropout": ((2, 4),),
        "strategy_miss_tile": ((1, 1),),
        "strategy_miss_sum": ((2, 4, 1),),
        "strategy_miss_matmul": ((2, 1), (1, 3)),
        "strategy_miss_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "adalora": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_adalora_dropout": ((2, 4),),
        "strategy_adalora_a_matmul": ((2, 4), (1, 4)),
        "strategy_adalora_e_mul": ((2, 1), (1,)),
        "strategy_adalora_mul": ((2, 1), ()),
        "strategy_adalora_b_matmul": ((2, 1), (3, 1)),
        "strategy_adalora_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "oft": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_oft_parts_mul": ((2, 1, 1), (4, 1)),
        "strategy_oft_gather": ((2, 4, 1), (1,)),
        "strategy_oft_sign_mul": ((2, 4, 1), (1,)),
        "strategy_oft_block_matmul": ((2, 4, 1, 1), (2, 4, 1, 1)),
        "strategy_oft_block_add": ((2, 4, 1, 1), (2, 4, 1, 1)),
        "strategy_oft_dropout": ((2, 4, 1, 1),),
        "strategy_oft_mask_mul": ((2, 4, 1, 1), (2, 4, 1, 1)),
        "strategy_oft_in_transpose": ((2, 1, 4, 1),),
        "strategy_oft_matmul": ((2, 4, 1, 1), (2, 4, 1, 1)),
        "strategy_oft_out_transpose": ((2, 4, 1, 1),),
        "strategy_oft_add": ((2, 4), (2, 4)),
        "strategy_activation": ((2, 3),),
    },
    "loha": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_loha_w1_a_matmul": ((1, 1), (1, 1)),
        "strategy_loha_w2_a_matmul": ((1, 1), (1, 1)),
        "strategy_loha_a_mul": ((1, 1), (1, 1)),
        "strategy_loha_w1_b_matmul": ((1, 1), (1, 1)),
        "strategy_loha_w2_b_matmul": ((1, 1), (1, 1)),
        "strategy_loha_b_mul": ((1, 1), (1, 1)),
        "strategy_loha_b_matmul": ((2, 4), (1, 4)),
        "strategy_loha_a_matmul": ((2, 1), (3, 1)),
        "strategy_loha_mul": ((1, 1), ()),
        "strategy_loha_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "lokr": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_lokr_w2_matmul": ((2, 1), (1, 1)),
        "strategy_lokr_turn": ((2, 1, 1),),
        "strategy_lokr_w1_matmul": ((2, 1), (1, 1)),
        "strategy_lokr_turn_back": ((2, 1, 1),),
        "strategy_lokr_w2_a_matmul": ((2, 1), (1, 1)),
        "strategy_lokr_mul": ((1, 1), ()),
        "strategy_lokr_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "adapter": {
        "strategy_matmul_org": ((2, 4), (3, 4)),
        "strategy_bias_org": ((2, 3), (3,)),
        "strategy_activation_org": ((2, 3),),
        "strategy_matmul_down_sampler": ((2, 3), (1, 3)),
        "strategy_bias_down_sampler": ((2, 1), (1,)),
        "strategy_non_linearity": ((2, 1),),
        "strategy_matmul_up_sampler": ((2, 1), (3, 1)),
        "strategy_bias_up_sampler": ((2, 3), (3,)),
        "strategy_residual_add": ((2, 3), (2, 3)),
    },
    "adapter_parallel": {
        "strategy_matmul_org": ((2, 4), (3, 4)),
        "strategy_bias_org": ((2, 3), (3,)),
        "strategy_activation_org": ((2, 3),),
        "strategy_matmul_down_sampler": ((2, 4), (1, 4)),
        "strategy_bias_down_sampler": ((2, 1), (1,)),
        "strategy_non_linearity": ((2, 1),),
        "strategy_matmul_up_sampler": ((2, 1), (3, 1)),
        "strategy_bias_up_sampler": ((2, 3), (3,)),
        "strategy_residual_add": ((2, 3), (2, 3)),
        "strategy_scale_mul": ((2, 3), (1,)),
    },
    "compacter": {
        "strategy_org_dense_matmul": ((2, 4), (3, 4)),
        "strategy_org_bias_add": ((2, 3), (3,)),
        "strategy_product_down": ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
        "strategy_transpose_down": ((1, 1, 1, 1, 1),),
        "strategy_matmul_down_wide": ((2, 3), (1, 3)),
        "strategy_matmul_down_narrow": ((2, 1), (1, 1)),
        "strategy_bias_down": ((2, 1), (1,)),
        "strategy_non_linearity": ((2, 1),),
        "strategy_product_up": ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
        "strategy_transpose_up": ((1, 1, 1, 1, 1),),
        "strategy_matmul_up_narrow": ((2, 1), (1, 1)),
        "strategy_matmul_up_wide": ((2, 1), (1, 3)),
        "strategy_bias_up": ((2, 3), (3,)),
        "strategy_residual_add": ((2, 3), (2, 3)),
        "strategy_activation": ((2, 3),),
    },
    "low_rank_adapter": {
        "strategy_matmul_org": ((2, 4), (3, 4)),
        "strategy_bias_org": ((2, 3), (3,)),
        "strategy_activation_org": ((2, 3),),
        "strategy_matmul_down_sampler_weight": ((1, 1), (1, 1)),
        "strategy_matmul_down_sampler_input": ((2, 3), (3, 1)),
        "strategy_bias_down_sampler": ((2, 1), (1,)),
        "strategy_non_linearity": ((2, 1),),
        "strategy_matmul_up_sampler_weight": ((1, 1), (1, 1)),
        "strategy_matmul_up_sampler_input": ((2, 1), (1, 3)),
        "strategy_bias_up_sampler": ((2, 3), (3,)),
        "strategy_residual_add": ((2, 3), (2, 3)),
    },
}


@pytest.mark.parametrize("name", DENSE)
def test_each_slot_by_hand(name, monkeypatch):
    cell = CELLS[name]()
    given = {}
    monkeypatch.setattr(type(cell), "shard", lambda self, **strategies: given.update(strategies) or self)
    assert shard_like(cell, ((2, 4), (3, 4))) is cell
    assert given == BY_HAND[name]


def test_the_strategy_of_the_base_is_the_default():
    cell = CELLS["lora"]()
    cell.matmul.shard(((2, 1), (4, 1)))
    assert shard_like(cell).lora_b_matmul.in_strategy == ((2, 1), (4, 1))


def test_no_strategy_anywhere():
    for cell in (CELLS["lora"](), CELLS["adapter_layer"]()):
        with pytest.raises(ValueError, match="'in_strategy' must be given, since no base matmul has one"):
            shard_like(cell)


@pytest.mark.parametrize(
    "in_strategy, error, match",
    [
        ("((1, 1), (1, 1))", TypeError, "a tuple of tuples of int"),
        (((1, True), (1, 1)), TypeError, "a tuple of tuples of int"),
        (((1, 0), (1, 0)), ValueError, "counts of at least 1"),
        (((1, 1),), ValueError, "with 2 and 2 counts"),
        (((1, 1, 1), (1, 1)), ValueError, "with 2 and 2 counts"),
        (((2, 4), (1, 2)), ValueError, "all inputs cut the axes alike that they have in common"),
    ],
)
def test_a_bad_strategy_sets_nothing(in_strategy, error, match):
    cell = CELLS["lora"]()
    with pytest.raises(error, match="shard_like: 'in_strategy' must be .*" + match):
        shard_like(cell, in_strategy)
    assert getattr(cell.lora_a_matmul, "in_strategy", None) is None


def test_only_delta_cells():
    for cell in (nn.Dense(4, 4), "lora", None):
        with pytest.raises(TypeError, match="'cell' must be a delta Cell that has slots"):
            shard_like(cell, strategy())


@pytest.mark.parametrize("name", list(CELLS))
def test_strategies_change_no_number_outside_of_a_parallel_mode(name, mode):
    cell = CELLS[name]()
    x = example(name, (4,))
    before = cell(x).asnumpy()
    np.testing.assert_array_equal(shard_like(cell, strategy(2, 2, 2))(x).asnumpy(), before)

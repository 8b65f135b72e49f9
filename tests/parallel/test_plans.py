"""Every Cell and every split, compiled by MindSpore's parallel front end."""

import functools
import itertools

import pytest
from sharded import (
    CELLS,
    DENSE,
    MOST,
    SIZES,
    build_with,
    case,
    collectives,
    expected_collectives,
    expected_slices,
    is_refused,
    splits,
    strategy,
)

from mindpet.errors import ShardError
from mindpet.layers.activation import activation_operators
from mindpet.parallel import Report, dry_run_many, shard_like


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("ranks", [8, 64])
def test_every_cell_and_every_split(ranks, train):
    cases = [
        pair
        for pair in itertools.product(CELLS, splits(ranks).values())
        if pair[1].get("i", 1) <= MOST.get(pair[0], ranks)
    ]
    reports = dry_run_many([case(*arguments) for arguments in cases], ranks, train=train)
    for (name, counts), report in zip(cases, reports):
        check(name, counts, report, ranks)


def check(name, counts, report, ranks, rows=1, layout=None, **arguments):
    """Strategies are what was set, slices and collectives what was worked out."""
    if layout is None and is_refused(name, counts):
        assert isinstance(report, ShardError) and "cell.weight has multiple users" in str(report)
        return
    assert isinstance(report, Report), report
    assert all(plan.is_set for plan in report.operators)
    cell = shard_like(CELLS[name](**arguments), strategy(**counts))
    assert operators(report) == set_operators(cell), (name, counts)
    weights = {plan.name: plan.slice for plan in report.parameters if plan.role != "optimizer"}
    assert weights == expected_slices(name, report, counts), (name, counts)
    assert collectives(report) == expected_collectives(name, report, counts, ranks, rows), (name, counts)


def operators(report):
    """(slot, type, strategy) of the operators in the Cell."""
    return sorted((plan.slot, plan.operator, plan.strategy) for plan in report.operators if plan.cell == "cell")


def set_operators(cell, dropout=False):
    """(slot, type, strategy) of the primitives of a Cell that have a strategy; without dropout none of its."""
    return sorted(
        (slot, primitive.name, primitive.in_strategy)
        for slot, (operator, _) in cell.operators.items()
        if operator is not None and (dropout or not slot.endswith(("dropout", "mask_mul")))
        for primitive, _ in activation_operators(operator)
    )


VARIANTS = [
    {"three_axes": True},
    {"has_bias": False},
    {"activation": None},
    {"activation": "leakyrelu", "has_bias": False, "three_axes": True},
]
MIXED = [{"n": 4, "o": 2}, {"n": 2, "i": 4}, {"n": 2, "o": 2}, {"i": 2}]


def test_variants_of_the_layers():
    further = ("ia3", "ia3_feedforward", "vera", "hira", "miss", "miss_mini", "adalora", "oft", "loha", "lokr")
    cases = list(itertools.product((name for name in DENSE if name not in further), MIXED, VARIANTS))
    cases += itertools.product(further, MIXED[:2], VARIANTS[:1])
    reports = dry_run_many([case(name, counts, **variant) for name, counts, variant in cases], 8)
    for (name, counts, variant), report in zip(cases, reports):
        arguments = {key: value for key, value in variant.items() if key != "three_axes"}
        check(name, counts, report, 8, rows=2 if "three_axes" in variant else 1, **arguments)


def test_all_three_axes_cut_costs_the_base_a_change_of_layout_and_the_delta_nothing():
    counts = {"n": 2, "i": 2, "o": 2}
    for name, report in zip(DENSE, dry_run_many([case(name, counts) for name in DENSE], 8, train=False)):
        if is_refused(name, counts):
            assert "cell.weight has multiple users" in str(report)
            continue
        gather = ("forward", "AllGather", 2, 4 * SIZES["n"] // 2 * SIZES["o"])
        assert collectives(report) == sorted([*expected_collectives(name, report, counts, 8), gather])


REFERENCE = {
    "lora": {
        "strategy_org_dense_matmul": ((2, 1), (4, 1)),
        "strategy_org_bias_add": ((2, 4), (4,)),
        "strategy_lora_dropout": ((2, 1),),
        "strategy_lora_a_matmul": ((2, 1), (1, 1)),
        "strategy_lora_b_matmul": ((2, 1), (4, 1)),
        "strategy_lora_mul": ((2, 4), ()),
        "strategy_lora_add": ((2, 4), (2, 4)),
        "strategy_activation": ((2, 4), (2, 4)),
    },
    "adapter_layer": {
        "strategy_matmul_down_sampler": ((2, 1), (1, 1)),
        "strategy_bias_down_sampler": ((2, 1), (1,)),
        "strategy_non_linearity": ((2, 1),),
        "strategy_matmul_up_sampler": ((2, 1), (1, 1)),
        "strategy_bias_up_sampler": ((2, 1), (1,)),
        "strategy_residual_add": ((2, 1), (2, 1)),
    },
    "low_rank_adapter_layer": {
        "strategy_matmul_down_sampler_weight": ((1, 1), (1, 1)),
        "strategy_matmul_down_sampler_input": ((2, 1), (1, 1)),
        "strategy_bias_down_sampler": ((2, 1), (1,)),
        "strategy_non_linearity": ((2, 1),),
        "strategy_matmul_up_sampler_weight": ((1, 1), (1, 1)),
        "strategy_matmul_up_sampler_input": ((2, 1), (1, 1)),
        "strategy_bias_up_sampler": ((2, 1), (1,)),
        "strategy_residual_add": ((2, 1), (2, 1)),
    },
}
ORIGINAL = {
    "strategy_matmul_org": ((2, 4), (1, 4)),
    "strategy_bias_org": ((2, 1), (1,)),
    "strategy_activation_org": ((2, 1),),
}
REFERENCE["adapter"] = {**ORIGINAL, **REFERENCE["adapter_layer"]}
REFERENCE["low_rank_adapter"] = {**ORIGINAL, **REFERENCE["low_rank_adapter_layer"]}


DROPOUT = [{"n": 2, "o": 4}, {"n": 2, "i": 4}]


@pytest.fixture(scope="module")
def results():
    """Results of the examples of the API reference, of LoRA with dropout, and of a plan that is refused."""
    builds = [
        *(
            functools.partial(build_with, name, strategies, **({"lora_dropout": 0.1} if name == "lora" else {}))
            for name, strategies in REFERENCE.items()
        ),
        *(case("lora", counts, lora_dropout=0.5) for counts in DROPOUT),
        functools.partial(build_with, "lora", {"strategy_lora_b_matmul": ((2, 1), (3, 1))}),
    ]
    return dry_run_many(builds, 8)


def test_the_examples_of_the_api_reference(results):
    for (name, strategies), report in zip(REFERENCE.items(), results):
        assert isinstance(report, Report), report
        assert operators(report) == set_operators(CELLS[name]().shard(**strategies), dropout=True)


def test_dropout_of_the_outputs_is_the_same_on_every_rank():
    dropout = {"rank_dropout": 0.5, "module_dropout": 0.1}
    cases = [("loha", {"n": 2, "o": 4}, dropout), ("lokr", {"n": 2, "i": 4}, dropout)]
    reports = dry_run_many([case(name, counts, **arguments) for name, counts, arguments in cases], 8)
    for (name, counts, _), report in zip(cases, reports):
        assert isinstance(report, Report), report
        assert all(plan.is_set for plan in report.operators)
        assert [plan.strategy for plan in report.operators if plan.operator == "Dropout"] == [((1,),)] * 2
        assert collectives(report) == expected_collectives(name, report, counts, 8)


def test_dropout_is_cut_like_the_rows_that_enter(results):
    for counts, report in zip(DROPOUT, results[len(REFERENCE) : -1]):
        (dropout,) = [plan for plan in report.operators if plan.operator == "Dropout"]
        assert dropout.slot == "strategy_lora_dropout" and dropout.is_set
        assert dropout.strategy == ((2, counts.get("i", 1)),)
        assert operators(report) == set_operators(shard_like(CELLS["lora"](), strategy(**counts)), dropout=True)
        assert collectives(report) == expected_collectives("lora", report, counts, 8)


def test_an_error_names_cell_slot_operator_strategy_and_reason(results):
    error = results[-1]
    assert isinstance(error, ShardError)
    assert (error.cell, error.slot, error.operator) == ("cell", "strategy_lora_b_matmul", "MatMul")
    assert error.strategy == ((2, 1), (3, 1)) and "128 at dim index 0 cannot be divisible by" in error.reason
    assert "'strategy_lora_b_matmul' of 'cell' (MatMul), strategy ((2, 1), (3, 1)): " in str(error)

"""Random strategies: the front end's slices are NumPy's, and what cannot be is refused with the slot's name."""

import functools
import math

import numpy as np
from sharded import CELLS, DENSE, SIZES, build_with, cut, key_of

from mindpet.errors import ShardError
from mindpet.parallel import dry_run_many

RANKS = 8
AXES = {axis: SIZES["o"] if axis == "f" else size for axis, size in {**SIZES, "f": 0}.items()}
# The slot that decides how a parameter is cut, and which of its inputs the parameter is.
DECIDES = {
    "weight": (("strategy_org_dense_matmul", "strategy_matmul_org"), 1),
    "bias": (("strategy_org_bias_add", "strategy_bias_org"), 1),
    "mindpet_delta_lora_a": (("strategy_lora_a_matmul",), 1),
    "mindpet_delta_lora_b": (("strategy_lora_b_matmul",), 1),
    "down_sampler.weight": (("strategy_matmul_down_sampler",), 1),
    "down_sampler.bias": (("strategy_bias_down_sampler",), 1),
    "up_sampler.weight": (("strategy_matmul_up_sampler",), 1),
    "up_sampler.bias": (("strategy_bias_up_sampler",), 1),
    "down_sampler.mindpet_delta_low_rank_adapter_weight_left": (("strategy_matmul_down_sampler_weight",), 0),
    "down_sampler.mindpet_delta_low_rank_adapter_weight_right": (("strategy_matmul_down_sampler_weight",), 1),
    "up_sampler.mindpet_delta_low_rank_adapter_weight_left": (("strategy_matmul_up_sampler_weight",), 0),
    "up_sampler.mindpet_delta_low_rank_adapter_weight_right": (("strategy_matmul_up_sampler_weight",), 1),
}


def random_strategy(rng, axes, spoil):
    """A strategy for an operator with these axes that the front end accepts; `spoil` makes one that it must refuse."""
    names = sorted(set(axes) - {","})
    while True:
        counts = {name: int(rng.choice([1, 1, 2, 4, 8])) for name in names}
        fits = math.prod(counts.values()) <= RANKS and all(AXES[name] % count == 0 for name, count in counts.items())
        if fits:
            break
    strategy = [[counts[name] for name in part] for part in axes.split(",")]
    if spoil:
        first = strategy[0]
        place = int(rng.integers(len(first)))
        kinds = ["not a divisor", "too many ranks"] + (
            ["two counts for an axis"] if axes.count(axes[place]) > 1 else []
        )
        kind = rng.choice(kinds)
        if kind == "not a divisor":
            first[place] = 7
        elif kind == "too many ranks":
            first[place] = 16
        else:
            first[place] = 2 if first[place] != 2 else 4
    return tuple(tuple(part) for part in strategy)


def test_random_strategies():
    plans = []
    for name in ("lora", "adapter", "low_rank_adapter", "adapter_layer", "low_rank_adapter_layer"):
        rng = np.random.default_rng(list(CELLS).index(name))
        operators = {slot: one for slot, one in CELLS[name]().operators.items() if one[0] is not None}
        slots = {slot: axes for slot, (_, axes) in operators.items() if slot != "strategy_lora_dropout"}
        for index in range(24):
            spoiled = {str(rng.choice(list(slots)))} if index % 3 == 0 else set()
            strategies = {slot: random_strategy(rng, axes, slot in spoiled) for slot, axes in slots.items()}
            plans.append((name, spoiled, strategies))
    builds = [functools.partial(build_with, name, strategies) for name, _, strategies in plans]
    for (name, spoiled, strategies), result in zip(plans, dry_run_many(builds, RANKS, train=False)):
        if spoiled:
            assert isinstance(result, ShardError), (name, spoiled, strategies)
            assert {result.slot} == spoiled and result.cell == "cell", (result, strategies)
        else:
            assert not isinstance(result, Exception), (name, result, strategies)
            assert slices(result) == numpy_slices(name, result, strategies)


def slices(report):
    return {plan.name: plan.slice for plan in report.parameters}


def numpy_slices(name, report, strategies):
    """The slices of the parameters by np.split along each axis."""
    expected = {}
    for plan in report.parameters:
        choices, place = DECIDES[key_of(name, plan.name)]
        strategy = next(strategies[slot] for slot in choices if slot in strategies)
        expected[plan.name] = cut(plan.shape, strategy[place])
    assert len(expected) == len(report.parameters) and (name in DENSE or "cell.weight" not in expected)
    return expected

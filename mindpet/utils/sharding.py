"""From the arguments of `shard()` to the operators of a Cell.

A Cell that can be sharded has a table `operators`: slot -> (operator, axes). The slot is an argument of its `shard()`.
The operator is a Primitive, an activation Cell, or None. The axes are those of the operator's inputs, as `einsum`
writes them, one letter an axis: `n` the rows, `i` and `o` the features that go into and come out of the base layer, `r`
the rank or bottleneck of the delta, `h` and `w` the axes of an image. `f`, `k` and `l` are axes that are never cut, of
tables, kernels and the factors of a matrix. A matmul of `(n, i)` with `(r, i)` is "ni,ri".

A strategy is a tuple of tuples of ints, or of Layouts; what a cut is stands in `mindpet.utils.layouts`.
"""

import warnings
from typing import Any

import mindspore as ms
from mindspore import Layout, nn, ops

from mindpet.layers.activation import activation_operators
from mindpet.utils.hints import Operators, Strategy
from mindpet.utils.layouts import (
    TAKES_LAYOUT,
    Cut,
    DeviceCut,
    cuts_of,
    is_layout,
    problem_of,
    set_strategy,
    strategy_of,
    tuples_of,
)
from mindpet.utils.validate import Checker, is_int

PARALLEL_MODES = (ms.ParallelMode.SEMI_AUTO_PARALLEL, ms.ParallelMode.AUTO_PARALLEL)
# Attribute of a Cell -> the strategy with which every rank computes it as a whole.
WHOLE = {
    "gather": ((1, 1), (1,)),
    "matmul": ((1, 1), (1, 1)),
    "bias_add": ((1, 1), (1,)),
    "relu": ((1, 1),),
    "tanh": ((1, 1),),
    "dropout": ((1, 1),),
}


def apply_strategies(cell: nn.Cell, strategies: dict[str, Any]) -> nn.Cell:
    """Set the strategies of the operators of `cell`; every strategy is checked before the first is set.

    A strategy of None leaves its operator alone. One for an operator that the Cell does not have (no bias, no
    activation) is a warning. An operator that takes no Layout gets the tuples that mean it. Setting a strategy changes
    nothing outside of a parallel mode.

    Args:
        cell: has the table `operators`.
        strategies: slot -> strategy: what `locals()` is in a `shard()`; `self` is passed over. A slot that is missing
            is None.

    Returns:
        `cell`.

    Raises:
        TypeError: a strategy is neither a tuple of tuples of ints nor one of Layouts; there is no such slot.
        ValueError: the wrong number of inputs or of axes; a number of slices below 1; Layouts that MindSpore does not
            take, or that an operator does not, where no tuples mean them; an activation whose operators cannot be
            sharded (LogSoftmax among them, which is refused in a parallel mode even without a strategy).
    """
    check = Checker(f"{type(cell).__name__}.shard")
    parallel = ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES
    surplus = [slot for slot in strategies if slot not in (*cell.operators, "self")]
    rule = f"one of the slots {list(cell.operators)}"
    check.require(not surplus, TypeError, "strategies", surplus, rule)
    plan = []
    for slot, (operator, axes) in cell.operators.items():
        strategy = strategies.get(slot)
        if _is_log_softmax(operator) and (strategy is not None or parallel):
            rule = "for another activation, since LogSoftmax cannot be sharded"
            check.require(False, ValueError, slot, strategy, rule)
        elif strategy is not None and check_strategy(check, slot, strategy, _with_weight(operator, axes, strategy)):
            plan.extend(_plan(check, slot, strategy, operator, axes))
    check.done()
    for primitive, strategy in plan:
        set_strategy(primitive, strategy)
    return cell


def cut_axes(cell: nn.Cell, cuts: dict[str, Cut]) -> dict[str, Strategy]:
    """The strategies of a Cell, slot -> strategy, from how each axis is cut.

    Args:
        cell: has the table `operators`.
        cuts: letter of an axis -> cut; what is missing is not cut.
    """
    return {
        slot: strategy_of(tuple(tuple(cuts.get(axis, 1) for axis in names) for names in axes.split(",")))
        for slot, (operator, axes) in slot_table(cell).items()
        if operator is not None
    }


def slot_table(cell: Any) -> Operators:
    """The table `operators` of a Cell of this package; empty for any other object."""
    return cell.operators if isinstance(getattr(type(cell), "operators", None), property) else {}


def check_strategy(check: Checker, slot: str, strategy: Any, axes: str) -> bool:
    """Whether a strategy is a tuple of tuples of positive ints, or of Layouts, that fits the axes.

    For an operator of one input several equal tuples are allowed; they mean that layout.
    """
    nested = isinstance(strategy, tuple) and all(isinstance(layout, tuple) for layout in strategy)
    ints = nested and all(is_int(count) for layout in strategy for count in layout)
    layouts = isinstance(strategy, tuple) and all(isinstance(layout, Layout) for layout in strategy)
    rule = "a tuple of tuples of int, or of Layouts, one for each input"
    if not check.require(ints or layouts, TypeError, slot, strategy, rule):
        return False
    problem = problem_of(strategy) if layouts else None
    if not check.require(not problem, ValueError, slot, strategy, problem):
        return False
    cuts = cuts_of(strategy)
    ranks = tuple(len(names) for names in axes.split(","))
    given = tuple(len(one) for one in (cuts if len(ranks) > 1 else tuple(dict.fromkeys(cuts))))
    rule = f"of {len(ranks)} tuple(s), one for each input, with {' and '.join(map(str, ranks))} counts"
    positive = layouts or all(count >= 1 for layout in strategy for count in layout)
    fits = check.require(given == ranks, ValueError, slot, strategy, rule)
    return fits and check.require(positive, ValueError, slot, strategy, "of counts of at least 1")


def axis_cuts(check: Checker, slot: str, strategy: Any, axes: str) -> dict[str, Cut]:
    """How each axis is cut: letter -> cut, of a strategy that is checked; empty if it is wrong."""
    if not check_strategy(check, slot, strategy, axes):
        return {}
    pairs = [pair for names, cuts in zip(axes.split(","), cuts_of(strategy)) for pair in zip(names, cuts)]
    cuts = dict(pairs)
    alike = all(cuts[letter] == cut for letter, cut in pairs)
    rule = "one in which all inputs cut the axes alike that they have in common"
    check.require(alike, ValueError, slot, strategy, rule)
    over = [name for cut in cuts.values() if isinstance(cut, DeviceCut) for name in cut.over]
    rule = "one in which a device axis cuts no two of the axes"
    check.require(len(set(over)) == len(over), ValueError, slot, strategy, rule)
    return cuts


def shard_whole(*cells: nn.Cell) -> None:
    """Have every rank compute Cells on matrices as a whole: Embedding, Dense, Tanh, Dropout."""
    for cell in cells:
        for name, strategy in WHOLE.items():
            if name in cell._primitives:
                set_strategy(cell._primitives[name], strategy)


def _is_log_softmax(operator):
    return isinstance(operator, (nn.LogSoftmax, ops.LogSoftmax))


def _with_weight(operator, axes, strategy):
    """The axes of an activation, with that of its weight where a PReLU's strategy tells it."""
    pair = isinstance(operator, nn.PReLU) and isinstance(strategy, tuple) and len(strategy) == 2
    first, second = (getattr(layout, "_tensor_map", layout) for layout in strategy) if pair else (None, None)
    return axes if first == second else f"{axes},w"


def _plan(check, slot, strategy, operator, axes):
    """(primitive, strategy) for each primitive behind a slot."""
    if operator is None:
        warnings.warn(f"{check.owner}: '{slot}' is ignored, because this Cell has no such operator.", stacklevel=4)
        return []
    if "," in axes:
        return _fitting(check, slot, [(operator, strategy)])
    operators = activation_operators(operator)
    rule = f"for an activation given as a str, since the operators of {type(operator).__name__} cannot be reached"
    check.require(operators, ValueError, slot, strategy, rule)
    cuts = cuts_of(strategy)
    features = cuts[0][-1] if _has_many_weights(operator) else 1
    kinds = {"x": cuts[0], "s": (), "w": cuts[-1] if len(cuts[-1]) == 1 else (features,)}
    plan = [(primitive, strategy_of(tuple(kinds[kind] for kind in operands))) for primitive, operands in operators]
    return _fitting(check, slot, plan)


def _fitting(check, slot, plan):
    """The plan with tuples for primitives that take no Layout."""
    fitting = []
    for primitive, strategy in plan:
        if is_layout(strategy) and primitive.name not in TAKES_LAYOUT:
            tuples = tuples_of(strategy)
            rule = f"of tuples, for {primitive.name} takes no Layout, and no tuples cut its input in the same places"
            never_runs = primitive.name == "Dropout" and primitive.keep_prob == 1
            check.require(tuples or never_runs, ValueError, slot, strategy, rule)
            strategy = tuples
        if strategy is not None:
            fitting.append((primitive, strategy))
    return fitting


def _has_many_weights(operator):
    """Whether it is a PReLU with a weight for each feature."""
    return isinstance(operator, nn.PReLU) and operator.w.shape[0] > 1

"""From the arguments of `shard()` to the operators of a Cell."""

import warnings

import mindspore as ms
from mindspore import nn, ops

from mindpet.layers.activation import activation_operators
from mindpet.utils.validate import Checker, is_int

TWO_INPUTS = ("MatMul", "BatchMatMul", "BiasAdd", "Add", "Mul")
PARALLEL_MODES = (ms.ParallelMode.SEMI_AUTO_PARALLEL, ms.ParallelMode.AUTO_PARALLEL)


def apply_strategies(cell, strategies):
    """Set the strategies of the operators of `cell`; every strategy is checked before the first is set.

    A strategy of None leaves its operator alone. One for an operator that the Cell does not have (no bias, no
    activation) is a warning. Setting a strategy changes nothing outside of a parallel mode.

    Args:
        cell (Cell): its `operators` is the table from slot to operator: a Primitive, an activation Cell or None.
        strategies (dict): slot -> strategy: what `locals()` is in a `shard()`; `self` is passed over.

    Returns:
        Cell, `cell`.

    Raises:
        TypeError: a strategy is not a tuple of tuples of ints.
        ValueError: the wrong number of entries; a number of slices below 1; an activation whose operators cannot be
            sharded (LogSoftmax among them, which is refused in a parallel mode even without a strategy).
    """
    check = Checker(f"{type(cell).__name__}.shard")
    parallel = ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES
    plan = []
    for slot, operator in cell.operators.items():
        strategy = strategies[slot]
        if _is_log_softmax(operator) and (strategy is not None or parallel):
            rule = "for another activation, since LogSoftmax cannot be sharded"
            check.require(False, ValueError, slot, strategy, rule)
        elif strategy is not None and _check_nesting(check, slot, strategy):
            plan.extend(_plan(check, slot, strategy, operator))
    check.done()
    for primitive, strategy in plan:
        primitive.shard(strategy)
    return cell


def _is_log_softmax(operator):
    return isinstance(operator, (nn.LogSoftmax, ops.LogSoftmax))


def _check_nesting(check, slot, strategy):
    """Whether it is a tuple of tuples of positive ints, at least one."""
    nested = isinstance(strategy, tuple) and all(isinstance(layout, tuple) for layout in strategy)
    ints = nested and all(is_int(count) for layout in strategy for count in layout)
    positive = ints and strategy and all(count >= 1 for layout in strategy for count in layout)
    return check.require(
        ints, TypeError, slot, strategy, "a tuple of tuples of int, one for each input"
    ) and check.require(positive, ValueError, slot, strategy, "of at least one tuple, with counts of at least 1")


def _plan(check, slot, strategy, operator):
    """(primitive, strategy) for each primitive behind a slot; nothing if the strategy does not fit."""
    if operator is None:
        warnings.warn(f"{check.owner}: '{slot}' is ignored, because this Cell has no such operator.", stacklevel=4)
        return []
    if getattr(operator, "name", None) in TWO_INPUTS:
        fits = check.require(len(strategy) == 2, ValueError, slot, strategy, f"of two tuples, for {operator.name}")
        return [(operator, strategy)] if fits else []
    layout = strategy[0]
    operators = activation_operators(operator)
    rule = f"for an activation given as a str, since the operators of {type(operator).__name__} cannot be reached"
    check.require(operators, ValueError, slot, strategy, rule)
    same = all(entry == layout for entry in strategy)
    if not check.require(
        same, ValueError, slot, strategy, "of one tuple, or of equal ones, for an operator of one input"
    ):
        return []
    kinds = {"x": layout, "s": (), "w": (1,)}
    return [(primitive, tuple(kinds[kind] for kind in operands)) for primitive, operands in operators]

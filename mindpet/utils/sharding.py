"""From the arguments of `shard()` to the operators of a Cell."""

import warnings

import mindspore as ms
from mindspore import nn, ops

from mindpet.layers.activation import activation_operators
from mindpet.utils.validate import is_int

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
    owner = type(cell).__name__
    parallel = ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES
    plan = []
    for slot, operator in cell.operators.items():
        strategy = strategies[slot]
        if is_log_softmax(operator) and (strategy is not None or parallel):
            raise ValueError(f"{owner}.shard: '{slot}' is for LogSoftmax, which cannot be sharded; got {strategy!r}.")
        if strategy is None:
            continue
        _check_strategy(owner, slot, strategy)
        if operator is None:
            warnings.warn(f"{owner}.shard: '{slot}' is ignored, because this Cell has no such operator.", stacklevel=3)
        elif getattr(operator, "name", None) in TWO_INPUTS:
            _check_two(owner, slot, strategy)
            plan.append((operator, strategy))
        else:
            plan.extend(_one_input_plan(owner, slot, strategy, operator))
    for primitive, strategy in plan:
        primitive.shard(strategy)
    return cell


def is_log_softmax(operator):
    """Whether an activation is LogSoftmax, as Cell or as Primitive."""
    return isinstance(operator, (nn.LogSoftmax, ops.LogSoftmax))


def _check_strategy(owner, slot, strategy):
    """A tuple of tuples of positive ints, one inner tuple an input."""
    nested = isinstance(strategy, tuple) and all(isinstance(layout, tuple) for layout in strategy)
    if not nested or not all(is_int(count) for layout in strategy for count in layout):
        raise TypeError(
            f"{owner}.shard: '{slot}' must be a tuple of tuples of int, one an input, but got {strategy!r}."
        )
    if not strategy or any(count < 1 for layout in strategy for count in layout):
        raise ValueError(
            f"{owner}.shard: '{slot}' must have an entry an input and numbers of slices of at least 1, "
            f"but got {strategy!r}."
        )


def _check_two(owner, slot, strategy):
    if len(strategy) != 2:
        raise ValueError(f"{owner}.shard: '{slot}' is for an operator of two inputs, but got {strategy!r}.")


def _one_input_plan(owner, slot, strategy, operator):
    """The strategy of each primitive of an activation or a dropout. Entries that repeat one layout mean that layout."""
    layout = strategy[0]
    if any(entry != layout for entry in strategy):
        raise ValueError(
            f"{owner}.shard: '{slot}' is for an operator of one input, so its entries must be equal, "
            f"but got {strategy!r}."
        )
    operators = activation_operators(operator)
    if not operators:
        raise ValueError(
            f"{owner}.shard: '{slot}' cannot reach the operators of {type(operator).__name__}; "
            f"give the activation as a str, if get_activation knows it. Got {strategy!r}."
        )
    kinds = {"x": layout, "s": (), "w": (1,)}
    return [(primitive, tuple(kinds[kind] for kind in operands)) for primitive, operands in operators]

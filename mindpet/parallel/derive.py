"""The strategies of a delta, derived from that of the layer it belongs to."""

from typing import Optional

from mindspore import nn

from mindpet.utils.hints import Strategy
from mindpet.utils.layouts import Cut, get_strategy
from mindpet.utils.sharding import axis_cuts, cut_axes, slot_table
from mindpet.utils.validate import Checker


def shard_like(cell: nn.Cell, in_strategy: Optional[Strategy] = None) -> nn.Cell:
    """Set all strategies of a delta Cell so that they go with the strategy of the base layer's matmul.

    One rule serves all methods: an axis of the delta that is an axis of the base layer is cut as it is there, as often,
    or over the same device axes of a Layout; the rank or bottleneck is never cut. So the first matrix of the delta
    inherits the cut of the axis that it contracts, and the second that of the axis that it yields. The factors of the
    low-rank adapter's matrices stay whole: they are small, and cutting their product costs more communication than it
    saves.

    The plan communicates no more than the mathematics needs. For LoRA a column split (of the outputs) needs nothing in
    the forward pass and a row split (of the inputs) one AllReduce of `(rows, rank)`, beside the base's own. For the
    adapters, which follow the base layer, it is the reverse: a column split needs one AllReduce of `(rows, bottleneck)`
    and a row split nothing.

    Source: the rule is that of google/qwix for LoRA.

    Args:
        cell: a hand-made one with a table `operators`, such as LoRADense.
        in_strategy: of the base matmul, `((rows, in), (out, in))`, as `mindspore.ops.MatMul(transpose_b=True)` takes
            it: tuples or Layouts. For a layer without a base of its own it is that of the layer before. Default: None,
            for what is set on `cell.matmul`.

    Returns:
        `cell`.

    Raises:
        TypeError: `cell` is none of these Cells, `in_strategy` neither a tuple of tuples of ints nor one of Layouts.
        ValueError: `in_strategy` has the wrong number of inputs or axes, a count below 1, two cuts for the inputs'
            axis, or a device axis for two axes; it is None and none is set; an operator takes no Layout, and no tuples
            mean the same; an activation cannot be sharded.
    """
    check = Checker("shard_like")
    check.require(slot_table(cell), TypeError, "cell", cell, "a delta Cell that has slots")
    check.done()
    if in_strategy is None:
        matmul = getattr(cell, "matmul", None)
        in_strategy = get_strategy(matmul) if matmul is not None else None
        check.require(in_strategy, ValueError, "in_strategy", in_strategy, "given, since no base matmul has one")
        check.done()
    cuts = axis_cuts(check, "in_strategy", in_strategy, "ni,oi")
    check.done()
    return shard_axes(cell, cuts)


def shard_axes(cell: nn.Cell, cuts: dict[str, Cut]) -> nn.Cell:
    """Set all strategies of a delta Cell from how each axis of its base layer is cut.

    Args:
        cell: has the table `operators`, see `mindpet.utils.sharding`.
        cuts: letter of an axis -> cut; what is missing is not cut.

    Returns:
        `cell`.

    Raises:
        ValueError: an activation cannot be sharded; an operator takes no Layout, and no tuples mean the same.
    """
    return cell.shard(**cut_axes(cell, cuts))

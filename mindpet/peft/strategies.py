"""The strategies of deltas, from those of the network around them."""

from mindpet.parallel import shard_like
from mindpet.utils.sharding import slot_table


def carry_strategy(cell, kind, delta):
    """Derive the delta's strategies from that of the layer's matmul, if it has one."""
    strategy = getattr(getattr(cell, "matmul", None), "in_strategy", None)
    delta = getattr(delta, "delta", delta)
    if strategy is None or kind.name != "linear" or not slot_table(delta):
        return
    if kind.fan_in_fan_out:
        strategy = (strategy[0], strategy[1][::-1])
    shard_like(delta, strategy)

"""The strategies of deltas, from those of the operators of the layer or attention that they belong to.

A Cell of which no operator has a strategy is left to MindSpore, and its delta too. Where there are strategies that a
delta cannot follow it is refused: it would be right, but gather what is cut.
"""

from typing import Any

from mindspore import nn

from mindpet.delta._base import Delta
from mindpet.errors import ConfigError
from mindpet.network.kinds import SLOTS, linear_layers
from mindpet.parallel.derive import shard_axes
from mindpet.utils.sharding import check_strategy, slot_table
from mindpet.utils.validate import Checker, is_int

# Kind of a layer -> type of the operator that takes its weight, and the axes of its inputs as `operators` have them.
OPERATORS = {"linear": ("MatMul", "ni,oi"), "embedding": ("Gather", "vo,n"), "conv2d": ("Conv2D", "nihw,oikl")}
DELTAS = (
    "mindpet_",
    *(kind.slot for kind in SLOTS.values()),
)  # how the names of Cells begin that are put into layers and attentions


def carry_strategy(cell: nn.Cell, kind: Any, delta: Delta) -> None:
    """Derive a delta's strategies from those of its place; do nothing if that has none.

    Args:
        cell: the layer, block or attention.
        kind: of the Cell, see `mindpet.network.kinds`.
        delta: made for it.

    Raises:
        ConfigError: there are strategies that the delta cannot follow.
    """
    cuts = find_cuts(cell, kind)
    if cuts and kind.name in SLOTS:
        delta.shard(*cuts)
    elif cuts:
        if not slot_table(delta):
            raise ConfigError(f"{type(delta).__name__} has no table 'operators': it cannot follow a layer's strategies")
        shard_axes(delta, cuts)


def find_cuts(cell: nn.Cell, kind: Any) -> Any:
    """How the operators of a place are cut, see the functions below; None if none has a strategy.

    Raises:
        ConfigError: there are strategies that a delta cannot follow.
    """
    sharded = [
        primitive
        for path, inner in cell.cells_and_names()
        if not any(part.startswith(DELTAS) for part in path.split("."))
        for primitive in inner._primitives.values()
        if any(getattr(primitive, name, None) is not None for name in ("in_strategy", "in_layout"))
    ]
    if kind.name not in SLOTS:
        if not sharded:
            return None
        return _block_cuts(cell) if kind.name == "block" else _layer_cuts(kind, sharded)
    given = getattr(cell, kind.strategy, None)
    if given is None and not sharded:
        return None
    return _attention_cuts(kind, sharded, given) if hasattr(kind, "cut_heads") else _batch_cut(given)


def _layer_cuts(kind, sharded):
    """How often each axis of a layer is cut: letter -> count."""
    if kind.name not in OPERATORS:
        raise ConfigError(f"no delta beside a layer with strategies of the kind '{kind.name}'")
    name, axes = OPERATORS[kind.name]
    matching = [primitive for primitive in sharded if primitive.name == name]
    if len(matching) != 1:
        raise ConfigError(f"a delta takes its strategies from one {name}, but {len(matching)} have one in this layer")
    strategy = _strategy(matching[0])
    if name == "MatMul":
        flipped = (matching[0].transpose_a, not matching[0].transpose_b)
        axes = ",".join(part[::-1] if flip else part for part, flip in zip(axes.split(","), flipped))
    if name == "Gather":  # the delta takes the ids in one row
        if any(count > 1 for layout in strategy[1:] for count in layout[1:]):
            raise ConfigError(f"no delta where ids are cut along other axes than the first, as in {strategy}")
        strategy = (strategy[0], *(layout[:1] for layout in strategy[1:]))
    check = Checker("")
    if not check_strategy(check, f"strategy of {name}", strategy, axes):
        raise ConfigError("; ".join(message for _, message in check.problems))
    return {letter: count for part, layout in zip(axes.split(","), strategy) for letter, count in zip(part, layout)}


def _block_cuts(cell):
    """How often each axis of a block is cut: as its first and its last linear layer are."""
    layers = linear_layers(cell)
    first, last = (find_cuts(*layer) for layer in (layers[0], layers[-1]))
    if first is None or last is None or first["n"] != last["n"]:
        raise ConfigError(
            "a delta takes the strategies of a block from its first and its last linear layer, which must both have "
            f"them, and cut the rows alike; they are {first} and {last}"
        )
    return {"n": first["n"], "i": first["i"], "o": last["o"]}


def _batch_cut(given):
    """(slices of the batch,) of a Cell that takes a prompt."""
    if not (isinstance(given, tuple) and len(given) == 1 and is_int(given[0]) and given[0] > 0):
        raise ConfigError(
            "its attribute 'prompt_strategy' must say in how many slices the batch is cut, a tuple of one positive "
            f"int, but is {given!r}"
        )
    return given


def _attention_cuts(kind, sharded, cut):
    """(slices of the batch, slices of the heads) of an attention.

    Key and value are the second inputs, `(batch, heads, ..., ...)`, of its batched matmuls.
    """
    if cut is None:
        layouts = {_strategy(primitive)[-1] for primitive in sharded if primitive.name == "BatchMatMul"}
        cut = layouts.pop() if len(layouts) == 1 else ()
        if len(cut) != 4 or cut[2:] != (1, 1):
            raise ConfigError(
                "its batched matmuls do not tell in how many slices the batch and the heads of key and value are cut; "
                f"give it an attribute {kind.strategy!r}, a tuple of these two"
            )
        cut = cut[:2]
    pair = isinstance(cut, tuple) and len(cut) == 2 and all(is_int(count) and count > 0 for count in cut)
    if not pair or kind.cut_heads % cut[1]:
        raise ConfigError(
            f"its {kind.strategy!r} must be two positive ints, of which the second divides its {kind.cut_heads} heads, "
            f"but is {cut!r}"
        )
    return cut


def _strategy(primitive):
    """The strategy of an operator, a tuple of tuples."""
    if getattr(primitive, "in_layout", None) is not None:
        raise ConfigError(f"no delta where the strategy of {primitive.name} is a Layout: give tuples of ints")
    return primitive.in_strategy

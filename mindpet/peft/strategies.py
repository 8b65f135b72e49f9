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
from mindpet.utils.layouts import TAKES_LAYOUT, cuts_of, get_strategy, is_layout, slices, strategy_of, tuples_of
from mindpet.utils.quote import quote
from mindpet.utils.sharding import axis_cuts, check_strategy, slot_table
from mindpet.utils.validate import Checker

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
    if not cuts:
        return
    is_slot, has_table = kind.name in SLOTS, bool(slot_table(delta))
    if not (is_slot or has_table):
        raise ConfigError(f"{type(delta).__name__} has no table 'operators': it cannot follow a layer's strategies")
    try:
        if is_slot:
            delta.shard(*(cuts if has_table else _counts(cuts)))
        else:
            shard_axes(delta, cuts)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def find_cuts(cell: nn.Cell, kind: Any) -> Any:
    """How the axes of a place are cut, see the functions below and `mindpet.utils.layouts`; None if nothing tells it.

    Raises:
        ConfigError: there are strategies that a delta cannot follow.
    """
    sharded = [
        primitive
        for path, inner in cell.cells_and_names()
        if not any(part.startswith(DELTAS) for part in path.split("."))
        for primitive in inner._primitives.values()
        if get_strategy(primitive) is not None
        and not getattr(primitive, "self_define_shard", False)  # it follows another one
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
    """How each axis of a layer is cut: letter -> cut."""
    if kind.name not in OPERATORS:
        raise ConfigError(f"no delta beside a layer with strategies of the kind '{kind.name}'")
    name, axes = OPERATORS[kind.name]
    matching = [primitive for primitive in sharded if primitive.name == name]
    if len(matching) != 1:
        raise ConfigError(
            f"a delta takes its strategies from one {name}, but {len(matching)} have one in this layer; what has one: "
            f"{[primitive.name for primitive in sharded]}"
        )
    strategy = get_strategy(matching[0])
    if is_layout(strategy) and name not in TAKES_LAYOUT:
        raise ConfigError(f"no delta where the strategy of {name} is a Layout, which MindSpore refuses: give tuples")
    if name == "MatMul":
        flipped = (matching[0].transpose_a, not matching[0].transpose_b)
        axes = ",".join(part[::-1] if flip else part for part, flip in zip(axes.split(","), flipped))
    if name == "Gather":  # the delta takes the ids in one row
        if any(count > 1 for layout in strategy[1:] for count in layout[1:]):
            raise ConfigError(f"no delta where ids are cut along other axes than the first, as in {strategy}")
        strategy = (strategy[0], *(layout[:1] for layout in strategy[1:]))
    check = Checker("")
    cuts = axis_cuts(check, f"strategy of {name}", strategy, axes)
    if check.problems:
        raise ConfigError("; ".join(message for _, message in check.problems))
    return cuts


def _block_cuts(cell):
    """How each axis of a block is cut: as its first and its last linear layer are."""
    layers = linear_layers(cell)
    first, last = (find_cuts(*layer) for layer in (layers[0], layers[-1]))
    if first is None or last is None or first["n"] != last["n"]:
        raise ConfigError(
            "a delta takes the strategies of a block from its first and its last linear layer, which must both have "
            f"them, and cut the rows alike; they are {first} and {last}"
        )
    return {"n": first["n"], "i": first["i"], "o": last["o"]}


def _batch_cut(given):
    """(cut of the batch,) of a Cell that takes a prompt."""
    cuts = _given_cuts(given)
    if cuts is None or len(cuts) != 1:
        raise ConfigError(
            "its attribute 'prompt_strategy' must say in how many slices the batch is cut, a tuple of one positive "
            f"int or a Layout of one axis, but is {quote(given)}"
        )
    return cuts


def _attention_cuts(kind, sharded, given):
    """(cut of the batch, cut of the heads) of an attention.

    Key and value are the second inputs, `(batch, heads, ..., ...)`, of its batched matmuls.
    """
    if given is None:
        cuts = {cuts_of(get_strategy(primitive))[-1] for primitive in sharded if primitive.name == "BatchMatMul"}
        cut = cuts.pop() if len(cuts) == 1 else ()
        if len(cut) != 4 or any(slices(one) > 1 for one in cut[2:]):
            raise ConfigError(
                "its batched matmuls do not tell in how many slices the batch and the heads of key and value are cut; "
                f"give it an attribute {kind.strategy!r}, a tuple of these two"
            )
        given = strategy_of((cut[:2],))[0]
    cuts = _given_cuts(given)
    if cuts is None or len(cuts) != 2 or kind.cut_heads % slices(cuts[1]):
        raise ConfigError(
            f"its {kind.strategy!r} must be two positive ints, of which the second divides its {kind.cut_heads} heads, "
            f"or a Layout of two such axes, but is {quote(given)}"
        )
    return cuts


def _given_cuts(given):
    """The cuts that an attribute says, a tuple of ints or a Layout; None if it says none."""
    check = Checker("")
    axes = "n" * (len(given) if isinstance(given, tuple) else len(getattr(given, "_tensor_map", None) or ()))
    return cuts_of((given,))[0] if check_strategy(check, "", (given,), axes) else None


def _counts(cuts):
    """The numbers of slices, for a delta with operators that take no Layout."""
    strategy = strategy_of((cuts,))
    tuples = tuples_of(strategy)
    if tuples is None:
        raise ConfigError(
            f"no prefix or prompt where the batch and the heads are cut by {quote(strategy[0])}: it takes "
            "no Layout, and no tuples cut in the same places"
        )
    return tuples[0]

"""Strategies as tuples of ints and as Layouts: for both, a cut for each axis of each input.

A Layout arranges the ranks of a pipeline stage along named axes, the device axes, and says over which of these an axis
of a tensor is cut. A tuple says how often it is cut, and leaves it to MindSpore to arrange the ranks. So a cut is an
int or a DeviceCut, and whoever hands cuts on need not know which.
"""

import math
from dataclasses import dataclass
from typing import Any, Optional, Union

from mindspore import Layout
from mindspore.ops import Primitive

from mindpet.utils.hints import Strategy

WHOLE = "None"  # of a Layout: an axis of a tensor that is not cut
INTERLEAVED = "interleaved_parallel"  # the device axis that stands for parts of a rank's slice
# Operators that take a Layout, seen in 2.7 and 2.10. Others refuse it (Concat, Conv2D, Dropout, Gather, HSwish, PReLU,
# reductions, Slice), or mean something else by it (Tile: its input and not its output).
TAKES_LAYOUT = frozenset(
    "Abs Add BatchMatMul BiasAdd Div Elu Equal Exp FastGeLU GeLU HShrink HSigmoid Log1p MatMul Maximum Minimum Mish "
    "Mul Neg ReLU ReLU6 Reciprocal SiLU Sigmoid SoftShrink Softmax Softsign Sub Tanh Transpose".split()
)


@dataclass(frozen=True)
class DeviceCut:
    """How a Layout cuts an axis of a tensor.

    Attributes:
        matrix: sizes of the device axes.
        names: of the device axes.
        over: those that the axis is cut over, the outermost first; none of one rank.
    """

    matrix: tuple[int, ...]
    names: tuple[str, ...]
    over: tuple[str, ...] = ()


Cut = Union[int, DeviceCut]
Cuts = tuple[tuple[Cut, ...], ...]


def slices(cut: Cut) -> int:
    """How many slices of an axis there are; what is interleaved stays on its rank."""
    if isinstance(cut, DeviceCut):
        sizes = dict(zip(cut.names, cut.matrix))
        return math.prod(sizes[name] for name in cut.over if name != INTERLEAVED)
    return cut


def counts_of(strategy: Strategy) -> tuple[tuple[int, ...], ...]:
    """How many slices of each axis of each input there are."""
    return tuple(tuple(map(slices, axes)) for axes in cuts_of(strategy))


def cuts_of(strategy: Strategy) -> Cuts:
    """The cuts of each axis of each input."""
    return tuple(_layout_cuts(**layout.to_dict()) if isinstance(layout, Layout) else layout for layout in strategy)


def _layout_cuts(device_matrix, alias_name, tensor_map, **others):
    sizes = dict(zip(alias_name, device_matrix))
    mapped = [axes if isinstance(axes, tuple) else (axes,) for axes in tensor_map]
    over = [[alias_name[-1 - axis] for axis in axes if axis >= 0] for axes in mapped]
    return tuple(
        DeviceCut(device_matrix, alias_name, tuple(name for name in names if sizes[name] > 1)) for names in over
    )


def strategy_of(cuts: Cuts) -> Strategy:
    """The inverse of `cuts_of`; ints among DeviceCuts are of axes that are whole."""
    mesh = _mesh(cuts)
    return cuts if mesh is None else tuple(_layout(mesh, axes) for axes in cuts)


def _mesh(cuts):
    """Some DeviceCut; None if there is none."""
    return next((cut for axes in cuts for cut in axes if isinstance(cut, DeviceCut)), None)


def _layout(mesh, axes):
    over = [cut.over if isinstance(cut, DeviceCut) else () for cut in axes]
    names = [(names if len(names) > 1 else names[0]) if names else WHOLE for names in over]
    return Layout(mesh.matrix, mesh.names)(*names)


def is_layout(strategy: Strategy) -> bool:
    """Whether it is one of Layouts."""
    return any(isinstance(layout, Layout) for layout in strategy)


def tuples_of(strategy: Strategy) -> Optional[Strategy]:
    """The tuples that cut every input in the same places as Layouts do; None if there are none.

    MindSpore arranges the ranks for tuples as the first input cuts its axes, from its first one on, and what cuts none
    comes last.
    """
    cuts = cuts_of(strategy)
    mesh = _mesh(cuts)
    if mesh is None:
        return cuts
    first, *others = ([name for cut in axes for name in cut.over] for axes in cuts)
    devices = [name for name, size in zip(mesh.names, mesh.matrix) if size > 1]
    fits = first == devices[: len(first)] and INTERLEAVED not in first and set().union(*others) <= set(first)
    return counts_of(strategy) if fits else None


def get_strategy(primitive: Primitive) -> Optional[Strategy]:
    """The strategy that was set on a primitive; of the two kinds MindSpore takes the Layouts. None if there is none."""
    layouts = getattr(primitive, "in_layout", None)
    if layouts is None:
        return getattr(primitive, "in_strategy", None)
    flat = [one for layout in layouts for one in (layout if isinstance(layout, tuple) else (layout,))]
    return strategy_of(tuple(_layout_cuts(**layout) for layout in flat))


def set_strategy(primitive: Primitive, strategy: Strategy) -> None:
    """Set a strategy in place of one of whichever kind."""
    for name in ("in_strategy", "in_layout"):
        primitive.del_prim_attr(name)
    primitive.shard(strategy)


def problem_of(layouts: tuple[Any, ...]) -> Optional[str]:
    """What a strategy of Layouts must be, and is not; None if all is right."""
    if any(layout._tensor_map is None for layout in layouts):
        return "of Layouts that were called, with a name for each axis of the tensor"
    described = [layout.to_dict() for layout in layouts]
    if len({(one["device_matrix"], one["alias_name"]) for one in described}) > 1:
        return "of Layouts with one device matrix and the same names"
    if any(one["rank_list"] != list(range(len(one["rank_list"]))) for one in described):
        return "of Layouts without a rank_list, which MindSpore leaves out of account"
    return None


def describe(layout: Layout) -> str:
    """A Layout as it is written in code."""
    text = f"Layout({layout._device_shape}, {layout._alias_name})"
    if layout._tensor_map is None:
        return text
    names = (*layout._alias_name[::-1], WHOLE)  # of -1, too
    axes = [tuple(names[axis] for axis in one) if isinstance(one, tuple) else names[one] for one in layout._tensor_map]
    return f"{text}({', '.join(map(repr, axes))})"

"""What a dry run found."""

import collections
import json
import re
from dataclasses import asdict, dataclass

from mindpet.utils.hints import Shape, Strategy

_LAYER = re.compile(r"\b(?<=\.)\d+(?=\.)|^\d+(?=\.)")  # the number of a layer in a path


@dataclass
class ParameterPlan:
    """A parameter on one rank.

    Attributes:
        name: of the parameter.
        role: 'trainable', 'frozen', or 'optimizer' for what training adds (moments, accumulated gradients).
        dtype: its type.
        shape: full shape.
        slice: shape on this rank.
        device_matrix: how the ranks are arranged; empty if the parameter has no layout, so is whole.
        tensor_map: for each axis of the shape the axis of the device matrix that cuts it, counted from the right
            or -1.
        optimizer_shards: into how many parts `enable_parallel_optimizer` cuts the slice further. 1: none.
        bytes: on this rank.
    """

    name: str
    role: str
    dtype: str
    shape: Shape
    slice: Shape
    device_matrix: tuple[int, ...]
    tensor_map: tuple[int, ...]
    optimizer_shards: int
    bytes: int


@dataclass
class OperatorPlan:
    """A forward operator that has a strategy.

    Attributes:
        cell: path of its Cell.
        slot: the argument of this Cell's `shard()`, for other Cells the attribute; empty if it has no name.
        operator: its type.
        strategy: one tuple of ints for each input.
        is_set: whether `shard` set it; else MindSpore derived it.
        count: how often it runs in a step; 0 if the compiler has found it needless.
    """

    cell: str
    slot: str
    operator: str
    strategy: Strategy
    is_set: bool
    count: int


@dataclass
class CollectivePlan:
    """A communication of this rank with others.

    Attributes:
        kind: 'AllReduce', 'AllGather', 'ReduceScatter', ...
        phase: 'forward' or 'backward'; what follows the gradients, as an optimizer's AllGather, is backward.
        cause: what it is for.
        cell: path of the Cell where it happens.
        ranks: the group.
        dtype: of what is communicated.
        shape: of the larger of what goes in and what comes out.
        bytes: of that tensor, once.
        count: how often it runs in a step.
    """

    kind: str
    phase: str
    cause: str
    cell: str
    ranks: tuple[int, ...]
    dtype: str
    shape: Shape
    bytes: int
    count: int

    @property
    def group_size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)

    @property
    def bytes_per_step(self) -> int:
        """`bytes * count`."""
        return self.bytes * self.count


@dataclass
class Report:
    """The plan of one rank. `print(report)` shows it as tables.

    Attributes:
        device_num: ranks.
        rank: the rank that it was made for.
        train: a training step, or a forward pass.
        mindspore: version.
        target: 'GPU' (stub libraries) or 'Ascend'.
        parameters: in the network's order, then the optimizer's.
        operators: in the order of the graph.
        collectives: in the order of the graph.
    """

    device_num: int
    rank: int
    train: bool
    mindspore: str
    target: str
    parameters: list[ParameterPlan]
    operators: list[OperatorPlan]
    collectives: list[CollectivePlan]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on this rank."""
        return sum(plan.bytes for plan in self.parameters if plan.role != "optimizer")

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients on this rank, one for each trainable weight; 0 in a forward pass."""
        return sum(plan.bytes for plan in self.parameters if plan.role == "trainable") if self.train else 0

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state on this rank."""
        return sum(plan.bytes for plan in self.parameters if plan.role == "optimizer")

    @property
    def communication_bytes(self) -> int:
        """Bytes of all tensors that this rank communicates in a step."""
        return sum(plan.bytes_per_step for plan in self.collectives)

    def parameter(self, name: str) -> ParameterPlan:
        """The plan of a parameter by its name; KeyError if there is none."""
        return {plan.name: plan for plan in self.parameters}[name]

    def to_json(self) -> str:
        """The report as a JSON text, with the totals; a group of ranks at equal distances is 'start:stop:step'."""
        totals = {
            name: getattr(self, name)
            for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes", "communication_bytes")
        }
        content = asdict(self)
        for plan in content["collectives"]:
            plan["ranks"] = _short(plan["ranks"])
        return json.dumps({**content, "totals": totals}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote."""
        content = json.loads(text)
        content.pop("totals")
        for plan in content["collectives"]:
            if isinstance(plan["ranks"], str):
                plan["ranks"] = list(range(*map(int, plan["ranks"].split(":"))))
        for name, kind in (
            ("parameters", ParameterPlan),
            ("operators", OperatorPlan),
            ("collectives", CollectivePlan),
        ):
            content[name] = [kind(**{key: _tuples(value) for key, value in plan.items()}) for plan in content[name]]
        return cls(**content)

    def __str__(self) -> str:
        """Tables. Rows that differ only in the number of a layer are one row, with `*` for the number."""
        step = "training step" if self.train else "forward pass"
        parts = [
            f"Rank {self.rank} of {self.device_num}, {step}, MindSpore {self.mindspore}",
            _table(
                ("parameter", "", "dtype", "shape", "slice", "device matrix"),
                ("count", "bytes"),
                [
                    ((p.name, p.role, p.dtype, p.shape, p.slice, p.device_matrix or "-"), (1, p.bytes))
                    for p in self.parameters
                    if p.role != "optimizer"
                ],
            ),
            _table(
                ("cell", "slot", "operator", "strategy", ""),
                ("runs a step",),
                [
                    ((o.cell, o.slot, o.operator, o.strategy, "set" if o.is_set else "derived"), (o.count,))
                    for o in self.operators
                ],
            ),
            _table(
                ("phase", "collective", "cause", "ranks", "dtype"),
                ("runs a step", "bytes a step"),
                [
                    ((c.phase, c.kind, c.cause, c.group_size, c.dtype), (c.count, c.bytes_per_step))
                    for c in self.collectives
                ],
            ),
            f"weights {self.weight_bytes:,} bytes, gradients {self.gradient_bytes:,}, "
            f"optimizer {self.optimizer_bytes:,}, communicated in a step {self.communication_bytes:,}",
        ]
        return "\n\n".join(part for part in parts if part)


def _short(ranks):
    """A range as 'start:stop:step'; thousands of ranks have groups of thousands."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    whole = range(ranks[0], ranks[-1] + 1, step) if ranks and step > 0 else ()
    return f"{whole.start}:{whole.stop}:{whole.step}" if ranks and tuple(whole) == ranks else ranks


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _table(texts, numbers, rows):
    """A table of rows (texts, numbers); those whose texts are alike are added up."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(_LAYER.sub("*", str(text)) for text in row[0])].append(row)
    lines = [[*texts, *numbers]] if rows else []
    for alike, members in groups.items():
        shown = map(str, members[0][0]) if len(members) == 1 else alike
        lines.append([*shown, *(f"{sum(column):,}" for column in zip(*(numbers for _, numbers in members)))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index >= len(texts) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )

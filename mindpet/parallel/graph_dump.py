"""Reading the graphs that MindSpore's front end writes as text (`save_graphs`)."""

import collections
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Optional

from mindspore import Layout

from mindpet.utils.hints import PathLike, Shape, Strategy
from mindpet.utils.layouts import WHOLE, counts_of

BYTES = {
    "Bool": 1,
    "Int8": 1,
    "UInt8": 1,
    "Int16": 2,
    "UInt16": 2,
    "Float16": 2,
    "BFloat16": 2,
    "Int32": 4,
    "UInt32": 4,
    "Float32": 4,
    "Int64": 8,
    "UInt64": 8,
    "Float64": 8,
    "Complex64": 8,
    "Complex128": 16,
}
_NODE = re.compile(r"  %(\d+)\(.*?\) = (?:PrimFunc_)?([^\s(\[]+)(.*)")
_INSTANCE = re.compile(r"\{instance name: ([^}]*)\}")
_SCOPE = re.compile(r"# (?:Fullname with scope|Scope): \((.*)\)")
_CALL = re.compile(r" = call @([^\s(]+)\(| = %\d+\[@(?:@|Partial\(@)?([^\])]+)\)?\]\(")
_PARAMETER = re.compile(r"%para\d+_.*?: <Ref\[Tensor\[\w+\]\], \(([\d, ]*)\), ref_key=([^,>]+)")
_LAYOUT = re.compile(r"'device_matrix': (\(.*?\)), 'tensor_map': (\(.*?\)), '.*?'alias_name': \((.*?)\)\}")
_TENSOR = re.compile(r"Tensor\[(\w+)\]>?, \(([\d, ]*)\)")


@dataclass
class Node:
    """A line of a graph: an operator and what is known of it.

    Attributes:
        graph: name of the graph that it is in.
        number: of its result in this graph.
        operator: its type, for instance 'MatMul'.
        text: the whole line, with operands and attributes.
        types: types and shapes of operands and results.
        scope: the Cells that it stands in, and its own name where the dump tells it.
        code: places in the source, from the outermost call inwards.
    """

    graph: str
    number: str
    operator: str
    text: str
    types: str = ""
    scope: str = ""
    code: list[str] = field(default_factory=list)

    @property
    def instance(self) -> str:
        """The instance name, for a primitive that is an attribute of a Cell the name of that attribute."""
        match = _INSTANCE.search(self.text)
        return match.group(1) if match else ""

    @property
    def operands(self) -> list[str]:
        """The numbers of the results that it takes."""
        return re.findall(r"%(\d+)\b", self.text.split(" = ", 1)[1].split(" {instance name", 1)[0])

    def attribute(self, name: str) -> Optional[str]:
        """The text of an attribute, or None."""
        match = re.search(rf'\b{name}: (?:"([^"]*)"|(\(.*?\))[,}}]|([^,}}]*))', self.text)
        return next((part for part in match.groups() if part is not None), None) if match else None

    @property
    def strategy(self) -> Optional[Strategy]:
        """The strategy that the front end uses, a tuple of tuples, or None: it stands in the last braces.

        Not of a Layout, which the front end takes as it was set.
        """
        if self.layouts:
            return counts_of(self.layouts)
        match = re.search(r"\{in_strategy: \(([^{}]*)\)\}$", self.text)
        return parse_layouts(match.group(1)) if match else None

    @property
    def asked_strategy(self) -> Optional[Strategy]:
        """The strategy that was set by `shard`, or None."""
        if self.layouts:
            return self.layouts
        match = re.search(r"primitive_attrs: \{[^{}]*?\bin_strategy: \((\([^{}]*?\))\)[,}]", self.text)
        return parse_layouts(match.group(1)) if match else None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The Layouts that were set by `shard`; none if tuples were."""
        match = re.search(r"\bin_layout: \((\{[^()]*\([^{}]*\}(?:, \{[^{}]*\})*)\)", self.text)
        return tuple(_layout(*found) for found in _LAYOUT.findall(match.group(1))) if match else ()

    @property
    def tensors(self) -> list[tuple[str, Shape]]:
        """(dtype, shape) of every operand and result that is a tensor."""
        return [(dtype, _ints(shape)) for dtype, shape in _TENSOR.findall(self.types)]

    @property
    def largest(self) -> tuple[str, Shape, int]:
        """dtype, shape and bytes of the largest tensor that goes in or comes out."""
        sizes = [(BYTES.get(dtype, 0) * math.prod(shape), dtype, shape) for dtype, shape in self.tensors]
        size, dtype, shape = max(sizes, key=lambda item: item[0])
        return dtype, shape, size


def parse_layouts(text: str) -> Strategy:
    """`'(2, 4), (4)'` as `((2, 4), (4,))`."""
    return tuple(_ints(layout) for layout in re.findall(r"\(([\d, ]*)\)", text))


def _layout(device_matrix, tensor_map, alias_name):
    """A Layout from the text of its parts; brackets are the only sign of a tuple: `((2, 1), -1)`, `(0)`."""
    matrix, axes = (json.loads(text.replace("(", "[").replace(")", "]")) for text in (device_matrix, tensor_map))
    names = alias_name.split(", ")
    called = (*names[::-1], WHOLE)  # -1 is of an axis that is whole
    return Layout(tuple(matrix), tuple(names))(
        *(tuple(called[one] for one in axis) if isinstance(axis, list) else called[axis] for axis in axes)
    )


def _ints(text):
    return tuple(int(number) for number in text.split(",") if number.strip())


def read_nodes(path: PathLike) -> Iterator[Node]:
    """The nodes of all graphs in a dump."""
    graph, node = "", None
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("subgraph @"):
                graph = line[len("subgraph @") :].split("(", 1)[0]
            elif line.startswith("  %"):
                if node:
                    yield node
                match = _NODE.match(line)
                node = Node(graph, match.group(1), match.group(2), line.rstrip()) if match else None
            elif node and line.startswith("      : "):
                node.types = line.strip()
            elif node and line.startswith("      # In file "):
                node.code.append(line[len("      # In file ") :].rstrip().split("<~~")[0])
            elif node and _SCOPE.search(line):
                node.scope = _SCOPE.search(line).group(1)
    if node:
        yield node


def count_runs(nodes: Iterable[Node], entry: str) -> dict[str, int]:
    """How often each graph runs in a step: graph -> count. A block that is compiled once can be called many times."""
    calls = collections.defaultdict(collections.Counter)
    for node in nodes:
        match = _CALL.search(node.text)
        if match:
            calls[node.graph][match.group(1) or match.group(2)] += 1
    runs = collections.Counter()

    def run(graph, times):
        runs[graph] += times
        for callee, count in calls[graph].items():
            run(callee, times * count)

    run(entry, 1)
    return runs


def read_header(path: PathLike) -> tuple[str, dict[str, Shape]]:
    """The name of the graph where a dump begins, and the shape on this rank of each of its parameters by name."""
    entry, shapes = "", {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("# IR entry: @"):
                entry = line.split("@", 1)[1].strip()
            elif line.startswith("subgraph @"):
                break
            match = _PARAMETER.match(line)
            if match:
                shapes[match.group(2)] = _ints(match.group(1))
    return entry, shapes

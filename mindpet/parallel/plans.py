"""From a compiled graph to the plans of a report."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mindspore import nn

from mindpet.parallel.graph_dump import BYTES, Node
from mindpet.parallel.report import CollectivePlan, OperatorPlan, ParameterPlan
from mindpet.utils.hints import Shape
from mindpet.utils.layouts import counts_of, get_strategy
from mindpet.utils.sharding import slot_table

COLLECTIVES = (
    "AllGather", "AllReduce", "AlltoAll", "AlltoAllV", "Broadcast", "NeighborExchangeV2", "Receive", "ReduceScatter",
    "Send",
)  # fmt: skip
NO_OPERATORS = ("_", "MakeTuple", "MakeList")  # beginnings of what is in a graph, but is the front end's own
NAME = "mindpet_name"  # attribute that carries the name of a primitive into the graph


class Names:
    """What the nodes of a graph are called in the user's network.

    Args:
        network: the user's, without an AutoParallel around it.
        step: what is compiled: the network, or training Cells and AutoParallel around it.
    """

    def __init__(self, network: nn.Cell, step: nn.Cell):
        self.root = next(path for path, cell in step.cells_and_names() if cell is network)
        self.slots = {}  # id of a primitive -> (path of the Cell, slot of its shard())
        self.primitives = {}  # (path of a Cell, attribute) -> primitive
        for path, cell in step.cells_and_names():
            for slot, (operator, _) in slot_table(cell).items():
                for primitive in _primitives(operator):
                    self.slots.setdefault(id(primitive), (path, slot))
            for attribute, primitive in cell._primitives.items():
                if primitive is not None:
                    # MindSpore merges primitives that are alike, and names them as the last; this keeps them apart.
                    primitive.add_prim_attr(NAME, attribute)
                    self.primitives[path, attribute] = primitive

    def cell(self, node: Node) -> str:
        """The path of the Cell that a node stands in."""
        return self._in_network(_cell_path(node.scope))

    def locate(self, node: Node) -> tuple[str, str, Any]:
        """(path of the Cell, slot or attribute, primitive) of a node; the last two '' and None if not known."""
        path, name = _cell_path(node.scope), node.attribute(NAME)
        if (path, name) not in self.primitives:
            # An operator that the front end has replaced has lost its name: it is the Cell's only one of its type.
            same = [
                key for key, candidate in self.primitives.items() if key[0] == path and candidate.name == node.operator
            ]
            if len(same) != 1:
                return self._in_network(path), "", None
            path, name = same[0]
        primitive = self.primitives[path, name]
        path, name = self.slots.get(id(primitive), (path, name))
        return self._in_network(path), name, primitive

    def _in_network(self, path):
        return path[len(self.root) :].lstrip(".") if path.startswith(self.root) else path


def _primitives(operator):
    """The primitives of a Primitive, a Cell or None."""
    if isinstance(operator, nn.Cell):
        return [primitive for _, cell in operator.cells_and_names() for primitive in cell._primitives.values()]
    return [operator] if operator is not None else []


def _cell_path(scope):
    """`'Gradients/Default/network-Net/fc-LoRADense/MatMul-op0'` as `'network.fc'`."""
    parts = [part.rsplit("-", 1) for part in scope.split("/") if "-" in part]
    return ".".join(part[0] for part in parts if not re.fullmatch(r"op\d+", part[1]))


def parameter_plans(network: nn.Cell, step: nn.Cell, shapes: dict[str, Shape]) -> list[ParameterPlan]:
    """The ParameterPlan of each parameter, those of the user's network first; `shapes` are those on this rank."""
    weights = {param.name: param for param in network.get_parameters()}
    added = {param.name: param for param in step.get_parameters() if param.name not in weights}
    plans = []
    for name, param in {**weights, **added}.items():
        if name not in shapes:  # it belongs to another pipeline stage
            continue
        part = shapes[name]
        # A parameter without a layout is whole on every rank.
        layout = step.parameter_layout_dict.get(name, ((), (), part, 0, True, "", part))
        matrix, tensor_map, cut, _, _, _, shape = layout[:7]
        role = "optimizer" if name in added else "trainable" if param.requires_grad else "frozen"
        shards = math.prod(cut) // math.prod(part)
        size = BYTES[str(param.dtype)] * math.prod(part)
        plans.append(
            ParameterPlan(
                name, role, str(param.dtype), tuple(shape), part, tuple(matrix), tuple(tensor_map), shards, size
            )
        )
    return plans


def operator_plans(
    early: Iterable[Node], final: Iterable[Node], runs: dict[str, int], names: Names
) -> list[OperatorPlan]:
    """The OperatorPlan of each forward operator that has a strategy.

    `early` are the nodes right after the parallel passes, `final` those that are left in the end.
    """
    plans = {}
    for node, count in [*((node, 0) for node in early), *((node, runs[node.graph]) for node in final)]:
        ours = not node.operator.startswith(NO_OPERATORS) and not node.scope.startswith("Gradients")
        if node.strategy is None or not ours:
            continue
        cell, slot, primitive = names.locate(node)
        asked = node.asked_strategy if primitive is None else get_strategy(primitive)
        is_set = asked is not None and counts_of(asked) == node.strategy  # a search leaves out of account what is set
        plan = OperatorPlan(cell, slot, node.operator, node.strategy, is_set, 0)
        plans.setdefault((cell, slot, node.operator, node.strategy), plan).count += count
    return list(plans.values())


def collective_plans(nodes: Sequence[Node], runs: dict[str, int], names: Names, rank: int) -> list[CollectivePlan]:
    """The CollectivePlan of each node that communicates; `rank` is whose graph it is."""
    results = {(node.graph, node.number): node for node in nodes}
    communicating = [node for node in nodes if node.operator in COLLECTIVES]
    forward = {}  # id of a node -> (cause, path of the Cell)
    for node in communicating:
        if not node.attribute("forward_unique_id"):
            source = results.get((node.graph, next(iter(node.operands), None)))
            forward[id(node)] = _forward_cause(node, source, names)
    numbered = {node.attribute("unique_id"): forward[id(node)] for node in communicating if id(node) in forward}
    plans = []
    for node in communicating:
        parameter = node.attribute("mirror_user_id")
        if id(node) in forward:
            phase, (cause, cell) = "forward", forward[id(node)]
        else:
            phase, (cause, cell) = "backward", numbered.get(node.attribute("forward_unique_id"), ("", names.cell(node)))
            cause = f"gradient of {parameter or 'the ' + (cause or node.instance)}"
        ranks = _integers(node.attribute("group_rank_ids") or node.attribute("rank_list"))
        if node.operator in ("Send", "Receive"):
            ranks = tuple(sorted((rank, _peer(node))))
        plans.append(CollectivePlan(node.operator, phase, cause, cell, ranks, *node.largest, runs[node.graph]))
    return plans


def _integers(text):
    return tuple(int(number) for number in re.findall(r"\d+", text or ""))


def _peer(node):
    """The rank that a Send or Receive is for; the attribute is written as `I64(4)`."""
    return _integers(node.attribute("dest_rank" if node.operator == "Send" else "src_rank"))[-1]


def _forward_cause(node, source, names):
    """(cause, path of the Cell) of a collective in the forward pass; `source` is the node whose result it takes."""
    cell = names.cell(node)
    if node.operator in ("Send", "Receive"):
        return f"activations {'to' if node.operator == 'Send' else 'from'} rank {_peer(node)}", cell
    if node.instance.startswith("redistribution"):
        return f"change of layout in {cell or 'the network'}", cell
    if node.instance.startswith("parallel_optimizer"):
        return f"parts of {node.attribute('mirror_user_id')} (parallel optimizer)", cell
    if source is None or source.strategy is None:
        return f"sum in {cell or 'the network'}", cell
    path, slot, _ = names.locate(source)
    return f"sum over {'.'.join(part for part in (path, slot or source.operator) if part)}", path

"""What MindSpore has compiled: operators, and what the backward pass takes from the forward one."""

import collections
import math

from mindspore.common import api
from mindspore.train.mind_ir_pb2 import ModelProto, TensorProto

BYTES = {
    TensorProto.DataType.BOOL: 1,
    TensorProto.DataType.FLOAT: 4,
    TensorProto.DataType.FLOAT16: 2,
    TensorProto.DataType.INT32: 4,
    TensorProto.DataType.INT64: 8,
    TensorProto.DataType.UINT8: 1,
}
# What orders nodes or groups their results, and computes nothing.
SILENT = {"MakeTuple", "TupleGetItem", "Constant", "Load", "UpdateState", "Depend", "Return"}


def nodes_of(cell):
    """(type of the operator, node) of the one graph that a called Cell was compiled to."""
    (phase,) = cell.compile_cache
    model = ModelProto.FromString(api._cell_graph_executor._graph_executor.get_func_graph_proto(phase, "mind_ir"))
    assert not model.functions  # all is in one graph
    return [(node.op_type.split("::")[-1].split(":")[0].split("/")[-1], node) for node in model.graph.node]


def count_operators(cell):
    """How many operators of each type there are; what MindSpore 2.10 calls EqScalar is an Equal."""
    return collections.Counter(
        {"EqScalar": "Equal"}.get(name, name) for name, _ in nodes_of(cell) if name not in SILENT
    )


def kept_bytes(cell):
    """Bytes that the backward pass takes from the forward one, without inputs and Parameters: result -> bytes.

    What follows from a gradient is the backward pass, what is computed again there, too. What a Reshape returns is the
    memory that it was given, and what a Depend returns.
    """
    memory, kept, backward = {}, {}, set()  # memory: name of a result -> (name of the first with it, bytes)
    for kind, node in nodes_of(cell):
        shapes = [tensor for attribute in node.attribute if attribute.name == "shape" for tensor in attribute.tensors]
        is_backward = node.domain.startswith("Gradients/") or not backward.isdisjoint(node.input)
        if is_backward:
            backward.update(node.output)
        if kind in ("Reshape", "Depend") and node.input[0] in memory:
            memory[node.output[0]] = memory[node.input[0]]
        elif is_backward and kind not in SILENT:
            kept.update(memory[name] for name in node.input if name in memory)
        elif not is_backward and kind not in SILENT and len(shapes) == 1:
            memory[node.output[0]] = (node.output[0], _size(shapes[0]))
    return kept


def _size(tensor):
    return BYTES[tensor.data_type] * math.prod(tensor.dims)


def largest_result(cell):
    """Bytes of the largest result of an operator."""
    shapes = [
        tensor
        for kind, node in nodes_of(cell)
        if kind not in SILENT
        for attribute in node.attribute
        if attribute.name == "shape"
        for tensor in attribute.tensors
    ]
    return max(_size(tensor) for tensor in shapes)

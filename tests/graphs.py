"""What MindSpore's compiler makes of a Cell, read from its dumps."""

import contextlib
import os

import mindspore as ms

from mindpet.parallel.graph_dump import read_nodes


@contextlib.contextmanager
def dumped(folder):
    """A context in which graphs are written to a folder."""
    os.environ["MS_DEV_DUMP_IR_PASSES"] = "validate"  # MindSpore reads it once
    ms.set_context(save_graphs=1, save_graphs_path=str(folder))
    try:
        yield
    finally:
        ms.set_context(save_graphs=0)


def final_nodes(folder):
    """The nodes of the graph that is run, from the newest dump in a folder."""
    return list(read_nodes(max(folder.rglob("*_validate_*.ir"), key=lambda path: path.stat().st_mtime_ns)))


def readers(nodes, name):
    """Types of the operators that take the Parameter of a name, or what is loaded of it."""
    loads = {
        (node.graph, node.number) for node in nodes if node.operator == "Load" and f"ref_key={name}," in node.types
    }
    assert loads, name
    return sorted(
        node.operator
        for node in nodes
        if node.operator not in ("UpdateState", "MakeTuple", "Depend")
        and any((node.graph, operand) in loads for operand in node.operands)
    )

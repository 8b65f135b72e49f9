"""What `dry_run` does in its child process: it compiles the networks and reads the result."""

import contextlib
import ctypes
import importlib.util
import math
import pathlib
import pickle
import re
import shutil
import signal
import sys
import traceback

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.amp import build_train_network
from mindspore.communication import init
from mindspore.parallel import _utils as parallel_utils

from mindpet.errors import BuildError, DryRunError, MindPetError, ShardError
from mindpet.parallel.graph_dump import BYTES, count_runs, read_header, read_nodes
from mindpet.parallel.report import CollectivePlan, OperatorPlan, ParameterPlan, Report
from mindpet.utils.sharding import slot_table

COLLECTIVES = (
    "AllGather", "AllReduce", "AlltoAll", "AlltoAllV", "Broadcast", "NeighborExchangeV2", "Receive", "ReduceScatter",
    "Send",
)  # fmt: skip
NO_OPERATORS = ("_", "MakeTuple", "MakeList")  # beginnings of what is in a graph, but is the front end's own
NAME = "mindpet_name"  # attribute that carries the name of a primitive into the graph
_FAILED = re.compile(r"operator (\w+) init failed")
_REASON = re.compile(r"^\[(?:ERROR|CRITICAL)\] PARALLEL\(.*?\)?:.*?\] \w+\] (?:\w+Info\d+ ?: )?(.*)$", re.MULTILINE)


def main(folder):
    """Compile what `request` in the folder asks for, and write `results`: a Report or an exception for each build."""
    _die_with_parent()
    folder = pathlib.Path(folder)
    with open(folder / "request", "rb") as file:
        request = pickle.load(file)
    if request.main_path:
        _import_main(request.main_path)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(request.target)
    init()
    # After a compilation MindSpore fills and cuts the parameters, which a plan does not need.
    parallel_utils._slice_parameter = parallel_utils._init_optimizer_state = lambda *_: None
    with open(folder / "results", "wb") as results:
        for pickled in request.builds:
            try:
                result = _dry_run(pickled, request, folder)
            except MindPetError as error:
                result = error
            pickle.dump(result, results)
            results.flush()


def _import_main(path):
    """Run the script that called dry_run, so that what it defines is found in '__main__'."""
    spec = importlib.util.spec_from_file_location("__mp_main__", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["__mp_main__"] = sys.modules["__main__"] = module
    spec.loader.exec_module(module)


def _die_with_parent():
    """Have Linux kill this process if its parent is killed, so that none is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _dry_run(pickled, request, folder):
    """The Report for one build."""
    dump = folder / "graphs"
    shutil.rmtree(dump, ignore_errors=True)
    ms.reset_auto_parallel_context()
    ms.set_auto_parallel_context(
        **{
            "parallel_mode": "semi_auto_parallel",
            "device_num": request.device_num,
            "global_rank": request.rank,
            "dataset_strategy": "full_batch",
            **request.settings,
        }
    )
    network, inputs, step = _build(pickled, request.train)
    names = _Names(network, step)
    log_start = _log_size(folder)
    try:
        step.compile(*inputs)
    except Exception as error:  # MindSpore's front end raises several types
        log = (folder / "log").read_bytes()[log_start:].decode(errors="replace")
        raise _front_end_error(error, log, dump, names) from error
    final = _dump_file(dump, "*_validate_*.ir")
    entry, shapes = read_header(final)
    nodes = list(read_nodes(final))
    runs = count_runs(nodes, entry)
    weights = [param.name for param in network.get_parameters()]
    params = {param.name: param for param in (*network.get_parameters(), *step.get_parameters())}
    return Report(
        request.device_num,
        request.rank,
        request.train,
        ms.__version__,
        request.target,
        [
            _parameter_plan(param, name in weights, step.parameter_layout_dict.get(name), shapes[name])
            for name, param in params.items()
            if name in shapes  # a pipeline stage does not have all
        ],
        _operator_plans(read_nodes(_dump_file(dump, "step_parallel_end_*.ir")), nodes, runs, names),
        _collective_plans(nodes, runs, names, request.rank),
    )


def _build(pickled, train):
    """The network, its inputs, and the Cell to compile: in training the network with its optimizer."""
    try:
        made = pickle.loads(pickled)()
    except MindPetError:
        raise
    except Exception as error:
        raise BuildError(f"dry_run: build() raised an error.\n{traceback.format_exc()}") from error
    network, inputs, optimizer = (*made, None)[:3] if isinstance(made, tuple) and len(made) in (2, 3) else (made, (), 0)
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    if (
        not isinstance(network, nn.Cell)
        or not all(isinstance(value, Tensor) for value in inputs)
        or not isinstance(optimizer, (nn.Optimizer, type(None)))
    ):
        raise BuildError(
            "dry_run: build() must return (network, inputs) or (network, inputs, optimizer): a Cell, a Tensor or a "
            f"tuple of Tensors, and an Optimizer, but it returned {made!r}."
        )
    if not train:
        return network, inputs, network.set_train(False)
    if isinstance(network, nn.TrainOneStepCell):
        return network.network, inputs, network.set_train()
    optimizer = optimizer or nn.Adam(network.trainable_params())
    return network, inputs, build_train_network(network, optimizer, level="O0")  # as Model does


def _log_size(folder):
    sys.stdout.flush()
    sys.stderr.flush()
    return (folder / "log").stat().st_size


def _dump_file(folder, pattern):
    """The newest graph that MindSpore wrote under a name."""
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime_ns)


class _Names:
    """What the nodes of a graph are called in the user's network.

    Args:
        network (Cell): the user's.
        step (Cell): what is compiled: the network, or a training Cell around it.
    """

    def __init__(self, network, step):
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

    def cell(self, node):
        """The path of the Cell that a node stands in."""
        return self._in_network(_cell_path(node.scope))

    def locate(self, node):
        """(path of the Cell, slot or attribute, primitive) of a node; the last two '' and None if not known."""
        path, name = _cell_path(node.scope), node.attribute(NAME)
        if (path, name) not in self.primitives:
            # An operator that the front end has replaced has lost its name: it is the Cell's only one of its type.
            same = [key for key, found in self.primitives.items() if key[0] == path and found.name == node.operator]
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


def _parameter_plan(param, is_weight, layout, part):
    """`part` is the shape on this rank, `layout` MindSpore's or None for a parameter that is whole on each."""
    matrix, tensor_map, cut, _, _, _, shape = layout[:7] if layout else ((), (), part, 0, True, "", part)
    return ParameterPlan(
        param.name,
        ("trainable" if param.requires_grad else "frozen") if is_weight else "optimizer",
        str(param.dtype),
        tuple(shape),
        part,
        tuple(matrix),
        tuple(tensor_map),
        math.prod(cut) // math.prod(part),
        BYTES[str(param.dtype)] * math.prod(part),
    )


def _operator_plans(early, final, runs, names):
    """`early` are the nodes right after the parallel passes, `final` those that are left in the end."""
    plans = {}
    for node, count in [*((node, 0) for node in early), *((node, runs[node.graph]) for node in final)]:
        ours = not node.operator.startswith(NO_OPERATORS) and not node.scope.startswith("Gradients")
        if node.strategy is None or not ours:
            continue
        cell, slot, primitive = names.locate(node)
        is_set = node.asked_strategy is not None or getattr(primitive, "in_strategy", None) is not None
        plan = OperatorPlan(cell, slot, node.operator, node.strategy, is_set, 0)
        plans.setdefault((cell, slot, node.operator, node.strategy), plan).count += count
    return list(plans.values())


def _collective_plans(nodes, runs, names, rank):
    results = {(node.graph, node.number): node for node in nodes}
    found = [node for node in nodes if node.operator in COLLECTIVES]
    forward = {}  # id of a node -> (cause, path of the Cell)
    for node in found:
        if not node.attribute("forward_unique_id"):
            source = results.get((node.graph, next(iter(node.operands), None)))
            forward[id(node)] = _forward_cause(node, source, names)
    numbered = {node.attribute("unique_id"): forward[id(node)] for node in found if id(node) in forward}
    plans = []
    for node in found:
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


def _front_end_error(error, log, dump, names):
    """What the parallel front end refused, or what else went wrong while compiling."""
    reasons = _REASON.findall(log)
    failed = _FAILED.search(str(error))
    if not failed or not reasons:
        text = "\n".join([str(error).strip(), *reasons])
        if reasons or "frontend/parallel" in text:
            return ShardError(f"dry_run: the parallel front end refuses the network: {text}", reason=text)
        return DryRunError(f"dry_run: the network does not compile: {text}")
    # The places in the source and the strategy tell which operator it is; of blocks that are alike, take the first.
    code = {line[len("In file ") :] for line in str(error).splitlines() if line.startswith("In file ")}
    nodes = [
        node for node in read_nodes(_dump_file(dump, "step_parallel_begin_*.ir")) if node.operator == failed.group(1)
    ]
    node = max(nodes, key=lambda node: (code <= set(node.code), _is_about(reasons[0], node.asked_strategy)))
    cell, slot, primitive = names.locate(node)
    strategy = node.asked_strategy or getattr(primitive, "in_strategy", None)
    return ShardError(
        f"dry_run: the parallel front end refuses '{slot}' of '{cell}' ({node.operator}), strategy {strategy}: "
        f"{reasons[0]}",
        cell,
        slot,
        node.operator,
        strategy,
        reasons[0],
    )


def _is_about(reason, strategy):
    """Whether a message of the front end quotes the strategy, as tuples or as lists."""
    if strategy is None:
        return False
    quotes = str(strategy), str(strategy).replace(",)", ")")
    return any(quote in reason for quote in quotes) or all(str(list(layout)) in reason for layout in strategy)

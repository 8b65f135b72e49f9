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
from mindspore.communication import init

from mindpet.errors import BuildError, DryRunError, MindPetError, ShardError
from mindpet.parallel.graph_dump import BYTES, count_runs, read_entry, read_nodes
from mindpet.parallel.report import CollectivePlan, OperatorPlan, ParameterPlan, Report

COLLECTIVES = (
    "AllGather", "AllReduce", "AlltoAll", "AlltoAllV", "Broadcast", "NeighborExchangeV2", "Receive", "ReduceScatter",
    "Send",
)  # fmt: skip
# The beginning of a collective's instance name -> what it is for. The first that fits.
CAUSES = {
    "gradforward_op": "gradient of the sum over {operator}",
    "forward_op": "sum over {operator}",
    "grad_redistribution": "gradient of a change of layout in {cell}",
    "gradredistribution": "gradient of a change of layout in {cell}",
    "redistribution": "change of layout in {cell}",
    "grad_mirror": "gradient of {parameter}",
    "mirror": "gradient of {parameter}",
    "grad_parallel_optimizer": "gradient of {parameter}, cut by the parallel optimizer",
    "parallel_optimizer": "parts of {parameter}, cut by the parallel optimizer",
}
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
    operators = _named_operators(step)
    log_start = _log_size(folder)
    try:
        step.compile(*inputs)
    except Exception as error:  # MindSpore's front end raises several types
        log = (folder / "log").read_bytes()[log_start:].decode(errors="replace")
        raise _front_end_error(error, log, dump, operators) from error
    weights = list(network.get_parameters())
    known = {id(param) for param in weights}
    entry_dump = _dump_file(dump, "*_validate_*.ir")
    nodes = list(read_nodes(entry_dump))
    runs = count_runs(nodes, read_entry(entry_dump))
    return Report(
        request.device_num,
        request.rank,
        request.train,
        ms.__version__,
        request.target,
        [_parameter_plan(param, step, "frozen") for param in weights]
        + [_parameter_plan(param, step, "optimizer") for param in step.get_parameters() if id(param) not in known],
        _operator_plans(nodes, runs, operators),
        _collective_plans(nodes, runs, operators),
    )


def _build(pickled, train):
    """The network, its inputs, and the Cell to compile: in training the network with its optimizer."""
    try:
        made = pickle.loads(pickled)()
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
    return network, inputs, nn.TrainOneStepCell(network, optimizer).set_train()


def _log_size(folder):
    sys.stdout.flush()
    sys.stderr.flush()
    return (folder / "log").stat().st_size


def _dump_file(folder, pattern):
    """The newest graph that MindSpore wrote under a name."""
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime_ns)


def _named_operators(step):
    """(path of the Cell, attribute) -> (path, slot, primitive), the path and slot being those of a `shard()`.

    The paths begin at the network, without the training Cell around it.
    """
    slots, named = {}, {}
    for path, cell in step.cells_and_names():
        if hasattr(cell, "operators"):
            for slot, (operator, _) in cell.operators.items():
                for primitive in _primitives(operator):
                    slots.setdefault(id(primitive), (path, slot))
        for attribute, primitive in cell._primitives.items():
            if primitive is not None:
                where = slots.get(id(primitive), (path, attribute))
                named[path, attribute] = (_user_path(where[0]), where[1], primitive)
    return named


def _primitives(operator):
    """The primitives of a Primitive, a Cell or None."""
    if isinstance(operator, nn.Cell):
        return [primitive for _, cell in operator.cells_and_names() for primitive in cell._primitives.values()]
    return [operator] if operator is not None else []


def _cell_path(scope):
    """`'Gradients/Default/network-Net/fc-LoRADense/MatMul-op0'` as `'network.fc'`."""
    parts = [part.rsplit("-", 1) for part in scope.split("/") if "-" in part]
    return ".".join(part[0] for part in parts if not re.fullmatch(r"op\d+", part[1]))


def _user_path(path):
    """A path from the user's network on."""
    return path[len("network") :].lstrip(".") if path.split(".")[0] == "network" else path


def _locate(node, operators):
    """(path, slot, primitive or None) of a node."""
    path = _cell_path(node.scope)
    if (path, node.instance) in operators:
        return operators[path, node.instance]
    # An operator that the front end has replaced has lost its name: it is the Cell's only one of its type.
    same = [found for (cell, _), found in operators.items() if cell == path and found[2].name == node.operator]
    return same[0] if len(same) == 1 else (_user_path(path), "", None)


def _parameter_plan(param, step, role):
    """`role` is 'optimizer', or 'frozen' for a weight that may be trainable."""
    layout = step.parameter_layout_dict.get(param.name, ((), (), param.shape, 0, True, "", param.shape, param.shape))
    matrix, tensor_map, cut, _, _, optimizer_group, shape, shard = (*layout, layout[2])[:8]
    part = shard if optimizer_group else cut
    if role == "frozen" and param.requires_grad:
        role = "trainable"
    return ParameterPlan(
        param.name,
        role,
        str(param.dtype),
        tuple(shape),
        tuple(part),
        tuple(matrix),
        tuple(tensor_map),
        math.prod(cut) // math.prod(part),
        BYTES[str(param.dtype)] * math.prod(part),
    )


def _operator_plans(nodes, runs, operators):
    plans = {}
    for node in nodes:
        if node.strategy is None or node.operator.startswith("_") or node.scope.startswith("Gradients"):
            continue
        cell, slot, primitive = _locate(node, operators)
        is_set = node.asked_strategy is not None or getattr(primitive, "in_strategy", None) is not None
        plan = OperatorPlan(cell, slot, node.operator, node.strategy, is_set, 0)
        key = (cell, slot, node.operator, node.strategy)
        plans.setdefault(key, plan).count += runs[node.graph]
    return list(plans.values())


def _collective_plans(nodes, runs, operators):
    by_number = {(node.graph, node.number): node for node in nodes}
    plans = []
    for node in nodes:
        if node.operator not in COLLECTIVES:
            continue
        cell = _user_path(_cell_path(node.scope))
        summed = by_number.get((node.graph, next(iter(node.operands), None)))
        path, slot, _ = _locate(summed, operators) if summed else (cell, "", None)
        cause = next((text for start, text in CAUSES.items() if node.instance.startswith(start)), node.instance)
        cause = cause.format(
            cell=cell or "the network",
            operator=".".join(part for part in (path, slot or (summed.operator if summed else "")) if part),
            parameter=node.attribute("mirror_user_id") or node.attribute("parameter") or "a parameter",
        )
        ranks = node.attribute("group_rank_ids") or node.attribute("rank_list") or ""
        phase = "backward" if node.scope.startswith("Gradients") else "forward"
        plans.append(
            CollectivePlan(
                node.operator,
                phase,
                cause,
                cell,
                tuple(int(rank) for rank in re.findall(r"\d+", ranks)),
                *node.largest,
                runs[node.graph],
            )
        )
    return plans


def _front_end_error(error, log, dump, operators):
    """What the parallel front end refused, or what else went wrong while compiling."""
    reasons = _REASON.findall(log)
    failed = _FAILED.search(str(error))
    if not failed:
        text = "\n".join([str(error).strip(), *reasons])
        if reasons or "frontend/parallel" in text:
            return ShardError(f"dry_run: the parallel front end refuses the network: {text}", reason=text)
        return DryRunError(f"dry_run: the network does not compile: {text}")
    # The places in the source and the strategy tell which operator it is; of blocks that are alike, take the first.
    code = [line[len("In file ") :] for line in str(error).splitlines() if line.startswith("In file ")][::-1]
    nodes = [
        node for node in read_nodes(_dump_file(dump, "step_parallel_begin_*.ir")) if node.operator == failed.group(1)
    ]
    node = max(nodes, key=lambda node: (node.code == code, _is_about(reasons[0], node.asked_strategy)))
    cell, slot, primitive = _locate(node, operators)
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
    quoted = str(strategy).replace(",)", ")") in reason
    return quoted or all(str(list(layout)) in reason for layout in strategy)

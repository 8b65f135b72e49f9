"""What `dry_run` does in its child process: it compiles the networks and reads the result."""

import gc
import pathlib
import pickle
import re
import shutil
import sys
import traceback

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.amp import build_train_network
from mindspore.communication import init
from mindspore.parallel import _utils as parallel_utils
from mindspore.parallel.auto_parallel import AutoParallel

from mindpet.errors import BuildError, DryRunError, MindPetError, ShardError
from mindpet.parallel.graph_dump import count_runs, read_header, read_nodes
from mindpet.parallel.launcher import import_file
from mindpet.parallel.plans import Names, collective_plans, operator_plans, parameter_plans
from mindpet.parallel.report import Report
from mindpet.utils.hints import PathLike
from mindpet.utils.layouts import counts_of, get_strategy, is_layout
from mindpet.utils.quote import quote

_FAILED = re.compile(r"operator (\w+) (?:init|extract configured layout) failed")
_REASON = re.compile(r"^\[(?:ERROR|CRITICAL)\] PARALLEL\(.*?\)?:.*?\] \w+\] (?:\w+Info\d+ ?: )?(.*)$", re.MULTILINE)


def main(folder: PathLike) -> None:
    """Compile what `request` in the folder asks for, and write `results`: a Report or an exception for each build."""
    folder = pathlib.Path(folder)
    with open(folder / "request", "rb") as file:
        request = pickle.load(file)
    if request.main_path:  # what the script that called dry_run defines is found in '__main__'
        import_file(request.main_path, "__mp_main__", "__main__")
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(request.target)
    init()
    # After a compilation MindSpore fills and cuts the parameters, which a plan does not need.
    parallel_utils._slice_parameter = parallel_utils._init_optimizer_state = lambda *_: None
    gc.freeze()  # MindSpore collects garbage at every compilation: not among what has been imported
    with open(folder / "results", "wb") as results:
        for pickled in request.builds:
            try:
                result = _dry_run(pickled, request, folder)
            except MindPetError as error:
                result = error
            pickle.dump(result, results)
            results.flush()


def _dry_run(pickled, request, folder):
    """The Report for one build."""
    dump = folder / "graphs"
    shutil.rmtree(dump, ignore_errors=True)
    ms.reset_auto_parallel_context()
    _set_context(request)
    network, inputs, step = _build(pickled, request)
    names = Names(network, step)
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
    return Report(
        request.device_num,
        request.rank,
        request.train,
        ms.__version__,
        request.target,
        parameter_plans(network, step, shapes),
        operator_plans(read_nodes(_dump_file(dump, "step_parallel_end_*.ir")), nodes, runs, names),
        collective_plans(nodes, runs, names, request.rank),
    )


def _set_context(request):
    try:
        ms.set_auto_parallel_context(
            **{
                "parallel_mode": "semi_auto_parallel",
                "device_num": request.device_num,
                "global_rank": request.rank,
                "dataset_strategy": "full_batch",
                **request.settings,
            }
        )
    except Exception as error:  # MindSpore raises several types
        raise DryRunError(
            f"dry_run: 'settings' must be arguments of mindspore.set_auto_parallel_context, but got "
            f"{quote(request.settings)}: {' '.join(str(error).split())}"
        ) from error


def _build(pickled, request):
    """The network, its inputs, and the Cell to compile: in training the network with its optimizer."""
    try:
        made = pickle.loads(pickled)()
    except MindPetError:
        raise
    except Exception as error:
        raise BuildError(f"dry_run: build() raised an error.\n{traceback.format_exc()}") from error
    parts = made if isinstance(made, tuple) and len(made) in (2, 3) else (None, None)
    whole, inputs, optimizer = (*parts, None)[:3]
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    network = whole.network if isinstance(whole, AutoParallel) else whole
    if (
        not isinstance(network, nn.Cell)
        or not all(isinstance(value, Tensor) for value in inputs)
        or not isinstance(optimizer, (nn.Optimizer, type(None)))
    ):
        raise BuildError(
            "dry_run: build() must return (network, inputs) or (network, inputs, optimizer): a Cell, a Tensor or a "
            f"tuple of Tensors, and an Optimizer, but it returned {made!r}."
        )
    if whole is not network:
        _follow(whole, request)
    if not request.train:
        return network, inputs, whole.set_train(False)
    if isinstance(network, nn.TrainOneStepCell):
        return network.network, inputs, whole.set_train()
    optimizer = optimizer or nn.Adam(network.trainable_params())
    return network, inputs, build_train_network(whole, optimizer, level="O0")  # as Model does


def _follow(parallel, request):
    """Set the parallel context as an AutoParallel says, which Model does before it makes the training network."""
    if request.settings:
        raise BuildError(
            f"dry_run: 'settings' are of mindspore.set_auto_parallel_context, but build() returned an AutoParallel, "
            f"which has its own; set there what {sorted(request.settings)} mean."
        )
    ms.reset_auto_parallel_context()
    try:
        parallel_utils._init_auto_parallel_context(parallel)
    except Exception as error:  # MindSpore raises several types
        raise DryRunError(
            f"dry_run: the settings of the AutoParallel are refused: {' '.join(str(error).split())}"
        ) from error


def _log_size(folder):
    sys.stdout.flush()
    sys.stderr.flush()
    return (folder / "log").stat().st_size


def _dump_file(folder, pattern):
    """The newest graph that MindSpore wrote under a name."""
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime_ns)


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
    node = max(nodes, key=lambda n: (code <= set(n.code), _is_about(reasons[0], n.asked_strategy), _is_uneven(n)))
    cell, slot, primitive = names.locate(node)
    strategy = node.asked_strategy or (get_strategy(primitive) if primitive is not None else None)
    return ShardError(
        f"dry_run: the parallel front end refuses '{slot}' of '{cell}' ({node.operator}), strategy {quote(strategy)}: "
        f"{reasons[0]}",
        cell,
        slot,
        node.operator,
        strategy,
        reasons[0],
    )


def _is_uneven(node):
    """Whether a bias is cut otherwise than the features that it is added to; of that the message has no numbers."""
    strategy = node.asked_strategy and counts_of(node.asked_strategy)
    return node.operator == "BiasAdd" and strategy is not None and strategy[0][-1] != strategy[1][0]


def _is_about(reason, strategy):
    """Whether a message of the front end quotes the strategy, as tuples or as lists."""
    if strategy is None or is_layout(strategy):
        return False
    quotes = str(strategy), str(strategy).replace(",)", ")")
    return any(quote in reason for quote in quotes) or all(str(list(layout)) in reason for layout in strategy)

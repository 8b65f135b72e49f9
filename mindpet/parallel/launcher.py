"""Compiling a network for many ranks on a machine that has none of them."""

import functools
import importlib.util
import io
import os
import pathlib
import pickle
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Callable, Union

from mindpet.errors import BuildError, DryRunError
from mindpet.parallel.report import Report
from mindpet.parallel.stubs import stub_folder
from mindpet.utils.hints import PathLike
from mindpet.utils.validate import Checker, is_int

IN_CHILD = "MINDPET_DRY_RUN"  # environment variable of the child
CHILD = "import sys; sys.path[:] = {path!r}; from mindpet.parallel.child import main; main({folder!r})"
KEEPER = os.path.join(os.path.dirname(__file__), "keeper.py")
MOST_RANKS = 262_144  # beyond that MindSpore, which lists the ranks of every group, takes minutes and tens of GB


@dataclass
class Request:
    """What the child is asked for."""

    builds: list[bytes]
    main_path: str
    target: str
    device_num: int
    rank: int
    train: bool
    settings: dict[str, Any]


def dry_run(
    build: Union[Callable, str],
    device_num: int,
    rank: int = 0,
    train: bool = True,
    timeout: float = 600,
    **settings: Any,
) -> Report:
    """Compile a network in semi-auto parallel for `device_num` ranks, without an accelerator, and report the plan.

    MindSpore's own parallel front end runs in a child process: it checks every strategy, cuts the parameters, and
    inserts the collectives. Nothing is executed. On a machine with CANN it compiles for Ascend; elsewhere for the GPU
    target with stub libraries, which needs Linux on x86-64, `gcc` and `nm`. A script must call it under
    `if __name__ == "__main__":`, for the child imports the script.

    Args:
        build: returns `(network, inputs)` or `(network, inputs, optimizer)`; `inputs` is a Tensor or a tuple of
            Tensors, in training the network returns the loss. It is called in the child, after the parallel context is
            set. A function at the top level of a module or script, a `functools.partial` of one, or 'FILE.py:name'. The
            optimizer is by default `nn.Adam` of the trainable parameters; a network that is a `TrainOneStepCell` is
            compiled as it is.
        device_num: number of ranks.
        rank: the rank whose plan it is. Default: 0.
        train: a training step, else a forward pass in evaluation mode. Default: True.
        timeout: seconds until the child is killed. Default: 600.
        settings: further arguments of `mindspore.set_auto_parallel_context`, for instance `pipeline_stages=2`,
            `enable_parallel_optimizer=True`, or `dataset_strategy="data_parallel"`; that is "full_batch" by default.

    Raises:
        TypeError, ValueError: an argument is wrong.
        BuildError: `build` raised an error, cannot be found, or returned something else.
        ShardError: the front end refuses a strategy; names the Cell, the slot, the operator and the reason.
        DryRunError: the machine cannot do it; the child died or took too long; the network does not compile.
    """
    result = dry_run_many([build], device_num, rank, train, timeout, **settings)[0]
    if isinstance(result, Exception):
        raise result
    return result


def dry_run_many(
    builds: Sequence[Union[Callable, str]],
    device_num: int,
    rank: int = 0,
    train: bool = True,
    timeout: float = 600,
    **settings: Any,
) -> list[Union[Report, Exception]]:
    """`dry_run` for several networks, one after the other in one child process, which saves its start.

    Args:
        builds: each is what `dry_run` takes as `build`.
        device_num, rank, train, timeout, settings: as in `dry_run`; the timeout is for all together.

    Returns:
        For each build a Report, or the exception that `dry_run` would raise for it.

    Raises:
        TypeError, ValueError, DryRunError: as in `dry_run`, where it does not concern a single build.
    """
    check = Checker("dry_run")
    _check_ranks(check, device_num, rank, settings.get("pipeline_stages", 1))
    check.boolean(train=train)
    number = isinstance(timeout, float) or is_int(timeout)
    check.require(number and timeout > 0, ValueError, "timeout", timeout, "a number of seconds above 0")
    check.done()
    if os.environ.get(IN_CHILD):
        raise DryRunError(
            "dry_run: called while its own child process imports the script; put the call under "
            "`if __name__ == '__main__':`."
        )
    pickled = [_pickle(build) for build in builds]
    uses_main = any(b"__main__" in build for build in pickled)
    target, environment = _environment(device_num, rank)
    request = Request(pickled, _main_path() if uses_main else "", target, device_num, rank, train, settings)
    return _run_child(request, environment, timeout)


def _check_ranks(check, device_num, rank, stages):
    """Note what MindSpore would refuse: these rules are those of its parallel front end, 2.7 and 2.10."""
    fits = is_int(device_num) and 0 < device_num <= MOST_RANKS and (device_num in (1, 2, 4) or device_num % 8 == 0)
    error = ValueError if is_int(device_num) else TypeError
    rule = f"1, 2, 4 or a multiple of 8 up to {MOST_RANKS}"
    if check.require(fits, error, "device_num", device_num, rule):
        in_range = is_int(rank) and 0 <= rank < device_num
        rule = f"an int from 0 to device_num - 1, with device_num={device_num}"
        check.require(in_range, ValueError, "rank", rank, rule)
        divides = is_int(stages) and stages > 0 and device_num % stages == 0
        rule = f"a positive int that divides device_num, with device_num={device_num}"
        check.require(divides, ValueError, "pipeline_stages", stages, rule)


def import_file(path: PathLike, *names: str) -> ModuleType:
    """Run a file as a module, which is known by all of the names while it runs."""
    spec = importlib.util.spec_from_file_location(names[0], path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(dict.fromkeys(names, module))
    spec.loader.exec_module(module)
    return module


def load_function(reference: str) -> Callable:
    """The function behind 'FILE.py:name'.

    Raises:
        BuildError: the file or the function does not exist, or the file raises an error.
    """
    file, _, name = reference.rpartition(":")
    path = pathlib.Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise BuildError(f"{reference!r} must be FILE.py:name, of a file that exists.")
    sys.path.insert(0, str(path.parent))
    module = import_file(path, path.stem)
    if not callable(getattr(module, name, None)):
        raise BuildError(f"dry_run: {path} has no function {name!r}.")
    return getattr(module, name)


def _call(reference):
    return load_function(reference)()


def _pickle(build):
    """`build` as the child can load it."""
    if isinstance(build, str):
        file, _, name = build.rpartition(":")
        if not name.isidentifier() or not os.path.isfile(file):
            raise ValueError(f"dry_run: 'build' must be a function or 'FILE.py:name' of a file, but got {build!r}.")
        build = functools.partial(_call, f"{os.path.abspath(file)}:{name}")
    if not callable(build):
        raise TypeError(f"dry_run: 'build' must be a function or a str, but got {build!r} ({type(build).__name__}).")
    try:
        return pickle.dumps(build)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BuildError(
            f"dry_run: 'build' must be at the top level of a module or script, so that the child process can import "
            f"it, but {build!r} is not: {error}"
        ) from error


def _main_path():
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None:
        raise BuildError("dry_run: 'build' is defined in an interactive session; put it into a file.")
    return os.path.abspath(path)


def _environment(device_num, rank):
    """The target, and the environment that the child must be started with, without MindSpore's settings of this one."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MS_", "GLOG_", "RANK_"))},
        IN_CHILD: "1",
        "RANK_SIZE": str(device_num),
        "RANK_ID": str(rank),
        "MS_SIMULATION_LEVEL": "0",  # communication groups without peers
        "GLOG_v": "3",
        "GLOG_logtostderr": "1",
    }
    if os.environ.get("ASCEND_HOME_PATH"):
        return "Ascend", environment
    stubs = str(stub_folder())
    environment.update(
        CUDA_HOME=stubs,
        PATH=f"{stubs}/bin:{os.environ.get('PATH', '')}",
        LD_LIBRARY_PATH=f"{stubs}/lib64",
        OMPI_COMMAND="x",  # the GPU target asks for a launcher
        PMIX_RANK=str(rank),
    )
    return "GPU", environment


def _search_path():
    """The paths that Python searches, folders of packages last: `amp.auto_mixed_precision` puts such in front.

    MindSpore's own `nn/layer` has a `math.py`.
    """
    return sorted(sys.path, key=lambda path: os.path.exists(os.path.join(path, "__init__.py")))


def _run_child(request, environment, timeout):
    """Have `keeper` run the child to its end, or kill it; returns its results."""
    folder = os.path.join(tempfile.gettempdir(), f"mindpet-plan-{secrets.token_hex(8)}")
    environment.update(
        MS_OM_PATH=folder,  # where MindSpore puts its notes on graphs that do not compile
        MS_DEV_SAVE_GRAPHS="1",
        MS_DEV_SAVE_GRAPHS_PATH=os.path.join(folder, "graphs"),
        MS_DEV_DUMP_IR_PASSES="step_parallel,validate",
    )
    job = {
        "folder": folder,
        "request": pickle.dumps(request),
        "command": [sys.executable, "-c", CHILD.format(path=_search_path(), folder=folder)],
        "timeout": timeout,
    }
    command = [sys.executable, "-I", "-S", KEEPER, str(os.getpid())]  # without what a site may import
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        try:
            output, _ = process.communicate(pickle.dumps(job))
        finally:
            process.terminate()  # if this is interrupted; else it has ended
            process.wait()
    outcome = pickle.loads(output) if output else {"error": f"it was ended by signal {-process.returncode}"}
    if "error" in outcome:
        raise DryRunError(f"dry_run: the process that starts the child cannot: {outcome['error']}")
    code = outcome["code"]
    results = _load_all(outcome["results"])
    if len(results) < len(request.builds):
        what = f"took longer than {timeout} s" if code is None else f"ended with exit code {code}"
        raise DryRunError(f"dry_run: the child process {what}. The end of its output:\n{outcome['log']}")
    return results


def _load_all(data):
    """The results that the child has finished; one that it was writing does not count."""
    results, file = [], io.BytesIO(data)
    while True:
        try:
            results.append(pickle.load(file))
        except (EOFError, pickle.UnpicklingError):
            return results

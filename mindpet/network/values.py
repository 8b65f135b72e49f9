"""Values of Parameters, read and set so that what MindSpore has compiled sees them."""

import hashlib
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common import api


def value_of(param: Parameter) -> np.ndarray:
    """A copy of a Parameter's value as an array; in semi-auto parallel mode it may have to be made first."""
    if param.has_init:
        param.init_data()
    return param.asnumpy().copy()


def assign(param: Parameter, value: Tensor) -> None:
    """Set a Parameter's value in place.

    `Parameter.set_data` puts other memory in its place, which a compiled `mindspore.jit` function does not notice: it
    goes on with the old values, or with what has become of that memory.

    Args:
        param: is set.
        value: of the same shape and type.
    """
    cannot = param.dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU"  # there is no kernel
    if param.has_init or cannot:
        type(param).set_data(param, value)  # not what `watch` has put in its place
        forget_graphs()
    else:
        ops.assign(param, value)


def load(param: Parameter, value: Tensor) -> None:
    """`assign` a value that comes from a file; who watches the Parameter is told."""
    assign(param, value)
    if "set_data" in vars(param):
        param.set_data.mindpet_watcher()


def watch(param: Parameter, watcher: Callable[[], None]) -> None:
    """Have `watcher()` called after each `set_data` of a Parameter, as `mindspore.load_param_into_net` does it.

    The method is patched on the object; MindSpore 2.7 to 2.10 set what they load through it. `unwatch` undoes it.

    Args:
        param: one that is watched gets another watcher.
        watcher: is called.
    """

    def set_data(*arguments, **keywords):
        result = type(param).set_data(param, *arguments, **keywords)
        watcher()
        return result

    set_data.mindpet_watcher = watcher
    vars(param)["set_data"] = set_data


def is_watched(param: Parameter) -> bool:
    """Whether a Parameter has a watcher."""
    return "set_data" in vars(param)


def unwatch(param: Parameter) -> None:
    """Undo `watch`."""
    vars(param).pop("set_data", None)


def digest(value: np.ndarray) -> bytes:
    """A hash of an array's bytes."""
    return hashlib.blake2b(value.tobytes(), digest_size=16).digest()


def know_graphs(network: nn.Cell) -> None:
    """Have `forget_graphs` reach the Cells of a network: MindSpore does not list the graphs of deep copies."""
    for _, cell in network.cells_and_names():
        api.cells_compile_cache.setdefault(id(cell), cell.compile_cache)


def has_jit_functions() -> bool:
    """Whether MindSpore has compiled a `mindspore.jit` function."""
    return bool(api.ms_compile_cache)


def forget_graphs() -> None:
    """Drop MindSpore's compiled graphs; every network is compiled anew on its next call.

    MindSpore (2.7 to 2.10) does not see that a network that it has compiled has changed.
    """
    executors = [api._cell_graph_executor]
    for cache in list(api.cells_compile_cache.values()):  # a Cell that is freed meanwhile takes its entry out
        _drop(executors, cache)
    _drop([*executors, api.JitExecutor_.get_instance()], api.ms_compile_cache)


def _drop(executors, cache):
    """Empty a cache of compiled graphs; MindSpore frees by itself only those of a Cell that is freed."""
    for executor in executors if cache else ():
        executor.del_net_res(None, cache)
    cache.clear()

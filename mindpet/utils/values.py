"""Values of Parameters, read and set so that what MindSpore has compiled sees them."""

import mindspore as ms
from mindspore import ops
from mindspore.common import api


def value_of(param):
    """A copy of a Parameter's value as an array; in semi-auto parallel mode it may have to be made first."""
    if param.has_init:
        param.init_data()
    return param.asnumpy().copy()


def assign(param, value):
    """Set a Parameter's value in place.

    `Parameter.set_data` puts other memory in its place, which a compiled `mindspore.jit` function does not notice: it
    goes on with the old values, or with what has become of that memory.

    Args:
        param (Parameter): the Parameter.
        value (Tensor): of the same shape and type.
    """
    cannot = param.dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU"  # there is no kernel
    if param.has_init or cannot:
        param.set_data(value)
        forget_graphs()
    else:
        ops.assign(param, value)


def forget_graphs():
    """Have everything compiled anew: MindSpore does not see that a network that it has compiled has changed."""
    for cache in api.cells_compile_cache.values():
        cache.clear()
    api.ms_compile_cache.clear()

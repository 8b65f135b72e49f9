"""Operators of `mindspore.mint` that MindSpore has on accelerators only, for models that use them.

Importing this puts the same mathematics, from operators that every target has, in their place. It comes before the
import of a library.
"""

import mindspore as ms
import mindspore.dataset.transforms as transforms
from mindspore import Tensor, mint, ops
from mindspore.mint.nn.layer import conv


def arange(start, end=None, step=1, dtype=None):
    start, end = (0, start) if end is None else (start, end)
    out = ops.arange(start, end, step)
    return out if dtype is None else out.astype(dtype)


def embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False):
    return ops.gather(weight, input, 0)


def addmm(input, mat1, mat2, *, beta=1, alpha=1):
    return beta * input + alpha * ops.matmul(mat1, mat2)


def chunk(input, chunks, dim=0):
    return ops.split(input, input.shape[dim] // chunks, dim)


def gelu(input, *, approximate="none"):
    return ops.gelu(input, approximate)


def rms_norm(x, gamma, epsilon=1e-6):
    return x * ops.rsqrt(ops.square(x).mean(-1, True) + epsilon) * gamma, None


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, True)
    out = centred * ops.rsqrt(ops.square(centred).mean(axes, True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    rows = input.reshape(input.shape[0], num_groups, -1)
    centred = rows - rows.mean(2, True)
    out = (centred * ops.rsqrt(ops.square(centred).mean(2, True) + eps)).reshape(input.shape)
    shape = (1, -1) + (1,) * (input.ndim - 2)
    return out * weight.reshape(shape) + bias.reshape(shape)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return ops.conv2d(input, weight, bias, stride, "pad", padding, dilation, groups)


def layer_norm_construct(self, input):
    return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def group_norm_construct(self, input):
    return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class NoTransform:
    """What older libraries import from modules that MindSpore has no longer."""


mint.arange, mint.addmm, mint.chunk = arange, addmm, chunk
ops.embedding, ops.rms_norm = embedding, rms_norm
for function in (embedding, gelu, layer_norm, group_norm, conv2d):
    setattr(mint.nn.functional, function.__name__, function)
mint.nn.LayerNorm.construct, mint.nn.GroupNorm.construct = layer_norm_construct, group_norm_construct
conv.conv2d_ext_op = conv2d
Tensor.chunk = chunk
if not hasattr(transforms, "py_transforms"):
    import sys
    import types

    for name in ("py_transforms", "c_transforms"):
        module = types.ModuleType(f"{transforms.__name__}.{name}")
        module.PyTensorOperation = NoTransform
        setattr(transforms, name, module)
        sys.modules[module.__name__] = module
ms.set_device("CPU")

"""Operators that compute as a convolution does, with a weight that they are given."""

from typing import Union

from mindspore import mint, nn, ops

AXES = {"conv1d": 1, "conv2d": 2, "conv3d": 3}  # name of a LayerKind -> axes that the kernel moves along


def convolution_like(cell: nn.Cell, name: str, channels: int) -> Union[nn.Cell, ops.Primitive]:
    """An operator `(x, weight) -> out` with the kernel, strides, padding and groups of a convolution.

    Args:
        cell: the convolution; one with `groups` computes as `mindspore.mint.nn.Conv2d` does, else as
            `mindspore.nn.Conv2d`.
        name: of its LayerKind.
        channels: that come out.

    Returns:
        The operator; its weight is `(channels, in / groups, *kernel)`.
    """
    if hasattr(cell, "groups"):
        pads = cell._reversed_padding if cell.padding_mode != "zeros" else None
        padding = cell.padding if pads is None else (0,) * len(cell.stride)
        operator = _MintConvolution(cell, cell.stride, padding, cell.dilation, pads)
    else:
        same = {name: getattr(cell, name) for name in ("kernel_size", "pad_mode", "stride", "dilation")}
        operator = _primitive(cell, name, channels, pad=cell.padding, **same)
    return _on_its_axes(cell, name, operator)


def pointwise_like(cell: nn.Cell, name: str, channels: int) -> Union[nn.Cell, ops.Primitive]:
    """An operator like `convolution_like`'s with a kernel of one tap that moves by one; groups are those of `cell`."""
    if hasattr(cell, "groups"):
        ones = (1,) * len(cell.stride)
        padding = cell.padding if isinstance(cell.padding, str) else (0,) * len(ones)
        operator = _MintConvolution(cell, ones, padding, ones)
    else:
        operator = _primitive(cell, name, channels, kernel_size=1)
    return _on_its_axes(cell, name, operator)


def _primitive(cell, name, channels, **arguments):
    if name != "conv3d":
        return ops.Conv2D(channels, group=cell.group, **arguments)
    operator = ops.Conv3D(channels // cell.group, **arguments)
    return _OfGroups(operator, cell.group) if cell.group > 1 else operator


def _on_its_axes(cell, name, operator):
    """`nn.Conv1d` computes with an operator for two axes."""
    return _Flat(operator) if name == "conv1d" and hasattr(cell, "conv2d") else operator


class _MintConvolution(nn.Cell):
    """The function of a convolution of `mindspore.mint.nn`, with other arguments."""

    def __init__(self, cell, stride, padding, dilation, pads=None):
        super().__init__(auto_prefix=False)
        self.function = next(getattr(cell, name) for name in AXES if hasattr(cell, name))
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, cell.groups
        self.pads, self.padding_mode = pads, cell.padding_mode

    def construct(self, x, weight):
        if self.pads is not None:
            x = mint.nn.functional.pad(x, self.pads, mode=self.padding_mode)
        return self.function(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


class _OfGroups(nn.Cell):
    """Computes each group by itself, as `nn.Conv3d` does."""

    def __init__(self, operator, group):
        super().__init__(auto_prefix=False)
        self.operator, self.group = operator, group
        self.split_x, self.split_weight, self.concat = ops.Split(1, group), ops.Split(0, group), ops.Concat(1)

    def construct(self, x, weight):
        parts, weights, out = self.split_x(x), self.split_weight(weight), ()
        for index in range(self.group):
            out += (self.operator(parts[index], weights[index]),)
        return self.concat(out)


class _Flat(nn.Cell):
    """A convolution along one axis by an operator for two, the first of which has length one."""

    def __init__(self, operator):
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, x, weight):
        return ops.squeeze(self.operator(ops.expand_dims(x, 2), ops.expand_dims(weight, 2)), 2)

"""A Dense layer with separate types for storage and computation."""

import mindspore as ms
from mindspore import nn, ops

from mindpet.layers.activation import get_activation
from mindpet.utils.hints import ActivationLike, InitLike

# The operator: of the Python function `ops.cast` MindSpore (2.7 to 2.10) keeps 3 KB each time that it is compiled.
cast = ops.Cast()


def to_rows(x):
    """`(*, features) -> (rows, features)`."""
    return x if x.ndim == 2 else ops.reshape(x, (-1, x.shape[-1]))


def from_rows(rows, like):
    """`(rows, features) -> (*, features)`, the leading axes those of `like`."""
    return rows if like.ndim == 2 else ops.reshape(rows, like.shape[:-1] + rows.shape[-1:])


class Dense(nn.Dense):
    """`activation(x W^T + b)`, stored in `dtype`, computed in `compute_dtype`, returned in the type of `x`.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        weight_init: of `weight (out_channels, in_channels)`. Default: 'normal'.
        bias_init: of `bias (out_channels,)`. Default: 'zeros'.
        has_bias: whether there is a bias. Default: True.
        activation: applied to the output. Default: None.
        dtype: of the parameters. Default: float32.
        compute_dtype: of the computation. Default: float32.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: InitLike = "normal",
        bias_init: InitLike = "zeros",
        has_bias: bool = True,
        activation: ActivationLike = None,
        dtype: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float32,
    ):
        super().__init__(in_channels, out_channels, weight_init, bias_init, has_bias, dtype=dtype)
        self.activation = get_activation(activation) if isinstance(activation, str) else activation
        self.activation_flag = self.activation is not None
        self.compute_dtype = compute_dtype

    def construct(self, x):
        rows = ops.cast(to_rows(x), self.compute_dtype)
        return from_rows(ops.cast(self.transform(rows), x.dtype), x)

    def transform(self, rows):
        """The layer on rows of the compute type: `(rows, in_channels) -> (rows, out_channels)`."""
        return self.activate(self.linear(rows))

    def linear(self, rows):
        """`rows W^T + b`."""
        out = self.matmul(rows, ops.cast(self.weight, self.compute_dtype))
        if self.has_bias:
            out = self.bias_add(out, ops.cast(self.bias, self.compute_dtype))
        return out

    def activate(self, rows):
        """The activation, if there is one."""
        return self.activation(rows) if self.activation_flag else rows

"""What the methods that replace a Dense layer, or follow one, share."""

from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindpet.layers.activation import ACTIVATIONS
from mindpet.layers.linear import Dense, from_rows, to_rows
from mindpet.utils.values import assign


class DeltaDense(Dense):
    """A Dense layer with a delta; the base parameters keep their names `weight` and `bias`.

    A method overrides `transform(rows)`, and `merged_weight()` if its delta can be folded into the weight.

    Args:
        in_channels, out_channels, weight_init, bias_init, has_bias, activation: as in `mindpet.layers.Dense`.
        param_init_type (mindspore.dtype): type of the delta parameters: float16, float32 or bfloat16.
        compute_dtype (mindspore.dtype): type of the computation: float16, float32 or bfloat16.
        check (Checker): what the method has already found wrong with its own arguments.

    Raises:
        TypeError, ValueError, KeyError: an argument is wrong; all wrong ones are in the message.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        weight_init,
        bias_init,
        has_bias,
        activation,
        param_init_type,
        compute_dtype,
        check,
    ):
        check.positive_int(in_channels=in_channels, out_channels=out_channels)
        check.initial("weight_init", weight_init, (out_channels, in_channels))
        check.initial("bias_init", bias_init, (out_channels,))
        check.boolean(has_bias=has_bias)
        check.activation("activation", activation, ACTIVATIONS)
        check.float_type(param_init_type=param_init_type, compute_dtype=compute_dtype)
        check.done()
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, compute_dtype=compute_dtype
        )
        self.param_init_type = param_init_type

    def extend_repr(self):
        return f"{super().extend_repr()}, param_init_type={self.param_init_type}, compute_dtype={self.compute_dtype}"


class ResidualAdapter(nn.Cell):
    """`h + bottleneck(h)`: what adapters put after a layer. A method overrides `bottleneck(rows)`.

    Args:
        hidden_size (int): features of the input and the output.
        param_init_type (mindspore.dtype): type of the parameters.
        compute_dtype (mindspore.dtype): type of the bottleneck's computation. The residual is added in the input's own
            type, so that an untrained bottleneck that gives zeros leaves the input bit for bit.
    """

    def __init__(self, hidden_size, param_init_type, compute_dtype):
        super().__init__()
        self.hidden_size = hidden_size
        self.param_init_type = param_init_type
        self.compute_dtype = compute_dtype
        self.residual_add = ops.Add()

    def construct(self, hidden):
        rows = to_rows(hidden)
        delta = ops.cast(self.bottleneck(ops.cast(rows, self.compute_dtype)), hidden.dtype)
        return from_rows(self.residual_add(rows, delta), hidden)

    def bottleneck(self, rows):
        """The delta on rows of the compute type: `(rows, hidden_size) -> (rows, hidden_size)`."""
        raise NotImplementedError

    def extend_repr(self):
        return (
            f"hidden_size={self.hidden_size}, param_init_type={self.param_init_type}, "
            f"compute_dtype={self.compute_dtype}"
        )


class Behind(nn.Cell):
    """A delta that follows a layer, in the form that all deltas of layers have: it takes the layer's input and output.

    Args:
        delta (Cell): takes the layer's output and returns it with the delta; `delta.reset()` makes it the identity.
    """

    def __init__(self, delta):
        super().__init__(auto_prefix=False)
        self.delta = delta

    def construct(self, x, out):
        return self.delta(out)

    def reset(self):
        """Make the delta the identity bit for bit, whatever its parameters hold: all of them are lost.

        Each one is set, not only what the last product needs, for `0 * NaN` is NaN. Keep the values that are to come
        back.
        """
        self.delta.reset()


class InFront(nn.Cell):
    """Trained keys and values in front of those of one attention.

    Args:
        delta (Cell): has the parameters.

    Inputs:
        key, value: `(batch, heads, seq, head_dim)`.

    Outputs:
        key, value: `(batch, heads, tokens + seq, head_dim)`.
    """

    def __init__(self, delta):
        super().__init__(auto_prefix=False)
        self.delta = delta
        self.concat = ops.Concat(axis=2)

    def construct(self, key, value):
        past_key, past_value = self.past(key.shape[0], key.dtype)
        return self.concat((past_key, key)), self.concat((past_value, value))

    def past(self, batch, dtype):
        """The trained keys and values, each `(batch, heads, tokens, head_dim)`."""
        raise NotImplementedError

    def shard(self, batch, heads):
        """Cut the result over the batch and the heads; the parameters are the same on every rank.

        Args:
            batch (int): slices of the batch.
            heads (int): slices of the key and value heads.

        Returns:
            InFront, itself.
        """
        layout = (batch, heads, 1, 1)
        self.concat.shard((layout, layout))
        return self


def out_features(cell, kind):
    """Features of a layer's output, and the type that it computes in."""
    weight = kind.weight_of(cell)
    return weight.shape[-1 if kind.transposed else 0], kind.compute_dtype


def set_zeros(*params):
    """Fill Parameters with zeros."""
    for param in params:
        assign(param, initializer("zeros", param.shape, param.dtype).init_data())


def delta_parameter(init, shape, dtype, name):
    """A parameter of a delta, of `dtype` also where `init` is a Tensor of another type."""
    if isinstance(init, Tensor):
        # A Tensor of `initializer()` has no values yet: a cast of it kills the process (MindSpore 2.10) or gives zeros.
        init = init.init if init.has_init else init.astype(dtype)
    return Parameter(initializer(init, shape, dtype), name=name)

"""A Dense layer whose weight is quantised, and does not train."""

from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import Layout, Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops import constexpr
from mindspore.ops.auto_generate import WeightQuantBatchMatmul
from mindspore.parallel._utils import _get_stage_device_num

from mindpet.layers.activation import ACTIVATIONS, get_activation
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.utils.hints import ActivationLike, Arrays, InitLike, Operators, Shape, Strategy
from mindpet.utils.layouts import is_layout
from mindpet.utils.quantization import BITS, SCALE, WEIGHT, Format, dequantize_matrix, lowest, pair_table
from mindpet.utils.sharding import PARALLEL_MODES, apply_strategies, check_strategy
from mindpet.utils.validate import Checker

TYPES = {np.dtype(np.int8): ms.int8, np.dtype(np.uint8): ms.uint8, np.dtype(np.float32): ms.float32}
# Operators: the functions for some of them do not compile in a `bprop`.
gather, mul, add, depend, tile = ops.Gather(), ops.Mul(), ops.Add(), ops.Depend(), ops.Tile()


def dequantizer(form: Format, dtype: ms.Type) -> Callable:
    """The function `(weight, scale, ranges) -> W (out, in)` of a format; see `mindpet.utils.quantization`.

    MindSpore parses it. It takes its sizes from its inputs, so that it serves slices of the weight, too.

    Args:
        form: the format.
        dtype: of W.
    """
    table = Tensor(pair_table(form.bits).astype(ms.dtype_to_nptype(dtype))) if form.is_packed else None
    offset, size = lowest(form.bits), form.group_size

    def broadcast(column, like):
        return column

    def tiled(column, like):
        return tile(column, (1, like.shape[1]))

    def unsigned(weight):
        return cast(ops.reshape(weight, (-1,)), ms.int32)

    def signed(weight):
        return add(unsigned(weight), offset)

    def plain(scale, ranges):
        return scale

    def double(scale, ranges):
        blocks = cast(ops.reshape(scale, (ranges.shape[0], -1)), ms.float32)
        return add(mul(blocks, spread(ranges[:, :1], blocks)), spread(ranges[:, 1:], blocks))

    def of_rows(weight, scale, ranges):
        rows = cast(weight, dtype)
        return mul(rows, spread(cast(ops.reshape(scale, (-1, 1)), dtype), rows))

    # Chosen here, for MindSpore 2.7 does not compile a branch in these functions. On a CPU the kernel of an operator
    # that broadcasts keeps 16 bytes for each number that comes out (MindSpore 2.7 to 2.10).
    places, scales = signed if offset else unsigned, double if form.is_double else plain
    spread = tiled if ms.get_context("device_target") == "CPU" else broadcast

    def of_groups(weight, scale, ranges):
        groups = ops.reshape(gather(table, places(weight), 0), (-1, size))
        numbers = mul(groups, spread(cast(ops.reshape(scales(scale, ranges), (-1, 1)), dtype), groups))
        return ops.reshape(numbers, (weight.shape[0], -1))

    return of_groups if form.is_packed else of_rows


def after(codes, value):
    """Codes that are there once a value is, so that W is decoded when it is needed and not before.

    Without the dependence all weights of a network are decoded at the start, and the compiler finds that the backward
    pass computes what the forward pass has computed, and keeps it. Without the reshape it copies the codes (MindSpore
    2.7 to 2.10, TensorMove).
    """
    return depend(ops.reshape(codes, (codes.shape[0], -1)), value)


def one_operator(dequantize: Callable, form: Format, dtype: ms.Type) -> ops.Primitive:
    """A `dequantizer` that the parallel front end takes as one operator: slices of codes give that slice of W."""
    columns = 2 if form.is_packed else 1

    def infer_shape(weight, scale, ranges):
        return (weight[0], weight[1] * columns)

    def infer_dtype(weight, scale, ranges):
        return dtype

    operator = ops.Morph(dequantize, infer_shape, infer_dtype)
    operator.add_prim_attr("self_define_shard", True)
    return operator


@constexpr(reuse_result=False)
def is_cut(is_laid_out):
    """Whether the graph that is compiled is cut by MindSpore's parallel front end."""
    is_parallel = ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES
    if is_parallel and not is_laid_out:
        raise RuntimeError(
            "QuantizedDense: it must be made, or its shard() called, after the parallel mode and the number of devices "
            "have been set, since how its codes are cut depends on these."
        )
    return is_parallel


class Decoder(nn.Cell):
    """W from its codes, in the type that it is computed in: `(weight, scale, ranges) -> (out, in)`.

    Args:
        form: the format.
        dtype: of W.
    """

    def __init__(self, form: Format, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.form, self.dtype = form, dtype
        self.dequantize, self.whole = dequantizer(form, dtype), None

    def construct(self, weight, scale, ranges):
        if is_cut(self.whole is not None):
            return self.whole(weight, scale, ranges)
        return self.dequantize(weight, scale, ranges)

    def lay_out(self, rows: int, inputs: int, outputs: int) -> None:
        """Cut the codes as a matmul cuts the weight, with the arrangement of the ranks that it has.

        Nothing is done where MindSpore does not cut graphs.

        Args:
            rows, inputs, outputs: slices of the axes of the matmul.
        """
        if ms.get_auto_parallel_context("parallel_mode") not in PARALLEL_MODES:
            return
        repeated = max(1, _get_stage_device_num() // (rows * inputs * outputs))
        layout = Layout((rows, inputs, outputs, repeated), ("rows", "inputs", "outputs", "repeated"))
        of_weight = layout("outputs", "inputs")
        of_scale = of_weight if self.form.is_packed else layout("outputs")
        of_range = layout("outputs" if self.form.is_double else "None", "None")
        self.whole = one_operator(self.dequantize, self.form, self.dtype)
        self.whole.shard(in_strategy=(of_weight, of_scale, of_range), out_strategy=(of_weight,))


class QuantizedProduct(nn.Cell):
    """The product with a quantised weight, with a gradient for the input alone.

    .. math::
        y = x W^T,\\quad dx = dy\\, W

    W is computed from its codes in the forward and again in the backward pass, and not kept in between.

    Args:
        dequantize: see `dequantizer`.
        kernel: an operator `(x, weight, scale) -> y` that takes the codes, for the forward pass. Default: None.

    Inputs:
        rows: `(rows, in)`, of the type that W is computed in.
        weight, scale, ranges: of the weight.

    Outputs:
        `(rows, out)`.
    """

    def __init__(self, dequantize: Callable, kernel: Optional[Callable] = None):
        super().__init__(auto_prefix=False)
        self.dequantize, self.kernel = dequantize, kernel
        self.forward_matmul, self.backward_matmul = ops.MatMul(transpose_b=True), ops.MatMul()

    def construct(self, rows, weight, scale, ranges):
        if self.kernel is not None:
            return self.kernel(rows, weight, scale)
        weight, scale, ranges = after(weight, rows), after(scale, rows), after(ranges, rows)
        return self.forward_matmul(rows, self.dequantize(weight, scale, ranges))

    def bprop(self, rows, weight, scale, ranges, out, dout):
        codes, scales, blocks = after(weight, dout), after(scale, dout), after(ranges, dout)
        change = self.backward_matmul(dout, self.dequantize(codes, scales, blocks))
        return change, ops.zeros_like(weight), ops.zeros_like(scale), ops.zeros_like(ranges)


class AscendProduct(nn.Cell):
    """`x W^T` of int8 by Ascend's kernel, which has no gradient. It was compiled by the tests, and never run."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.product = WeightQuantBatchMatmul(transpose_x=False, transpose_weight=True)

    def construct(self, rows, weight, scale):
        return self.product(rows, weight, cast(scale, rows.dtype))


class QuantizedDense(nn.Cell):
    """A Dense layer with a quantised weight, as QLoRA has them.

    .. math::
        y = activation(x W^T + b)

    Source: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, equation 5, without the term of LoRA; the formats stand in
    `mindpet.utils.quantization`. The weight is computed from its codes in `compute_dtype`, whenever it is needed, and
    gets no gradient.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        bits: 'int8', 'int4' or 'nf4'. Default: 'nf4'.
        group_size: numbers of a row that share a scale, of 4 bits; even, and divides `in_channels`. Default: 64.
        double_quant: whether the scales of 4 bits are quantised, too. Default: True.
        bias_init: of the bias b. Default: 'zeros'.
        has_bias: whether there is a bias. Default: True.
        activation: applied to the output. Default: None.
        dtype: of the bias, and of the weight once it is dequantised. Default: float32.
        compute_dtype: of the computation. Default: float32.

    Parameters:
        weight, weight_scale, weight_scale_range: see `Format.shapes`; zeros, until they are loaded. bias
        `(out_channels,)`.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.

    Raises:
        TypeError, ValueError, KeyError: an argument is wrong; all wrong ones are in the message.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bits: str = "nf4",
        group_size: int = 64,
        double_quant: bool = True,
        bias_init: InitLike = "zeros",
        has_bias: bool = True,
        activation: ActivationLike = None,
        dtype: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float32,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(in_channels=in_channels, out_channels=out_channels)
        check_format(check, bits, group_size, double_quant)
        check.initial("bias_init", bias_init, (out_channels,))
        check.boolean(has_bias=has_bias)
        check.activation("activation", activation, ACTIVATIONS)
        check.float_type(dtype=dtype, compute_dtype=compute_dtype)
        if not check.problems:
            problem = Format(bits, group_size, double_quant).problem((out_channels, in_channels))
            check.require(not problem, ValueError, "group_size", group_size, "a divisor of 'in_channels'")
        check.done()
        super().__init__()
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, has_bias
        self.form, self.dtype, self.compute_dtype = Format(bits, group_size, double_quant), dtype, compute_dtype
        self.is_quantized, self.codes = True, {}
        for name, (shape, kind) in self.form.shapes(self.shape).items():
            codes = initializer("zeros", shape, TYPES[kind])
            setattr(self, name, Parameter(codes, name=name, requires_grad=False))
        self.bias = Parameter(initializer(bias_init, (out_channels,), dtype), name="bias") if has_bias else None
        self.no_range = Tensor(np.zeros((1, 2), np.float32))
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd() if has_bias else None
        self.activation = get_activation(activation) if isinstance(activation, str) else activation
        self.activation_flag = self.activation is not None
        has_kernel = ms.get_context("device_target") == "Ascend" and compute_dtype != ms.float32
        kernel = AscendProduct() if has_kernel and bits == "int8" else None
        self.decoder = Decoder(self.form, compute_dtype)
        self.decoder.lay_out(1, 1, 1)
        self.product = QuantizedProduct(self.decoder.dequantize, kernel)

    @property
    def shape(self) -> Shape:
        """`(out_channels, in_channels)`, of the weight."""
        return self.out_channels, self.in_channels

    def construct(self, x):
        rows = self.linear(cast(to_rows(x), self.compute_dtype))
        if self.has_bias:
            rows = self.bias_add(rows, cast(self.bias, self.compute_dtype))
        if self.activation_flag:
            rows = self.activation(rows)
        return from_rows(cast(rows, x.dtype), x)

    def linear(self, rows):
        """`rows W^T`."""
        if not self.is_quantized:
            return self.matmul(rows, cast(self.weight, self.compute_dtype))
        if is_cut(self.decoder.whole is not None):  # the front end knows nothing of a gradient of our own
            weight = self.decoder(self.weight, self.weight_scale, self.ranges())
            return self.matmul(rows, ops.stop_gradient(weight))
        return self.product(rows, self.weight, self.weight_scale, self.ranges())

    def ranges(self):
        """The Parameter `weight_scale_range`, or a Tensor in its place."""
        return self.weight_scale_range if self.form.is_double else self.no_range

    def shard(
        self,
        strategy_matmul: Optional[Strategy] = None,
        strategy_bias_add: Optional[Strategy] = None,
        strategy_activation: Optional[Strategy] = None,
    ) -> "QuantizedDense":
        """Set the strategies; the codes of the weight are cut as it is.

        Args:
            strategy_matmul: of `(rows, in)` and of the weight `(out, in)`, whatever its codes are. Default: None.
            strategy_bias_add: of `(rows, out)` and `(out,)`. Default: None.
            strategy_activation: of `(rows, out)`. Default: None.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; a slice would not have whole groups or
                blocks of scales.
        """
        slots = {name: value for name, value in locals().items() if name != "self"}
        check = Checker(f"{type(self).__name__}.shard")
        rule = "a tuple of tuples of int: codes are not cut by a Layout"
        is_tuples = not is_layout(strategy_matmul or ())
        check.require(is_tuples, TypeError, "strategy_matmul", strategy_matmul, rule)
        if is_tuples and check_strategy(Checker(""), "", strategy_matmul, "ni,oi"):
            (rows, inputs), (outputs, _) = strategy_matmul
            shapes = self.form.shapes(self.shape)
            fits = all(size[0] % outputs == 0 for size, _ in shapes.values())
            fits = fits and (inputs == 1 or not self.form.is_packed or shapes[SCALE][0][1] % inputs == 0)
            rule = f"one whose slices have whole groups and blocks of {', '.join(shapes)}"
            check.require(fits, ValueError, "strategy_matmul", strategy_matmul, rule)
        check.done()
        apply_strategies(self, slots)
        if strategy_matmul is not None:
            self.decoder.lay_out(rows, inputs, outputs)
        return self

    @property
    def operators(self) -> Operators:
        """The operators behind the slots of `shard()`."""
        return {
            "strategy_matmul": (self.matmul, "ni,oi"),
            "strategy_bias_add": (self.bias_add, "no,o"),
            "strategy_activation": (self.activation, "no"),
        }

    def arrays(self) -> Arrays:
        """The codes and scales by name, NumPy."""
        params = self.codes or {name: getattr(self, name) for name in self.form.shapes(self.shape)}
        for param in params.values():
            if param.has_init:
                param.init_data()
        return {name: param.asnumpy() for name, param in params.items()}

    def dequantized(self) -> np.ndarray:
        """W `(out_channels, in_channels)`, float32."""
        return dequantize_matrix(self.arrays(), self.form)

    def dequantize(self) -> None:
        """Have W itself, in `dtype`, in the place of its codes; compiled graphs are the caller's to drop."""
        weight = Tensor(self.dequantized()).astype(self.dtype)
        names = list(self.form.shapes(self.shape))
        self.codes = {name: self._params.pop(name) for name in names}
        plain = Parameter(weight, name=self.codes[WEIGHT].name, requires_grad=False)
        self._set_params({WEIGHT: plain}, False)

    def requantize(self) -> None:
        """Undo `dequantize`: the codes are those from before."""
        del self._params[WEIGHT]
        codes, self.codes = self.codes, {}
        self._set_params(codes, True)

    def _set_params(self, params, is_quantized):
        others = dict(self._params)
        self._params.clear()
        self._params.update({**params, **others})
        self.is_quantized = is_quantized

    def extend_repr(self) -> str:
        form = self.form
        groups = f", group_size={form.group_size}, double_quant={form.double_quant}" if form.is_packed else ""
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, has_bias={self.has_bias}, "
            f"bits={form.bits}{groups}, compute_dtype={self.compute_dtype}"
        )


class KeptCodes(nn.Cell):
    """The weight of a quantised layer, for a delta that computes with it: `() -> (out, in)`, without a gradient.

    Args:
        cell: the layer.
    """

    def __init__(self, cell: QuantizedDense):
        super().__init__(auto_prefix=False)
        self.decoder, self.weight, self.weight_scale = cell.decoder, cell.weight, cell.weight_scale
        self.weight_scale_range = cell.ranges()

    def construct(self):
        return ops.stop_gradient(self.decoder(self.weight, self.weight_scale, self.weight_scale_range))


def check_format(check: Checker, bits: Any, group_size: Any, double_quant: Any) -> None:
    """Note what is wrong with the arguments of a format."""
    check.choice("bits", bits, BITS)
    check.positive_int(group_size=group_size)
    even = not isinstance(group_size, int) or group_size % 2 == 0
    check.require(even, ValueError, "group_size", group_size, "even, for two numbers are in a byte")
    check.boolean(double_quant=double_quant)

"""LoRA beside a layer that stays as it is: linear, embedding or convolution."""

import math
import re
import warnings

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Normal, initializer

from mindpet.delta._base import delta_parameter, set_zeros
from mindpet.layers.convolution import AXES, convolution_like, pointwise_like
from mindpet.layers.linear import from_rows, to_rows
from mindpet.utils.sharding import apply_strategies
from mindpet.utils.values import assign
from mindpet.utils.version_control import get_dropout

cast = ops.Cast()  # of the Python function `ops.cast` MindSpore keeps 3 KB each time that it is compiled


class LoraLayer(nn.Cell):
    """The LoRA delta of a layer: takes the layer's input `x` and output `out`, and returns the output with the delta.

    .. math::
        out + s\\, B A\\, dropout(x)\\quad or, with DoRA,\\quad b + g \\odot (out - b + s\\, B A\\, dropout(x)),
        \\quad g = m / \\lVert W + s B A \\rVert

    with s = alpha / rank, or alpha / sqrt(rank) for rsLoRA, and the norm over all axes of W but the first, taken as
    a constant in the backward pass. An embedding has its table's transpose as W. PiSSA and OLoRA take off W what A and
    B start as: there the update is `s (B A dropout(x) - B_0 A_0 x)`. Use `lora_layer` to make one.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685, equation 3; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732, equation
    2; DoRA, Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.

    Args:
        cell (Cell): the layer.
        kind (LayerKind): of the layer.
        rank (int): rows of A.
        alpha (Union[int, float]): scale.
        dropout (float): probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        use_rslora (bool): the scale of rsLoRA. Default: False.
        use_dora (bool): DoRA. Default: False.
        lora_bias (bool): adds `s * mindpet_delta_lora_bias`. Default: False.
        init (Union[bool, str]): True: A Kaiming uniform and B zero, of an embedding A zero and B normal; 'gaussian': A
            normal with deviation 1 / rank; False: neither is zero; 'pissa', 'olora': A_0 and B_0 are parameters, which
            whoever knows the weight fills. Default: True.

    Parameters:
        mindpet_delta_lora_a, mindpet_delta_lora_b: see `shapes` of the class; mindpet_delta_lora_magnitude: `(out,)`,
        of a convolution `(1, out, 1, ...)`; mindpet_delta_lora_bias: `(out,)`; not trained: mindpet_lora_scaling: `()`,
        mindpet_lora_start_a, mindpet_lora_start_b: A_0 and B_0.
    """

    # Parameter -> its name in an adapter's file, as Hugging Face PEFT has it.
    file_names = {
        "mindpet_delta_lora_a": "lora_A.weight",
        "mindpet_delta_lora_b": "lora_B.weight",
        "mindpet_delta_lora_bias": "lora_B.bias",
        "mindpet_delta_lora_magnitude": "lora_magnitude_vector",
    }

    def __init__(
        self,
        cell,
        kind,
        rank,
        alpha,
        dropout=0.0,
        use_rslora=False,
        use_dora=False,
        lora_bias=False,
        init=True,
    ):
        super().__init__(auto_prefix=False)
        self.kind, self.rank, self.use_dora, self.lora_bias = kind, rank, use_dora, lora_bias
        weight = kind.weight_of(cell)
        self.compute_dtype = kind.compute_dtype
        self.use_rslora, self.starts_from_weight = use_rslora, starts_from_weight(init)
        scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        # A Parameter, so that another adapter's scale can take its place without a new graph.
        self.mindpet_lora_scaling = Parameter(Tensor(scaling, ms.float32), requires_grad=False)
        shape_a, shape_b = self.shapes(cell, weight.shape)
        init_a, init_b = self.initial_values(init)
        self.mindpet_delta_lora_a = delta_parameter(init_a, shape_a, ms.float32, "mindpet_delta_lora_a")
        self.mindpet_delta_lora_b = delta_parameter(init_b, shape_b, ms.float32, "mindpet_delta_lora_b")
        self.out_channels = shape_b[0]
        if use_dora:
            self.mindpet_delta_lora_magnitude = delta_parameter(
                "ones", self.magnitude_shape(), ms.float32, "mindpet_delta_lora_magnitude"
            )
            self.base_weight, self.base_bias = weight, kind.bias_of(cell) if kind.adds_bias else None
        if lora_bias:
            shape = (self.out_channels,)
            self.mindpet_delta_lora_bias = delta_parameter("zeros", shape, ms.float32, "mindpet_delta_lora_bias")
        self.lora_start_a_matmul, self.lora_start_b_matmul, self.sub = None, None, None
        if self.starts_from_weight:
            self.mindpet_lora_start_a = Parameter(initializer("zeros", shape_a, ms.float32), requires_grad=False)
            self.mindpet_lora_start_b = Parameter(initializer("zeros", shape_b, ms.float32), requires_grad=False)
            self.lora_start_a_matmul, self.lora_start_b_matmul = self.make_operators(cell)
            self.sub = ops.Sub()
        self.lora_dropout = get_dropout(dropout)
        self.lora_a_matmul, self.lora_b_matmul = self.make_operators(cell)
        self.bias_add = ops.BiasAdd("NCDHW" if kind.name == "conv3d" else "NCHW") if lora_bias else None
        self.mul = ops.Mul()
        self.add = ops.Add()

    def construct(self, x, out):
        rows = self.rows(out)
        lora_a, lora_b = self.mindpet_delta_lora_a, self.mindpet_delta_lora_b
        delta = self.update(x, cast(lora_a, self.compute_dtype), cast(lora_b, self.compute_dtype))
        if self.starts_from_weight:
            delta = self.sub(delta, self.start(x))
        if self.lora_bias:
            delta = self.bias_add(delta, cast(self.mindpet_delta_lora_bias, self.compute_dtype))
        delta = cast(self.mul(delta, cast(self.mindpet_lora_scaling, self.compute_dtype)), out.dtype)
        if self.use_dora:
            gain = cast(self.gain(), out.dtype)
            delta = gain * delta + (gain - 1) * self.without_bias(rows)
        return from_rows(self.add(rows, delta), out)

    def update(self, x, lora_a, lora_b):
        """`B A dropout(x)` in the compute type."""
        x = self.lora_dropout(cast(to_rows(x), self.compute_dtype))
        return self.lora_b_matmul(self.lora_a_matmul(x, lora_a), lora_b)

    def start(self, x):
        """`B_0 A_0 x` in the compute type, of a linear layer."""
        lora_a = cast(self.mindpet_lora_start_a, self.compute_dtype)
        lora_b = cast(self.mindpet_lora_start_b, self.compute_dtype)
        return self.lora_start_b_matmul(self.lora_start_a_matmul(cast(to_rows(x), self.compute_dtype), lora_a), lora_b)

    def reset(self):
        """Make the delta the identity, whatever its values were: all is zero, and DoRA's magnitude the norm of W."""
        set_zeros(*(param for name, param in self._params.items() if re.fullmatch(r"mindpet_\w+_(a|b|bias)", name)))
        if self.use_dora:
            self.set_magnitude()

    def set_magnitude(self):
        """Set DoRA's magnitude so that its gain is one."""
        if self.base_weight.has_init:  # in semi-auto parallel mode, until it is compiled or loaded
            warnings.warn(f"DoRA: {self.base_weight.name} has no values yet; load the base first.", stacklevel=2)
            return
        magnitude = self.mindpet_delta_lora_magnitude
        assign(magnitude, cast(self.norm(), magnitude.dtype))

    @property
    def scaling(self):
        """s, a float; other adapters of the same shapes may have another one."""
        return float(self.mindpet_lora_scaling.asnumpy())

    def gain(self):
        """`m / ||W + s B A||`, float32; of a row of zeros that was never trained it is one, and not 0 / 0."""
        norm = ops.stop_gradient(self.norm())
        is_zero = cast(norm == 0, ms.float32)
        return (cast(self.mindpet_delta_lora_magnitude, ms.float32) + is_zero) / (norm + is_zero)

    def norm(self):
        """`||W + s B A||` in the magnitude's shape, float32."""
        weight, lora_a, lora_b = self.base_weight, self.mindpet_delta_lora_a, self.mindpet_delta_lora_b
        weight, lora_a, lora_b = (self.as_matrix(cast(param, ms.float32)) for param in (weight, lora_a, lora_b))
        update = ops.matmul(lora_b, lora_a)
        if self.starts_from_weight:
            update = update - ops.matmul(self.mindpet_lora_start_b, self.mindpet_lora_start_a)
        update = self.mindpet_lora_scaling * update
        tuned = (ops.transpose(weight, (1, 0)) if self.kind.transposed else weight) + update
        return self.channels(ops.sqrt(ops.square(tuned).sum(1)))

    def without_bias(self, rows):
        """The base layer's output before its bias."""
        return rows if self.base_bias is None else rows - self.channels(cast(self.base_bias, rows.dtype))

    def rows(self, out):
        """The output as `(rows, out)`."""
        return to_rows(out)

    def channels(self, vector):
        """A vector `(out,)` so that it goes with the output."""
        return vector

    def as_matrix(self, weight):
        """A weight as `(first axis, rest)`."""
        return weight

    def magnitude_shape(self):
        """The shape of DoRA's magnitude."""
        return (self.out_channels,)

    def shapes(self, cell, weight):
        """The shapes of A and B: `(rank, in)` and `(out, rank)`."""
        out_channels, in_channels = weight[::-1] if self.kind.transposed else weight
        return (self.rank, in_channels), (out_channels, self.rank)

    def initial_values(self, init):
        """Initialisers of A and B."""
        uniform = HeUniform(negative_slope=math.sqrt(5))
        return (Normal(1 / self.rank) if init == "gaussian" else uniform), (uniform if init is False else "zeros")

    def make_operators(self, cell):
        """The operators that multiply by A and by B."""
        return ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)

    @property
    def operators(self):
        """The operator behind each slot of `shard()`, see `mindpet.utils.sharding`."""
        return {
            "strategy_lora_dropout": (self.lora_dropout.dropout, "ni"),
            "strategy_lora_a_matmul": (self.lora_a_matmul, "ni,ri"),
            "strategy_lora_b_matmul": (self.lora_b_matmul, "nr,or"),
            "strategy_lora_start_a_matmul": (self.lora_start_a_matmul, "ni,ri"),
            "strategy_lora_start_b_matmul": (self.lora_start_b_matmul, "nr,or"),
            "strategy_lora_sub": (self.sub, "no,no"),
            "strategy_lora_bias_add": (self.bias_add, "no,o"),
            "strategy_lora_mul": (self.mul, "no,"),
            "strategy_lora_add": (self.add, "no,no"),
        }

    def shard(
        self,
        strategy_lora_dropout=None,
        strategy_lora_a_matmul=None,
        strategy_lora_b_matmul=None,
        strategy_lora_start_a_matmul=None,
        strategy_lora_start_b_matmul=None,
        strategy_lora_sub=None,
        strategy_lora_bias_add=None,
        strategy_lora_mul=None,
        strategy_lora_add=None,
    ):
        """Set the strategies of the operators of a linear layer's delta; see `LoRADense.shard`."""
        return apply_strategies(self, locals())

    @property
    def signature(self):
        """What must be equal for two adapters to take turns in this Cell, besides shapes and types."""
        return (
            type(self),
            self.rank,
            self.use_dora,
            self.lora_bias,
            self.starts_from_weight,
            self.lora_dropout.p,
        )

    def extend_repr(self):
        alpha = self.scaling * (math.sqrt(self.rank) if self.use_rslora else self.rank)
        return f"rank={self.rank}, alpha={alpha:g}, use_dora={self.use_dora}, lora_bias={self.lora_bias}"


class LoraEmbedding(LoraLayer):
    """The LoRA delta of an embedding; `x` are the ids. Dropout does not act on ids."""

    file_names = {
        "mindpet_delta_lora_a": "lora_embedding_A",
        "mindpet_delta_lora_b": "lora_embedding_B",
        "mindpet_delta_lora_magnitude": "lora_magnitude_vector",
    }

    def update(self, x, lora_a, lora_b):
        return self.lora_b_matmul(self.lora_a_matmul(lora_a, ops.reshape(x, (-1,)), 1), lora_b)

    def initial_values(self, init):
        return (Normal(1.0) if init is False else "zeros"), Normal(1.0)

    def make_operators(self, cell):
        return ops.Gather(), ops.MatMul(transpose_a=True, transpose_b=True)

    @property
    def operators(self):
        """The operator behind each slot of `shard()`; A is whole: MindSpore would gather what is taken from a part."""
        return {
            "strategy_lora_a_matmul": (self.lora_a_matmul, "rf,n"),
            "strategy_lora_b_matmul": (self.lora_b_matmul, "rn,or"),
            "strategy_lora_mul": (self.mul, "no,"),
            "strategy_lora_add": (self.add, "no,no"),
        }


class LoraConvolution(LoraLayer):
    """The LoRA delta of a convolution: one with `rank` channels, then one with a kernel of one tap."""

    def update(self, x, lora_a, lora_b):
        x = self.lora_dropout(cast(x, self.compute_dtype))
        return self.lora_b_matmul(self.lora_a_matmul(x, lora_a), lora_b)

    def rows(self, out):
        return out

    def channels(self, vector):
        return ops.reshape(vector, (1, -1) + (1,) * (self.mindpet_delta_lora_b.ndim - 2))

    def as_matrix(self, weight):
        return ops.reshape(weight, (weight.shape[0], -1))

    def magnitude_shape(self):
        return (1, self.out_channels) + (1,) * AXES[self.kind.name]

    def shapes(self, cell, weight):
        """`(rank, in / groups, *kernel)` and `(out, rank / groups, 1, ...)`."""
        axes = AXES[self.kind.name]
        taps = (1,) * axes
        return (self.rank, weight[1], *weight[-axes:]), (weight[0], self.rank // self.kind.groups_of(cell), *taps)

    def make_operators(self, cell):
        name = self.kind.name
        return convolution_like(cell, name, self.rank), pointwise_like(cell, name, self.out_channels)

    @property
    def operators(self):
        """The operator behind each slot of `shard()`, of a convolution with the one operator that has strategies."""
        if not isinstance(self.lora_a_matmul, ops.Conv2D):
            return {}
        return {
            "strategy_lora_dropout": (self.lora_dropout.dropout, "nihw"),
            "strategy_lora_a_matmul": (self.lora_a_matmul, "nihw,rikl"),
            "strategy_lora_b_matmul": (self.lora_b_matmul, "nrhw,orkl"),
            "strategy_lora_bias_add": (self.bias_add, "nohw,o"),
            "strategy_lora_mul": (self.mul, "nohw,"),
            "strategy_lora_add": (self.add, "nohw,nohw"),
        }


# Parameter -> keyword of `fold_lora`; a bias is folded into the layer's own.
FOLD = {
    "mindpet_lora_start_a": "start_a",
    "mindpet_lora_start_b": "start_b",
    "mindpet_delta_lora_a": "lora_a",
    "mindpet_delta_lora_b": "lora_b",
    "mindpet_delta_lora_magnitude": "magnitude",
    "mindpet_delta_lora_bias": "bias",
}
LORA_LAYERS = {"linear": LoraLayer, "embedding": LoraEmbedding, **dict.fromkeys(AXES, LoraConvolution)}


def lora_layer(cell, kind, *args, **keywords):
    """The LoraLayer for a layer; see there for the arguments."""
    return LORA_LAYERS[kind.name](cell, kind, *args, **keywords)


def starts_from_weight(init):
    """Whether A and B start from the layer's weight, and are taken off it: PiSSA and OLoRA."""
    return isinstance(init, str) and init.startswith(("pissa", "olora"))


def fold_lora(matrix, lora_a, lora_b, scaling, magnitude=None, group=1, start_a=None, start_b=None):
    """`W + s (B A - B_0 A_0)`, or with DoRA `m (...) / ||...||`; see LoraLayer.

    Args:
        matrix (numpy.ndarray): W as `(out, rest)`, float32.
        lora_a, lora_b (numpy.ndarray): A and B, float32.
        scaling (float): s.
        magnitude (numpy.ndarray): DoRA's m. Default: None.
        group (int): groups of a convolution. Default: 1.
        start_a, start_b (numpy.ndarray): A_0 and B_0. Default: None, for zeros.

    Returns:
        numpy.ndarray, like `matrix`.
    """
    out_channels, rank = lora_b.shape[:2]
    delta = np.matmul(lora_b.reshape(group, out_channels // group, rank), lora_a.reshape(group, rank, -1))
    delta = delta.reshape(matrix.shape)
    if start_a is not None:
        delta = delta - start_b @ start_a
    merged = matrix + np.float32(scaling) * delta
    if magnitude is not None:
        norm = np.linalg.norm(merged, axis=1)
        merged = merged * (magnitude.reshape(-1) / np.where(norm == 0, 1, norm))[:, None]
    return merged

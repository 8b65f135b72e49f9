"""Adapter: a bottleneck that is added to what a frozen layer or block puts out, after it or beside it."""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
from mindspore import nn, ops

from mindpet.delta._base import Delta, DeltaDense, ResidualAdapter, delta_parameter, scale_problems
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from mindpet.layers.activation import ACTIVATIONS, get_activation
from mindpet.layers.linear import Dense, to_rows
from mindpet.network.kinds import ContextKind, linear_layers
from mindpet.utils.hints import ActivationLike, InitLike, Operators, Strategy
from mindpet.utils.layouts import Cut
from mindpet.utils.sharding import apply_strategies, cut_axes
from mindpet.utils.validate import Checker

__all__ = ["AdapterDense", "AdapterLayer", "LowRankAdapterDense", "LowRankAdapterLayer"]


# Form -> kinds of places; what an embedding takes in are no features.
PLACES = {"sequential": ("linear", "embedding", "block"), "parallel": ("linear", "block"), "multi_head": ("context",)}
LEARNED, SCALE = "learned", "mindpet_delta_adapter_scale"  # a scale that trains
UP, UP_BIAS = "mindpet_delta_adapter_up", "mindpet_delta_adapter_up_bias"


@dataclass
class BottleneckConfig(TargetConfig):
    """Bottleneck adapters, Houlsby et al. 2019, arXiv:1902.00751; beside their place: He et al. 2022, arXiv:2110.04366.

    `target_modules` names layers or, by the path of a Cell that has linear layers, blocks: with 'sequential' after each
    attention and each feed-forward block it is Houlsby's adapter, after the feed-forward block alone Pfeiffer's
    (arXiv:2005.00247); with 'parallel' and a scale beside the feed-forward block it is the scaled parallel adapter.
    With 'multi_head' it names attentions that have a `context_source`, see docs/peft.md.

    Args beyond those of PeftConfig and TargetConfig:
        bottleneck_size: features inside. Default: 64.
        non_linearity: activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
        form: 'sequential': computed from what the place puts out; 'parallel': from what it takes in; 'multi_head':
            also, apart for each head of an attention, with as many features inside for each. Default: 'sequential'.
        scale: factor of what is added, or 'learned' for one that trains, and starts as 1. Default: 1.0.
    """

    peft_type, method_name = "ADAPTER", "adapter"
    required = ("bottleneck_size",)

    bottleneck_size: int = 64
    non_linearity: str = "gelu"
    form: str = "sequential"
    scale: Union[float, str] = 1.0

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "bottleneck_size": self.bottleneck_size,
            "non_linearity": self.non_linearity,
            "form": self.form,
            "scale": self.scale,
        }

    def kinds_of_targets(self, kinds: Collection[str]) -> Collection[str]:
        return PLACES[self.form]

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.positive_int(bottleneck_size=self.bottleneck_size)
        check.choice("non_linearity", self.non_linearity, ACTIVATIONS)
        check.choice("form", self.form, PLACES)
        check_scale(check, self.scale)


def check_form(check: Checker, form: Any, scale: Any) -> None:
    """Note what is wrong with the form and the scale of an adapter at a layer."""
    check.choice("form", form, ("sequential", "parallel"))
    check_scale(check, scale)


def check_scale(check: Checker, scale: Any) -> None:
    """Note a scale that is neither a number nor 'learned'."""
    if scale != LEARNED:
        check.nonzero_number(scale=scale)


AdapterConfig = BottleneckConfig  # its name until 1.1


class AdapterLayer(ResidualAdapter):
    """A bottleneck adapter.

    .. math::
        y = h + s \\, (W_{up} non\\_linearity(W_{down} x + b_{down}) + b_{up})

    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, section 2.1; with
    another x and with s He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning",
    arXiv:2110.04366, section 3.3. W_up and both biases start as zeros, so a fresh adapter is the identity.

    Args:
        hidden_size: features of the input and the output.
        bottleneck_size: features inside. Default: 64.
        non_linearity: name of the activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
        param_init_type: type of the parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.
        form: 'sequential' for x = h, or 'parallel'. Default: 'sequential'.
        in_channels: features of x. Default: None, for `hidden_size`.
        scale: s, or 'learned' for one that trains, and starts as 1. Default: 1.0.

    Parameters:
        mindpet_delta_adapter_block.mindpet_delta_adapter_down_sampler: weight `(bottleneck_size, in_channels)`, bias;
        mindpet_delta_adapter_block.mindpet_delta_adapter_up_sampler: weight `(hidden_size, bottleneck_size)`, bias;
        mindpet_delta_adapter_scale `(1,)`, if it is learned.

    Inputs:
        hidden: `(*, hidden_size)`.
        x: `(*, in_channels)`, what the layer or block took in that puts out `hidden`, if `form` is 'parallel'.

    Outputs:
        `(*, hidden_size)`, in the type of `hidden`.

    Raises:
        TypeError: a size is not an int, `non_linearity` not a str, `scale` no number, a type none of the three.
        ValueError: a size below 1, an unknown `non_linearity`, a `scale` of zero.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
        form: str = "sequential",
        in_channels: Optional[int] = None,
        scale: Union[float, str] = 1.0,
    ):
        in_channels = hidden_size if in_channels is None else in_channels
        check = Checker(type(self).__name__)
        check.positive_int(hidden_size=hidden_size, bottleneck_size=bottleneck_size, in_channels=in_channels)
        check.choice("non_linearity", non_linearity, ACTIVATIONS)
        check_form(check, form, scale)
        check.float_type(param_init_type=param_init_type, compute_dtype=compute_dtype)
        check.done()
        super().__init__(hidden_size, param_init_type, compute_dtype)
        self.bottleneck_size = bottleneck_size
        self.non_linearity = non_linearity
        self.form, self.in_channels = form, in_channels
        self.scale, self.scale_mul = scale, None if scale == 1 else ops.Mul()
        if scale == LEARNED:
            self.mindpet_delta_adapter_scale = delta_parameter("ones", (1,), param_init_type, SCALE)
        self.mindpet_delta_adapter_block = nn.SequentialCell(
            OrderedDict(
                mindpet_delta_adapter_down_sampler=Dense(
                    in_channels, bottleneck_size, "xavier_uniform", dtype=param_init_type, compute_dtype=compute_dtype
                ),
                mindpet_delta_adapter_non_linear=get_activation(non_linearity),
                mindpet_delta_adapter_up_sampler=Dense(
                    bottleneck_size, hidden_size, "zeros", dtype=param_init_type, compute_dtype=compute_dtype
                ),
            )
        )

    def bottleneck(self, rows):
        delta = self.mindpet_delta_adapter_block(rows)
        if self.scale == LEARNED:
            return self.scale_mul(delta, ops.cast(self.mindpet_delta_adapter_scale, self.compute_dtype))
        return delta if self.scale == 1 else self.scale_mul(delta, self.scale)

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, and the axes of its inputs; see `mindpet.utils.sharding`."""
        down, non_linearity, up = self.mindpet_delta_adapter_block
        return {
            "strategy_matmul_down_sampler": (down.matmul, "ni,ri" if self.form == "parallel" else "no,ro"),
            "strategy_bias_down_sampler": (down.bias_add, "nr,r"),
            "strategy_non_linearity": (non_linearity, "nr"),
            "strategy_matmul_up_sampler": (up.matmul, "nr,or"),
            "strategy_bias_up_sampler": (up.bias_add, "no,o"),
            "strategy_residual_add": (self.residual_add, "no,no"),
            "strategy_scale_mul": (self.scale_mul, "no,k" if self.scale == LEARNED else "no,"),
        }

    def shard(
        self,
        strategy_matmul_down_sampler: Optional[Strategy] = None,
        strategy_bias_down_sampler: Optional[Strategy] = None,
        strategy_non_linearity: Optional[Strategy] = None,
        strategy_matmul_up_sampler: Optional[Strategy] = None,
        strategy_bias_up_sampler: Optional[Strategy] = None,
        strategy_residual_add: Optional[Strategy] = None,
        strategy_scale_mul: Optional[Strategy] = None,
    ) -> "AdapterLayer":
        """Set the strategies of the operators; None leaves one alone.

        Args:
            strategy_matmul_down_sampler: of the down matmul (transpose_b). Default: None.
            strategy_bias_down_sampler: of the down bias addition. Default: None.
            strategy_non_linearity: of the activation inside. Default: None.
            strategy_matmul_up_sampler: of the up matmul (transpose_b). Default: None.
            strategy_bias_up_sampler: of the up bias addition. Default: None.
            strategy_residual_add: of the residual addition. Default: None.
            strategy_scale_mul: of the product with the scale, `((rows, out), ())`, or `((rows, out), (1,))` if it is
                learned. Default: None.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; LogSoftmax cannot be sharded.
        """
        return apply_strategies(self, locals())

    def extend_repr(self) -> str:
        return (
            f"{super().extend_repr()}, bottleneck_size={self.bottleneck_size}, non_linearity={self.non_linearity}, "
            f"form={self.form}, scale={self.scale}"
        )


class AdapterDelta(Delta):
    """An `AdapterLayer` behind a layer or block, or beside it; also behind its activation.

    Delta arguments:
        bottleneck_size (int), non_linearity, form (str), scale (Union[float, str]): see `AdapterLayer`.
        dtype (mindspore.dtype): of the parameters. Default: float32.
    """

    def setup(self, cell, bottleneck_size, non_linearity, form="sequential", scale=1.0, dtype=ms.float32):
        features, kind = self.kind.out_features(cell), self.kind
        in_channels = kind.in_features(cell) if form == "parallel" else features
        self.mindpet_delta_adapter = AdapterLayer(
            features, bottleneck_size, non_linearity, dtype, kind.compute_dtype, form, in_channels, scale
        )

    @classmethod
    def problems(cls, cell: nn.Cell, kind: Any, is_sharded: bool, scale: Any = 1.0, **others: Any) -> list[str]:
        return [] if scale == LEARNED else scale_problems(scale, kind)

    def after(self, x, out):
        return self.mindpet_delta_adapter(out, x)

    @property
    def operators(self) -> Operators:
        return self.mindpet_delta_adapter.operators


class MultiHeadAdapterLayer(nn.Cell):
    """A bottleneck adapter for each head of an attention, added to what the heads put out.

    .. math::
        c_i \\mapsto c_i + s \\, (non\\_linearity(x W_{down}^i + b_{down}^i) W_{up}^i + b_{up}^i)

    Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366,
    section 3.3, the multi-head parallel adapter. W_up and both biases start as zeros, so a fresh one is the identity.

    Args:
        hidden_size: features of x, the attention's input.
        heads: query heads.
        head_dim: features of a head.
        bottleneck_size: features inside, for each head. Default: 64.
        non_linearity: name of the activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
        scale: s, or 'learned' for one that trains, and starts as 1. Default: 1.0.
        param_init_type: type of the parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.

    Parameters:
        mindpet_delta_adapter_down: weight `(heads * bottleneck_size, hidden_size)`, bias; mindpet_delta_adapter_up
        `(1, heads, bottleneck_size, head_dim)`; mindpet_delta_adapter_up_bias `(heads, 1, head_dim)`;
        mindpet_delta_adapter_scale `(1,)`, if it is learned.

    Inputs:
        hidden: x, `(batch, seq, hidden_size)`.
        query: of no effect, `(batch, heads, seq, head_dim)`.
        context: what the heads put out, `(batch, heads, seq, head_dim)`.

    Outputs:
        `(batch, heads, seq, head_dim)`, in the type of `context`.

    Raises:
        TypeError, ValueError: an argument is wrong, see `AdapterLayer`.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_dim: int,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        scale: Union[float, str] = 1.0,
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(hidden_size=hidden_size, heads=heads, head_dim=head_dim, bottleneck_size=bottleneck_size)
        check.choice("non_linearity", non_linearity, ACTIVATIONS)
        check_scale(check, scale)
        check.float_type(param_init_type=param_init_type, compute_dtype=compute_dtype)
        check.done()
        super().__init__()
        self.heads, self.bottleneck_size, self.compute_dtype = heads, bottleneck_size, compute_dtype
        self.mindpet_delta_adapter_down = Dense(
            hidden_size, heads * bottleneck_size, "xavier_uniform", dtype=param_init_type, compute_dtype=compute_dtype
        )
        self.mindpet_delta_adapter_non_linear = get_activation(non_linearity)
        shape = (1, heads, bottleneck_size, head_dim)
        self.mindpet_delta_adapter_up = delta_parameter("zeros", shape, param_init_type, UP)
        self.mindpet_delta_adapter_up_bias = delta_parameter("zeros", (heads, 1, head_dim), param_init_type, UP_BIAS)
        self.scale = scale
        if scale == LEARNED:
            self.mindpet_delta_adapter_scale = delta_parameter("ones", (1,), param_init_type, SCALE)
        self.heads_first, self.tile = ops.Transpose(), ops.Tile()
        self.up_matmul, self.bias_add, self.scale_mul = ops.BatchMatMul(), ops.Add(), ops.Mul()
        self.residual_add = ops.Add()

    def construct(self, hidden, query, context):
        batch, seq = hidden.shape[0], hidden.shape[1]
        inner = self.mindpet_delta_adapter_down(ops.cast(to_rows(hidden), self.compute_dtype))
        inner = self.heads_first(ops.reshape(inner, (batch, seq, self.heads, self.bottleneck_size)), (0, 2, 1, 3))
        up = self.tile(ops.cast(self.mindpet_delta_adapter_up, self.compute_dtype), (batch, 1, 1, 1))
        delta = self.up_matmul(self.mindpet_delta_adapter_non_linear(inner), up)
        delta = self.bias_add(delta, ops.cast(self.mindpet_delta_adapter_up_bias, self.compute_dtype))
        factor = self.scale
        if factor == LEARNED:
            factor = ops.cast(self.mindpet_delta_adapter_scale, self.compute_dtype)
        return self.residual_add(context, ops.cast(self.scale_mul(delta, factor), context.dtype))

    def shard(self, batch: Cut, heads: Cut) -> "MultiHeadAdapterLayer":
        """Cut the result over the batch and the heads.

        Args:
            batch: slices of the batch, or a cut of a Layout.
            heads: the same of the heads.

        Returns:
            Itself.
        """
        return apply_strategies(self, cut_axes(self, {"n": batch, "o": heads}))

    @property
    def operators(self) -> Operators:
        """The operator behind each slot, and the axes of its inputs; see `mindpet.utils.sharding`."""
        down = self.mindpet_delta_adapter_down
        return {
            "strategy_matmul_down_sampler": (down.matmul, "ni,oi"),
            "strategy_bias_down_sampler": (down.bias_add, "no,o"),
            "strategy_heads_first": (self.heads_first, "nkor"),
            "strategy_non_linearity": (self.mindpet_delta_adapter_non_linear, "nokr"),
            "strategy_tile": (self.tile, "nork"),
            "strategy_matmul_up_sampler": (self.up_matmul, "nokr,nork"),
            "strategy_bias_up_sampler": (self.bias_add, "nokl,okl"),
            "strategy_scale_mul": (self.scale_mul, "nokl,k" if self.scale == LEARNED else "nokl,"),
            "strategy_residual_add": (self.residual_add, "nokl,nokl"),
        }

    def extend_repr(self) -> str:
        return f"heads={self.heads}, bottleneck_size={self.bottleneck_size}, scale={self.scale}"


class MultiHeadAdapterDelta(MultiHeadAdapterLayer, Delta):
    """A `MultiHeadAdapterLayer` that an attention calls as its attribute `context_source`.

    Delta arguments:
        bottleneck_size (int), non_linearity (str), scale (Union[float, str]): see there.
        form (str): 'multi_head'.
    """

    @classmethod
    def create(
        cls,
        cell: nn.Cell,
        kind: ContextKind,
        bottleneck_size: int,
        non_linearity: str,
        form: str,
        scale: Union[float, str],
    ) -> "MultiHeadAdapterDelta":
        (first, layer), *_ = linear_layers(cell)
        return cls(
            layer.in_features(first),
            kind.heads,
            kind.head_dim,
            bottleneck_size,
            non_linearity,
            scale,
            compute_dtype=layer.compute_dtype,
        )

    @classmethod
    def problems(cls, cell: nn.Cell, kind: Any, is_sharded: bool, scale: Any = 1.0, **others: Any) -> list[str]:
        layers = linear_layers(cell)
        if not layers:
            return ["there is no linear layer in it that tells the features of its input"]
        return [] if scale == LEARNED else scale_problems(scale, layers[0][1])


class AdapterDense(DeltaDense, AdapterDelta):
    """A Dense layer followed by an adapter, or with one beside it.

    .. math::
        y = AdapterLayer(activation(x W^T + b), x)

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; He et al. 2022, arXiv:2110.04366, for the parallel form
    and the scale, see `AdapterLayer`. A fresh AdapterDense computes what the Dense layer
    computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        weight_init: of the weight W. Default: 'normal'.
        bias_init: of the bias b. Default: 'zeros'.
        has_bias: whether there is a bias. Default: True.
        activation: applied before the adapter. Default: None.
        bottleneck_size: features inside the adapter. Default: 64.
        non_linearity: name of the activation inside the adapter. Default: 'gelu'.
        param_init_type: type of the adapter's parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.
        form: 'sequential': after the layer; 'parallel': beside it. Default: 'sequential'.
        scale: factor of what the adapter adds, or 'learned'. Default: 1.0.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, and mindpet_delta_adapter, an `AdapterLayer`.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.

    Raises:
        TypeError: a size is not an int, `has_bias` not a bool, `non_linearity` not a str, a type none of the three, an
            initialiser or `activation` none of its types.
        ValueError: a size below 1, an unknown `non_linearity`, an initialiser of the wrong shape or an unknown name.
        KeyError: the name of `activation` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: InitLike = "normal",
        bias_init: InitLike = "zeros",
        has_bias: bool = True,
        activation: ActivationLike = None,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
        form: str = "sequential",
        scale: Union[float, str] = 1.0,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(bottleneck_size=bottleneck_size)
        check.choice("non_linearity", non_linearity, ACTIVATIONS)
        check_form(check, form, scale)
        super().__init__(
            in_channels,
            out_channels,
            weight_init,
            bias_init,
            has_bias,
            activation,
            param_init_type,
            compute_dtype,
            check,
            bottleneck_size=bottleneck_size,
            non_linearity=non_linearity,
            form=form,
            scale=scale,
        )
        self.bottleneck_size = bottleneck_size
        self.non_linearity = non_linearity

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, and the axes of its inputs; see `mindpet.utils.sharding`."""
        return {
            "strategy_matmul_org": (self.matmul, "ni,oi"),
            "strategy_bias_org": (self.bias_add if self.has_bias else None, "no,o"),
            "strategy_activation_org": (self.activation, "no"),
            **self.mindpet_delta_adapter.operators,
        }

    def shard(
        self,
        strategy_matmul_org: Optional[Strategy] = None,
        strategy_bias_org: Optional[Strategy] = None,
        strategy_activation_org: Optional[Strategy] = None,
        strategy_matmul_down_sampler: Optional[Strategy] = None,
        strategy_bias_down_sampler: Optional[Strategy] = None,
        strategy_non_linearity: Optional[Strategy] = None,
        strategy_matmul_up_sampler: Optional[Strategy] = None,
        strategy_bias_up_sampler: Optional[Strategy] = None,
        strategy_residual_add: Optional[Strategy] = None,
        strategy_scale_mul: Optional[Strategy] = None,
    ) -> "AdapterDense":
        """Set the strategies of the operators; None leaves one alone.

        Args:
            strategy_matmul_org: of the base matmul (transpose_b). Default: None.
            strategy_bias_org: of the base bias addition. Default: None.
            strategy_activation_org: of the base activation. Default: None.
            strategy_matmul_down_sampler, strategy_bias_down_sampler, strategy_non_linearity,
                strategy_matmul_up_sampler, strategy_bias_up_sampler, strategy_residual_add, strategy_scale_mul: of the
                adapter, see `AdapterLayer.shard`. Default: None.

        Returns:
            AdapterDense, itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; LogSoftmax cannot be sharded.
        """
        return apply_strategies(self, locals())


METHOD = Method(
    "adapter",
    BottleneckConfig,
    ("*mindpet_delta_adapter*",),
    {
        "linear": AdapterDelta,
        "embedding": AdapterDelta,
        "block": AdapterDelta,
        "context": MultiHeadAdapterDelta,
    },
    (AdapterDense, AdapterLayer, MultiHeadAdapterLayer),
    identity=True,
)

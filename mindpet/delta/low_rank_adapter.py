"""Low-rank adapter: an adapter whose two matrices are low-rank products, after a frozen Dense layer."""

from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import Initializer

from mindpet.delta._base import Delta, DeltaDense, ResidualAdapter, delta_parameter, out_features
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.layers.activation import ACTIVATIONS, get_activation
from mindpet.utils.hints import ActivationLike, InitLike, Operators, Strategy
from mindpet.utils.sharding import apply_strategies
from mindpet.utils.validate import Checker, is_int


@dataclass
class LowRankAdapterConfig(TargetConfig):
    """Low-rank adapters, Mahabadi et al. 2021, arXiv:2106.04647, section 3.

    Args beyond those of PeftConfig and TargetConfig:
        reduction_factor: by how much the inner size is smaller than the features. Default: 32.
        low_rank_size: rank of both products. Default: 1.
        non_linearity: activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
    """

    peft_type, method_name = "LOW_RANK_ADAPTER", "low_rank_adapter"
    required = ("reduction_factor", "low_rank_size")

    reduction_factor: int = 32
    low_rank_size: int = 1
    non_linearity: str = "gelu"

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "reduction_factor": self.reduction_factor,
            "low_rank_size": self.low_rank_size,
            "non_linearity": self.non_linearity,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.positive_int(reduction_factor=self.reduction_factor, low_rank_size=self.low_rank_size)
        check.choice("non_linearity", self.non_linearity, ACTIVATIONS)


class LowRankLinear(nn.Cell):
    """`x (L R) + b` on rows of the compute type.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        rank: columns of L and rows of R.
        weight_init: of L and R.
        param_init_type: type of the parameters.
        compute_dtype: type of the computation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        weight_init: Union[str, Initializer],
        param_init_type: ms.Type,
        compute_dtype: ms.Type,
    ):
        super().__init__()
        self.compute_dtype = compute_dtype
        self.mindpet_delta_low_rank_adapter_weight_left = delta_parameter(
            weight_init, [in_channels, rank], param_init_type, "mindpet_delta_low_rank_adapter_weight_left"
        )
        self.mindpet_delta_low_rank_adapter_weight_right = delta_parameter(
            weight_init, [rank, out_channels], param_init_type, "mindpet_delta_low_rank_adapter_weight_right"
        )
        self.bias = delta_parameter("zeros", [out_channels], param_init_type, "bias")
        self.matmul_weight = ops.MatMul()
        self.matmul_input = ops.MatMul()
        self.bias_add = ops.BiasAdd()

    def construct(self, rows):
        left = ops.cast(self.mindpet_delta_low_rank_adapter_weight_left, self.compute_dtype)
        right = ops.cast(self.mindpet_delta_low_rank_adapter_weight_right, self.compute_dtype)
        out = self.matmul_input(rows, self.matmul_weight(left, right))
        return self.bias_add(out, ops.cast(self.bias, self.compute_dtype))


class LowRankAdapterLayer(ResidualAdapter):
    """A low-rank adapter.

    .. math::
        y = h + non\\_linearity(h W_{down} + b_{down}) W_{up} + b_{up},\\quad
        W_{down} = L_{down} R_{down},\\ W_{up} = L_{up} R_{up}

    Source: Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647,
    section 3 (the low-rank adapter it is compared with). The inner size is `hidden_size // reduction_factor`. All four
    matrices start by `low_rank_w_init`, so a fresh layer is not the identity.

    Args:
        hidden_size: features of the input and the output.
        reduction_factor: by how much the inner size is smaller; at most `hidden_size`. Default: 1.
        low_rank_size: rank of both products. Default: 1.
        low_rank_w_init: of the four matrices. Default: 'xavier_uniform'.
        non_linearity: name of the activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
        param_init_type: type of the parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.

    Parameters:
        In mindpet_delta_low_rank_adapter_down_sampler and ..._up_sampler each:
        mindpet_delta_low_rank_adapter_weight_left `(in, rank)`, mindpet_delta_low_rank_adapter_weight_right
        `(rank, out)`, bias `(out,)`.

    Inputs:
        hidden: `(*, hidden_size)`.

    Outputs:
        `(*, hidden_size)`, in the type of `hidden`.

    Raises:
        TypeError: a size is not an int, `low_rank_w_init` neither str nor Initializer, `non_linearity` not a str, a
            type none of the three.
        ValueError: a size below 1, `reduction_factor` above `hidden_size`, an unknown name.
    """

    def __init__(
        self,
        hidden_size: int,
        reduction_factor: int = 1,
        low_rank_size: int = 1,
        low_rank_w_init: Union[str, Initializer] = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(hidden_size=hidden_size)
        check_bottleneck(check, hidden_size, reduction_factor, low_rank_size, low_rank_w_init, non_linearity)
        check.float_type(param_init_type=param_init_type, compute_dtype=compute_dtype)
        check.done()
        super().__init__(hidden_size, param_init_type, compute_dtype)
        self.reduction_factor = reduction_factor
        self.low_rank_size = low_rank_size
        self.low_rank_w_init = low_rank_w_init
        self.non_linearity = non_linearity
        self.bottleneck_size = hidden_size // reduction_factor
        self.mindpet_delta_low_rank_adapter_down_sampler = LowRankLinear(
            hidden_size, self.bottleneck_size, low_rank_size, low_rank_w_init, param_init_type, compute_dtype
        )
        self.mindpet_delta_low_rank_adapter_non_linear = get_activation(non_linearity)
        self.mindpet_delta_low_rank_adapter_up_sampler = LowRankLinear(
            self.bottleneck_size, hidden_size, low_rank_size, low_rank_w_init, param_init_type, compute_dtype
        )

    def bottleneck(self, rows):
        inner = self.mindpet_delta_low_rank_adapter_down_sampler(rows)
        return self.mindpet_delta_low_rank_adapter_up_sampler(self.mindpet_delta_low_rank_adapter_non_linear(inner))

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, and the axes of its inputs; see `mindpet.utils.sharding`."""
        down = self.mindpet_delta_low_rank_adapter_down_sampler
        up = self.mindpet_delta_low_rank_adapter_up_sampler
        return {
            "strategy_matmul_down_sampler_weight": (down.matmul_weight, "fk,kr"),
            "strategy_matmul_down_sampler_input": (down.matmul_input, "no,or"),
            "strategy_bias_down_sampler": (down.bias_add, "nr,r"),
            "strategy_non_linearity": (self.mindpet_delta_low_rank_adapter_non_linear, "nr"),
            "strategy_matmul_up_sampler_weight": (up.matmul_weight, "rk,kf"),
            "strategy_matmul_up_sampler_input": (up.matmul_input, "nr,ro"),
            "strategy_bias_up_sampler": (up.bias_add, "no,o"),
            "strategy_residual_add": (self.residual_add, "no,no"),
        }

    def shard(
        self,
        strategy_matmul_down_sampler_weight: Optional[Strategy] = None,
        strategy_matmul_down_sampler_input: Optional[Strategy] = None,
        strategy_bias_down_sampler: Optional[Strategy] = None,
        strategy_non_linearity: Optional[Strategy] = None,
        strategy_matmul_up_sampler_weight: Optional[Strategy] = None,
        strategy_matmul_up_sampler_input: Optional[Strategy] = None,
        strategy_bias_up_sampler: Optional[Strategy] = None,
        strategy_residual_add: Optional[Strategy] = None,
    ) -> "LowRankAdapterLayer":
        """Set the strategies of the operators; None leaves one alone.

        Args:
            strategy_matmul_down_sampler_weight: of the product of the down matrices. Default: None.
            strategy_matmul_down_sampler_input: of the down matmul. Default: None.
            strategy_bias_down_sampler: of the down bias addition. Default: None.
            strategy_non_linearity: of the activation inside. Default: None.
            strategy_matmul_up_sampler_weight: of the product of the up matrices. Default: None.
            strategy_matmul_up_sampler_input: of the up matmul. Default: None.
            strategy_bias_up_sampler: of the up bias addition. Default: None.
            strategy_residual_add: of the residual addition. Default: None.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; LogSoftmax cannot be sharded.
        """
        return apply_strategies(self, locals())

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, reduction_factor={self.reduction_factor}, low_rank_size={self.low_rank_size}"


class LowRankAdapterDelta(Delta):
    """A `LowRankAdapterLayer` behind a layer, also behind its activation.

    Delta arguments:
        reduction_factor, low_rank_size (int), non_linearity (str): see `LowRankAdapterLayer`.
        low_rank_w_init (Union[str, Initializer]): see `LowRankAdapterLayer`. Default: 'xavier_uniform'.
        dtype (mindspore.dtype): of the parameters. Default: float32.
    """

    def setup(
        self,
        cell,
        reduction_factor,
        low_rank_size,
        non_linearity,
        low_rank_w_init="xavier_uniform",
        dtype=ms.float32,
    ):
        self.mindpet_delta_low_rank_adapter = LowRankAdapterLayer(
            out_features(cell, self.kind),
            reduction_factor,
            low_rank_size,
            low_rank_w_init,
            non_linearity,
            dtype,
            self.kind.compute_dtype,
        )

    def after(self, x, out):
        return self.mindpet_delta_low_rank_adapter(out)

    @property
    def operators(self) -> Operators:
        return self.mindpet_delta_low_rank_adapter.operators


class LowRankAdapterDense(DeltaDense, LowRankAdapterDelta):
    """A Dense layer followed by a low-rank adapter.

    .. math::
        y = LowRankAdapterLayer(activation(x W^T + b))

    Source: Mahabadi et al. 2021, arXiv:2106.04647, section 3.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        weight_init: of the weight W. Default: 'normal'.
        bias_init: of the bias b. Default: 'zeros'.
        has_bias: whether there is a bias. Default: True.
        activation: applied before the adapter. Default: None.
        reduction_factor: by how much the adapter's inner size is smaller than `out_channels`. Default: 1.
        low_rank_size: rank of the adapter's products. Default: 1.
        low_rank_w_init: of the adapter's matrices. Default: 'xavier_uniform'.
        non_linearity: name of the activation inside the adapter. Default: 'gelu'.
        param_init_type: type of the adapter's parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, and mindpet_delta_low_rank_adapter, a
        `LowRankAdapterLayer`.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.

    Raises:
        TypeError: a size is not an int, `has_bias` not a bool, `low_rank_w_init` neither str nor Initializer,
            `non_linearity` not a str, a type none of the three, an initialiser or `activation` none of its types.
        ValueError: a size below 1, `reduction_factor` above `out_channels`, an initialiser of the wrong shape, an
            unknown name.
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
        reduction_factor: int = 1,
        low_rank_size: int = 1,
        low_rank_w_init: Union[str, Initializer] = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
    ):
        check = Checker(type(self).__name__)
        check_bottleneck(check, out_channels, reduction_factor, low_rank_size, low_rank_w_init, non_linearity)
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
            reduction_factor=reduction_factor,
            low_rank_size=low_rank_size,
            non_linearity=non_linearity,
            low_rank_w_init=low_rank_w_init,
        )
        self.reduction_factor = reduction_factor
        self.low_rank_size = low_rank_size
        self.low_rank_w_init = low_rank_w_init
        self.non_linearity = non_linearity

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, and the axes of its inputs; see `mindpet.utils.sharding`."""
        return {
            "strategy_matmul_org": (self.matmul, "ni,oi"),
            "strategy_bias_org": (self.bias_add if self.has_bias else None, "no,o"),
            "strategy_activation_org": (self.activation, "no"),
            **self.mindpet_delta_low_rank_adapter.operators,
        }

    def shard(
        self,
        strategy_matmul_org: Optional[Strategy] = None,
        strategy_bias_org: Optional[Strategy] = None,
        strategy_activation_org: Optional[Strategy] = None,
        strategy_matmul_down_sampler_weight: Optional[Strategy] = None,
        strategy_matmul_down_sampler_input: Optional[Strategy] = None,
        strategy_bias_down_sampler: Optional[Strategy] = None,
        strategy_non_linearity: Optional[Strategy] = None,
        strategy_matmul_up_sampler_weight: Optional[Strategy] = None,
        strategy_matmul_up_sampler_input: Optional[Strategy] = None,
        strategy_bias_up_sampler: Optional[Strategy] = None,
        strategy_residual_add: Optional[Strategy] = None,
    ) -> "LowRankAdapterDense":
        """Set the strategies of the operators; None leaves one alone.

        Args:
            strategy_matmul_org: of the base matmul (transpose_b). Default: None.
            strategy_bias_org: of the base bias addition. Default: None.
            strategy_activation_org: of the base activation. Default: None.
            strategy_matmul_down_sampler_weight, strategy_matmul_down_sampler_input, strategy_bias_down_sampler,
                strategy_non_linearity, strategy_matmul_up_sampler_weight, strategy_matmul_up_sampler_input,
                strategy_bias_up_sampler, strategy_residual_add: of the adapter, see `LowRankAdapterLayer.shard`.
                Default: None.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; LogSoftmax cannot be sharded.
        """
        return apply_strategies(self, locals())


def check_bottleneck(
    check: Checker,
    hidden_size: Any,
    reduction_factor: Any,
    low_rank_size: Any,
    low_rank_w_init: Any,
    non_linearity: Any,
) -> None:
    """Check what LowRankAdapterLayer and LowRankAdapterDense have in common."""
    check.positive_int(reduction_factor=reduction_factor, low_rank_size=low_rank_size)
    if is_int(hidden_size) and is_int(reduction_factor):
        check.require(
            reduction_factor <= max(hidden_size, 1),
            ValueError,
            "reduction_factor",
            reduction_factor,
            f"at most the hidden size, {hidden_size}",
        )
    check.initial("low_rank_w_init", low_rank_w_init, (), types=(str, Initializer))
    check.choice("non_linearity", non_linearity, ACTIVATIONS)


METHOD = Method(
    "low_rank_adapter",
    LowRankAdapterConfig,
    ("*mindpet_delta_low_rank_adapter*",),
    {"linear": LowRankAdapterDelta, "embedding": LowRankAdapterDelta},
    (LowRankAdapterDense, LowRankAdapterLayer),
)

"""Adapter: a bottleneck with a residual, after a frozen Dense layer."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Optional

import mindspore as ms
from mindspore import nn

from mindpet.delta._base import Delta, DeltaDense, ResidualAdapter, out_features
from mindpet.delta._config import TargetConfig
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from mindpet.layers.activation import ACTIVATIONS, get_activation
from mindpet.layers.linear import Dense
from mindpet.utils.hints import ActivationLike, InitLike, Operators, Strategy
from mindpet.utils.sharding import apply_strategies
from mindpet.utils.validate import Checker

__all__ = ["AdapterDense", "AdapterLayer", "LowRankAdapterDense", "LowRankAdapterLayer"]


@dataclass
class BottleneckConfig(TargetConfig):
    """Bottleneck adapters, Houlsby et al. 2019, arXiv:1902.00751.

    Args beyond those of PeftConfig and TargetConfig:
        bottleneck_size: features inside. Default: 64.
        non_linearity: activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
    """

    peft_type, method_name = "ADAPTER", "adapter"
    required = ("bottleneck_size",)

    bottleneck_size: int = 64
    non_linearity: str = "gelu"

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {"bottleneck_size": self.bottleneck_size, "non_linearity": self.non_linearity}

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.positive_int(bottleneck_size=self.bottleneck_size)
        check.choice("non_linearity", self.non_linearity, ACTIVATIONS)


AdapterConfig = BottleneckConfig  # its name until 1.1


class AdapterLayer(ResidualAdapter):
    """A bottleneck adapter.

    .. math::
        y = h + W_{up} non\\_linearity(W_{down} h + b_{down}) + b_{up}

    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, section 2.1.
    W_up and both biases start as zeros, so a fresh adapter is the identity.

    Args:
        hidden_size: features of the input and the output.
        bottleneck_size: features inside. Default: 64.
        non_linearity: name of the activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
        param_init_type: type of the parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.

    Parameters:
        mindpet_delta_adapter_block.mindpet_delta_adapter_down_sampler: weight `(bottleneck_size, hidden_size)`, bias;
        mindpet_delta_adapter_block.mindpet_delta_adapter_up_sampler: weight `(hidden_size, bottleneck_size)`, bias.

    Inputs:
        hidden: `(*, hidden_size)`.

    Outputs:
        `(*, hidden_size)`, in the type of `hidden`.

    Raises:
        TypeError: a size is not an int, `non_linearity` not a str, a type none of the three.
        ValueError: a size below 1, an unknown `non_linearity`.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(hidden_size=hidden_size, bottleneck_size=bottleneck_size)
        check.choice("non_linearity", non_linearity, ACTIVATIONS)
        check.float_type(param_init_type=param_init_type, compute_dtype=compute_dtype)
        check.done()
        super().__init__(hidden_size, param_init_type, compute_dtype)
        self.bottleneck_size = bottleneck_size
        self.non_linearity = non_linearity
        self.mindpet_delta_adapter_block = nn.SequentialCell(
            OrderedDict(
                mindpet_delta_adapter_down_sampler=Dense(
                    hidden_size, bottleneck_size, "xavier_uniform", dtype=param_init_type, compute_dtype=compute_dtype
                ),
                mindpet_delta_adapter_non_linear=get_activation(non_linearity),
                mindpet_delta_adapter_up_sampler=Dense(
                    bottleneck_size, hidden_size, "zeros", dtype=param_init_type, compute_dtype=compute_dtype
                ),
            )
        )

    def bottleneck(self, rows):
        return self.mindpet_delta_adapter_block(rows)

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, and the axes of its inputs; see `mindpet.utils.sharding`."""
        down, non_linearity, up = self.mindpet_delta_adapter_block
        return {
            "strategy_matmul_down_sampler": (down.matmul, "no,ro"),
            "strategy_bias_down_sampler": (down.bias_add, "nr,r"),
            "strategy_non_linearity": (non_linearity, "nr"),
            "strategy_matmul_up_sampler": (up.matmul, "nr,or"),
            "strategy_bias_up_sampler": (up.bias_add, "no,o"),
            "strategy_residual_add": (self.residual_add, "no,no"),
        }

    def shard(
        self,
        strategy_matmul_down_sampler: Optional[Strategy] = None,
        strategy_bias_down_sampler: Optional[Strategy] = None,
        strategy_non_linearity: Optional[Strategy] = None,
        strategy_matmul_up_sampler: Optional[Strategy] = None,
        strategy_bias_up_sampler: Optional[Strategy] = None,
        strategy_residual_add: Optional[Strategy] = None,
    ) -> "AdapterLayer":
        """Set the strategies of the operators; None leaves one alone.

        Args:
            strategy_matmul_down_sampler: of the down matmul (transpose_b). Default: None.
            strategy_bias_down_sampler: of the down bias addition. Default: None.
            strategy_non_linearity: of the activation inside. Default: None.
            strategy_matmul_up_sampler: of the up matmul (transpose_b). Default: None.
            strategy_bias_up_sampler: of the up bias addition. Default: None.
            strategy_residual_add: of the residual addition. Default: None.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; LogSoftmax cannot be sharded.
        """
        return apply_strategies(self, locals())

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, bottleneck_size={self.bottleneck_size}, non_linearity={self.non_linearity}"


class AdapterDelta(Delta):
    """An `AdapterLayer` behind a layer, also behind its activation.

    Delta arguments:
        bottleneck_size (int), non_linearity (str): see `AdapterLayer`.
        dtype (mindspore.dtype): of the parameters. Default: float32.
    """

    def setup(self, cell, bottleneck_size, non_linearity, dtype=ms.float32):
        features = out_features(cell, self.kind)
        self.mindpet_delta_adapter = AdapterLayer(
            features, bottleneck_size, non_linearity, dtype, self.kind.compute_dtype
        )

    def after(self, x, out):
        return self.mindpet_delta_adapter(out)

    @property
    def operators(self) -> Operators:
        return self.mindpet_delta_adapter.operators


class AdapterDense(DeltaDense, AdapterDelta):
    """A Dense layer followed by an adapter.

    .. math::
        y = AdapterLayer(activation(x W^T + b))

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1. A fresh AdapterDense computes what the Dense layer
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
    ):
        check = Checker(type(self).__name__)
        check.positive_int(bottleneck_size=bottleneck_size)
        check.choice("non_linearity", non_linearity, ACTIVATIONS)
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
    ) -> "AdapterDense":
        """Set the strategies of the operators; None leaves one alone.

        Args:
            strategy_matmul_org: of the base matmul (transpose_b). Default: None.
            strategy_bias_org: of the base bias addition. Default: None.
            strategy_activation_org: of the base activation. Default: None.
            strategy_matmul_down_sampler, strategy_bias_down_sampler, strategy_non_linearity,
                strategy_matmul_up_sampler, strategy_bias_up_sampler, strategy_residual_add: of the adapter, see
                `AdapterLayer.shard`. Default: None.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; LogSoftmax cannot be sharded.
        """
        return apply_strategies(self, locals())

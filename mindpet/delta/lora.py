"""LoRA: a low-rank update beside a frozen Dense layer."""

import math

import mindspore as ms
from mindspore import ops
from mindspore.common.initializer import HeUniform

from mindpet.delta._base import DeltaDense, delta_parameter
from mindpet.utils.sharding import apply_strategies
from mindpet.utils.validate import Checker
from mindpet.utils.version_control import get_dropout


class LoRADense(DeltaDense):
    """A Dense layer with a LoRA delta.

    .. math::
        y = activation(x W^T + b + \\frac{lora\\_alpha}{lora\\_rank} dropout(x) A^T B^T)

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3.
    B starts as zeros, so a fresh LoRADense computes what the Dense layer computed.

    Args:
        in_channels (int): features of the input.
        out_channels (int): features of the output.
        lora_rank (int): rank of the update, the rows of A and the columns of B.
        lora_alpha (Union[int, float]): scale of the update, finite and not zero.
        lora_dropout (float): probability in [0, 1) of zeroing an input of the update while training. Default: 0.0.
        lora_a_init (Union[Tensor, str, Initializer, Number]): of A. Default: HeUniform(negative_slope=sqrt(5)).
        lora_b_init (Union[Tensor, str, Initializer, Number]): of B. Default: 'zeros'.
        param_init_type (mindspore.dtype): type of A and B: float16, float32 or bfloat16. Default: float32.
        compute_dtype (mindspore.dtype): type of the computation: float16, float32 or bfloat16. Default: float16.
        weight_init (Union[Tensor, str, Initializer, Number]): of the weight W. Default: 'normal'.
        bias_init (Union[Tensor, str, Initializer, Number]): of the bias b. Default: 'zeros'.
        has_bias (bool): whether there is a bias. Default: True.
        activation (Union[str, Cell, Primitive, None]): applied to the sum. Default: None.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, mindpet_delta_lora_a `(lora_rank, in_channels)`,
        mindpet_delta_lora_b `(out_channels, lora_rank)`.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.

    Raises:
        TypeError: `in_channels`, `out_channels` or `lora_rank` is not an int, `lora_alpha` neither int nor float,
            `lora_dropout` not a float, `has_bias` not a bool, `param_init_type` or `compute_dtype` none of the three
            types, an initialiser or `activation` none of its types.
        ValueError: `in_channels`, `out_channels` or `lora_rank` below 1, `lora_alpha` zero, `lora_dropout` outside
            [0, 1), an initialiser of the wrong shape or with an unknown name.
        KeyError: the name of `activation` is unknown.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        lora_rank,
        lora_alpha,
        lora_dropout=0.0,
        lora_a_init=HeUniform(negative_slope=math.sqrt(5)),
        lora_b_init="zeros",
        param_init_type=ms.float32,
        compute_dtype=ms.float16,
        weight_init="normal",
        bias_init="zeros",
        has_bias=True,
        activation=None,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(lora_rank=lora_rank)
        check.nonzero_number(lora_alpha=lora_alpha)
        check.probability(lora_dropout=lora_dropout)
        check.initial("lora_a_init", lora_a_init, (lora_rank, in_channels))
        check.initial("lora_b_init", lora_b_init, (out_channels, lora_rank))
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
        )
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / lora_rank
        self.lora_dropout = get_dropout(lora_dropout)
        # Stand-alone layers have always carried these names; inside a network the attribute's name is the key.
        self.mindpet_delta_lora_a = delta_parameter(
            lora_a_init, [lora_rank, in_channels], param_init_type, "mindpet_delta_lora_A"
        )
        self.mindpet_delta_lora_b = delta_parameter(
            lora_b_init, [out_channels, lora_rank], param_init_type, "mindpet_delta_lora_B"
        )
        self.lora_a_matmul = ops.MatMul(transpose_b=True)
        self.lora_b_matmul = ops.MatMul(transpose_b=True)
        self.mul = ops.Mul()
        self.add = ops.Add()

    def transform(self, rows):
        lora_a = ops.cast(self.mindpet_delta_lora_a, self.compute_dtype)
        lora_b = ops.cast(self.mindpet_delta_lora_b, self.compute_dtype)
        delta = self.lora_b_matmul(self.lora_a_matmul(self.lora_dropout(rows), lora_a), lora_b)
        return self.activate(self.add(self.linear(rows), self.mul(delta, self.scaling)))

    def merged_weight(self):
        """`W + lora_alpha / lora_rank * B A`, computed in float32, in the type of W."""
        lora_a, lora_b = (ops.cast(p, ms.float32) for p in (self.mindpet_delta_lora_a, self.mindpet_delta_lora_b))
        merged = ops.cast(self.weight, ms.float32) + self.scaling * ops.matmul(lora_b, lora_a)
        return ops.cast(merged, self.weight.dtype)

    @property
    def operators(self):
        """The operator behind each slot of `shard()`, and the axes of its inputs; see `mindpet.utils.sharding`."""
        return {
            "strategy_org_dense_matmul": (self.matmul, "ni,oi"),
            "strategy_org_bias_add": (self.bias_add if self.has_bias else None, "no,o"),
            "strategy_lora_dropout": (self.lora_dropout.dropout, "ni"),
            "strategy_lora_a_matmul": (self.lora_a_matmul, "ni,ri"),
            "strategy_lora_b_matmul": (self.lora_b_matmul, "nr,or"),
            "strategy_lora_mul": (self.mul, "no,"),
            "strategy_lora_add": (self.add, "no,no"),
            "strategy_activation": (self.activation, "no"),
        }

    def shard(
        self,
        strategy_org_dense_matmul=None,
        strategy_org_bias_add=None,
        strategy_lora_dropout=None,
        strategy_lora_a_matmul=None,
        strategy_lora_b_matmul=None,
        strategy_lora_mul=None,
        strategy_lora_add=None,
        strategy_activation=None,
    ):
        """Set the strategies of the operators, each a tuple with one tuple of ints for each input, or None.

        Args:
            strategy_org_dense_matmul (tuple): of the base matmul (transpose_b). Default: None.
            strategy_org_bias_add (tuple): of the bias addition. Default: None.
            strategy_lora_dropout (tuple): of the dropout. Default: None.
            strategy_lora_a_matmul (tuple): of the matmul with A (transpose_b). Default: None.
            strategy_lora_b_matmul (tuple): of the matmul with B (transpose_b). Default: None.
            strategy_lora_mul (tuple): of the scaling; its second input is a scalar. Default: None.
            strategy_lora_add (tuple): of the sum of base and update. Default: None.
            strategy_activation (tuple): of the activation. Default: None.

        Returns:
            LoRADense, itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; LogSoftmax cannot be sharded.
        """
        return apply_strategies(self, locals())

    def extend_repr(self):
        return f"{super().extend_repr()}, lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"

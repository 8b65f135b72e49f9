"""Compacter: an adapter whose two matrices are sums of Kronecker products, of which all layers share one factor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import Normal, Uniform

from mindpet.delta._base import Delta, DeltaDense, ResidualAdapter, delta_parameter, out_features
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.layers.activation import ACTIVATIONS, get_activation
from mindpet.layers.linear import cast
from mindpet.network.kinds import LayerKind
from mindpet.utils.hints import Operators, Shape, Strategy
from mindpet.utils.sharding import apply_strategies
from mindpet.utils.validate import Checker, is_int

LAYER = "mindpet_delta_compacter"
LOCAL_RULE = f"{LAYER}_rule"
RULE = f"{LAYER}.{LOCAL_RULE}"
ENDS, LEAVES = ("down", "up"), ("left", "right", "bias")


@dataclass
class CompacterConfig(TargetConfig):
    """Compacter, Mahabadi et al. 2021, arXiv:2106.04647.

    `target_modules` names layers or, by the path of a Cell that has linear layers, blocks: after the attention and the
    feed-forward block of each layer it is Compacter, after the feed-forward block alone Compacter++.

    Args beyond those of PeftConfig and TargetConfig:
        reduction_factor: by how much the inner size is smaller than the features. Default: 32.
        phm_dim: n, Kronecker products in a sum; it divides the features and the inner size. Default: 4.
        phm_rank: r, rank of their second factors. Default: 1.
        non_linearity: activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
    """

    peft_type, method_name = "COMPACTER", "compacter"
    required = ("reduction_factor", "phm_dim", "phm_rank")

    reduction_factor: int = 32
    phm_dim: int = 4
    phm_rank: int = 1
    non_linearity: str = "gelu"

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "reduction_factor": self.reduction_factor,
            "phm_dim": self.phm_dim,
            "rank": self.phm_rank,
            "non_linearity": self.non_linearity,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check_numbers(check, self.reduction_factor, self.phm_dim, self.phm_rank, self.non_linearity)


class HypercomplexLinear(nn.Cell):
    """`x W + b` on rows of the compute type, W a sum of n Kronecker products, the second factors of low rank.

    .. math::
        W = \\sum_{i=1}^n A_i \\otimes (s_i t_i^T)

    W is never made. The factor on the side with more features is multiplied with all A_i, to a matrix of n n r columns
    there; the other factor works within each of the n parts of the features. So it costs what a product with a matrix
    of n n r columns costs, less than one with W where n n r is below the bottleneck. All operators on the side with
    more features are cut with the features; the factors are whole on each rank, and multiplied in float32.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        dim: n, divides both.
        rank: r, of the second factors.
        is_up: whether it is the second one of an adapter: there the output has more features, and the t_i, and so W,
            start as zeros.
        param_init_type: type of the parameters.
        compute_dtype: type of the computation.

    Parameters:
        left: s_i as `(n, r, in / n)`; right: t_i as `(n, r, out / n)`; bias `(out,)`.

    Inputs:
        rows: `(rows, in)`.
        rule: the A_i, `(n, n, n)`.

    Outputs:
        `(rows, out)`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dim: int,
        rank: int,
        is_up: bool,
        param_init_type: ms.Type,
        compute_dtype: ms.Type,
    ):
        super().__init__()
        self.compute_dtype, self.out_channels, self.is_up = compute_dtype, out_channels, is_up
        self.dim, self.rank = dim, rank
        # With A_i of variance 1 / n, the variance of W is that of Glorot, 2 / (in + out).
        start = Uniform(math.sqrt(3 * math.sqrt(2 / (rank * (in_channels + out_channels)))))
        shapes = [(dim, rank, size // dim) for size in (in_channels, out_channels)]
        self.left = delta_parameter(start, shapes[0], param_init_type, "left")
        self.right = delta_parameter("zeros" if is_up else start, shapes[1], param_init_type, "right")
        self.bias = delta_parameter("zeros", (out_channels,), param_init_type, "bias")
        self.transpose, self.product, self.bias_add = ops.Transpose(), ops.Mul(), ops.BiasAdd()
        self.wide_matmul = ops.MatMul(transpose_b=not is_up)
        self.narrow_matmul = ops.MatMul(transpose_b=is_up)

    def construct(self, rows, rule):
        n, rank = self.dim, self.rank
        narrow, wide = (self.left, self.right) if self.is_up else (self.right, self.left)
        rule, wide = cast(rule, ms.float32), cast(wide, ms.float32)
        if self.is_up:  # (i, rank, part in, part out, in it) -> (part in, i, rank, part out, in it)
            order, rule = (2, 0, 1, 3, 4), ops.reshape(rule, (n, 1, n, n, 1))
            wide = ops.reshape(wide, (n, rank, 1, 1, -1))
        else:  # (i, rank, part in, in it, part out) -> (part out, i, rank, part in, in it)
            order, rule = (4, 0, 1, 2, 3), ops.reshape(rule, (n, 1, n, 1, n))
            wide = ops.reshape(wide, (n, rank, 1, -1, 1))
        # The product first: where a Parameter goes to a Transpose, MindSpore 2.10 adds up no gradients of ranks.
        wide = self.transpose(self.product(rule, wide), order)
        wide = cast(ops.reshape(wide, (n * n * rank, -1)), self.compute_dtype)
        narrow = ops.reshape(cast(narrow, self.compute_dtype), (n * rank, -1))
        if self.is_up:
            inner = self.narrow_matmul(ops.reshape(rows, (-1, narrow.shape[1])), narrow)
            out = self.wide_matmul(ops.reshape(inner, (-1, n * n * rank)), wide)
        else:
            inner = ops.reshape(self.wide_matmul(rows, wide), (-1, n * rank))
            out = ops.reshape(self.narrow_matmul(inner, narrow), (-1, self.out_channels))
        return self.bias_add(out, cast(self.bias, self.compute_dtype))


class CompacterLayer(ResidualAdapter):
    """A Compacter adapter.

    .. math::
        y = h + non\\_linearity(h W_{down} + b_{down}) W_{up} + b_{up},\\quad
        W = \\sum_{i=1}^n A_i \\otimes (s_i t_i^T)

    Source: Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647,
    sections 3 and 4. W_down and W_up have the same A_i, `n x n`, which further layers may share, and s_i and t_i of
    their own. The t_i of W_up and both biases start as zeros, so a fresh layer is the identity; it trains from there,
    since nothing else is zero. (The paper's code begins close to the identity, with A_i of about 1e-4.)

    Args:
        hidden_size: features of the input and the output.
        reduction_factor: by how much the inner size, `hidden_size // reduction_factor`, is smaller. Default: 32.
        phm_dim: n, divides `hidden_size` and the inner size. Default: 4.
        phm_rank: r, columns of s_i and t_i. Default: 1.
        non_linearity: name of the activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
        param_init_type: type of the parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.
        shared: a layer with the same `phm_dim`, to have the A_i of. Default: None, for its own.

    Parameters:
        mindpet_delta_compacter_rule: the A_i, `(n, n, n)`; in mindpet_delta_compacter_down and ..._up each: left
        `(n, r, in / n)`, right `(n, r, out / n)`, bias `(out,)`.

    Inputs:
        hidden: `(*, hidden_size)`.

    Outputs:
        `(*, hidden_size)`, in the type of `hidden`.

    Raises:
        TypeError: a size is not an int, `non_linearity` not a str, a type none of the three, `shared` no such layer.
        ValueError: a size below 1, `phm_dim` does not divide what it must, an unknown name.
    """

    def __init__(
        self,
        hidden_size: int,
        reduction_factor: int = 32,
        phm_dim: int = 4,
        phm_rank: int = 1,
        non_linearity: str = "gelu",
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
        shared: Optional[Union["CompacterLayer", "CompacterDense"]] = None,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(hidden_size=hidden_size)
        check_numbers(check, reduction_factor, phm_dim, phm_rank, non_linearity)
        check_division(check, hidden_size, reduction_factor, phm_dim)
        check_shared(check, shared, phm_dim)
        check.float_type(param_init_type=param_init_type, compute_dtype=compute_dtype)
        check.done()
        super().__init__(hidden_size, param_init_type, compute_dtype)
        self.reduction_factor, self.phm_dim, self.phm_rank = reduction_factor, phm_dim, phm_rank
        self.non_linearity, self.bottleneck_size = non_linearity, hidden_size // reduction_factor
        self.mindpet_delta_compacter_rule = _rule(phm_dim, param_init_type) if shared is None else rule_of(shared)
        types = param_init_type, compute_dtype
        self.mindpet_delta_compacter_down = HypercomplexLinear(
            hidden_size, self.bottleneck_size, phm_dim, phm_rank, False, *types
        )
        self.mindpet_delta_compacter_non_linear = get_activation(non_linearity)
        self.mindpet_delta_compacter_up = HypercomplexLinear(
            self.bottleneck_size, hidden_size, phm_dim, phm_rank, True, *types
        )

    def bottleneck(self, rows):
        rule = self.mindpet_delta_compacter_rule
        inner = self.mindpet_delta_compacter_non_linear(self.mindpet_delta_compacter_down(rows, rule))
        return self.mindpet_delta_compacter_up(inner, rule)

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, and the axes of its inputs; see `mindpet.utils.sharding`."""
        down, up = self.mindpet_delta_compacter_down, self.mindpet_delta_compacter_up
        return {
            "strategy_product_down": (down.product, "fkfkl,fkfkl"),
            "strategy_transpose_down": (down.transpose, "fkfkl"),
            "strategy_matmul_down_wide": (down.wide_matmul, "no,ko"),
            "strategy_matmul_down_narrow": (down.narrow_matmul, "nk,kr"),
            "strategy_bias_down": (down.bias_add, "nr,r"),
            "strategy_non_linearity": (self.mindpet_delta_compacter_non_linear, "nr"),
            "strategy_product_up": (up.product, "fkfkl,fkfkl"),
            "strategy_transpose_up": (up.transpose, "fkfkl"),
            "strategy_matmul_up_narrow": (up.narrow_matmul, "nr,kr"),
            "strategy_matmul_up_wide": (up.wide_matmul, "nk,ko"),
            "strategy_bias_up": (up.bias_add, "no,o"),
            "strategy_residual_add": (self.residual_add, "no,no"),
        }

    def shard(self, **strategies: Optional[Strategy]) -> "CompacterLayer":
        """Set the strategies of the operators; the slots are the keys of `operators`."""
        return apply_strategies(self, strategies)

    def extend_repr(self) -> str:
        return (
            f"{super().extend_repr()}, reduction_factor={self.reduction_factor}, phm_dim={self.phm_dim}, "
            f"phm_rank={self.phm_rank}, non_linearity={self.non_linearity}"
        )


class CompacterDelta(Delta):
    """A `CompacterLayer` behind a layer or block, also behind the activation of a layer.

    Delta arguments:
        reduction_factor, phm_dim, rank (int), non_linearity (str): see `CompacterLayer`, of which `rank` is `phm_rank`.
        shared (dict): the A_i of all layers. Default: None, for those of this one alone.
        dtype (mindspore.dtype): of the parameters. Default: float32.
    """

    file_names = {f"{LAYER}.{LAYER}_{end}.{leaf}": f"compacter_{end}.{leaf}" for end in ENDS for leaf in LEAVES}
    file_names[f"{LAYER}.{LAYER}_non_linear.w"] = "compacter_non_linear.w"  # of 'prelu'
    shared_names = {RULE: "compacter_rule"}

    @classmethod
    def shared(cls, targets: Sequence[Any]) -> dict[str, Any]:
        return {RULE: _rule(targets[0].arguments["phm_dim"], ms.float32)}

    def setup(self, cell, reduction_factor, phm_dim, rank, non_linearity, shared=None, dtype=ms.float32):
        self.mindpet_delta_compacter = CompacterLayer(
            out_features(cell, self.kind),
            reduction_factor,
            phm_dim,
            rank,
            non_linearity,
            dtype,
            self.kind.compute_dtype,
        )
        if shared:
            self.mindpet_delta_compacter.mindpet_delta_compacter_rule = shared[RULE]

    def after(self, x, out):
        return self.mindpet_delta_compacter(out)

    @classmethod
    def problems(
        cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, reduction_factor: int, phm_dim: int, **others: Any
    ) -> list[str]:
        check = Checker(cls.__name__)
        check_division(check, out_features(cell, kind), reduction_factor, phm_dim)
        return [message for _, message in check.problems]

    @classmethod
    def file_shapes(
        cls, shapes: dict[str, Shape], reduction_factor: int, phm_dim: int, rank: int, non_linearity: str
    ) -> dict[str, Shape]:
        hidden = (*shapes.get(f"{LAYER}.{LAYER}_up.bias", ()), "out")[0]
        inner = "inner" if hidden == "out" else hidden // reduction_factor
        parts = {size: size if isinstance(size, str) else size // phm_dim for size in (hidden, inner)}
        wanted = {RULE: (phm_dim,) * 3}
        for end, (ins, outs) in zip(ENDS, ((hidden, inner), (inner, hidden))):
            own = ((phm_dim, rank, parts[ins]), (phm_dim, rank, parts[outs]), (outs,))
            wanted.update({f"{LAYER}.{LAYER}_{end}.{leaf}": shape for leaf, shape in zip(LEAVES, own)})
        if non_linearity == "prelu":
            wanted[f"{LAYER}.{LAYER}_non_linear.w"] = (1,)
        return wanted

    @property
    def operators(self) -> Operators:
        return self.mindpet_delta_compacter.operators


class CompacterDense(DeltaDense, CompacterDelta):
    """A Dense layer followed by a Compacter adapter.

    .. math::
        y = CompacterLayer(activation(x W^T + b))

    Source: Mahabadi et al. 2021, arXiv:2106.04647, sections 3 and 4. A fresh CompacterDense computes what the Dense
    layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        reduction_factor: by how much the adapter's inner size is smaller than `out_channels`. Default: 32.
        phm_dim: n, divides `out_channels` and the inner size. Default: 4.
        phm_rank: r, columns of s_i and t_i. Default: 1.
        non_linearity: name of the activation inside the adapter. Default: 'gelu'.
        shared: a layer with the same `phm_dim`, to have the A_i of. Default: None, for its own.
        dense: keywords of `DeltaDense`.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, and mindpet_delta_compacter, a `CompacterLayer`.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.

    Raises:
        TypeError, ValueError, KeyError: an argument is wrong, see `CompacterLayer` and `LoRADense`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        reduction_factor: int = 32,
        phm_dim: int = 4,
        phm_rank: int = 1,
        non_linearity: str = "gelu",
        shared: Optional[Union[CompacterLayer, "CompacterDense"]] = None,
        **dense: Any,
    ):
        check = Checker(type(self).__name__)
        check_numbers(check, reduction_factor, phm_dim, phm_rank, non_linearity)
        check_division(check, out_channels, reduction_factor, phm_dim)
        check_shared(check, shared, phm_dim)
        super().__init__(
            in_channels,
            out_channels,
            check=check,
            reduction_factor=reduction_factor,
            phm_dim=phm_dim,
            rank=phm_rank,
            non_linearity=non_linearity,
            shared=None if shared is None or check.problems else {RULE: rule_of(shared)},
            **dense,
        )


def check_numbers(check: Checker, reduction_factor: int, phm_dim: int, phm_rank: int, non_linearity: str) -> None:
    """Note what is wrong with the numbers of a Compacter adapter in themselves."""
    check.positive_int(reduction_factor=reduction_factor, phm_dim=phm_dim, phm_rank=phm_rank)
    check.choice("non_linearity", non_linearity, ACTIVATIONS)


def check_division(check: Checker, hidden_size: int, reduction_factor: int, phm_dim: int) -> None:
    """Note a `phm_dim` that does not divide the features, or the inner size."""
    sizes = (hidden_size, reduction_factor, phm_dim)
    if all(is_int(size) and size > 0 for size in sizes):
        inner = hidden_size // reduction_factor
        fits = inner > 0 and not hidden_size % phm_dim and not inner % phm_dim
        rule = f"a divisor of the {hidden_size} features and of the inner size, {inner}"
        check.require(fits, ValueError, "phm_dim", phm_dim, rule)


def check_shared(check: Checker, shared: Any, phm_dim: int) -> None:
    """Note a layer that cannot share its A_i."""
    known = shared is None or isinstance(shared, (CompacterLayer, CompacterDense))
    rule = "a CompacterLayer, a CompacterDense or None"
    if check.require(known, TypeError, "shared", shared, rule) and shared is not None:
        own = rule_of(shared).shape[0]
        check.require(own == phm_dim, ValueError, "shared", own, f"of 'phm_dim' {phm_dim}")


def rule_of(layer: nn.Cell) -> Any:
    """The A_i of a layer that was made by hand."""
    layer = layer.mindpet_delta_compacter if isinstance(layer, CompacterDense) else layer
    return layer.mindpet_delta_compacter_rule


def _rule(dim, dtype):
    """The A_i, `(n, n, n)`; normal, of variance 1 / n."""
    return delta_parameter(Normal(1 / math.sqrt(dim)), (dim, dim, dim), dtype, LOCAL_RULE)


METHOD = Method(
    "compacter",
    CompacterConfig,
    ("*mindpet_delta_compacter*",),
    {"linear": CompacterDelta, "embedding": CompacterDelta, "block": CompacterDelta},
    (CompacterDense, CompacterLayer),
    identity=True,
)

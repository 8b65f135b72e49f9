"""HiRA: a low-rank matrix that multiplies a frozen weight, element by element: linear, embedding or convolution."""

import math
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.common.initializer import HeUniform, Normal

from mindpet.delta._base import Delta, DeltaDense, delta_parameter, matrix_shape
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.errors import ConfigError
from mindpet.layers.convolution import AXES, convolution_like
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.network.match import pattern_value
from mindpet.utils.hints import Arrays, InitLike, Operators, Shape, Strategy
from mindpet.utils.layouts import is_layout
from mindpet.utils.validate import Checker
from mindpet.utils.version_control import get_dropout

A, B = "mindpet_delta_hira_a", "mindpet_delta_hira_b"


@dataclass
class HiraConfig(TargetConfig):
    """HiRA, Huang et al. 2025, ICLR 2025.

    Args beyond those of PeftConfig and TargetConfig:
        r: rank of the matrix that multiplies the weight. Default: 32.
        hira_dropout: probability in [0, 1) of zeroing an input of the update. Default: 0.0.
        fan_in_fan_out: kept for Hugging Face PEFT, see `LoraConfig`. Default: False.
        init_weights: True for Kaiming A and zero B, False for both random, 'gaussian' for a normal A of linear layers;
            None is False, but for embeddings True. Default: True.
        rank_pattern: layer name or regular expression -> another rank. Hugging Face PEFT (0.21) passes over it in the
            first adapter of a model, whose file then does not fit it. Default: {}.
    """

    peft_type, method_name = "HIRA", "hira"

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: Optional[Union[bool, str]] = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    required = ("r",)

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "rank": pattern_value(self.rank_pattern, path, self.r),
            "dropout": float(self.hira_dropout),
            "init": self.init_weights,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.positive_int(r=self.r)
        check.probability((int, float), hira_dropout=self.hira_dropout)
        check.boolean(fan_in_fan_out=self.fan_in_fan_out)
        check_init(check, self.init_weights)


def check_init(check: Checker, init: Any) -> None:
    """Note a value of `init_weights` that is none."""
    known = init is None or isinstance(init, bool) or init == "gaussian"
    check.require(known, ValueError, "init_weights", init, "a bool, 'gaussian' or None")


class HiraDelta(Delta):
    """The HiRA delta of a linear layer.

    .. math::
        y = out + (W \\odot B A)\\, dropout(x)

    The update has the rank of W times that of B A at most, where LoRA's has that of B A. W is the layer's own weight,
    which does not train. An embedding has its table's transpose as W.

    Source: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
    ICLR 2025, section 3.

    Delta arguments:
        rank (int): rows of A.
        dropout (float): probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        init (Union[bool, str, None]): True: A Kaiming uniform and B zero, of an embedding A zero and B normal; False:
            both normal; 'gaussian': True, but of a linear layer A normal with deviation 1 / rank; None: False, of an
            embedding True. Default: True.
        dtype (mindspore.dtype): of the parameters. Default: float32.

    Parameters:
        mindpet_delta_hira_a, mindpet_delta_hira_b: see `shapes` of the class.
    """

    before_activation = True
    file_names = {A: "hira_A", B: "hira_B"}

    def setup(self, cell, rank, dropout=0.0, init=True, dtype=ms.float32):
        self.rank = rank
        shape_a, shape_b = self.shapes(cell)
        init_a, init_b = self.initial_values(init)
        self.mindpet_delta_hira_a = delta_parameter(init_a, shape_a, dtype, A)
        self.mindpet_delta_hira_b = delta_parameter(init_b, shape_b, dtype, B)
        self.hira_dropout = get_dropout(dropout)
        self.hira_mul, self.hira_add = ops.Mul(), ops.Add()
        self.make_operators(cell)

    def after(self, x, out):
        a, b = self.to_compute(self.mindpet_delta_hira_a), self.to_compute(self.mindpet_delta_hira_b)
        rows = self.rows(out)
        return from_rows(self.hira_add(rows, cast(self.update(x, rows, a, b), out.dtype)), out)

    def update(self, x, out, a, b):
        """`(W * B A) dropout(x)`."""
        factors = self.hira_ab_matmul(a, b) if self.kind.transposed else self.hira_ab_matmul(b, a)
        weight = self.hira_mul(self.to_compute(self.kept_weight()), factors)
        return self.hira_matmul(self.hira_dropout(self.to_compute(to_rows(x))), weight)

    def rows(self, out):
        """The output as `(rows, out)`."""
        return to_rows(out)

    def shapes(self, cell: nn.Cell) -> tuple[Shape, Shape]:
        """The shapes of A and B: `(rank, in)` and `(out, rank)`."""
        out_channels, in_channels = matrix_shape(cell, self.kind)
        return (self.rank, in_channels), (out_channels, self.rank)

    def initial_values(self, init: Optional[Union[bool, str]]) -> tuple[InitLike, InitLike]:
        """Initialisers of A and B."""
        if not init:
            return Normal(1.0), Normal(1.0)
        is_normal = init == "gaussian" and not self.kind.is_convolution
        return (Normal(1 / self.rank) if is_normal else HeUniform(negative_slope=math.sqrt(5))), "zeros"

    def make_operators(self, cell: nn.Cell) -> None:
        """Make the operators that multiply A by B and the input by the weight, which is `(out, in)` or `(in, out)`."""
        turned = bool(self.kind.transposed)
        self.keep_weight(cell)
        self.hira_ab_matmul = ops.MatMul(transpose_a=turned, transpose_b=turned)
        self.hira_matmul = ops.MatMul(transpose_b=not turned)

    @classmethod
    def problems(cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, **arguments: Any) -> list[str]:
        return ["no HiRA beside a convolution in groups"] if kind.groups_of(cell) > 1 else []

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, **arguments: Any) -> bool:
        return (len(values[B]), math.prod(values[A].shape[1:])) == (shape[0], math.prod(shape[1:]))

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], rank: int, **others: Any) -> dict[str, tuple]:
        rest = shapes.get(A, ())[1:] or ("in",)
        return {A: (rank, *rest), B: ((*shapes.get(B, ()), "out")[0], rank, *(1,) * (len(rest) - 1))}

    @classmethod
    def fold(cls, matrix: np.ndarray, values: Arrays, **arguments: Any) -> np.ndarray:
        """`W (1 + B A)`, element by element."""
        a, b = values[A], values[B]
        return matrix * (1 + b.reshape(len(b), -1) @ a.reshape(len(a), -1))

    @property
    def operators(self) -> Operators:
        weight, inner = ("io", "ri,or") if self.kind.transposed else ("oi", "or,ri")
        return {
            "strategy_hira_dropout": (self.hira_dropout.dropout, "ni"),
            "strategy_hira_ab_matmul": (self.hira_ab_matmul, inner),
            "strategy_hira_mul": (self.hira_mul, f"{weight},{weight}"),
            "strategy_hira_matmul": (self.hira_matmul, f"ni,{weight}"),
            "strategy_hira_add": (self.hira_add, "no,no"),
        }

    def shard(self, **strategies: Optional[Strategy]) -> "HiraDelta":
        """Set the strategies of the operators, see `Delta.shard`.

        Raises:
            ConfigError: in a network more than one of rows, inputs and outputs is cut, and not by Layouts. For tuples
                MindSpore (2.7 to 2.10) puts the slices of a weight elsewhere for a product of elements than for a
                matmul, and does not compile.
        """
        strategy = strategies.get("strategy_hira_matmul")
        if self.is_patched_in and "strategy_hira_ab_matmul" in strategies and not is_layout(strategy):  # no embedding
            rows, weight = strategy
            if sum(count > 1 for count in (rows[0], *weight)) > 1:
                raise ConfigError(
                    f"no HiRA beside a layer that is cut along several axes by tuples: {strategy}; Layouts can do it"
                )
        return super().shard(**strategies)

    @property
    def signature(self) -> Any:
        return type(self), self.rank, self.hira_dropout.p

    def extend_repr(self) -> str:
        return f"rank={self.rank}"


class HiraEmbedding(HiraDelta):
    """The HiRA delta of an embedding; `x` are the ids. Dropout does not act on ids.

    .. math::
        y = out \\odot (1 + B A_{ids})
    """

    file_names = {A: "hira_embedding_A", B: "hira_embedding_B"}

    def update(self, x, out, a, b):
        return self.hira_mul(self.to_compute(out), self.hira_matmul(self.hira_gather(a, ops.reshape(x, (-1,)), 1), b))

    def initial_values(self, init: Optional[Union[bool, str]]) -> tuple[InitLike, InitLike]:
        return (Normal(1.0) if init is False else "zeros"), Normal(1.0)

    def make_operators(self, cell: nn.Cell) -> None:
        self.hira_gather, self.hira_matmul = ops.Gather(), ops.MatMul(transpose_a=True, transpose_b=True)

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`; A is whole, as LoRA's."""
        return {
            "strategy_hira_gather": (self.hira_gather, "rf,n"),
            "strategy_hira_matmul": (self.hira_matmul, "rn,or"),
            "strategy_hira_mul": (self.hira_mul, "no,no"),
            "strategy_hira_add": (self.hira_add, "no,no"),
        }


class HiraConvolution(HiraDelta):
    """The HiRA delta of a convolution: one like it, with `W * B A` as its weight."""

    def update(self, x, out, a, b):
        factors = self.hira_ab_matmul(ops.reshape(b, (-1, self.rank)), ops.reshape(a, (self.rank, -1)))
        weight = ops.reshape(self.to_compute(self.kept_weight()), self.weight_shape)
        weight = self.hira_mul(weight, ops.reshape(factors, self.weight_shape))
        return self.hira_matmul(self.hira_dropout(self.to_compute(x)), weight)

    def rows(self, out):
        return out

    def shapes(self, cell: nn.Cell) -> tuple[Shape, Shape]:
        """`(rank, in, *kernel)` and `(out, rank, 1, ...)`."""
        weight, axes = self.kind.weight_of(cell).shape, AXES[self.kind.name]
        self.weight_shape = (*weight[:2], *weight[-axes:])  # without the axis of length one of `nn.Conv1d`
        return (self.rank, *self.weight_shape[1:]), (weight[0], self.rank, *(1,) * axes)

    def make_operators(self, cell: nn.Cell) -> None:
        self.keep_weight(cell)
        self.hira_ab_matmul = ops.MatMul()
        self.hira_matmul = convolution_like(cell, self.kind.name, self.weight_shape[0])

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, of a convolution with the one operator that has strategies."""
        if not isinstance(self.hira_matmul, ops.Conv2D):
            return {}
        return {
            "strategy_hira_dropout": (self.hira_dropout.dropout, "nihw"),
            "strategy_hira_ab_matmul": (self.hira_ab_matmul, "or,rf"),
            "strategy_hira_mul": (self.hira_mul, "oikl,oikl"),
            "strategy_hira_matmul": (self.hira_matmul, "nihw,oikl"),
            "strategy_hira_add": (self.hira_add, "nohw,nohw"),
        }


class HiraDense(DeltaDense, HiraDelta):
    """A Dense layer with a HiRA delta.

    .. math::
        y = activation(x W^T + b + dropout(x)\\, (W \\odot B A)^T)

    Source: Huang et al. 2025, ICLR 2025, section 3. B starts as zeros, so a fresh HiraDense computes what the Dense
    layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        hira_rank: rows of A and columns of B.
        hira_dropout: probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        init_weights: True for Kaiming A and zero B, 'gaussian' for normal A and zero B, False or None for normal A and
            B. Default: True.
        dense: keywords of `DeltaDense`.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, mindpet_delta_hira_a `(hira_rank, in_channels)`,
        mindpet_delta_hira_b `(out_channels, hira_rank)`.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.

    Raises:
        TypeError, ValueError, KeyError: an argument is wrong, see `LoRADense`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hira_rank: int,
        hira_dropout: float = 0.0,
        init_weights: Optional[Union[bool, str]] = True,
        **dense: Any,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(hira_rank=hira_rank)
        check.probability(hira_dropout=hira_dropout)
        check_init(check, init_weights)
        super().__init__(
            in_channels,
            out_channels,
            check=check,
            rank=hira_rank,
            dropout=hira_dropout,
            init=init_weights,
            **dense,
        )

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, rank={self.rank}"


METHOD = Method(
    "hira",
    HiraConfig,
    ("*mindpet_delta_hira_*",),
    {
        "linear": HiraDelta,
        "embedding": HiraEmbedding,
        "conv1d": HiraConvolution,
        "conv2d": HiraConvolution,
        "conv3d": HiraConvolution,
    },
    (HiraDense,),
    identity=True,
)

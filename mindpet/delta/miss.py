"""MiSS: a small block of trained numbers that all shards of a frozen weight share."""

import math
from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.common.initializer import HeUniform

from mindpet.delta._base import Delta, DeltaDense, delta_parameter, matrix_shape
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.utils.hints import Arrays, Operators, Shape
from mindpet.utils.validate import Checker, is_int
from mindpet.utils.version_control import get_dropout

BLOCK = "mindpet_delta_miss"


@dataclass
class MissConfig(TargetConfig):
    """MiSS, Kang & Yin 2024, arXiv:2409.15371.

    Args beyond those of PeftConfig and TargetConfig:
        r: rows of the block, inputs of a shard. Default: 64.
        miss_dropout: probability in [0, 1) of zeroing an input of the update; with 'bat', too, where Hugging Face PEFT
            drops nothing. Default: 0.0.
        mini_r: columns of the block with 'mini'; it must be 1 without. Default: 1.
        init_weights: True for a block of zeros, False for a random one; 'bat' for a block of zeros for each shard of
            the outputs, which multiplies the weight, too; 'mini' for one of `mini_r` columns. Default: True.
        bias: which biases train: 'none', 'all', or 'miss_only' for those of the targets. Default: 'none'.
        fan_in_fan_out: for files without a network, whether weights are `(in, out)`, see `LoraConfig`; not a field of
            Hugging Face PEFT, which has no MiSS on such layers. Default: None, for False.
    """

    peft_type, method_name = "MISS", "miss"

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: Union[bool, str] = True
    bias: str = "none"
    fan_in_fan_out: Optional[bool] = None

    required = ("r",)
    not_in_peft = ("fan_in_fan_out",)

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "rank": self.r,
            "dropout": float(self.miss_dropout),
            "mini_r": self.mini_r,
            "init": self.init_weights,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.positive_int(r=self.r)
        check.probability((int, float), miss_dropout=self.miss_dropout)
        check_block(check, self.mini_r, self.init_weights, self.inference_mode)
        check.choice("bias", self.bias, ("none", "all", "miss_only"))
        given = self.fan_in_fan_out is None or isinstance(self.fan_in_fan_out, bool)
        check.require(given, TypeError, "fan_in_fan_out", self.fan_in_fan_out, "a bool or None")


def check_block(check: Checker, mini_r: Any, init: Any, is_loaded: bool = False) -> None:
    """Note wrong arguments; what a file says of a block without 'mini' is of no effect."""
    known = isinstance(init, bool) or init in ("bat", "mini")
    check.require(known, ValueError, "init_weights", init, "a bool, 'bat' or 'mini'")
    if check.require(is_int(mini_r), TypeError, "mini_r", mini_r, "a positive int"):
        check.require(mini_r > 0, ValueError, "mini_r", mini_r, "a positive int")
        is_used = mini_r == 1 or init == "mini" or is_loaded
        check.require(is_used, ValueError, "mini_r", mini_r, "1 where init_weights is not 'mini'")


def misfits(outs: int, ins: int, rank: int, mini_r: int, init: Union[bool, str]) -> list[str]:
    """Why a block does not fit a weight `(outs, ins)`."""
    problems = [f"the rank, {rank}, must be at most the number of its inputs, {ins}"] if rank > ins else []
    if init == "bat" and (outs % rank or ins % rank):
        problems.append(f"with 'bat' the rank, {rank}, must divide its inputs and outputs, {ins} and {outs}")
    if init == "mini" and outs % mini_r:
        problems.append(f"mini_r, {mini_r}, must divide the number of its outputs, {outs}")
    return problems


class MissDelta(Delta):
    """The MiSS delta of a linear layer.

    .. math::
        y = out + D^T \\sum_k dropout(x)_k

    x_k are the shards of the input, of `rank` features each; what lacks of the last one counts as zeros. With 'mini' D
    is a block of `mini_r` columns, side by side as often as there is place. With 'bat' each shard j of the outputs has
    a block of its own, and W_jk are square blocks of the weight, which does not train:

    .. math::
        y_j = out_j + \\sum_k (W_{jk} D_j + D_j)\\, dropout(x)_k

    Source: Kang & Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
    arXiv:2409.15371, section 3; 'bat' is the block affine transformation of its first versions, which call it Bone.

    Delta arguments:
        rank (int): features of a shard.
        dropout (float): probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        mini_r (int): columns of the block with 'mini'. Default: 1.
        init (Union[bool, str]): True: zeros; False: Kaiming uniform; 'bat', 'mini': zeros, see above. Default: True.
        dtype (mindspore.dtype): of the parameter. Default: float32.

    Parameters:
        mindpet_delta_miss: `(rank, out)`; with 'mini' `(rank, mini_r)`, with 'bat' `(out / rank, rank, rank)`.
    """

    before_activation = True
    file_names = {BLOCK: "miss_block"}

    def setup(self, cell, rank, dropout=0.0, mini_r=1, init=True, dtype=ms.float32):
        self.outs, self.ins = matrix_shape(cell, self.kind)
        self.rank, self.shards = rank, -(-self.ins // rank)
        self.is_bat, self.padding = init == "bat", self.shards * rank - self.ins
        self.copies = self.outs // mini_r if init == "mini" else 1  # of the block
        shape = (self.outs // rank, rank, rank) if self.is_bat else (rank, self.outs // self.copies)
        start = HeUniform(negative_slope=math.sqrt(5)) if init is False else "zeros"
        self.mindpet_delta_miss = delta_parameter(start, shape, dtype, BLOCK)
        self.miss_dropout, self.miss_add = get_dropout(dropout), ops.Add()
        self.miss_matmul = ops.MatMul(transpose_b=self.is_bat)
        if self.is_bat:
            self.keep_weight(cell)
            if self.kind.transposed:
                self.miss_transpose = ops.Transpose()
            self.miss_block_matmul, self.miss_block_add = ops.BatchMatMul(), ops.Add()
            return
        self.miss_sum = ops.ReduceSum()
        if self.copies > 1:
            self.miss_tile = ops.Tile()
        if self.padding:
            self.miss_concat = ops.Concat(1)

    def after(self, x, out):
        rows = self.miss_dropout(self.to_compute(to_rows(x)))
        block = self.to_compute(self.mindpet_delta_miss)
        delta = self.miss_matmul(rows, self.change(block)) if self.is_bat else self.share(rows, block)
        return from_rows(self.miss_add(to_rows(out), cast(delta, out.dtype)), out)

    def share(self, rows, block):
        """`D^T` times the sum of the shards."""
        if self.copies > 1:
            block = self.miss_tile(block, (1, self.copies))
        if self.padding:
            rows = self.miss_concat((rows, ops.zeros((rows.shape[0], self.padding), rows.dtype)))
        return self.miss_matmul(self.miss_sum(ops.reshape(rows, (-1, self.shards, self.rank)), 1), block)

    def change(self, block):
        """All `W_jk D_j + D_j`, as one matrix `(out, in)`."""
        weight = self.to_compute(self.kept_weight())
        if self.kind.transposed:
            weight = self.miss_transpose(weight, (1, 0))
        count, rank = self.outs // self.rank, self.rank
        product = self.miss_block_matmul(ops.reshape(weight, (count, -1, rank)), block)
        product = ops.reshape(product, (count, rank, self.shards, rank))
        return ops.reshape(self.miss_block_add(product, ops.expand_dims(block, 2)), (self.outs, self.ins))

    @classmethod
    def problems(
        cls,
        cell: nn.Cell,
        kind: LayerKind,
        is_sharded: bool,
        rank: int,
        mini_r: int,
        init: Union[bool, str],
        **others: Any,
    ) -> list[str]:
        problems = misfits(*matrix_shape(cell, kind), rank, mini_r, init)
        if init == "mini" and kind.transposed:
            problems.append("no 'mini' beside a weight that is (in, out), for a file of it could be of either kind")
        return problems

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, init: Union[bool, str] = True, **others: Any) -> bool:
        (outs, ins), block = shape, values[BLOCK].shape
        if init == "bat":
            return block[0] * block[1] == outs and ins % block[1] == 0
        return block[0] <= ins and (outs % block[1] == 0 if init == "mini" else outs == block[1])

    @classmethod
    def file_shapes(
        cls, shapes: dict[str, Shape], rank: int, mini_r: int = 1, init: Union[bool, str] = True, **others: Any
    ) -> dict[str, tuple]:
        shape = shapes.get(BLOCK, ())
        if init == "bat":
            return {BLOCK: ((*shape, "out / rank")[0], rank, rank)}
        return {BLOCK: (rank, mini_r if init == "mini" else (*shape, "out", "out")[1])}

    @classmethod
    def fold(cls, matrix: np.ndarray, values: Arrays, **arguments: Any) -> np.ndarray:
        (outs, ins), block = matrix.shape, values[BLOCK]
        if block.ndim == 3:
            count, rank = block.shape[:2]
            product = (matrix.reshape(count, -1, rank) @ block).reshape(count, rank, -1, rank)
            return matrix + (product + block[:, :, None]).reshape(outs, ins)
        rank, columns = block.shape
        return matrix + np.tile(block, (-(-ins // rank), outs // columns))[:ins].T

    @property
    def operators(self) -> Operators:
        table = {"strategy_miss_dropout": (self.miss_dropout.dropout, "ni")}
        if self.is_bat:
            if self.kind.transposed:
                table["strategy_miss_transpose"] = (self.miss_transpose, "io")
            table["strategy_miss_block_matmul"] = (self.miss_block_matmul, "off,off")
            table["strategy_miss_block_add"] = (self.miss_block_add, "offf,offf")
            table["strategy_miss_matmul"] = (self.miss_matmul, "ni,oi")
        else:
            if self.copies > 1:
                table["strategy_miss_tile"] = (self.miss_tile, "rf")
            if self.padding:
                table["strategy_miss_concat"] = (self.miss_concat, "nf,nf")
            table["strategy_miss_sum"] = (self.miss_sum, "nff" if self.padding else "nir")
            table["strategy_miss_matmul"] = (self.miss_matmul, "nr,ro")
        return {**table, "strategy_miss_add": (self.miss_add, "no,no")}

    @property
    def signature(self) -> Any:
        return type(self), self.rank, self.is_bat, self.copies, self.miss_dropout.p

    def extend_repr(self) -> str:
        return f"rank={self.rank}, block={self.mindpet_delta_miss.shape}"


class MissDense(DeltaDense, MissDelta):
    """A Dense layer with a MiSS delta.

    .. math::
        y = activation(x W^T + b + \\sum_k dropout(x)_k\\, D)

    with the shards x_k of the input, and the variants of `MissDelta`.

    Source: Kang & Yin 2024, arXiv:2409.15371, section 3. D starts as zeros, so a fresh MissDense computes what the
    Dense layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        miss_rank: features of a shard, at most `in_channels`.
        miss_dropout: probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        mini_r: columns of the block with 'mini'; they divide `out_channels`. Default: 1.
        init_weights: True for a block of zeros, False for a random one, 'bat' or 'mini', see `MissDelta`.
            Default: True.
        dense: keywords of `DeltaDense`.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, mindpet_delta_miss `(miss_rank, out_channels)`,
        with 'mini' `(miss_rank, mini_r)`, with 'bat' `(out_channels / miss_rank, miss_rank, miss_rank)`.

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
        miss_rank: int,
        miss_dropout: float = 0.0,
        mini_r: int = 1,
        init_weights: Union[bool, str] = True,
        **dense: Any,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(miss_rank=miss_rank)
        check.probability(miss_dropout=miss_dropout)
        check_block(check, mini_r, init_weights)
        sizes = (out_channels, in_channels, miss_rank, mini_r)
        if all(is_int(size) and size > 0 for size in sizes):
            for problem in misfits(*sizes, init_weights):
                check.problems.append((ValueError, problem))
        super().__init__(
            in_channels,
            out_channels,
            check=check,
            rank=miss_rank,
            dropout=miss_dropout,
            mini_r=mini_r,
            init=init_weights,
            **dense,
        )

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, rank={self.rank}, block={self.mindpet_delta_miss.shape}"


METHOD = Method("miss", MissConfig, ("*mindpet_delta_miss",), {"linear": MissDelta}, (MissDense,), identity=True)

"""LoHa: the elementwise product of two low-rank matrices beside a frozen layer, linear or convolution."""

import math
from dataclasses import dataclass
from typing import Any, Union

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindpet.delta._base import DeltaDense
from mindpet.delta._matrix import (
    MatrixConfig,
    MatrixConvolution,
    MatrixDelta,
    factor_shapes,
    factors_in_file,
    product,
    product_shape,
)
from mindpet.delta._method import Method
from mindpet.layers.linear import to_rows
from mindpet.utils.hints import Arrays, Operators, Shape
from mindpet.utils.validate import Checker

W1_A, W1_B, W2_A, W2_B, T1, T2 = (f"mindpet_delta_loha_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
FACTORS = {W1_A: "hada_w1_a", W1_B: "hada_w1_b", W2_A: "hada_w2_a", W2_B: "hada_w2_b"}


@dataclass
class LoHaConfig(MatrixConfig):
    """LoHa, Hyeon-Woo et al. 2021, arXiv:2108.06098; its fields are those of MatrixConfig."""

    peft_type, method_name = "LOHA", "loha"


class LohaDelta(MatrixDelta):
    """The LoHa delta of a linear layer.

    .. math::
        \\Delta W = (A_1 B_1) \\odot (A_2 B_2)

    of a rank of up to `rank ** 2`. Where that is less work, dW is not made, but multiplied by as two matrices, which
    have a product for each pair of columns of A_1 and A_2, and of rows of B_1 and B_2:

    .. math::
        \\Delta W x = A B x,\\quad A_{o,(p,q)} = A_{1,o,p} A_{2,o,q},\\quad B_{(p,q),i} = B_{1,p,i} B_{2,q,i}

    Source: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
    arXiv:2108.06098, propositions 1 and 3; LyCORIS, Yeh et al. 2023, arXiv:2309.14859, section 3.2.

    Delta arguments:
        rank (int): columns of A_1 and A_2.
        alpha (Union[int, float]): scale.
        rank_dropout, module_dropout (float): see `MatrixDelta`. Default: 0.0.
        effective (bool): of a convolution, see `MatrixConfig`. Default: False.
        init (bool): True: B_2 is zero, False: nothing is. Default: True.
        dtype (mindspore.dtype): of the parameters. Default: float32.

    Parameters:
        mindpet_delta_loha_w1_a, mindpet_delta_loha_w2_a: `(out, rank)`; mindpet_delta_loha_w1_b,
        mindpet_delta_loha_w2_b: `(rank, in)`; of a convolution see `factor_shapes`, whose cores are
        mindpet_delta_loha_t1 and mindpet_delta_loha_t2.
    """

    slots = "loha"
    file_names = FACTORS

    def setup(self, cell, rank, alpha, effective=False, init=True, dtype=ms.float32, **dropout):
        super().setup(cell, rank, alpha, **dropout)
        outs, ins, *kernel = self.shape
        shapes = factor_shapes(outs, ins, rank, kernel, effective)
        self.has_core = len(shapes) > 2
        for names in ((W1_A, W1_B, T1), (W2_A, W2_B, T2)):
            for name, shape in zip(names, shapes):
                self.parameter(name, shape, init and name == W2_B, dtype)
        # By the pairs it takes rank ** 2 multiplications for each input and output, else one for each number of dW.
        self.by_pairs = not kernel and rank**2 * (outs + ins) < outs * ins
        if self.by_pairs:
            each, ones = np.eye(rank, dtype=np.float32), np.ones((1, rank), np.float32)
            self.first, self.second = Tensor(np.kron(each, ones)), Tensor(np.kron(ones, each))  # of each pair
            self.loha_w1_a_matmul, self.loha_w2_a_matmul, self.loha_a_mul = ops.MatMul(), ops.MatMul(), ops.Mul()
            self.loha_w1_b_matmul, self.loha_w2_b_matmul = ops.MatMul(transpose_a=True), ops.MatMul(transpose_a=True)
            self.loha_b_mul = ops.Mul()
            self.loha_a_matmul, self.loha_b_matmul = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        else:
            self.loha_w1_matmul, self.loha_w2_matmul, self.loha_w_mul = ops.MatMul(), ops.MatMul(), ops.Mul()
            self.loha_w_matmul = ops.MatMul(transpose_b=True)

    def factors(self):
        """`s A_1`, B_1, A_2 and B_2 in the compute type."""
        w1_a, w1_b = self.scaled(self.mindpet_delta_loha_w1_a), self.to_compute(self.mindpet_delta_loha_w1_b)
        w2_a, w2_b = self.to_compute(self.mindpet_delta_loha_w2_a), self.to_compute(self.mindpet_delta_loha_w2_b)
        return w1_a, w1_b, w2_a, w2_b

    def update(self, x):
        rows = self.to_compute(to_rows(x))
        w1_a, w1_b, w2_a, w2_b = self.factors()
        if not self.by_pairs:
            weight = self.loha_w_mul(self.loha_w1_matmul(w1_a, w1_b), self.loha_w2_matmul(w2_a, w2_b))
            return self.loha_w_matmul(rows, weight)
        first, second = self.to_compute(self.first), self.to_compute(self.second)
        a = self.loha_a_mul(self.loha_w1_a_matmul(w1_a, first), self.loha_w2_a_matmul(w2_a, second))
        b = self.loha_b_mul(self.loha_w1_b_matmul(first, w1_b), self.loha_w2_b_matmul(second, w2_b))
        return self.loha_a_matmul(self.loha_b_matmul(rows, b), a)

    @classmethod
    def matrix_of(cls, values: Arrays) -> np.ndarray:
        first, second = (W1_A, W1_B, T1), (W2_A, W2_B, T2)
        one, other = ([values[name] for name in names if name in values] for names in (first, second))
        return product(*one) * product(*other)

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, **arguments: Any) -> bool:
        shapes = [values[name].shape for name in (W1_A, W1_B, T1) if name in values]
        return product_shape(*shapes) == (shape[0], math.prod(shape[1:]))

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], rank: int, **others: Any) -> dict[str, tuple]:
        first = factors_in_file(shapes, rank, W1_A, W1_B, T1)
        return {**first, **dict(zip((W2_A, W2_B, T2), first.values()))}

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`; the factors are whole, for they are small."""
        if not self.by_pairs:
            table = {
                "strategy_loha_w1_matmul": (self.loha_w1_matmul, "fr,rk"),
                "strategy_loha_w2_matmul": (self.loha_w2_matmul, "fr,rk"),
                "strategy_loha_w_mul": (self.loha_w_mul, "fk,fk"),
                "strategy_loha_w_matmul": (self.loha_w_matmul, "ni,oi"),
            }
        else:
            table = {
                "strategy_loha_w1_a_matmul": (self.loha_w1_a_matmul, "fr,rk"),
                "strategy_loha_w2_a_matmul": (self.loha_w2_a_matmul, "fr,rk"),
                "strategy_loha_a_mul": (self.loha_a_mul, "fk,fk"),
                "strategy_loha_w1_b_matmul": (self.loha_w1_b_matmul, "rk,rf"),
                "strategy_loha_w2_b_matmul": (self.loha_w2_b_matmul, "rk,rf"),
                "strategy_loha_b_mul": (self.loha_b_mul, "kf,kf"),
                "strategy_loha_b_matmul": (self.loha_b_matmul, "ni,ki"),
                "strategy_loha_a_matmul": (self.loha_a_matmul, "nk,ok"),
            }
        return {**table, **super().operators}


class LohaConvolution(MatrixConvolution, LohaDelta):
    """The LoHa delta of a convolution along one or two axes."""

    file_names = {**FACTORS, T1: "hada_t1", T2: "hada_t2"}

    def matrix(self):
        w1_a, w1_b, w2_a, w2_b = self.factors()
        if not self.has_core:
            return product(w1_a, w1_b) * product(w2_a, w2_b)
        t1, t2 = self.to_compute(self.mindpet_delta_loha_t1), self.to_compute(self.mindpet_delta_loha_t2)
        return product(w1_a, w1_b, t1) * product(w2_a, w2_b, t2)


class LoHaDense(DeltaDense, LohaDelta):
    """A Dense layer with a LoHa delta.

    .. math::
        y = activation(x W^T + b + \\frac{loha\\_alpha}{loha\\_rank} x ((A_1 B_1) \\odot (A_2 B_2))^T)

    Source: Hyeon-Woo et al. 2021, arXiv:2108.06098, proposition 1. B_2 starts as zeros, so a fresh LoHaDense computes
    what the Dense layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        loha_rank: columns of A_1 and A_2; the update has a rank of up to the square of it.
        loha_alpha: scale of the update, finite and not zero.
        rank_dropout: probability in [0, 1) of zeroing an output of the update while training. Default: 0.0.
        module_dropout: probability in [0, 1) of leaving the update out while training. Default: 0.0.
        dense: keywords of `DeltaDense`.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, and those of `LohaDelta`.

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
        loha_rank: int,
        loha_alpha: Union[int, float],
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        **dense: Any,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(loha_rank=loha_rank)
        check.nonzero_number(loha_alpha=loha_alpha)
        check.probability(rank_dropout=rank_dropout, module_dropout=module_dropout)
        super().__init__(
            in_channels,
            out_channels,
            check=check,
            rank=loha_rank,
            alpha=loha_alpha,
            rank_dropout=rank_dropout,
            module_dropout=module_dropout,
            **dense,
        )

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, rank={self.rank}, alpha={self.scale * self.rank:g}"


METHOD = Method(
    "loha",
    LoHaConfig,
    ("*mindpet_delta_loha*",),
    {"linear": LohaDelta, "conv1d": LohaConvolution, "conv2d": LohaConvolution},
    (LoHaDense,),
    identity=True,
)

"""LoKr: the Kronecker product of two small matrices beside a frozen layer, linear or convolution."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Union

import mindspore as ms
import numpy as np
from mindspore import ops

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
from mindpet.utils.hints import Arrays, Operators, PathLike, Shape
from mindpet.utils.validate import Checker, is_int

W1, W1_A, W1_B, W2, W2_A, W2_B, T2 = (
    f"mindpet_delta_lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
)
FACTORS = {name: name.replace("mindpet_delta_", "") for name in (W1, W1_A, W1_B, W2, W2_A, W2_B)}
LYCORIS = "lycoris"


@dataclass
class LoKrConfig(MatrixConfig):
    """LoKr, Yeh et al. 2023, arXiv:2309.14859.

    Args beyond those of MatrixConfig, of which `init_weights` can be 'lycoris': C is zero, and not B; by default B is:
        decompose_both: whether the first matrix is factored, too, where `r` is less than half of its longer side.
            Default: False.
        decompose_factor: how long the shorter side of the first matrix may be, or is if it divides that of the weight;
            -1 for as long as the longer one. Default: -1.
        rank_dropout_scale: whether the rows that `rank_dropout` leaves are divided by their mean. Default: False.
    """

    peft_type, method_name = "LOKR", "lokr"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    inits = (LYCORIS,)

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            **super().delta_arguments(path),
            "rescales": self.rank_dropout_scale,
            "decompose_both": self.decompose_both,
            "decompose_factor": self.decompose_factor,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.boolean(decompose_both=self.decompose_both, rank_dropout_scale=self.rank_dropout_scale)
        check_factor(check, self.decompose_factor)

    def check_sizes(self, folder: PathLike, paths: Iterable[str], shapes: Iterable[Shape]) -> None:
        """Pass: no rank makes a tensor that is larger than those of the layer."""


class LokrDelta(MatrixDelta):
    """The LoKr delta of a linear layer.

    .. math::
        \\Delta W = C \\otimes B

    with C `(l, m)` and B `(k, n)`, `l k = out` and `m n = in`, see `split`. B is the product of `(k, rank)` and
    `(rank, n)` if `rank < max(k, n) / 2`, and so is C with `decompose_both` if `rank < max(l, m) / 2`. dW is never
    there: with x as a matrix X `(m, n)`, and the update as `(l, k)`, it is

    .. math::
        C X B^T

    Source: Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    arXiv:2309.14859, section 3.2; KronA, Edalati et al. 2022, arXiv:2212.10650, equations 3 to 5.

    Delta arguments:
        rank (int): of the factored matrices.
        alpha (Union[int, float]): scale.
        rank_dropout, module_dropout (float), rescales (bool): see `MatrixDelta`. Default: 0.0, 0.0, False.
        decompose_both (bool), decompose_factor (int): see `LoKrConfig`. Default: False, -1.
        effective (bool): of a convolution, see `MatrixConfig`. Default: False.
        init (Union[bool, str]): True: C is zero, 'lycoris': B is, False: nothing is. Default: True.
        dtype (mindspore.dtype): of the parameters. Default: float32.

    Parameters:
        mindpet_delta_lokr_w1: C, or mindpet_delta_lokr_w1_a and mindpet_delta_lokr_w1_b: its factors;
        mindpet_delta_lokr_w2: B, of a convolution `(k, n, *kernel)`, or mindpet_delta_lokr_w2_a and
        mindpet_delta_lokr_w2_b: its factors, see `factor_shapes`, with mindpet_delta_lokr_t2 as their core.
    """

    slots = "lokr"
    file_names = FACTORS

    def setup(
        self,
        cell,
        rank,
        alpha,
        decompose_both=False,
        decompose_factor=-1,
        effective=False,
        init=True,
        rescales=False,
        dtype=ms.float32,
        **dropout,
    ):
        super().setup(cell, rank, alpha, rescales=rescales, **dropout)
        outs, ins, *kernel = self.shape
        (self.l, self.k), (self.m, self.n) = split(outs, decompose_factor), split(ins, decompose_factor)
        self.factors_c = decompose_both and rank < max(self.l, self.m) / 2
        self.factors_b = rank < max(self.k, self.n) / 2
        self.inner = rank if self.factors_b else self.k
        names_c, shapes_c = (W1,), [(self.l, self.m)]
        names_b, shapes_b = (W2,), [(self.k, self.n, *kernel)]
        if self.factors_c:
            names_c, shapes_c = (W1_A, W1_B), factor_shapes(self.l, self.m, rank)
        if self.factors_b:
            names_b, shapes_b = (W2_A, W2_B, T2), factor_shapes(self.k, self.n, rank, kernel, effective)
        self.has_core = len(shapes_b) > 2
        for name, shape in zip(names_c, shapes_c):
            self.parameter(name, shape, init is True and name in (W1, W1_A), dtype)
        for name, shape in zip(names_b, shapes_b):
            self.parameter(name, shape, init == LYCORIS and name in (W2, W2_B), dtype)
        self.lokr_w1_matmul, self.lokr_w2_matmul = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        if self.factors_c:
            self.lokr_w1_a_matmul = ops.MatMul(transpose_b=True)
        if self.factors_b:
            self.lokr_w2_a_matmul = ops.MatMul(transpose_b=True)
        self.lokr_turn, self.lokr_turn_back = ops.Transpose(), ops.Transpose()

    def update(self, x):
        c = self.scaled(self.mindpet_delta_lokr_w1_b if self.factors_c else self.mindpet_delta_lokr_w1)
        b = self.to_compute(self.mindpet_delta_lokr_w2_b if self.factors_b else self.mindpet_delta_lokr_w2)
        parts = self.lokr_w2_matmul(ops.reshape(self.to_compute(to_rows(x)), (-1, self.n)), b)
        parts = self.lokr_turn(ops.reshape(parts, (-1, self.m, self.inner)), (0, 2, 1))
        parts = self.lokr_w1_matmul(ops.reshape(parts, (-1, self.m)), c)
        if self.factors_c:
            parts = self.lokr_w1_a_matmul(parts, self.to_compute(self.mindpet_delta_lokr_w1_a))
        parts = self.lokr_turn_back(ops.reshape(parts, (-1, self.inner, self.l)), (0, 2, 1))
        if self.factors_b:
            parts = ops.reshape(parts, (-1, self.inner))
            parts = self.lokr_w2_a_matmul(parts, self.to_compute(self.mindpet_delta_lokr_w2_a))
        return ops.reshape(parts, (-1, self.shape[0]))

    @classmethod
    def matrix_of(cls, values: Arrays) -> np.ndarray:
        return kronecker(*(product(*factors) if len(factors) > 1 else factors[0] for factors in _present(values)))

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, **arguments: Any) -> bool:
        shapes = [[value.shape for value in factors] for factors in _present(values)]
        c, b = (product_shape(*each) if len(each) > 1 else (each[0][0], math.prod(each[0][1:])) for each in shapes)
        return (c[0] * b[0], c[1] * b[1]) == (shape[0], math.prod(shape[1:]))

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], rank: int, **others: Any) -> dict[str, tuple]:
        wanted = {}
        for whole, left, right, core in ((W1, W1_A, W1_B, None), (W2, W2_A, W2_B, T2)):
            if left in shapes or right in shapes:
                wanted.update(factors_in_file(shapes, rank, left, right, core))
            else:
                shape = shapes.get(whole, ())
                is_kernel = whole == W2 and len(shape) == 4
                wanted[whole] = shape if is_kernel else (*shape[:2], *("out", "in")[len(shape) :])
        return wanted

    @property
    def operators(self) -> Operators:
        table = {
            "strategy_lokr_w2_matmul": (self.lokr_w2_matmul, "nf,kf"),
            "strategy_lokr_turn": (self.lokr_turn, "nfk"),
            "strategy_lokr_w1_matmul": (self.lokr_w1_matmul, "nf,kf"),
            "strategy_lokr_turn_back": (self.lokr_turn_back, "nfk"),
            **super().operators,
        }
        if self.factors_c:
            table["strategy_lokr_w1_a_matmul"] = (self.lokr_w1_a_matmul, "nf,kf")
        if self.factors_b:
            table["strategy_lokr_w2_a_matmul"] = (self.lokr_w2_a_matmul, "nf,kf")
        return table

    @property
    def signature(self) -> Any:
        return *super().signature, self.l, self.m


class LokrConvolution(MatrixConvolution, LokrDelta):
    """The LoKr delta of a convolution along two axes.

    Hugging Face PEFT (0.21) has it along one axis, too, but where B is whole it is no Kronecker product there.
    """

    file_names = {**FACTORS, T2: "lokr_t2"}

    def matrix(self):
        if self.factors_c:
            c = product(self.scaled(self.mindpet_delta_lokr_w1_a), self.to_compute(self.mindpet_delta_lokr_w1_b))
        else:
            c = self.scaled(self.mindpet_delta_lokr_w1)
        if not self.factors_b:
            return kronecker(c, self.to_compute(self.mindpet_delta_lokr_w2))
        w2_a, w2_b = self.to_compute(self.mindpet_delta_lokr_w2_a), self.to_compute(self.mindpet_delta_lokr_w2_b)
        if self.has_core:
            return kronecker(c, product(w2_a, w2_b, self.to_compute(self.mindpet_delta_lokr_t2)))
        return kronecker(c, product(w2_a, w2_b))


def split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a number of features, as LyCORIS chooses them.

    Args:
        size: the number.
        factor: the first one, if it divides `size`. Else, or if it is -1, the first one is the largest that is no
            larger than the second, nor than `factor`.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(count for count in range(largest, 0, -1) if size % count == 0)
    return first, size // first


def kronecker(c, b):
    """The Kronecker product of a matrix `(l, m)` and of one `(k, n, ...)` as `(l k, m n ...)`; NumPy or Tensors."""
    (rows, columns), inner = c.shape, b.shape[0]
    matrix = c.reshape((rows, 1, columns, 1)) * b.reshape((1, inner, 1, -1))
    return matrix.reshape((rows * inner, -1))


def _present(values):
    """C and B: a list of the one array, or of its factors."""
    names = (W1,), (W1_A, W1_B), (W2,), (W2_A, W2_B, T2)
    present = [[values[name] for name in group if name in values] for group in names]
    return present[0] or present[1], present[2] or present[3]


def check_factor(check: Checker, factor: Any) -> None:
    """-1, or a positive int."""
    if check.require(is_int(factor), TypeError, "decompose_factor", factor, "an int"):
        check.require(factor == -1 or factor > 0, ValueError, "decompose_factor", factor, "-1 or positive")


class LoKrDense(DeltaDense, LokrDelta):
    """A Dense layer with a LoKr delta.

    .. math::
        y = activation(x W^T + b + \\frac{lokr\\_alpha}{lokr\\_rank} x (C \\otimes B)^T)

    Source: Yeh et al. 2023, arXiv:2309.14859, section 3.2. C starts as zeros, so a fresh LoKrDense computes what the
    Dense layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        lokr_rank: of B where it is factored, and of C; it is whole if the rank is not below half of its longer side.
        lokr_alpha: scale of the update, finite and not zero.
        rank_dropout: probability in [0, 1) of zeroing an output of the update while training. Default: 0.0.
        module_dropout: probability in [0, 1) of leaving the update out while training. Default: 0.0.
        rank_dropout_scale: whether the outputs that are left are divided by their mean. Default: False.
        decompose_both: whether C is factored, too, where it is long enough. Default: False.
        decompose_factor: how many rows and columns C has at most, or exactly if the number divides those of the
            weight; -1 for as many as B. Default: -1.
        dense: keywords of `DeltaDense`.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, and those of `LokrDelta`.

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
        lokr_rank: int,
        lokr_alpha: Union[int, float],
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rank_dropout_scale: bool = False,
        decompose_both: bool = False,
        decompose_factor: int = -1,
        **dense: Any,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(lokr_rank=lokr_rank)
        check.nonzero_number(lokr_alpha=lokr_alpha)
        check.probability(rank_dropout=rank_dropout, module_dropout=module_dropout)
        check.boolean(rank_dropout_scale=rank_dropout_scale, decompose_both=decompose_both)
        check_factor(check, decompose_factor)
        super().__init__(
            in_channels,
            out_channels,
            check=check,
            rank=lokr_rank,
            alpha=lokr_alpha,
            rank_dropout=rank_dropout,
            module_dropout=module_dropout,
            rescales=rank_dropout_scale,
            decompose_both=decompose_both,
            decompose_factor=decompose_factor,
            **dense,
        )

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, rank={self.rank}, alpha={self.scale * self.rank:g}"


METHOD = Method(
    "lokr",
    LoKrConfig,
    ("*mindpet_delta_lokr*",),
    {"linear": LokrDelta, "conv2d": LokrConvolution},
    (LoKrDense,),
    identity=True,
)

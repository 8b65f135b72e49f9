"""What methods share whose delta is a matrix `s dW` beside the weight: rank and alpha, dropout, convolutions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeUniform

from mindpet.delta._base import Delta, delta_parameter, scale_problems
from mindpet.delta._config import TargetConfig
from mindpet.layers.convolution import AXES, convolution_like
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.network.match import pattern_value
from mindpet.utils.hints import Arrays, Operators, Shape
from mindpet.utils.validate import Checker
from mindpet.utils.version_control import get_dropout


@dataclass
class MatrixConfig(TargetConfig):
    """The fields of all methods with such a delta, as LyCORIS has them, Yeh et al. 2023, arXiv:2309.14859.

    Args beyond those of PeftConfig and TargetConfig:
        r: rank. Default: 8.
        alpha: scale; the delta is multiplied by `alpha / r`. Default: 8.
        rank_dropout: probability in [0, 1) of zeroing a row of the delta while training. Default: 0.0.
        module_dropout: probability in [0, 1) of leaving the delta of a layer out while training. Default: 0.0.
        use_effective_conv2d: whether the factors of a convolution with a kernel of several taps have a core, which
            alone has the taps. Default: False.
        init_weights: True for a delta of zeros, False for random factors. Default: True.
        rank_pattern: layer name or regular expression -> another rank. Default: {}.
        alpha_pattern: layer name or regular expression -> another alpha. Default: {}.
    """

    r: int = 8
    alpha: Union[int, float] = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: Union[bool, str] = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, Union[int, float]] = field(default_factory=dict)

    required = ("r", "alpha")
    inits = ()  # further values of `init_weights`

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "rank": pattern_value(self.rank_pattern, path, self.r),
            "alpha": pattern_value(self.alpha_pattern, path, self.alpha),
            "rank_dropout": float(self.rank_dropout),
            "module_dropout": float(self.module_dropout),
            "effective": self.use_effective_conv2d,
            "init": self.init_weights,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.positive_int(r=self.r)
        check.nonzero_number(alpha=self.alpha)
        check.probability((int, float), rank_dropout=self.rank_dropout, module_dropout=self.module_dropout)
        check.boolean(use_effective_conv2d=self.use_effective_conv2d)
        known = isinstance(self.init_weights, bool) or self.init_weights in self.inits
        rule = " or ".join(["a bool", *map(repr, self.inits)])
        check.require(known, ValueError, "init_weights", self.init_weights, rule)


class MatrixDelta(Delta):
    """A matrix of small ones that is added to the weight of a linear layer.

    .. math::
        y = out + u \\odot s\\, \\Delta W x,\\quad s = alpha / rank

    The factors u of the outputs are ones. While training, `rank_dropout` sets some of them to zero, for all rows of x
    alike, and divides the others by their mean if `rescales`; `module_dropout` sets all of them to zero.

    A method overrides `setup`, `update` and `matrix_of`, and of the rest what it needs.

    Attributes:
        slots (str): the method, in the names of the slots of `shard()`.
        shape (tuple): `(out, in)`, or `(out, in / groups, *kernel)`.
    """

    before_activation = True
    slots = ""

    def setup(self, cell, rank, alpha, rank_dropout=0.0, module_dropout=0.0, rescales=True):
        self.rank, self.scale = rank, alpha / rank
        shape = self.kind.weight_of(cell).shape
        kernel = shape[-AXES[self.kind.name] :] if self.kind.is_convolution else ()
        self.shape = (*(shape[1::-1] if self.kind.transposed else shape[:2]), *kernel)
        self.dropout = None
        if rank_dropout or module_dropout:
            self.dropout = OutputDropout(self.shape[0], rank_dropout, module_dropout, rescales)
            self.drop_mul = ops.Mul()
        self.delta_mul, self.delta_add = ops.Mul(), ops.Add()

    def after(self, x, out):
        delta = self.update(x)
        if self.dropout is not None and self.training:
            delta = self.drop_mul(delta, self.channels(self.to_compute(self.dropout())))
        return from_rows(self.delta_add(self.rows(out), cast(delta, out.dtype)), out)

    def update(self, x):
        """`s dW x` in the compute type, `(rows, out)`."""
        raise NotImplementedError

    def scaled(self, factor):
        """s times a Parameter, of which dW is a multiple, in the compute type: it has fewer numbers than `dW x`."""
        return self.delta_mul(self.to_compute(factor), self.scale)

    @classmethod
    def matrix_of(cls, values: Arrays) -> np.ndarray:
        """dW from the values by name, NumPy."""
        raise NotImplementedError

    def rows(self, out):
        """The output as `(rows, out)`."""
        return to_rows(out)

    def channels(self, vector):
        """A vector `(out,)` so that it goes with the output."""
        return vector

    def parameter(self, name: str, shape: Shape, is_zero: bool, dtype: ms.Type) -> None:
        """A factor: zeros, or Kaiming uniform."""
        init = "zeros" if is_zero else HeUniform(negative_slope=math.sqrt(5))
        setattr(self, name, delta_parameter(init, shape, dtype, name))

    @classmethod
    def problems(
        cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, rank: int, alpha: Union[int, float], **others: Any
    ) -> list[str]:
        return scale_problems(alpha / rank, kind)

    @classmethod
    def fold(cls, matrix: np.ndarray, values: Arrays, rank: int, alpha: Union[int, float], **others: Any) -> np.ndarray:
        return matrix + np.float32(alpha / rank) * cls.matrix_of(values).reshape(matrix.shape)

    @property
    def operators(self) -> Operators:
        table = {"mul": (self.delta_mul, "fk,")}
        if self.dropout is not None:
            table.update(self.dropout.operators)
            table["drop_mul"] = (self.drop_mul, "no,o" if self.dropout.drops_outputs else "no,f")
        table["add"] = (self.delta_add, "no,no")
        return {f"strategy_{self.slots}_{slot}": value for slot, value in table.items()}

    @property
    def signature(self) -> Any:
        return type(self), self.rank, self.scale, self.dropout and self.dropout.signature

    def extend_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.scale * self.rank:g}"


class OutputDropout(nn.Cell):
    """Factors of the outputs of a delta while training, some or all of them zero: `(out,)`, or `(1,)` for all; float32.

    Args:
        size: number of outputs.
        rank_dropout: probability in [0, 1) of zero, for each output.
        module_dropout: the same for all of them together; one of the two is not zero.
        rescales: whether the factors that `rank_dropout` leaves are divided by their mean, and not one; if it leaves
            none, all are zero.
    """

    def __init__(self, size: int, rank_dropout: float, module_dropout: float, rescales: bool):
        super().__init__()
        self.drops_outputs, self.drops_whole, self.rescales = rank_dropout > 0, module_dropout > 0, rescales
        self.probabilities = rank_dropout, module_dropout
        if self.drops_outputs:
            self.ones, self.rank_dropout = Tensor(np.ones(size, np.float32)), get_dropout(rank_dropout)
            if rescales:
                self.rank_mean, self.rank_max, self.rank_div = (
                    ops.ReduceMean(keep_dims=True),
                    ops.Maximum(),
                    ops.RealDiv(),
                )
            else:
                self.rank_sign = ops.Sign()
        if self.drops_whole:
            self.one, self.module_dropout = Tensor(np.ones(1, np.float32)), get_dropout(module_dropout)
            self.module_sign = ops.Sign()
        if self.drops_outputs and self.drops_whole:
            self.module_mul = ops.Mul()

    def construct(self):
        if not self.drops_outputs:
            return self.module_sign(self.module_dropout(self.one))
        outputs = self.rank_dropout(self.ones)
        if self.rescales:
            outputs = self.rank_div(outputs, self.rank_max(self.rank_mean(outputs, 0), 1e-12))
        else:
            outputs = self.rank_sign(outputs)
        if not self.drops_whole:
            return outputs
        return self.module_mul(outputs, self.module_sign(self.module_dropout(self.one)))

    @property
    def operators(self) -> Operators:
        """What comes behind the method's name in the slots of `shard()` -> operator, axes; every rank has all."""
        table = {}
        if self.drops_outputs:
            table["rank_dropout"] = (self.rank_dropout.dropout, "f")
            if self.rescales:
                table["rank_mean"], table["rank_max"] = (self.rank_mean, "f"), (self.rank_max, "f,")
                table["rank_div"] = (self.rank_div, "f,k")
            else:
                table["rank_sign"] = (self.rank_sign, "f")
        if self.drops_whole:
            table.update(module_dropout=(self.module_dropout.dropout, "f"), module_sign=(self.module_sign, "f"))
        if self.drops_outputs and self.drops_whole:
            table["module_mul"] = (self.module_mul, "f,k")
        return table

    @property
    def signature(self) -> Any:
        """What must be equal for two of them to be the same."""
        return self.probabilities, self.rescales


class MatrixConvolution(MatrixDelta):
    """The part of a convolution: dW is the weight of another one like it. It comes first among the bases of a class.

    It has no strategies, so it is refused beside a layer that has some.
    """

    operators = {}

    @classmethod
    def problems(cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, **others: Any) -> list[str]:
        problems = [f"no {cls.__name__} beside a layer with strategies"] if is_sharded else []
        return problems + super().problems(cell, kind, is_sharded, **others)

    def setup(self, cell, **arguments):
        super().setup(cell, **arguments)
        self.convolution = convolution_like(cell, self.kind.name, self.shape[0])

    def matrix(self):
        """`s dW` in the compute type, `(out, rest)`."""
        raise NotImplementedError

    def update(self, x):
        return self.convolution(self.to_compute(x), ops.reshape(self.matrix(), self.shape))

    def rows(self, out):
        return out

    def channels(self, vector):
        return ops.reshape(vector, (1, -1) + (1,) * (len(self.shape) - 2))


def factor_shapes(
    outs: int, ins: int, rank: int, kernel: Sequence[int] = (), effective: bool = False
) -> tuple[Shape, ...]:
    """The shapes of two factors of a matrix `(outs, ins * taps)`, and with `effective` of their core.

    Args:
        outs: its rows.
        ins: its columns for each tap of the kernel.
        rank: of the factors.
        kernel: of a convolution. Default: (), for a linear layer.
        effective: whether the taps are in a core, if there are several. Default: False.

    Returns:
        `(outs, rank)`, `(rank, ins * taps)`, or `(rank, outs)`, `(rank, ins)`, `(rank, rank, *kernel)` with a kernel
        of two axes.
    """
    taps = math.prod(kernel)
    if effective and taps > 1:
        return (rank, outs), (rank, ins), (rank, rank, *(*kernel, 1)[:2])
    return (outs, rank), (rank, ins * taps)


def product(left, right, core=None):
    """The matrix of two factors, see `factor_shapes`; of NumPy arrays or Tensors.

    .. math::
        \\Delta W = A B\\quad or\\quad \\Delta W_{o,i,t} = \\sum_{p,q} A_{p,o} B_{q,i} C_{p,q,t}

    Source: FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098, proposition 3.
    """
    if core is None:
        return left @ right
    rank, outs = left.shape
    inner = (left.T @ core.reshape((rank, -1))).reshape((outs, rank, -1))
    return (inner.swapaxes(1, 2) @ right).swapaxes(1, 2).reshape((outs, -1))


def product_shape(left: Shape, right: Shape, core: Shape = ()) -> Shape:
    """The shape of `product`, from those of what it is of."""
    return (left[1], right[1] * math.prod(core[2:])) if core else (left[0], right[1])


def factors_in_file(
    shapes: dict[str, Shape], rank: int, left: str, right: str, core: Optional[str]
) -> dict[str, tuple]:
    """The shapes of two factors, and of their core if the file has one, as far as those in the file tell."""
    a, b = ((*shapes.get(name, ()), size, size)[:2] for name, size in ((left, "out"), (right, "in")))
    if core not in shapes:
        return {left: (a[0], rank), right: (rank, b[1])}
    kernel = (*shapes[core][2:], 1, 1)[:2]
    return {left: (rank, a[1]), right: (rank, b[1]), core: (rank, rank, *kernel)}

"""VeRA: vectors that scale random matrices, which all layers share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindpet.delta._base import Delta, DeltaDense, delta_parameter, matrix_shape
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.utils.hints import Arrays, Operators, Shape
from mindpet.utils.validate import Checker, is_int
from mindpet.utils.version_control import get_dropout

LAMBDA_B, LAMBDA_D = "mindpet_delta_vera_lambda_b", "mindpet_delta_vera_lambda_d"
A, B = "mindpet_vera_a", "mindpet_vera_b"


@dataclass
class VeraConfig(TargetConfig):
    """VeRA, Kopiczko et al. 2023, arXiv:2310.11454.

    Args beyond those of PeftConfig and TargetConfig:
        r: rank. Default: 256.
        projection_prng_key: seed of the random matrices. They are others than PyTorch's of the same seed. Default: 0.
        save_projection: whether a file has them; must be True. Default: True.
        vera_dropout: probability in [0, 1) of zeroing an input of the update. Default: 0.0.
        d_initial: what lambda_d starts as. Default: 0.1.
        fan_in_fan_out: kept for Hugging Face PEFT, see `LoraConfig`. Default: False.
        bias: which biases train: 'none', 'all', or 'vera_only' for those of the targets. Default: 'none'.
        init_weights: kept for Hugging Face PEFT; of no effect. Default: True.
    """

    peft_type, method_name = "VERA", "vera"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    required = ("r",)
    not_in_peft = ("exclude_modules",)

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "rank": self.r,
            "dropout": float(self.vera_dropout),
            "d_initial": float(self.d_initial),
            "seed": self.projection_prng_key,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.positive_int(r=self.r)
        check.require(
            is_int(self.projection_prng_key), TypeError, "projection_prng_key", self.projection_prng_key, "an int"
        )
        check.require(self.save_projection is True, ValueError, "save_projection", self.save_projection, "True")
        check.probability((int, float), vera_dropout=self.vera_dropout)
        check.nonzero_number(d_initial=self.d_initial)
        check.boolean(fan_in_fan_out=self.fan_in_fan_out, init_weights=self.init_weights)
        check.choice("bias", self.bias, ("none", "all", "vera_only"))


class VeraDelta(Delta):
    """The VeRA delta of a linear layer.

    .. math::
        y = out + \\lambda_b \\odot B\\, (\\lambda_d \\odot A\\, dropout(x))

    A and B are random, do not train, and are the same for all layers: a layer takes the first columns of A and the
    first rows of B.

    Source: Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454, equation 2.

    Delta arguments:
        rank (int): rows of A.
        dropout (float): probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        d_initial (float): what lambda_d starts as. Default: 0.1.
        seed (int): of A and B. Default: 0.
        shared (dict): A and B of all layers. Default: None, for those of this layer alone.
        dtype (mindspore.dtype): of the vectors. Default: float32.

    Parameters:
        mindpet_delta_vera_lambda_b: `(out,)`, zeros; mindpet_delta_vera_lambda_d: `(rank,)`; not trained:
        mindpet_vera_a: `(rank, largest in)`, mindpet_vera_b: `(largest out, rank)`.
    """

    before_activation = True
    file_names = {LAMBDA_B: "vera_lambda_b", LAMBDA_D: "vera_lambda_d"}
    shared_names = {A: "vera_A", B: "vera_B"}

    @classmethod
    def shared(cls, targets: Sequence[Any]) -> dict[str, Parameter]:
        shapes = [matrix_shape(target.cell, target.kind) for target in targets]
        outs, ins = zip(*shapes)
        return _projections(max(ins), max(outs), targets[0].arguments["rank"], targets[0].arguments["seed"])

    def setup(self, cell, rank, dropout=0.0, d_initial=0.1, seed=0, shared=None, dtype=ms.float32):
        self.rank, (self.outs, self.ins) = rank, matrix_shape(cell, self.kind)
        shared = shared or _projections(self.ins, self.outs, rank, seed)
        self.mindpet_vera_a, self.mindpet_vera_b = shared[A], shared[B]
        self.mindpet_delta_vera_lambda_b = delta_parameter("zeros", (self.outs,), dtype, LAMBDA_B)
        start = Tensor(np.full(rank, d_initial, np.float32))
        self.mindpet_delta_vera_lambda_d = delta_parameter(start, (rank,), dtype, LAMBDA_D)
        self.vera_dropout = get_dropout(dropout)
        self.vera_a_slice, self.vera_b_slice = ops.Slice(), ops.Slice()
        self.vera_a_matmul, self.vera_b_matmul = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        self.vera_d_mul, self.vera_b_mul, self.vera_add = ops.Mul(), ops.Mul(), ops.Add()

    def after(self, x, out):
        rows = self.vera_dropout(self.to_compute(to_rows(x)))
        a = self.to_compute(self.vera_a_slice(self.mindpet_vera_a, (0, 0), (self.rank, self.ins)))
        b = self.to_compute(self.vera_b_slice(self.mindpet_vera_b, (0, 0), (self.outs, self.rank)))
        inner = self.vera_d_mul(self.vera_a_matmul(rows, a), self.to_compute(self.mindpet_delta_vera_lambda_d))
        delta = self.vera_b_mul(self.vera_b_matmul(inner, b), self.to_compute(self.mindpet_delta_vera_lambda_b))
        return from_rows(self.vera_add(to_rows(out), cast(delta, out.dtype)), out)

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, **arguments: Any) -> bool:
        out_channels, in_channels = shape
        return len(values[LAMBDA_B]) == out_channels and values[A].shape[1] >= in_channels

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], rank: int, **others: Any) -> dict[str, tuple]:
        (out, *_), a, b = (shapes.get(name, ()) or ("out",) for name in (LAMBDA_B, A, B))
        rows = b[0] if b[0] == "out" or out == "out" or b[0] > out else out
        return {LAMBDA_B: (out,), LAMBDA_D: (rank,), A: (rank, (*a, "in", "in")[1]), B: (rows, rank)}

    @classmethod
    def fold(cls, matrix: np.ndarray, values: Arrays, **arguments: Any) -> np.ndarray:
        outs, ins = matrix.shape
        scaled = values[LAMBDA_D][:, None] * values[A][:, :ins]
        return matrix + values[LAMBDA_B][:, None] * (values[B][:outs] @ scaled)

    @property
    def operators(self) -> Operators:
        return {
            "strategy_vera_dropout": (self.vera_dropout.dropout, "ni"),
            "strategy_vera_a_slice": (self.vera_a_slice, "fk"),
            "strategy_vera_a_matmul": (self.vera_a_matmul, "ni,ri"),
            "strategy_vera_d_mul": (self.vera_d_mul, "nr,r"),
            "strategy_vera_b_slice": (self.vera_b_slice, "fk"),
            "strategy_vera_b_matmul": (self.vera_b_matmul, "nr,or"),
            "strategy_vera_b_mul": (self.vera_b_mul, "no,o"),
            "strategy_vera_add": (self.vera_add, "no,no"),
        }

    @property
    def signature(self) -> Any:
        return type(self), self.rank, self.vera_dropout.p

    def extend_repr(self) -> str:
        return f"rank={self.rank}"


def _projections(ins, outs, rank, seed):
    """A `(rank, ins)` and B `(outs, rank)`, Kaiming uniform: of variance 2 / columns."""
    rng = np.random.default_rng(seed)
    matrices = {}
    for name, shape in ((A, (rank, ins)), (B, (outs, rank))):
        bound = np.sqrt(6 / shape[1])
        value = rng.uniform(-bound, bound, shape).astype(np.float32)
        matrices[name] = Parameter(Tensor(value), name=name, requires_grad=False)
    return matrices


class VeraDense(DeltaDense, VeraDelta):
    """A Dense layer with a VeRA delta.

    .. math::
        y = activation(x W^T + b + \\lambda_b \\odot B\\, (\\lambda_d \\odot A\\, dropout(x)))

    Source: Kopiczko et al. 2023, arXiv:2310.11454, equation 2. lambda_b starts as zeros, so a fresh VeraDense computes
    what the Dense layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        vera_rank: rows of A and columns of B.
        vera_dropout: probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        d_initial: what lambda_d starts as. Default: 0.1.
        seed: of A and B. Default: 0.
        shared: a layer that is at least as large, to have the A and B of. Default: None, for its own.
        dense: keywords of `DeltaDense`.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, and those of `VeraDelta`.

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
        vera_rank: int,
        vera_dropout: float = 0.0,
        d_initial: Union[int, float] = 0.1,
        seed: int = 0,
        shared: Optional["VeraDense"] = None,
        **dense: Any,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(vera_rank=vera_rank)
        check.probability(vera_dropout=vera_dropout)
        check.nonzero_number(d_initial=d_initial)
        check.require(is_int(seed), TypeError, "seed", seed, "an int")
        known = shared is None or isinstance(shared, VeraDense)
        if check.require(known, TypeError, "shared", shared, "a VeraDense or None") and shared is not None:
            sizes = (shared.rank, shared.mindpet_vera_a.shape[1], shared.mindpet_vera_b.shape[0])
            fits = sizes[0] == vera_rank and sizes[1] >= in_channels and sizes[2] >= out_channels
            rule = f"of rank {vera_rank}, and at least as large as {(in_channels, out_channels)}"
            check.require(fits, ValueError, "shared", sizes, rule)
        matrices = None if shared is None or check.problems else {A: shared.mindpet_vera_a, B: shared.mindpet_vera_b}
        super().__init__(
            in_channels,
            out_channels,
            check=check,
            rank=vera_rank,
            dropout=vera_dropout,
            d_initial=d_initial,
            seed=seed,
            shared=matrices,
            **dense,
        )

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, rank={self.rank}"


METHOD = Method(
    "vera",
    VeraConfig,
    ("*mindpet_delta_vera*",),
    {"linear": VeraDelta},
    (VeraDense,),
    saved=("*mindpet_vera_a", "*mindpet_vera_b"),
    identity=True,
)

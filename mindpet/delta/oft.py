"""OFT: the input of a frozen layer is rotated, a block of features at a time."""

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from mindpet.delta._base import Delta, DeltaDense, delta_parameter, matrix_shape
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.errors import ConfigError
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.utils.hints import Arrays, Operators, Shape, Strategy
from mindpet.utils.layouts import counts_of
from mindpet.utils.quote import quote
from mindpet.utils.sharding import check_strategy
from mindpet.utils.validate import Checker, is_int
from mindpet.utils.version_control import get_dropout

OFT = "mindpet_delta_oft"
# The exact transform inverts I + Q by Newton's iteration, whose factors are fixed for all Q of a norm up to this one.
# Beyond it the iteration runs away, and gives NaN; a network never gets there: at 1000 all is turned by 180 degrees.
LARGEST = 1000.0
STEPS = 13


@dataclass
class OFTConfig(TargetConfig):
    """OFT, Qiu et al. 2023, arXiv:2306.07280, acting on inputs as in OFTv2, Qiu et al. 2025, arXiv:2506.19847.

    `r` or `oft_block_size` is zero, and the other one says how the features of a layer are cut into blocks. Where it
    does not divide the features, the divisor next to it is taken, with a warning.

    Args beyond those of PeftConfig and TargetConfig:
        r: blocks. Default: 0.
        oft_block_size: features of a block. Default: 32.
        module_dropout: probability in [0, 1) of leaving out the rotation of a block while training. Default: 0.0.
        fan_in_fan_out: kept for Hugging Face PEFT, see `LoraConfig`. Default: False.
        bias: which biases train: 'none', 'all', or 'oft_only' for those of the targets. Default: 'none'.
        init_weights: True for rotations by nothing, False for normal ones. Default: True.
        coft: keep each block's Q as short as `eps` says. Default: False.
        eps: the length that Q may have in COFT, divided by the square root of the blocks. Default: 0.00006.
        block_share: one rotation for all blocks of a layer. Default: False.
        use_cayley_neumann: a power series in place of the exact transform, see `OFTDelta`. Default: True.
        num_cayley_neumann_terms: its terms, at least 2. Default: 5.
    """

    peft_type, method_name = "OFT", "oft"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    required = ("oft_block_size", "use_cayley_neumann")

    def check_supported(self, from_file: bool = False) -> None:
        super().check_supported(from_file)
        version = re.match(r"0\.(\d+)\.", self.peft_version or "")
        if self.use_cayley_neumann and version and int(version[1]) < 18:
            raise ConfigError(
                f"OFTConfig: not supported: use_cayley_neumann=True with peft_version={quote(self.peft_version)}; the "
                "series is another one since 0.18.0 of Hugging Face PEFT, so the adapter must be trained again."
            )

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "blocks": self.r,
            "block_size": self.oft_block_size,
            "dropout": float(self.module_dropout),
            "coft": self.coft,
            "eps": float(self.eps),
            "block_share": self.block_share,
            "neumann": self.use_cayley_neumann,
            "terms": self.num_cayley_neumann_terms,
            "init": self.init_weights,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        sizes = {"r": self.r, "oft_block_size": self.oft_block_size}
        for name, value in sizes.items():
            rule = "an int, at least 0"
            check.require(
                is_int(value) and value >= 0, TypeError if not is_int(value) else ValueError, name, value, rule
            )
        rule = "given if the other one is 0, and only then"
        is_one = [self.r, self.oft_block_size].count(0) == 1
        check.require(is_one, ValueError, "r' or 'oft_block_size", tuple(sizes.values()), rule)
        for name in ("fan_in_fan_out", "init_weights"):
            check.boolean(**{name: getattr(self, name)})
        check.choice("bias", self.bias, ("none", "all", "oft_only"))
        check_rotation(
            check,
            self.module_dropout,
            self.coft,
            self.eps,
            self.block_share,
            self.use_cayley_neumann,
            self.num_cayley_neumann_terms,
        )


def check_rotation(
    check: Checker,
    module_dropout: Any,
    coft: Any,
    eps: Any,
    block_share: Any,
    use_cayley_neumann: Any,
    num_cayley_neumann_terms: Any,
    types: Union[type, tuple[type, ...]] = (int, float),
) -> None:
    """Note what is wrong with the arguments that the configuration and the hand-made layer have in common."""
    check.probability(types, module_dropout=module_dropout)
    check.boolean(coft=coft, block_share=block_share, use_cayley_neumann=use_cayley_neumann)
    check.nonzero_number(eps=eps)
    if not check.problems:
        check.require(eps > 0, ValueError, "eps", eps, "above 0")
    terms, rule = num_cayley_neumann_terms, "at least 2, for with fewer nothing is rotated"
    if check.require(is_int(terms), TypeError, "num_cayley_neumann_terms", terms, "an int"):
        check.require(terms >= 2, ValueError, "num_cayley_neumann_terms", terms, rule)


class OFTDelta(Delta):
    """Rotations R of the input of a linear layer, one for each block of features.

    .. math::
        y = layer(x\\, diag(R_1, ..., R_n))

    Q is the skew-symmetric matrix of a block, whose upper triangle is trained, row by row. The rotation is

    .. math::
        R = I + 2 Q + 2 Q^2 + ... + 2 Q^{t - 2} + Q^{t - 1}\\quad or, exact,\\quad R = (I - Q) (I + Q)^{-1}

    with t terms, at least 4 if there are more than 2: as in Hugging Face PEFT, where the exact one turns the other way.
    COFT keeps Q within `||Q|| <= eps / sqrt(n)`: a training step starts from the nearest Q there.

    Source: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280, equations
    2 and 4; Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", arXiv:2506.19847, equations 2 and 5.

    Delta arguments:
        blocks (int): n, or 0. Default: 0.
        block_size (int): features of a block if `blocks` is 0. Of both the nearest divisor is taken. Default: 32.
        dropout (float): probability in [0, 1) of having I for R in a block while training. Default: 0.0.
        coft (bool): COFT. Default: False.
        eps (float): of COFT. Default: 0.00006.
        block_share (bool): one R for all blocks. Default: False.
        neumann (bool): the series, and not the exact rotation. Default: True.
        terms (int): of the series. Default: 5.
        init (bool): True for Q of zeros, False for normal ones. Default: True.
        dtype (mindspore.dtype): of the parameter. Default: float32.

    Parameters:
        mindpet_delta_oft: `(n, size (size - 1) / 2)`, of shared blocks `(1, ...)`.
    """

    before_activation = True
    file_names = {OFT: "oft_R.weight"}
    axis, cut = 1, "i"  # of the weight `(out, in)` the axis that is rotated, and its letter in `operators`

    def setup(
        self,
        cell,
        blocks=0,
        block_size=32,
        dropout=0.0,
        coft=False,
        eps=6e-5,
        block_share=False,
        neumann=True,
        terms=5,
        init=True,
        dtype=ms.float32,
    ):
        features = matrix_shape(cell, self.kind)[self.axis]
        self.size = nearest_size(features, blocks, block_size)
        self.count, self.block_share, self.neumann, self.terms = features // self.size, block_share, neumann, terms
        self.limit = longest(eps, 1 if block_share else self.count) if coft else 0.0
        shape = (1 if block_share else self.count, self.size * (self.size - 1) // 2)
        self.mindpet_delta_oft = delta_parameter("zeros" if init else Normal(0.1), shape, dtype, OFT)
        places, signs = skew_places(self.size)
        self.places, self.half_signs = Tensor(places.ravel(), ms.int32), Tensor(signs.ravel() / 2, ms.float32)
        self.oft_gather, self.oft_sign_mul = ops.Gather(), ops.Mul()
        self.oft_block_matmul, self.oft_block_add = ops.BatchMatMul(), ops.Add()
        if not neumann:
            self.one = Tensor(np.eye(self.size, dtype=np.float32)[None, None])
            self.oft_one_sub, self.oft_block_sub, self.oft_block_mul = ops.Sub(), ops.Sub(), ops.Mul()
        if block_share:
            self.oft_share_mul = ops.Mul()
        self.oft_dropout, self.oft_mask_mul = get_dropout(dropout), ops.Mul()
        self.oft_in_transpose, self.oft_out_transpose = ops.Transpose(), ops.Transpose()
        self.oft_parts_mul, self.oft_matmul, self.oft_add = ops.Mul(), ops.BatchMatMul(), ops.Add()
        # In how many parts `shard` cuts the rows. They are an axis in front of that of the blocks: MindSpore gives out
        # an operator's slices in the order of its axes, and would move slices between ranks if this one came behind.
        self.parts = 1

    def before(self, x):
        return self.rotate(x)

    def after(self, x, out):
        return out

    def rotate(self, x):
        """`x diag(R_1, ..., R_n)` as `x + x diag(R_1 - I, ...)`, so that Q of zeros leaves `x` bit for bit."""
        rows = to_rows(x)
        parts = self.parts if rows.shape[0] % self.parts == 0 else 1
        change = self.to_compute(self.change(parts))
        blocks = ops.reshape(self.to_compute(rows), (parts, -1, self.count, self.size))
        turned = self.oft_matmul(self.oft_in_transpose(blocks, (0, 2, 1, 3)), change)
        turned = ops.reshape(self.oft_out_transpose(turned, (0, 2, 1, 3)), rows.shape)
        return from_rows(self.oft_add(rows, cast(turned, x.dtype)), x)

    def change(self, parts):
        """`R - I` of each block, `(parts, n, size, size)`, float32, the same for all parts of the rows.

        The trained numbers are doubled, and halved with their signs, for MindSpore leaves out products with ones.
        """
        upper = self.oft_parts_mul(ops.full((parts, 1, 1), 2.0, dtype=ms.float32), self.upper_triangles())
        flat = self.oft_sign_mul(self.oft_gather(upper, self.places, 2), self.half_signs)
        skew = ops.reshape(flat, (parts, -1, self.size, self.size))
        change = self.series(skew) if self.neumann else self.exact(skew)
        if self.block_share:
            halves = ops.full((self.count, 1, 1), 0.5, dtype=ms.float32)
            change = self.oft_share_mul(self.oft_block_add(change, change), halves)
        if self.training and self.oft_dropout.p > 0:  # the mask is 0 or 1: what is kept is not made larger
            kept = ops.full((parts, self.count, 1, 1), 1 - self.oft_dropout.p, dtype=ms.float32)
            change = self.oft_mask_mul(change, self.oft_dropout(kept))
        return change

    def upper_triangles(self):
        """The trained numbers, float32; of COFT the nearest ones of the allowed length, with their own gradient.

        While training they are set to those, as in Hugging Face PEFT: the optimizer's step goes on from there.
        """
        value = cast(self.mindpet_delta_oft, ms.float32)
        if self.limit:
            norm = ops.sqrt(ops.square(value).sum(1, keepdims=True))
            near = ops.stop_gradient(value * (self.limit / ops.maximum(norm, self.limit)))
            value = near + (value - ops.stop_gradient(value))
            if self.training:
                ops.assign(self.mindpet_delta_oft, cast(near, self.mindpet_delta_oft.dtype))
        return value

    def series(self, skew):
        """`2 Q + ... + 2 Q^(t - 2) + Q^(t - 1)`, by Horner's rule."""
        double, result = self.oft_block_add(skew, skew), skew
        if self.terms == 2:
            return double
        for _ in range(max(self.terms, 4) - 2):
            result = self.oft_block_add(self.oft_block_matmul(skew, result), double)
        return result

    def exact(self, skew):
        """`-2 Q (I + Q)^-1`.

        Newton's iteration for the inverse, `X <- X (2 I - (I + Q) X)`, needs products of matrices only: every device
        has them, with gradients and with strategies, in both modes, where MatrixInverse has no strategy and runs on the
        host's side of an Ascend. The eigenvalues of `(I + Q) X` are real if X starts as a multiple of `I - Q`, so each
        step can be stretched to the best. In float32 the result is as near as that of an LU decomposition. A last step
        from the finished X has the exact gradient, `-X dQ X`, and none goes back through the iteration.
        """
        still = ops.stop_gradient(skew)
        start, stretches = newton_factors()
        inverse = self.oft_block_mul(self.oft_one_sub(self.one, still), start)
        for stretch in stretches:
            inverse = self.oft_block_mul(self.newton(still, inverse), stretch)
        inverse = self.newton(skew, ops.stop_gradient(inverse))
        return self.oft_block_mul(self.oft_block_matmul(skew, inverse), -2.0)

    def newton(self, skew, inverse):
        """`X (2 I - (I + Q) X)`."""
        product = self.oft_block_add(inverse, self.oft_block_matmul(skew, inverse))
        double = self.oft_block_add(inverse, inverse)
        return self.oft_block_sub(double, self.oft_block_matmul(inverse, product))

    @classmethod
    def problems(
        cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, blocks: int, block_size: int, coft: bool, **others: Any
    ) -> list[str]:
        features = matrix_shape(cell, kind)[cls.axis]
        size = nearest_size(features, blocks, block_size)
        problems = ["no COFT beside a layer with strategies"] if coft and is_sharded else []
        if size == 1:
            problems.append(f"its {features} features would be in blocks of one, which cannot be rotated")
        name, asked, near = ("r", blocks, features // size) if blocks else ("oft_block_size", block_size, size)
        if asked != near and not problems:
            warnings.warn(f"OFT: {name} {asked} does not divide {features} features; {near} is taken.", stacklevel=2)
        return problems

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, blocks: int, block_size: int, block_share: bool, **others: Any) -> bool:
        features = shape[cls.axis]
        size = nearest_size(features, blocks, block_size)
        return values[OFT].shape == (1 if block_share else features // size, size * (size - 1) // 2)

    @classmethod
    def file_shapes(
        cls, shapes: dict[str, Shape], blocks: int, block_size: int, block_share: bool, **others: Any
    ) -> dict[str, tuple]:
        rows, pairs = shapes.get(OFT, ()) if len(shapes.get(OFT, ())) == 2 else (blocks, 0)
        size = size_of(pairs)
        if not rows or size < 2 or size * (size - 1) // 2 != pairs:
            return {OFT: (rows or "blocks", "size (size - 1) / 2")}
        if block_share:
            return {OFT: (1, pairs)}
        features = rows * size
        size = nearest_size(features, blocks, block_size)
        return {OFT: (features // size, size * (size - 1) // 2)}

    @classmethod
    def fold(
        cls,
        matrix: np.ndarray,
        values: Arrays,
        coft: bool = False,
        eps: float = 6e-5,
        neumann: bool = True,
        terms: int = 5,
        **others: Any,
    ) -> np.ndarray:
        """`W diag(R_1, ..., R_n)^T`."""
        upper = values[OFT]
        size = size_of(upper.shape[1])
        if coft:
            limit = np.float32(longest(eps, len(upper)))
            upper = upper * (limit / np.maximum(np.linalg.norm(upper, axis=1, keepdims=True), limit))
        places, signs = skew_places(size)
        skew = upper[:, places] * signs.astype(np.float32)
        if neumann:
            change = skew if terms > 2 else 2 * skew
            for _ in range(max(terms, 4) - 2 if terms > 2 else 0):
                change = skew @ change + 2 * skew
        else:
            change = np.linalg.solve(np.eye(size, dtype=np.float32) + skew, -2 * skew)
        return cls.fold_change(matrix, change)

    @classmethod
    def fold_change(cls, matrix: np.ndarray, change: np.ndarray) -> np.ndarray:
        """The folded weight, from `R - I` of each block."""
        blocks = matrix.reshape(len(matrix), -1, change.shape[1], 1)
        return matrix + (change @ blocks).reshape(matrix.shape)

    def shard(self, **strategies: Optional[Strategy]) -> "OFTDelta":
        """Set the strategies of the operators; the slots are the keys of `operators`.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; the blocks cannot be cut so.
        """
        check = Checker(f"{type(self).__name__}.shard")
        check.require(not self.limit, ValueError, "coft", True, "False where there are strategies")
        strategy = strategies.get("strategy_oft_matmul")
        valid = strategy is not None and check_strategy(check, "strategy_oft_matmul", strategy, "nifk,nikl")
        if valid:
            rows, blocks = counts_of(strategy)[0][:2]
            rule = f"one that cuts the {self.count} blocks into equal parts"
            check.require(self.count % blocks == 0, ValueError, "strategy_oft_matmul", strategy, rule)
        check.done()
        super().shard(**strategies)
        self.parts = rows if valid else self.parts
        return self

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`; a block stays whole, and one that is shared is on every rank."""
        cut = self.cut
        blocks = "f" if self.block_share else cut
        table = {
            "strategy_oft_parts_mul": (self.oft_parts_mul, f"nff,{blocks}f"),
            "strategy_oft_gather": (self.oft_gather, f"n{blocks}f,k"),
            "strategy_oft_sign_mul": (self.oft_sign_mul, f"n{blocks}f,f"),
            "strategy_oft_block_matmul": (self.oft_block_matmul, f"n{blocks}kl,n{blocks}kl"),
            "strategy_oft_block_add": (self.oft_block_add, f"n{blocks}kl,n{blocks}kl"),
        }
        if not self.neumann:
            table["strategy_oft_one_sub"] = (self.oft_one_sub, f"ffkl,n{blocks}kl")
            table["strategy_oft_block_sub"] = (self.oft_block_sub, f"n{blocks}kl,n{blocks}kl")
            table["strategy_oft_block_mul"] = (self.oft_block_mul, f"n{blocks}kl,")
        if self.block_share:
            table["strategy_oft_share_mul"] = (self.oft_share_mul, f"nfkl,{cut}ff")
        return {
            **table,
            "strategy_oft_dropout": (self.oft_dropout.dropout, f"n{cut}kl"),
            "strategy_oft_mask_mul": (self.oft_mask_mul, f"n{cut}kl,n{cut}kl"),
            "strategy_oft_in_transpose": (self.oft_in_transpose, f"nf{cut}k"),
            "strategy_oft_matmul": (self.oft_matmul, f"n{cut}fk,n{cut}kl"),
            "strategy_oft_out_transpose": (self.oft_out_transpose, f"n{cut}fk"),
            "strategy_oft_add": (self.oft_add, f"n{cut},n{cut}"),
        }

    @property
    def signature(self) -> Any:
        return type(self), self.size, self.neumann, self.terms, self.limit, self.block_share, self.oft_dropout.p

    def extend_repr(self) -> str:
        return f"block_size={self.size}, blocks={self.count}, block_share={self.block_share}"


class OFTEmbedding(OFTDelta):
    """Rotations of what an embedding puts out, `y = layer(x) diag(R_1, ..., R_n)`; see `OFTDelta`."""

    file_names = {OFT: "oft_embedding_R.weight"}
    axis, cut = 0, "o"

    def before(self, x):
        return x

    def after(self, x, out):
        return self.rotate(out)

    @classmethod
    def fold_change(cls, matrix: np.ndarray, change: np.ndarray) -> np.ndarray:
        return super().fold_change(np.ascontiguousarray(matrix.T), change.transpose(0, 2, 1)).T


def size_of(pairs: int) -> int:
    """The features of a block that has so many pairs of them."""
    return (1 + math.isqrt(1 + 8 * pairs)) // 2


def nearest_size(features: int, blocks: int, size: int) -> int:
    """The features of a block: `features / blocks`, or `size` if `blocks` is 0; of both the nearest divisor."""
    small = [number for number in range(1, math.isqrt(features) + 1) if features % number == 0]
    divisors = small + [features // number for number in reversed(small)]
    near = min(divisors, key=lambda divisor: abs(divisor - (blocks or size)))  # of two the smaller one
    return features // near if blocks else near


def longest(eps: float, rows: int) -> float:
    """How long the upper triangle of Q may be in COFT, which is 1 / sqrt(2) of Q's own length."""
    return eps / math.sqrt(2 * rows)


def skew_places(size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each element of Q, `(size, size)`, its place in the upper triangle, and its sign, 0 on the diagonal."""
    rows, columns = np.triu_indices(size, 1)
    places, signs = np.zeros((size, size), np.int32), np.zeros((size, size), np.int8)
    places[rows, columns] = places[columns, rows] = np.arange(len(rows))
    signs[rows, columns], signs[columns, rows] = 1, -1
    return places, signs


def newton_factors():
    """What X starts as, as a multiple of `I - Q`, and the stretch behind each step of the iteration.

    The eigenvalues of `(I + Q) X` are in [d, 2 - d], with d = 2 / (2 + LARGEST^2) at first; a step takes them to
    [g, 1], with g = d (2 - d), and the stretch 2 / (1 + g) to [d', 2 - d'], with d' = 2 g / (1 + g).
    """
    start = least = 2 / (2 + LARGEST**2)
    stretches = []
    for _ in range(STEPS):
        least = least * (2 - least)
        stretches.append(2 / (1 + least))
        least = 2 * least / (1 + least)
    return start, stretches


class OFTDense(DeltaDense, OFTDelta):
    """A Dense layer whose input is rotated, a block of features at a time.

    .. math::
        y = activation(x\\, diag(R_1, ..., R_n)\\, W^T + b)

    Source: Qiu et al. 2023, arXiv:2306.07280; Qiu et al. 2025, arXiv:2506.19847; see `OFTDelta` for R. A fresh OFTDense
    computes what the Dense layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        oft_block_size: features of a block, a divisor of `in_channels`. Default: 32.
        module_dropout: probability in [0, 1) of leaving out the rotation of a block while training. Default: 0.0.
        coft: keep Q short, see `OFTDelta`. Default: False.
        eps: of COFT. Default: 0.00006.
        block_share: one rotation for all blocks. Default: False.
        use_cayley_neumann: the series, and not the exact rotation. Default: True.
        num_cayley_neumann_terms: of the series, at least 2. Default: 5.
        dense: keywords of `DeltaDense`.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, and that of `OFTDelta`.

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
        oft_block_size: int = 32,
        module_dropout: float = 0.0,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        use_cayley_neumann: bool = True,
        num_cayley_neumann_terms: int = 5,
        **dense: Any,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(oft_block_size=oft_block_size)
        if not check.problems and is_int(in_channels) and in_channels > 0:
            rule = f"a divisor of {in_channels}, 'in_channels', and no 1"
            divides = oft_block_size > 1 and in_channels % oft_block_size == 0
            check.require(divides, ValueError, "oft_block_size", oft_block_size, rule)
        check_rotation(
            check, module_dropout, coft, eps, block_share, use_cayley_neumann, num_cayley_neumann_terms, types=(float,)
        )
        super().__init__(
            in_channels,
            out_channels,
            check=check,
            block_size=oft_block_size,
            dropout=module_dropout,
            coft=coft,
            eps=eps,
            block_share=block_share,
            neumann=use_cayley_neumann,
            terms=num_cayley_neumann_terms,
            **dense,
        )

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, block_size={self.size}, block_share={self.block_share}"


METHOD = Method(
    "oft",
    OFTConfig,
    ("*mindpet_delta_oft",),
    {"linear": OFTDelta, "embedding": OFTEmbedding},
    (OFTDense,),
    identity=True,
)

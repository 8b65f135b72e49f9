"""LoRA: a low-rank update beside a frozen layer: linear, embedding or convolution."""

import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Normal, initializer
from mindspore.ops import Primitive

from mindpet.delta._base import Delta, DeltaDense, delta_parameter, scale_problems, set_zeros
from mindpet.delta._config import PeftConfig, TargetConfig
from mindpet.delta._method import Method
from mindpet.errors import ConfigError
from mindpet.layers.convolution import AXES, convolution_like, pointwise_like
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.network.match import exactly, pattern_value
from mindpet.network.values import assign
from mindpet.utils.hints import ActivationLike, Arrays, InitLike, Operators, Shape, Strategy
from mindpet.utils.quote import quote
from mindpet.utils.sharding import apply_strategies
from mindpet.utils.validate import Checker
from mindpet.utils.version_control import get_dropout

A, B, BIAS, MAGNITUDE = (f"mindpet_delta_lora_{name}" for name in ("a", "b", "bias", "magnitude"))
SCALING, START_A, START_B = "mindpet_lora_scaling", "mindpet_lora_start_a", "mindpet_lora_start_b"
FOREIGN_INITS = ("corda", "lora_ga", "loftq")
APPROXIMATE_INITS = r"pissa_niter_\d+"
INITS = rf"gaussian|pissa|{APPROXIMATE_INITS}|olora"


@dataclass
class LoraConfig(TargetConfig):
    """LoRA, Hu et al. 2021, arXiv:2106.09685.

    Args beyond those of PeftConfig and TargetConfig:
        r: rank. Default: 8.
        lora_alpha: scale; the update is multiplied by `lora_alpha / r`. Default: 8.
        lora_dropout: probability in [0, 1) of zeroing an input of the update. Default: 0.0.
        fan_in_fan_out: whether the linear layers of the PyTorch model store their weight as `(in, out)`; kept for
            Hugging Face PEFT. Which way up a Cell's weight is, `mindpet.network.kinds` knows. Default: False.
        bias: which biases train: 'none', 'all', or 'lora_only' for those of the targets. Default: 'none'.
        use_rslora: scale by `lora_alpha / sqrt(r)`, Kalajdzievski 2023, arXiv:2312.03732. Default: False.
        init_lora_weights: True for Kaiming A and zero B, False for both random, 'gaussian', 'pissa', 'pissa_niter_N',
            which is computed exactly here, or 'olora'; of an adapter that is loaded, whatever it says. Default: True.
        rank_pattern: layer name or regular expression -> another rank. Default: {}.
        alpha_pattern: layer name or regular expression -> another alpha. Default: {}.
        use_dora: magnitude and direction apart, Liu et al. 2024, arXiv:2402.09353. Default: False.
        lora_bias: a bias of B. Default: False.
        freeze_a: whether A stays what it starts as, LoRA-FA, Zhang et al. 2023, arXiv:2308.03303: a layer then keeps
            `r` numbers a token for the backward pass, and not its input. Default: None, for no.
    """

    peft_type, method_name = "LORA", "lora"

    r: int = 8
    lora_alpha: Union[int, float] = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: Union[bool, str] = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, Union[int, float]] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    freeze_a: Optional[bool] = None

    required = ("lora_alpha",)
    not_in_peft = ("freeze_a",)
    told_by_tensors = ("r",)

    def scaling(self, path: str) -> float:
        """The scale of the layer at `path`."""
        arguments = self.delta_arguments(path)
        return arguments["alpha"] / self.divisor(arguments["rank"])

    def divisor(self, rank: int) -> float:
        """What alpha is divided by."""
        return math.sqrt(rank) if self.use_rslora else rank

    def of_delta_file(self, shapes: dict[str, dict[str, Shape]], tensors: Arrays) -> tuple[PeftConfig, Arrays]:
        config, tensors = super().of_delta_file(shapes, tensors)
        ranks = {path: (*names[A], 0)[0] for path, names in shapes.items() if A in names}
        said = {path: pattern_value(self.rank_pattern, path, rank) for path, rank in ranks.items()}
        wrong = {path: rank for path, rank in ranks.items() if said[path] != rank}
        if wrong:
            lines = [f"{path}: {said[path]} is given, but it is {rank}" for path, rank in wrong.items()]
            raise ConfigError("the ranks are not those of the tensors:\n  " + "\n  ".join(lines))
        config.r = max(ranks.values(), key=list(ranks.values()).count) if ranks else self.r
        config.rank_pattern = {exactly(path): rank for path, rank in ranks.items() if rank != config.r}
        start = [key for key in tensors if "mindpet_lora_start_" in key]
        if start and not starts_from_weight(self.init_lora_weights):
            raise ConfigError(
                f"{start[0]} is a part of the base that the adapter starts from: 'init_lora_weights' must say how, "
                f"'pissa' or 'olora', but is {self.init_lora_weights!r}."
            )
        if re.fullmatch(APPROXIMATE_INITS, str(self.init_lora_weights)):
            config.init_lora_weights = "pissa"  # it was computed exactly
        return config, {key: value for key, value in tensors.items() if key not in start}

    def check_supported(self, from_file: bool = False) -> None:
        super().check_supported(from_file)
        init = self.init_lora_weights
        # A fresh adapter starts from the exact decomposition; in a file it was an approximation with random numbers.
        random = isinstance(init, str) and re.fullmatch(APPROXIMATE_INITS, init) and (from_file or self.inference_mode)
        if random or init in FOREIGN_INITS:
            raise ConfigError(
                f"LoraConfig: not supported: init_lora_weights={quote(init)}, which takes a part off the base that "
                "cannot be told from the file; save the adapter as plain LoRA, with "
                "path_initial_model_for_weight_conversion of save_pretrained in Hugging Face PEFT."
            )

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "rank": pattern_value(self.rank_pattern, path, self.r),
            "alpha": pattern_value(self.alpha_pattern, path, self.lora_alpha),
            "dropout": float(self.lora_dropout),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "init": self.init_lora_weights,
            "freeze_a": bool(self.freeze_a),
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.require(not (self.use_dora and self.lora_bias), ValueError, "lora_bias", True, "False with DoRA")
        check.positive_int(r=self.r)
        check.nonzero_number(lora_alpha=self.lora_alpha)
        check.probability((int, float), lora_dropout=self.lora_dropout)
        for name in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"):
            check.boolean(**{name: getattr(self, name)})
        known = self.freeze_a is None or isinstance(self.freeze_a, bool)
        check.require(known, TypeError, "freeze_a", self.freeze_a, "a bool or None")
        check.choice("bias", self.bias, ("none", "all", "lora_only"))
        init = self.init_lora_weights
        known = isinstance(init, bool) or (isinstance(init, str) and re.fullmatch(INITS, init))
        rule = "a bool, 'gaussian', 'pissa', 'pissa_niter_N' or 'olora'"
        check.require(known or self.inference_mode, ValueError, "init_lora_weights", init, rule)


class LoraDelta(Delta):
    """The LoRA delta of a linear layer.

    .. math::
        out + s\\, B A\\, dropout(x)\\quad or, with DoRA,\\quad b + g \\odot (out - b + s\\, B A\\, dropout(x)),
        \\quad g = m / \\lVert W + s B A \\rVert

    with s = alpha / rank, or alpha / sqrt(rank) for rsLoRA, and the norm over all axes of W but the first, taken as
    a constant in the backward pass. An embedding has its table's transpose as W. PiSSA and OLoRA take off W what A and
    B start as: there the update is `s (B A dropout(x) - B_0 A_0 x)`.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685, equation 3; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732, equation
    2; DoRA, Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.

    Delta arguments:
        rank (int): rows of A.
        alpha (Union[int, float]): scale.
        dropout (float): probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        use_rslora (bool): the scale of rsLoRA. Default: False.
        use_dora (bool): DoRA. Default: False.
        lora_bias (bool): adds `s * mindpet_delta_lora_bias`. Default: False.
        init (Union[bool, str, tuple]): True: A Kaiming uniform and B zero, of an embedding A zero and B normal;
            'gaussian': A normal with deviation 1 / rank; False: neither is zero; 'pissa', 'olora': see `start`; or the
            initialisers of A and B. Default: True.
        freeze_a (bool): whether A does not train. Default: False.
        dtype (mindspore.dtype): of the parameters. Default: float32.

    Parameters:
        mindpet_delta_lora_a, mindpet_delta_lora_b: see `shapes` of the class; mindpet_delta_lora_magnitude: `(out,)`,
        of a convolution `(1, out, 1, ...)`; mindpet_delta_lora_bias: `(out,)`; not trained: mindpet_lora_scaling: `()`,
        mindpet_lora_start_a, mindpet_lora_start_b: A_0 and B_0.
    """

    before_activation = True
    file_names = {
        A: "lora_A.weight",
        B: "lora_B.weight",
        BIAS: "lora_B.bias",
        MAGNITUDE: "lora_magnitude_vector",
    }

    def setup(
        self,
        cell,
        rank,
        alpha,
        dropout=0.0,
        use_rslora=False,
        use_dora=False,
        lora_bias=False,
        init=True,
        freeze_a=False,
        dtype=ms.float32,
    ):
        weight = self.kind.weight_of(cell)
        self.rank, self.use_rslora, self.use_dora, self.lora_bias = rank, use_rslora, use_dora, lora_bias
        self.starts_from_weight = starts_from_weight(init)
        # The scaled bias alone would be cut otherwise than the outputs (MindSpore), and model libraries give `mul` of
        # LoRADense a strategy for these.
        self.scales_outputs = lora_bias or not self.is_patched_in
        self.fixed_names = (A,) if freeze_a else ()
        self.set_scaling(float(self.constants(rank, alpha, use_rslora)[SCALING]))
        shape_a, shape_b = self.shapes(cell, weight.shape)
        init_a, init_b = init if isinstance(init, tuple) else self.initial_values(init)
        # Stand-alone layers have always carried these names; inside a network the attribute's name is the key.
        self.mindpet_delta_lora_a = delta_parameter(init_a, shape_a, dtype, "mindpet_delta_lora_A")
        self.mindpet_delta_lora_b = delta_parameter(init_b, shape_b, dtype, "mindpet_delta_lora_B")
        if use_dora:
            self.mindpet_delta_lora_magnitude = delta_parameter("ones", self.magnitude_shape(shape_b), dtype, MAGNITUDE)
            self.keep_weight(cell)
            self.base_bias = self.kind.bias_of(cell) if self.kind.adds_bias else None
        if lora_bias:
            self.mindpet_delta_lora_bias = delta_parameter("zeros", shape_b[:1], dtype, BIAS)
            self.lora_bias_add = ops.BiasAdd("NCDHW" if self.kind.name == "conv3d" else "NCHW")
        if self.starts_from_weight:
            self.mindpet_lora_start_a = Parameter(initializer("zeros", shape_a, ms.float32), requires_grad=False)
            self.mindpet_lora_start_b = Parameter(initializer("zeros", shape_b, ms.float32), requires_grad=False)
            self.lora_start_a_matmul, self.lora_start_b_matmul = self.make_operators(cell, shape_b)
            self.sub = ops.Sub()
        self.lora_dropout = get_dropout(dropout)
        self.lora_a_matmul, self.lora_b_matmul = self.make_operators(cell, shape_b)
        self.mul = ops.Mul()
        self.add = ops.Add()

    def set_scaling(self, scaling: float) -> None:
        """Have s, as a Parameter, so that another adapter's can take its place without a new graph."""
        # MindSpore's parallel optimizer (2.7 to 2.10) ends the process where it is to cut a Parameter without axes.
        value = Tensor(scaling, ms.float32)
        self.mindpet_lora_scaling = Parameter(value, requires_grad=False, parallel_optimizer=False)

    @property
    def scaling(self) -> float:
        """s."""
        return float(self.mindpet_lora_scaling.asnumpy())

    def after(self, x, out):
        rows = self.rows(out)
        delta = self.update(x, self.to_compute(self.mindpet_delta_lora_a), self.to_compute(self.mindpet_delta_lora_b))
        if self.starts_from_weight:
            delta = self.sub(delta, self.start_update(x))
        if self.lora_bias:
            delta = self.lora_bias_add(delta, self.to_compute(self.mindpet_delta_lora_bias))
        if self.scales_outputs:
            delta = self.scale(delta)
        delta = cast(delta, out.dtype)
        return from_rows(self.stretch(rows, delta) if self.use_dora else self.add(rows, delta), out)

    def scale(self, value):
        """`s value`."""
        return self.mul(value, self.to_compute(self.mindpet_lora_scaling))

    def scale_inner(self, inner):
        """`s A x`, the fewest numbers that the update passes through; A x if the outputs are scaled."""
        return inner if self.scales_outputs else self.scale(inner)

    def update(self, x, lora_a, lora_b):
        """`s B A dropout(x)`, or without s, in the compute type."""
        inner = self.lora_a_matmul(self.lora_dropout(self.to_compute(to_rows(x))), lora_a)
        return self.lora_b_matmul(self.scale_inner(inner), lora_b)

    def start_update(self, x):
        """`s B_0 A_0 x`, or without s, in the compute type, of a linear layer."""
        lora_a, lora_b = self.to_compute(self.mindpet_lora_start_a), self.to_compute(self.mindpet_lora_start_b)
        inner = self.lora_start_a_matmul(self.to_compute(to_rows(x)), lora_a)
        return self.lora_start_b_matmul(self.scale_inner(inner), lora_b)

    def reset(self) -> None:
        """Make the delta the identity, whatever its values were: all is zero, and DoRA's magnitude the norm of W."""
        set_zeros(*(param for name, param in self._params.items() if name in (A, B, BIAS, START_A, START_B)))
        if self.use_dora:
            self.set_magnitude()

    def set_magnitude(self) -> None:
        """Set DoRA's magnitude so that its gain is one."""
        weight = self.kept_weight()
        if weight.has_init:  # in semi-auto parallel mode, until it is compiled or loaded
            warnings.warn(f"DoRA: {weight.name} has no values yet; load the base first.", stacklevel=2)
            return
        magnitude = self.mindpet_delta_lora_magnitude
        assign(magnitude, cast(self.norm(), magnitude.dtype))

    def gain(self):
        """`m / ||W + s B A||`, float32; of a row of zeros that was never trained it is one, and not 0 / 0."""
        norm = ops.stop_gradient(self.norm())
        is_zero = cast(norm == 0, ms.float32)
        return (cast(self.mindpet_delta_lora_magnitude, ms.float32) + is_zero) / (norm + is_zero)

    def norm(self):
        """`||W + s B A||` in the magnitude's shape, float32."""
        weight, lora_a, lora_b = self.kept_weight(), self.mindpet_delta_lora_a, self.mindpet_delta_lora_b
        weight, lora_a, lora_b = (self.as_matrix(cast(param, ms.float32)) for param in (weight, lora_a, lora_b))
        update = ops.matmul(self.mindpet_lora_scaling * lora_b, lora_a)
        if self.starts_from_weight:
            start_b = self.mindpet_lora_scaling * self.mindpet_lora_start_b
            update = update - ops.matmul(start_b, self.mindpet_lora_start_a)
        tuned = (ops.transpose(weight, (1, 0)) if self.kind.transposed else weight) + update
        return self.channels(ops.sqrt(ops.square(tuned).sum(1)))

    def stretch(self, rows, delta):
        """`b + g (rows - b + delta)`, where the delta is zero and g one bit for bit the rows."""
        gain = cast(self.gain(), rows.dtype)
        if self.base_bias is None:
            return gain * self.add(rows, delta)
        before = rows - self.channels(cast(self.base_bias, rows.dtype))
        return self.add(rows, gain * (before + delta) - before)

    def rows(self, out):
        """The output as `(rows, out)`."""
        return to_rows(out)

    def channels(self, vector):
        """A vector `(out,)` so that it goes with the output."""
        return vector

    def as_matrix(self, weight):
        """A weight as `(first axis, rest)`."""
        return weight

    def magnitude_shape(self, shape_b: Shape) -> Shape:
        """The shape of DoRA's magnitude."""
        return shape_b[:1]

    def shapes(self, cell: nn.Cell, weight: Shape) -> tuple[Shape, Shape]:
        """The shapes of A and B: `(rank, in)` and `(out, rank)`."""
        out_channels, in_channels = weight[::-1] if self.kind.transposed else weight
        return (self.rank, in_channels), (out_channels, self.rank)

    def initial_values(self, init: Union[bool, str]) -> tuple[InitLike, InitLike]:
        """Initialisers of A and B."""
        uniform = HeUniform(negative_slope=math.sqrt(5))
        return (Normal(1 / self.rank) if init == "gaussian" else uniform), (uniform if init is False else "zeros")

    def make_operators(
        self, cell: nn.Cell, shape_b: Shape
    ) -> tuple[Union[nn.Cell, Primitive], Union[nn.Cell, Primitive]]:
        """The operators that multiply by A and by B."""
        return ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)

    @classmethod
    def constants(cls, rank: int, alpha: Union[int, float], use_rslora: bool = False, **others: Any) -> Arrays:
        """`mindpet_lora_scaling`, s; other adapters of the same shapes may have another one."""
        return {SCALING: np.float32(alpha / (math.sqrt(rank) if use_rslora else rank))}

    @classmethod
    def problems(
        cls,
        cell: nn.Cell,
        kind: LayerKind,
        is_sharded: bool,
        rank: int,
        alpha: Union[int, float],
        use_rslora: bool,
        use_dora: bool,
        init: Any,
        **others: Any,
    ) -> list[str]:
        groups, problems = kind.groups_of(cell), []
        if rank % groups:
            problems.append(f"the rank, {rank}, must be a multiple of its {groups} groups")
        if use_dora and groups > 1:
            problems.append("no DoRA beside a convolution in groups")
        if use_dora and is_sharded:
            problems.append("no DoRA beside a layer with strategies")
        problems += scale_problems(cls.constants(rank, alpha, use_rslora)[SCALING], kind)
        if kind.name != "linear" and starts_from_weight(init):
            problems.append(f"init_lora_weights={init!r} is for linear layers")
        return problems

    @classmethod
    def start_names(cls, init: Any = True, use_dora: bool = False, **others: Any) -> tuple[str, ...]:
        return ((A, B, START_A, START_B) if starts_from_weight(init) else ()) + ((MAGNITUDE,) if use_dora else ())

    @classmethod
    def start(
        cls, matrix: np.ndarray, values: Arrays, init: Any = True, use_dora: bool = False, **others: Any
    ) -> Arrays:
        """What PiSSA and OLoRA start from, see `start_from_weight`, and DoRA's magnitude with which its gain is one."""
        fresh = {}
        if starts_from_weight(init):
            if not np.isfinite(matrix).all():
                raise ConfigError(f"init_lora_weights={init!r}, but the weight has NaN or infinite numbers.")
            lora_a, lora_b = start_from_weight(matrix, init, len(values[A]), float(values[SCALING]))
            fresh = {A: lora_a, B: lora_b, START_A: lora_a, START_B: lora_b}
        if use_dora:
            tuned = cls.fold(matrix, {name: value for name, value in {**values, **fresh}.items() if name != MAGNITUDE})
            fresh[MAGNITUDE] = np.linalg.norm(tuned, axis=1).reshape(values[MAGNITUDE].shape)
        return fresh

    @classmethod
    def fold(cls, matrix: np.ndarray, values: Arrays, **arguments: Any) -> np.ndarray:
        """`W + s (B A - B_0 A_0)`, or with DoRA `m (...) / ||...||`."""
        lora_a, lora_b = values[A], values[B]
        out_channels, rank = lora_b.shape[:2]
        group = len(lora_a) // rank  # of a convolution
        delta = np.matmul(lora_b.reshape(group, out_channels // group, rank), lora_a.reshape(group, rank, -1))
        delta = delta.reshape(matrix.shape)
        if START_A in values:
            delta = delta - values[START_B] @ values[START_A]
        merged = matrix + values[SCALING] * delta
        if MAGNITUDE in values:
            norm = np.linalg.norm(merged, axis=1)
            merged = merged * (values[MAGNITUDE].reshape(-1) / np.where(norm == 0, 1, norm))[:, None]
        return merged

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, **arguments: Any) -> bool:
        return (len(values[B]), math.prod(values[A].shape[1:])) == (shape[0], math.prod(shape[1:]))

    @classmethod
    def file_shapes(
        cls, shapes: dict[str, Shape], rank: int, use_dora: bool = False, lora_bias: bool = False, **others: Any
    ) -> dict[str, tuple]:
        a, b = shapes.get(A, ()), shapes.get(B, ())
        rest = a[1:] or ("in",)
        out, inner = (b[0], b[1]) if len(b) > 1 else ("out", rank)
        taps = (1,) * (len(rest) - 1)
        # B of a convolution in groups has a part of the rank.
        grouped = taps and inner and rank % inner == 0 and out != "out" and out % (rank // inner) == 0
        wanted = {A: (rank, *rest), B: (out, inner if grouped else rank, *taps)}
        if use_dora:
            wanted[MAGNITUDE] = (1, out, *taps) if taps else (out,)
        if lora_bias and BIAS in cls.file_names:
            wanted[BIAS] = (out,)
        return wanted

    @classmethod
    def folds_bias(cls, lora_bias: bool = False, **others: Any) -> bool:
        return lora_bias

    @classmethod
    def fold_bias(cls, bias: np.ndarray, values: Arrays, **arguments: Any) -> np.ndarray:
        return bias + values[SCALING] * values[BIAS] if BIAS in values else bias

    @property
    def operators(self) -> Operators:
        table = {
            "strategy_lora_dropout": (self.lora_dropout.dropout, "ni"),
            "strategy_lora_a_matmul": (self.lora_a_matmul, "ni,ri"),
            "strategy_lora_b_matmul": (self.lora_b_matmul, "nr,or"),
            "strategy_lora_mul": (self.mul, "no," if self.scales_outputs else "nr,"),
            "strategy_lora_add": (self.add, "no,no"),
        }
        if self.starts_from_weight:
            table["strategy_lora_start_a_matmul"] = (self.lora_start_a_matmul, "ni,ri")
            table["strategy_lora_start_b_matmul"] = (self.lora_start_b_matmul, "nr,or")
            table["strategy_lora_sub"] = (self.sub, "no,no")
        if self.lora_bias:
            table["strategy_lora_bias_add"] = (self.lora_bias_add, "no,o")
        return table

    @property
    def signature(self) -> Any:
        return type(self), self.rank, self.use_dora, self.lora_bias, self.starts_from_weight, self.lora_dropout.p

    def extend_repr(self) -> str:
        alpha = self.scaling * (math.sqrt(self.rank) if self.use_rslora else self.rank)
        return f"rank={self.rank}, alpha={alpha:g}, use_dora={self.use_dora}, lora_bias={self.lora_bias}"


class LoraEmbedding(LoraDelta):
    """The LoRA delta of an embedding; `x` are the ids. Dropout does not act on ids."""

    file_names = {
        A: "lora_embedding_A",
        B: "lora_embedding_B",
        MAGNITUDE: "lora_magnitude_vector",
    }

    @classmethod
    def problems(
        cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, lora_bias: bool, freeze_a: bool, **others: Any
    ) -> list[str]:
        problems = ["an embedding has no lora_bias"] if lora_bias else []
        problems += ["no freeze_a with an embedding, whose A starts as zeros"] if freeze_a else []
        return problems + super().problems(cell, kind, is_sharded, **others)

    def update(self, x, lora_a, lora_b):
        return self.lora_b_matmul(self.scale(self.lora_a_matmul(lora_a, ops.reshape(x, (-1,)), 1)), lora_b)

    def initial_values(self, init: Union[bool, str]) -> tuple[InitLike, InitLike]:
        return (Normal(1.0) if init is False else "zeros"), Normal(1.0)

    def make_operators(self, cell: nn.Cell, shape_b: Shape) -> tuple[Primitive, Primitive]:
        return ops.Gather(), ops.MatMul(transpose_a=True, transpose_b=True)

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`; A is whole: MindSpore would gather what is taken from a part."""
        return {
            "strategy_lora_a_matmul": (self.lora_a_matmul, "rf,n"),
            "strategy_lora_b_matmul": (self.lora_b_matmul, "rn,or"),
            "strategy_lora_mul": (self.mul, "rn,"),
            "strategy_lora_add": (self.add, "no,no"),
        }


class LoraConvolution(LoraDelta):
    """The LoRA delta of a convolution: one with `rank` channels, then one with a kernel of one tap."""

    def update(self, x, lora_a, lora_b):
        inner = self.lora_a_matmul(self.lora_dropout(self.to_compute(x)), lora_a)
        return self.lora_b_matmul(self.scale_inner(inner), lora_b)

    def rows(self, out):
        return out

    def channels(self, vector):
        return ops.reshape(vector, (1, -1) + (1,) * (self.mindpet_delta_lora_b.ndim - 2))

    def as_matrix(self, weight):
        return ops.reshape(weight, (weight.shape[0], -1))

    def magnitude_shape(self, shape_b: Shape) -> Shape:
        return (1, shape_b[0]) + (1,) * AXES[self.kind.name]

    def shapes(self, cell: nn.Cell, weight: Shape) -> tuple[Shape, Shape]:
        """`(rank, in / groups, *kernel)` and `(out, rank / groups, 1, ...)`."""
        axes = AXES[self.kind.name]
        taps = (1,) * axes
        return (self.rank, weight[1], *weight[-axes:]), (weight[0], self.rank // self.kind.groups_of(cell), *taps)

    def make_operators(
        self, cell: nn.Cell, shape_b: Shape
    ) -> tuple[Union[nn.Cell, Primitive], Union[nn.Cell, Primitive]]:
        name = self.kind.name
        return convolution_like(cell, name, self.rank), pointwise_like(cell, name, shape_b[0])

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, of a convolution with the one operator that has strategies."""
        if not isinstance(self.lora_a_matmul, ops.Conv2D):
            return {}
        return {
            "strategy_lora_dropout": (self.lora_dropout.dropout, "nihw"),
            "strategy_lora_a_matmul": (self.lora_a_matmul, "nihw,rikl"),
            "strategy_lora_b_matmul": (self.lora_b_matmul, "nrhw,orkl"),
            "strategy_lora_mul": (self.mul, "nohw," if self.scales_outputs else "nrhw,"),
            "strategy_lora_add": (self.add, "nohw,nohw"),
            **({"strategy_lora_bias_add": (self.lora_bias_add, "nohw,o")} if self.lora_bias else {}),
        }


def starts_from_weight(init: Any) -> bool:
    """Whether A and B start from the layer's weight, and are taken off it: PiSSA and OLoRA."""
    return isinstance(init, str) and init.startswith(("pissa", "olora"))


def start_from_weight(weight: np.ndarray, init: str, rank: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B that start from a weight W, of which `s B A` is a part.

    PiSSA: with W = U S V^T, `B = U_r sqrt(S_r / s)`, `A = sqrt(S_r / s) V_r^T`. OLoRA: with W = Q R, `B = Q_r`,
    `A = R_r`.

    Source: PiSSA, Meng et al. 2024, arXiv:2404.02948, section 3; OLoRA, Büyükakyüz 2024, arXiv:2406.01775, section 3.

    Args:
        weight: W, `(out, in)`, float32.
        init: 'pissa', 'pissa_niter_N', which is computed exactly too, or 'olora'.
        rank: rows of A.
        scaling: s.

    Returns:
        A, B.
    """
    if init == "olora":
        left, right = np.linalg.qr(weight)
        lora_b, lora_a = left[:, :rank], right[:rank]
    else:
        left, roots, right = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(roots[:rank] / np.float32(scaling))
        lora_b, lora_a = left[:, :rank] * root, root[:, None] * right[:rank]
    return lora_a, lora_b


class LoRADense(DeltaDense, LoraDelta):
    """A Dense layer with a LoRA delta.

    .. math::
        y = activation(x W^T + b + \\frac{lora\\_alpha}{lora\\_rank} dropout(x) A^T B^T)

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3.
    B starts as zeros, so a fresh LoRADense computes what the Dense layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        lora_rank: rank of the update, the rows of A and the columns of B.
        lora_alpha: scale of the update, finite and not zero.
        lora_dropout: probability in [0, 1) of zeroing an input of the update while training. Default: 0.0.
        lora_a_init: of A. Default: HeUniform(negative_slope=sqrt(5)).
        lora_b_init: of B. Default: 'zeros'.
        param_init_type: type of A and B: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.
        weight_init: of the weight W. Default: 'normal'.
        bias_init: of the bias b. Default: 'zeros'.
        has_bias: whether there is a bias. Default: True.
        activation: applied to the sum. Default: None.

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
        in_channels: int,
        out_channels: int,
        lora_rank: int,
        lora_alpha: Union[int, float],
        lora_dropout: float = 0.0,
        lora_a_init: InitLike = HeUniform(negative_slope=math.sqrt(5)),
        lora_b_init: InitLike = "zeros",
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
        weight_init: InitLike = "normal",
        bias_init: InitLike = "zeros",
        has_bias: bool = True,
        activation: ActivationLike = None,
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
            rank=lora_rank,
            alpha=lora_alpha,
            dropout=lora_dropout,
            init=(lora_a_init, lora_b_init),
        )
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha

    @property
    def scaling(self) -> float:
        """`lora_alpha / lora_rank`."""
        return self.lora_alpha / self.lora_rank

    def set_scaling(self, scaling: float) -> None:
        """Do nothing: checkpoints of this layer have never had a Parameter for it."""

    def scale(self, value):
        return self.mul(value, self.lora_alpha / self.lora_rank)

    def shard(
        self,
        strategy_org_dense_matmul: Optional[Strategy] = None,
        strategy_org_bias_add: Optional[Strategy] = None,
        strategy_lora_dropout: Optional[Strategy] = None,
        strategy_lora_a_matmul: Optional[Strategy] = None,
        strategy_lora_b_matmul: Optional[Strategy] = None,
        strategy_lora_mul: Optional[Strategy] = None,
        strategy_lora_add: Optional[Strategy] = None,
        strategy_activation: Optional[Strategy] = None,
    ) -> "LoRADense":
        """Set the strategies of the operators; None leaves one alone.

        Args:
            strategy_org_dense_matmul: of the base matmul (transpose_b). Default: None.
            strategy_org_bias_add: of the bias addition. Default: None.
            strategy_lora_dropout: of the dropout. Default: None.
            strategy_lora_a_matmul: of the matmul with A (transpose_b). Default: None.
            strategy_lora_b_matmul: of the matmul with B (transpose_b). Default: None.
            strategy_lora_mul: of the scaling; its second input is a scalar. Default: None.
            strategy_lora_add: of the sum of base and update. Default: None.
            strategy_activation: of the activation. Default: None.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: see `mindpet.utils.sharding.apply_strategies`; LogSoftmax cannot be sharded.
        """
        return apply_strategies(self, locals())

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"


METHOD = Method(
    "lora",
    LoraConfig,
    ("*mindpet_delta_lora*",),
    {
        "linear": LoraDelta,
        "embedding": LoraEmbedding,
        "conv1d": LoraConvolution,
        "conv2d": LoraConvolution,
        "conv3d": LoraConvolution,
    },
    (LoRADense,),
    constants=("*mindpet_lora_scaling",),
    saved=("*mindpet_lora_start_*",),
    identity=True,
)

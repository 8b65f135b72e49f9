"""IA3: learned factors on the output of a frozen layer, or on the input of those in feed-forward blocks."""

from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.common.initializer import Normal

from mindpet.delta._base import Delta, DeltaDense, delta_parameter
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.network.match import chooses
from mindpet.network.values import assign
from mindpet.utils.hints import Arrays, Operators, Shape
from mindpet.utils.validate import Checker

FACTOR = "mindpet_delta_ia3"


@dataclass
class IA3Config(TargetConfig):
    """IA3, Liu et al. 2022, arXiv:2205.05638.

    Args beyond those of PeftConfig and TargetConfig:
        feedforward_modules: of the targets those whose input is multiplied: a str as in `target_modules`, or a list of
            ends of their names. Default: None, for none.
        fan_in_fan_out: kept for Hugging Face PEFT, see `LoraConfig`. Default: False.
        init_ia3_weights: True for factors of one, False for normal ones. Default: True.
    """

    peft_type, method_name = "IA3", "ia3"

    feedforward_modules: Optional[Union[list[str], str]] = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    choices = ("feedforward_modules",)
    not_in_peft = ("layers_to_transform", "layers_pattern")

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {"feedforward": chooses(self.feedforward_modules, path), "init": self.init_ia3_weights}

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.boolean(fan_in_fan_out=self.fan_in_fan_out, init_ia3_weights=self.init_ia3_weights)
        lists = [names for names in (self.feedforward_modules, self.target_modules) if not isinstance(names, str)]
        if not check.problems and len(lists) == 2 and all(lists):
            surplus = sorted(set(lists[0]) - set(lists[1]))
            check.require(not surplus, ValueError, "feedforward_modules", surplus, "among the target_modules")


class IA3Delta(Delta):
    """Factors l on the features of a linear layer or the channels of a convolution.

    .. math::
        y = l \\odot layer(x)\\quad or, with feedforward,\\quad y = layer(l \\odot x)

    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    arXiv:2205.05638, section 3.3.

    Delta arguments:
        feedforward (bool): whether the input is multiplied, and not the output.
        init (bool): True for factors of one, False for normal ones. Default: True.
        dtype (mindspore.dtype): of the parameter. Default: float32.

    Parameters:
        mindpet_delta_ia3: `(out, 1)`, with `feedforward` `(1, in)`; of a convolution `(1, channels, 1, ...)`.
    """

    before_activation = True
    file_names = {FACTOR: "ia3_l"}

    def setup(self, cell, feedforward, init=True, dtype=ms.float32):
        weight = self.kind.weight_of(cell).shape
        self.feedforward = feedforward
        features = weight[feedforward != self.kind.transposed]
        shape = (1, features) if feedforward else (features, 1)
        if self.kind.is_convolution:
            shape = (1, features) + (1,) * (len(weight) - 2)
        self.mindpet_delta_ia3 = delta_parameter("ones" if init else Normal(1.0), shape, dtype, FACTOR)
        self.ia3_mul = ops.Mul()

    def before(self, x):
        return self.multiply(x) if self.feedforward else x

    def after(self, x, out):
        return out if self.feedforward else self.multiply(out)

    def multiply(self, x):
        """`l x`, in the type of `x`."""
        factor = cast(self.mindpet_delta_ia3, x.dtype)
        if self.kind.is_convolution:
            return self.ia3_mul(x, factor)
        if self.feedforward:
            return from_rows(self.ia3_mul(to_rows(x), factor), x)
        # The factor keeps its shape: in semi-auto parallel mode MindSpore gathers a Parameter that is reshaped.
        return ops.reshape(self.ia3_mul(ops.reshape(x, (-1, x.shape[-1], 1)), factor), x.shape)

    def reset(self) -> None:
        factor = self.mindpet_delta_ia3
        assign(factor, ops.ones(factor.shape, factor.dtype))

    @classmethod
    def problems(cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, feedforward: bool, **others: Any) -> list[str]:
        problems = ["no factors before a convolution in groups"] if feedforward and kind.groups_of(cell) > 1 else []
        if not feedforward and not kind.adds_bias and kind.bias_of(cell) is not None:
            problems.append("no factors on an output without its bias, which would not be multiplied")
        return problems

    @classmethod
    def fold(cls, matrix: np.ndarray, values: Arrays, feedforward: bool, **others: Any) -> np.ndarray:
        factor = values[FACTOR].reshape(-1)
        if feedforward:
            return matrix * np.repeat(factor, matrix.shape[1] // len(factor))  # each channel has the taps of a kernel
        return matrix * factor[:, None]

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, feedforward: bool, **others: Any) -> bool:
        return values[FACTOR].size == shape[1 if feedforward else 0]

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], feedforward: bool, **others: Any) -> dict[str, tuple]:
        shape = shapes.get(FACTOR, ())
        if len(shape) > 2:
            return {FACTOR: (1, shape[1], *(1,) * (len(shape) - 2))}
        return {FACTOR: (1, (*shape, "in", "in")[1]) if feedforward else ((*shape, "out")[0], 1)}

    @classmethod
    def folds_bias(cls, feedforward: bool, **others: Any) -> bool:
        return not feedforward

    @classmethod
    def fold_bias(cls, bias: np.ndarray, values: Arrays, feedforward: bool, **others: Any) -> np.ndarray:
        return bias if feedforward else bias * values[FACTOR].reshape(-1)

    @property
    def operators(self) -> Operators:
        if self.kind.is_convolution:
            return {"strategy_ia3_mul": (self.ia3_mul, "nihw,fikl" if self.feedforward else "nohw,fokl")}
        return {"strategy_ia3_mul": (self.ia3_mul, "ni,fi" if self.feedforward else "nof,of")}

    @property
    def signature(self) -> Any:
        return type(self), self.feedforward

    def extend_repr(self) -> str:
        return f"feedforward={self.feedforward}"


class IA3Dense(DeltaDense, IA3Delta):
    """A Dense layer with IA3 factors.

    .. math::
        y = activation(l \\odot (x W^T + b))\\quad or, with feedforward,\\quad y = activation((l \\odot x) W^T + b)

    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3. The factors start as ones, so a fresh IA3Dense computes what
    the Dense layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        feedforward: whether the input is multiplied, and not the output. Default: False.
        dense: keywords of `DeltaDense`, of which `activation` is applied to the result.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, mindpet_delta_ia3 `(out_channels, 1)` or
        `(1, in_channels)`.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.

    Raises:
        TypeError, ValueError, KeyError: an argument is wrong, see `LoRADense`.
    """

    def __init__(self, in_channels: int, out_channels: int, feedforward: bool = False, **dense: Any):
        check = Checker(type(self).__name__)
        check.boolean(feedforward=feedforward)
        super().__init__(in_channels, out_channels, check=check, feedforward=feedforward, **dense)

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, feedforward={self.feedforward}"


METHOD = Method(
    "ia3",
    IA3Config,
    ("*mindpet_delta_ia3",),
    {"linear": IA3Delta, "conv2d": IA3Delta, "conv3d": IA3Delta},
    (IA3Dense,),
    identity=True,
)

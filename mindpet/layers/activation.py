"""Activations whose operators can be sharded.

Where MindSpore's own Cell holds its primitive, that Cell is used; where it calls a function (gelu, silu, leakyrelu,
...) a Cell here holds the primitives instead. Arguments whose defaults differ between MindSpore versions are written
out.
"""

from typing import Optional, Union

from mindspore import nn, ops


class Activation(nn.Cell):
    """An activation made of elementwise primitives.

    `operands` says what each primitive is fed, attribute name -> one letter an input: `x` for a tensor of the
    activation's shape, `s` for a scalar. `shard_activation` reads it.
    """

    operands = {}


class GELU(Activation):
    """`0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2."""

    operands = {"gelu": "x"}

    def __init__(self):
        super().__init__()
        self.gelu = ops.GeLU()

    def construct(self, x):
        return self.gelu(x)


class SiLU(Activation):
    """`x sigmoid(x)`, Elfwing et al. 2017, arXiv:1702.03118, equation 6."""

    operands = {"sigmoid": "x", "mul": "xx"}

    def __init__(self):
        super().__init__()
        self.sigmoid = ops.Sigmoid()
        self.mul = ops.Mul()

    def construct(self, x):
        return self.mul(x, self.sigmoid(x))


class LeakyReLU(Activation):
    """`max(alpha x, x)`.

    Args:
        alpha: slope for negative x, at most 1. Default: 0.2.
    """

    operands = {"mul": "xs", "maximum": "xx"}

    def __init__(self, alpha: float = 0.2):
        super().__init__()
        self.alpha = alpha
        self.mul = ops.Mul()
        self.maximum = ops.Maximum()

    def construct(self, x):
        return self.maximum(self.mul(x, self.alpha), x)


class Softmin(Activation):
    """`softmax(-x)` over the last axis."""

    operands = {"neg": "x", "softmax": "x"}

    def __init__(self):
        super().__init__()
        self.neg = ops.Neg()
        self.softmax = ops.Softmax(axis=-1)

    def construct(self, x):
        return self.softmax(self.neg(x))


class Tanhshrink(Activation):
    """`x - tanh(x)`."""

    operands = {"tanh": "x", "sub": "xx"}

    def __init__(self):
        super().__init__()
        self.tanh = ops.Tanh()
        self.sub = ops.Sub()

    def construct(self, x):
        return self.sub(x, self.tanh(x))


class Hardtanh(Activation):
    """`min(max(x, -1), 1)`."""

    operands = {"maximum": "xs", "minimum": "xs"}

    def __init__(self):
        super().__init__()
        self.maximum = ops.Maximum()
        self.minimum = ops.Minimum()

    def construct(self, x):
        return self.minimum(self.maximum(x, -1.0), 1.0)


class LogSigmoid(Activation):
    """`log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|))`, finite for every finite x."""

    operands = {"minimum": "xs", "abs": "x", "neg": "x", "exp": "x", "log1p": "x", "sub": "xx"}

    def __init__(self):
        super().__init__()
        self.minimum = ops.Minimum()
        self.abs = ops.Abs()
        self.neg = ops.Neg()
        self.exp = ops.Exp()
        self.log1p = ops.Log1p()
        self.sub = ops.Sub()

    def construct(self, x):
        return self.sub(self.minimum(x, 0.0), self.log1p(self.exp(self.neg(self.abs(x)))))


ACTIVATIONS = {
    "elu": lambda: nn.ELU(alpha=1.0),
    "fast_gelu": nn.FastGelu,
    "gelu": GELU,
    "hardtanh": Hardtanh,
    "hshrink": lambda: nn.HShrink(lambd=0.5),
    "hsigmoid": nn.HSigmoid,
    "hswish": nn.HSwish,
    "leakyrelu": LeakyReLU,
    "logsigmoid": LogSigmoid,
    "logsoftmax": lambda: nn.LogSoftmax(axis=-1),
    "mish": nn.Mish,
    "prelu": lambda: nn.PReLU(channel=1, w=0.25),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": lambda: nn.RReLU(lower=1 / 8, upper=1 / 3),
    "sigmoid": nn.Sigmoid,
    "silu": SiLU,
    "softmax": lambda: nn.Softmax(axis=-1),
    "softmax2d": nn.Softmax2d,
    "softmin": Softmin,
    "softshrink": lambda: nn.SoftShrink(lambd=0.5),
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanhshrink": Tanhshrink,
}


def get_activation(name: Optional[str]) -> Optional[nn.Cell]:
    """A new activation Cell by its name, one of `mindspore.nn.get_activation`; None for None.

    Raises:
        KeyError: `name` is not known.
    """
    if name is None:
        return None
    if name not in ACTIVATIONS:
        raise KeyError(f"get_activation: 'name' must be one of {sorted(ACTIVATIONS)}, but got {name!r}.")
    return ACTIVATIONS[name]()


def activation_operators(activation: Union[nn.Cell, ops.Primitive]) -> list[tuple[ops.Primitive, str]]:
    """The primitives of an activation and what each is fed, see `Activation`; empty if they cannot be reached."""
    if isinstance(activation, ops.Primitive):
        return [(activation, "x")]
    if isinstance(activation, Activation):
        return [(getattr(activation, name), operands) for name, operands in activation.operands.items()]
    if isinstance(activation, (nn.RReLU, nn.PReLU)):
        # RReLU computes outside of its only primitive; PReLU's has a per-channel weight as its second input.
        return [(activation.prelu, "xw")] if isinstance(activation, nn.PReLU) else []
    primitives = [prim for prim in activation._primitives.values() if prim.name != "Shape"]
    return [(primitives[0], "x")] if len(primitives) == 1 else []

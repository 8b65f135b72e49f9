"""Argument checks that report everything that is wrong in one error."""

import numbers
import sys
from collections.abc import Collection, Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.common.initializer import Initializer, initializer
from mindspore.ops import Primitive

from mindpet.utils.quote import printable, quote

FLOAT_TYPES = (ms.float16, ms.float32, ms.bfloat16)
INIT_TYPES = (Tensor, str, Initializer, numbers.Number)


class Checker:
    """Collects what is wrong with the arguments of `owner`; `done()` raises it.

    The error has the type of the first problem and tells all of them.

    Args:
        owner: the class or function whose arguments are checked.
    """

    def __init__(self, owner: str):
        self.owner = owner
        self.problems = []

    def require(self, condition: Any, error: type[Exception], name: str, value: Any, rule: str) -> Any:
        """Note a problem unless `condition` holds; returns whether it does."""
        if not condition:
            shown = f"a Tensor of shape {value.shape}" if isinstance(value, Tensor) else quote(value)
            self.problems.append((error, f"'{name}' must be {rule}, but got {shown} ({type(value).__name__})"))
        return condition

    def positive_int(self, error: type[Exception] = ValueError, **arguments: Any) -> None:
        """Each is an int and not a bool (else TypeError), and above zero (else `error`)."""
        for name, value in arguments.items():
            if self.require(is_int(value), TypeError, name, value, "a positive int"):
                self.require(value > 0, error, name, value, "a positive int")

    def boolean(self, **arguments: Any) -> None:
        """Each is a bool."""
        for name, value in arguments.items():
            self.require(isinstance(value, bool), TypeError, name, value, "a bool")

    def choice(self, name: str, value: Any, known: Collection[str], error: type[Exception] = ValueError) -> None:
        """`value` is a str (else TypeError) and in `known` (else `error`)."""
        if self.require(isinstance(value, str), TypeError, name, value, "a str"):
            self.require(value in known, error, name, value, f"one of {sorted(known)}")

    def float_type(self, **arguments: Any) -> None:
        """Each is float16, float32 or bfloat16."""
        for name, value in arguments.items():
            self.require(
                value in FLOAT_TYPES,
                TypeError,
                name,
                value,
                "mindspore.float16, mindspore.float32 or mindspore.bfloat16",
            )

    def probability(self, types: tuple[type, ...] = (float,), **arguments: Any) -> None:
        """Each is of one of `types` and in [0, 1)."""
        for name, value in arguments.items():
            number = isinstance(value, types) and not isinstance(value, bool)
            if self.require(number, TypeError, name, value, "a float in [0, 1)"):
                self.require(0 <= value < 1, ValueError, name, value, "in [0, 1)")

    def nonzero_number(self, **arguments: Any) -> None:
        """Each is a finite int or float that is not zero."""
        for name, value in arguments.items():
            if self.require(is_number(value), TypeError, name, value, "an int or a float"):
                finite = value != 0 and abs(value) <= sys.float_info.max  # an int can be beyond
                self.require(finite, ValueError, name, value, "finite and not zero")

    def initial(self, name: str, value: Any, shape: Sequence[int], types: tuple[type, ...] = INIT_TYPES) -> None:
        """`value` can initialise a parameter of `shape`: right type, known name, a Tensor of that shape."""
        allowed = isinstance(value, types) and not isinstance(value, bool)
        rule = "one of " + ", ".join(kind.__name__ for kind in types)
        if not self.require(allowed, TypeError, name, value, rule):
            return
        if isinstance(value, Tensor):
            self.require(tuple(value.shape) == tuple(shape), ValueError, name, value, f"of shape {tuple(shape)}")
        elif isinstance(value, str):
            self.require(_is_initializer_name(value), ValueError, name, value, "a name that initializer() knows")

    def activation(self, name: str, value: Any, known: Collection[str]) -> None:
        """`value` is None, a Cell, a Primitive, or a str in `known` (else KeyError)."""
        if isinstance(value, str):
            self.choice(name, value, known, KeyError)
        else:
            allowed = value is None or isinstance(value, (nn.Cell, Primitive))
            self.require(allowed, TypeError, name, value, "a str, a Cell, a Primitive or None")

    def done(self) -> None:
        """Raise the first problem's type with all problems in the message."""
        if self.problems:
            error = self.problems[0][0]
            raise error(printable(f"{self.owner}: " + "; ".join(message for _, message in self.problems) + "."))


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    """Whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_initializer_name(name):
    try:
        initializer(name, [1, 1])
    except ValueError:
        return False
    return True

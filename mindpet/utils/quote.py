"""Values of files in messages: short, and without characters that a terminal acts on."""

import reprlib
from typing import Any

from mindpet.utils.layouts import describe

LONGEST_VALUE = 300
LONGEST_MESSAGE = 20_000


class _Quoter(reprlib.Repr):
    """Looks at the first entries of the outer levels only: the whole of a value can be without end."""

    def __init__(self):
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxlong = self.maxother = LONGEST_VALUE

    def repr_Layout(self, x, level):
        return describe(x)

    def repr_int(self, x, level):
        # From some size on Python does not write a number in decimal digits.
        return super().repr_int(x, level) if x.bit_length() <= 1024 else f"<int of {x.bit_length()} bits>"


def quote(value: Any) -> str:
    """`repr(value)`, with `...` in the place of what is too much to show."""
    return shorten(_Quoter().repr(value), LONGEST_VALUE)


def printable(text: Any) -> str:
    """A message as it may be shown: control characters but line feeds are escaped, and what is too long is left out."""
    text = "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in str(text))
    return shorten(text, LONGEST_MESSAGE)


def shorten(text: str, longest: int) -> str:
    """A text, cut if it is longer than that."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text) - longest} characters more)"

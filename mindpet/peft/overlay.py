"""The `construct` that takes the place of a layer's own, on the object, while the layer has a delta."""

import ast
import contextlib
import functools
import inspect
import re
import types

from mindspore import ops

from mindpet.errors import AdapterError
from mindpet.layers.kinds import layer_kind
from mindpet.layers.linear import from_rows, to_rows

# How a parameter is passed on that is not passed by its place, and what of it is a layer's input.
PASSED = {
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}
FIRST = {inspect.Parameter.VAR_POSITIONAL: "{0}[0]"}


def beside(self, x, result):
    """What a layer with a delta returns, from its input and what it returns without."""
    if isinstance(result, tuple):  # the output, and say a bias that the caller adds
        return (activated(self, self.mindpet_delta(x, result[0])), *result[1:])
    return activated(self, self.mindpet_delta(x, result))


def by_rows(self, x, result):
    """What a layer returns where each row of the batch has the delta of its own adapter; see `beside`."""
    if isinstance(result, tuple):
        return (chosen(self, x, result[0]), *result[1:])
    return chosen(self, x, result)


def chosen(self, x, out):
    """The output with the delta of each row's adapter."""
    axis, count = self.mindpet_batch_axis, self.mindpet_rows.shape[0]
    times = out.shape[axis] // count
    # A layer may get (batch, seq) as rows, those of one sample side by side.
    if times * count != out.shape[axis] or (axis > 0 and times > 1):
        raise ValueError(
            f"adapter_names: the layer of {self.mindpet_weight_name} returns {out.shape[axis]} rows, which is no "
            f"multiple of the {count} names."
        )
    rows = ops.repeat_interleave(self.mindpet_rows, times) if times > 1 else self.mindpet_rows
    result = out
    index = 0
    for delta in self.mindpet_deltas:
        own = ops.reshape(rows == index, (1,) * axis + (-1,) + (1,) * (out.ndim - axis - 1))
        result = ops.select(own, delta(x, out), result)
        index += 1
    return activated(self, result)


def activated(self, out):
    """The layer's own activation, if it is left to this, of what the layer would give it."""
    if not self.mindpet_activates:
        return out
    return from_rows(self.activation(to_rows(out)), out) if self.mindpet_flattens else self.activation(out)


def construct_like(method, body):
    """A `construct` with the parameters of another one.

    MindSpore (2.7 to 2.10) never frees a Cell whose `construct` has been compiled and takes `*args` or `**keywords`.

    Args:
        method (callable): the other one, bound to its Cell.
        body (str): what is returned, with `{first}` for the first argument and `{arguments}` for all of them.

    Returns:
        function, to be bound to a Cell. It has `*args` and `**keywords` where the other one has, or where a default
        cannot be written down.
    """
    given = list(inspect.signature(method).parameters.values())
    if not all(one.default is one.empty or _is_literal(one.default) for one in given):
        given = list(inspect.signature(lambda *inputs, **keywords: None).parameters.values())
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([own, *(one.replace(annotation=one.empty) for one in given)])
    first = next((FIRST.get(one.kind, "{0}").format(one.name) for one in given), "")
    arguments = ", ".join(PASSED.get(one.kind, "{0}").format(one.name) for one in given)
    return _compiled(str(signature), body.format(first=first, arguments=arguments))


def bind_construct(cell, network):
    """Have a Cell call its `network`, with the parameters that this one has."""
    construct = construct_like(network.construct, "self.network({arguments})")
    vars(cell)["construct"] = types.MethodType(construct, cell)


def _is_literal(value):
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False


@functools.cache
def _compiled(signature, returned):
    source, line = f"def construct{signature}:\n    return {returned}\n", inspect.currentframe().f_lineno
    exec(compile(source, __file__, "exec"), globals(), found := {})
    construct = found["construct"]
    # Behind the end of this file, so that MindSpore parses `source`; in its messages it shows the line above.
    construct.__code__ = construct.__code__.replace(co_firstlineno=10**6)
    construct.source = (source.splitlines(keepends=True), line - 1)
    return construct


@contextlib.contextmanager
def one_error():
    """A context that turns an error of `by_rows` into an AdapterError, without the stacks of graph mode."""
    try:
        yield
    except ValueError as error:
        message = re.match(r"'?(adapter_names: .*?)'?$", str(error), re.MULTILINE)
        if message is None:
            raise
        raise AdapterError(message[1]) from None


class Overlay:
    """A layer with another `construct`, and what that needs; `remove()` leaves no trace.

    Args:
        cell (Cell): the layer.
        returns (callable): `beside` or `by_rows`.
        before_activation (bool): whether the layer's own activation is left to `returns`.
        cells, params (dict): attribute -> Cell or Parameter that `returns` needs.
    """

    def __init__(self, cell, returns, before_activation, cells, params=None):
        self.cell = cell
        body = f"{returns.__name__}(self, {{first}}, self.mindpet_base_construct({{arguments}}))"
        self.construct = construct_like(cell.construct, body)
        self.activates = before_activation and bool(getattr(cell, "activation_flag", False))
        self.kind = layer_kind(cell)
        self.cells, self.params = cells, params or {}

    def put(self):
        """Overlay the layer."""
        self.attributes = {
            "mindpet_base_construct": self.cell.construct,
            "construct": types.MethodType(self.construct, self.cell),
            "mindpet_activates": self.activates,
            "mindpet_flattens": self.kind.flattens,
            "mindpet_batch_axis": self.kind.batch_axis,
            "mindpet_weight_name": self.kind.weight_of(self.cell).name,
        }
        self.cell.__dict__.update(self.attributes)
        self.cell._cells.update(self.cells)
        self.cell._params.update(self.params)
        if self.activates:
            self.cell.activation_flag = False

    def remove(self):
        """Leave the layer as it was."""
        if self.activates:
            self.cell.activation_flag = True
        for where, names in (
            (self.cell.__dict__, self.attributes),
            (self.cell._cells, self.cells),
            (self.cell._params, self.params),
        ):
            for name in names:
                del where[name]

"""What is changed in the Cells of a network while an adapter is in it. Each change is on the object, and is undone."""

import ast
import contextlib
import functools
import inspect
import re
import types

import mindspore as ms
from mindspore import ops

from mindpet.delta._base import Delta
from mindpet.errors import AdapterError
from mindpet.layers.linear import from_rows, to_rows
from mindpet.network.parameters import TRAINED

# How a parameter is passed on that is not passed by its place.
PASSED = {
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}
# What a layer with deltas returns, see `construct_like`.
LAYER = "{1}(self, {{first}}, self.mindpet_base_construct({0}(self, {{first}}){{rest}}))"


class AttributePatch:
    """Another value of an attribute: a prefix, the offset of positions, how a BatchNorm normalises.

    Args:
        cell (Cell): the Cell.
        name (str): the attribute; it may be one of the class.
        value (Union[Cell, int, bool]): its value.
    """

    def __init__(self, cell, name, value):
        self.cell, self.name, self.value = cell, name, value

    def apply(self):
        """Set the value, on the object, where it hides what the class has."""
        self.before = {self.name: vars(self.cell)[self.name]} if self.name in vars(self.cell) else {}
        vars(self.cell)[self.name] = self.value
        if isinstance(self.value, ms.nn.Cell):
            self.cell._cells[self.name] = self.value
            self.value.set_train(self.cell.training)

    def revert(self):
        """Set the value that was there before."""
        del vars(self.cell)[self.name]
        self.cell._cells.pop(self.name, None)
        vars(self.cell).update(self.before)


class ParameterPatch:
    """A Parameter that takes the place of another one.

    The attribute of the object hides the Cell's own: Python looks there before it asks `Cell.__getattr__`, in PyNative
    and in graph mode (MindSpore 2.7 to 2.10).

    Args:
        cell (Cell): the Cell.
        name (str): the attribute.
        param (Parameter): takes the place.
    """

    def __init__(self, cell, name, param):
        self.cell, self.name, self.param = cell, name, param

    def apply(self):
        """Hide the Cell's own Parameter."""
        self.cell._params[TRAINED + self.name] = self.param
        vars(self.cell)[self.name] = self.param

    def revert(self):
        """Let the Cell have its own Parameter again."""
        del self.cell._params[TRAINED + self.name]
        del vars(self.cell)[self.name]


class ConstructPatch:
    """Another `construct` of a layer, that calls the layer's own and one delta, or several for a mixed batch.

    Args:
        cell (Cell): the layer.
        kind (LayerKind): of the layer.
        deltas (list of Delta): one, or those of which each row of a batch has one.
        rows (Parameter): of each row of a batch the number of its delta. Default: None, for one delta.
    """

    def __init__(self, cell, kind, deltas, rows=None):
        self.cell, self.kind, self.deltas = cell, kind, deltas
        before_activation = any(delta.before_activation for delta in deltas)  # then the activation is left to us
        self.activates = before_activation and bool(getattr(cell, "activation_flag", False))
        names = ("enter", "leave") if rows is None else ("enter_mixed", "leave_mixed")
        self.construct = construct_like(cell.construct, LAYER.format(*names))
        self.cells = {"mindpet_delta": deltas[0]}
        self.params = {}
        if rows is not None:
            self.cells = {"mindpet_deltas": ms.nn.CellList(deltas, auto_prefix=False)}
            self.params = {"mindpet_rows": rows}

    def apply(self):
        """Patch the layer."""
        self.attributes = {
            "mindpet_base_construct": self.cell.construct,
            "construct": types.MethodType(self.construct, self.cell),
            "mindpet_activates": self.activates,
            "mindpet_changes_input": any(type(delta).before is not Delta.before for delta in self.deltas),
            "mindpet_flattens": self.kind.flattens,
            "mindpet_batch_axis": self.kind.batch_axis,
            "mindpet_weight_name": self.kind.weight_of(self.cell).name,
        }
        self.cell.__dict__.update(self.attributes)
        self.cell._cells.update(self.cells)
        self.cell._params.update(self.params)
        for cell in self.cells.values():
            cell.set_train(self.cell.training)
        if self.activates:
            self.cell.activation_flag = False

    def revert(self):
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


def enter(self, x):
    """What a layer with a delta gets in place of its input."""
    return self.mindpet_delta.before(x)


def leave(self, x, result):
    """What a layer with a delta returns, from its input and what its own `construct` returned."""
    if isinstance(result, tuple):  # the output, and say a bias that the caller adds
        return (activated(self, self.mindpet_delta(x, result[0])), *result[1:])
    return activated(self, self.mindpet_delta(x, result))


def enter_mixed(self, x):
    """As `enter`, where each row of the batch has the delta of its own adapter."""
    entering, index = x, 0
    if self.mindpet_changes_input:
        for delta in self.mindpet_deltas:
            entering = select_rows(self, index, delta.before(x), entering)
            index += 1
    return entering


def leave_mixed(self, x, result):
    """As `leave`, where each row of the batch has the delta of its own adapter."""
    if isinstance(result, tuple):
        return (mixed(self, x, result[0]), *result[1:])
    return mixed(self, x, result)


def mixed(self, x, out):
    """The output with the delta of each row's adapter."""
    result, index = out, 0
    for delta in self.mindpet_deltas:
        result = select_rows(self, index, delta(x, out), result)
        index += 1
    return activated(self, result)


def select_rows(self, index, chosen, others):
    """`chosen` in the rows of the adapter with that index, else `others`."""
    axis, count = self.mindpet_batch_axis, self.mindpet_rows.shape[0]
    times = chosen.shape[axis] // count
    # A layer may get (batch, seq) as rows, those of one sample side by side.
    if times * count != chosen.shape[axis] or (axis > 0 and times > 1):
        raise ValueError(
            f"adapter_names: the layer of {self.mindpet_weight_name} returns {chosen.shape[axis]} rows, which is no "
            f"multiple of the {count} names."
        )
    rows = ops.repeat_interleave(self.mindpet_rows, times) if times > 1 else self.mindpet_rows
    is_chosen = ops.reshape(rows == index, (1,) * axis + (-1,) + (1,) * (chosen.ndim - axis - 1))
    return ops.select(is_chosen, chosen, others)


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
        body (str): what is returned, with `{first}` for the first argument, `{rest}` for `, ` and the further ones, if
            there are any, and `{arguments}` for all of them.

    Returns:
        function, to be bound to a Cell. It has `*args` and `**keywords` where the other one has, or where a default
        cannot be written down.
    """
    given = list(inspect.signature(method).parameters.values())
    if not all(one.default is one.empty or _is_literal(one.default) for one in given):
        given = list(inspect.signature(lambda *inputs, **keywords: None).parameters.values())
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([own, *(one.replace(annotation=one.empty) for one in given)])
    passed = [PASSED.get(one.kind, "{0}").format(one.name) for one in given]
    first, rest = passed[0] if passed else "", passed[1:]
    if first.startswith("*"):  # the first of `*inputs`
        first, rest = f"{first[1:]}[0]", [f"{first}[1:]", *rest]
    rest = "".join(f", {one}" for one in rest)
    return _compiled(str(signature), body.format(first=first, rest=rest, arguments=", ".join(passed)))


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
    """A context that turns an error of `select_rows` into an AdapterError, without the stacks of graph mode."""
    try:
        yield
    except ValueError as error:
        message = re.match(r"'?(adapter_names: .*?)'?$", str(error), re.MULTILINE)
        if message is None:
            raise
        raise AdapterError(message[1]) from None

"""A `construct` that calls another one, to be set on an object."""

import ast
import functools
import inspect
import sys
from typing import Callable

# How a parameter is passed on that is not passed by its place.
PASSED = {
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}


def construct_like(method: Callable, body: str, module: str) -> Callable:
    """A `construct` with the parameters of another one.

    MindSpore (2.7 to 2.10) never frees a Cell whose `construct` has been compiled and takes `*args` or `**keywords`.

    Args:
        method: the other one, bound to its Cell.
        body: what is returned, with `{first}` for the first argument, `{rest}` for `, ` and the further ones, if there
            are any, and `{arguments}` for all of them.
        module: that has the functions which `body` names, its `__name__`.

    Returns:
        A function to be bound to a Cell. It has `*args` and `**keywords` where the other one has, or where a default
        cannot be written down.
    """
    given = list(inspect.signature(method).parameters.values())
    if not all(one.default is one.empty or _is_literal(one.default) for one in given):
        given = list(inspect.signature(lambda *inputs, **keywords: None).parameters.values())
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([itself, *(one.replace(annotation=one.empty) for one in given)])
    passed = [PASSED.get(one.kind, "{0}").format(one.name) for one in given]
    first, rest = passed[0] if passed else "", passed[1:]
    if first.startswith("*"):  # the first of `*inputs`
        first, rest = f"{first[1:]}[0]", [f"{first}[1:]", *rest]
    rest = "".join(f", {one}" for one in rest)
    return _compiled(str(signature), body.format(first=first, rest=rest, arguments=", ".join(passed)), module)


def _is_literal(value):
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False


@functools.cache
def _compiled(signature, returned, module):
    source, line = f"def construct{signature}:\n    return {returned}\n", inspect.currentframe().f_lineno
    exec(compile(source, __file__, "exec"), vars(sys.modules[module]), names := {})
    construct = names["construct"]
    # Behind the end of this file, so that MindSpore parses `source`; in its messages it shows the line above.
    construct.__code__ = construct.__code__.replace(co_firstlineno=10**6)
    construct.source = (source.splitlines(keepends=True), line - 1)
    return construct

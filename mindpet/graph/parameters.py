"""Which parameters belong to the model, and what they are called."""

from fnmatch import fnmatchcase

from mindspore import nn


def model_parameters(network):
    """The parameters of `network` by name, without the state of an optimizer that is a Cell inside of it.

    Args:
        network (Cell): a model, or a Cell that trains one.

    Returns:
        dict of str -> Parameter, in the network's order.
    """
    return {
        param.name: param for cell in _cells(network, set()) for param in cell._params.values() if param is not None
    }


def _cells(cell, seen):
    """`cell` and the Cells in it, each once; optimizers and what is in them are left out."""
    if id(cell) in seen or isinstance(cell, nn.Optimizer):
        return
    seen.add(id(cell))
    yield cell
    for child in cell._cells.values():
        if child is not None:
            yield from _cells(child, seen)


def outer_prefix(network):
    """What the names of a network's parameters begin with before their paths: '' unless it is inside of another one."""
    pairs = network.parameters_and_names()
    return next((param.name[: -len(path)] for path, param in pairs if param.name.endswith(path)), "")


def trainable_parameters(network):
    """`model_parameters` that have `requires_grad`."""
    return {name: param for name, param in model_parameters(network).items() if param.requires_grad}


def matches(name, patterns):
    """Whether a name fits one of the fnmatch patterns, letter case counting."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)

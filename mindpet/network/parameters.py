"""Which parameters belong to the model, and what they are called."""

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from mindspore import Parameter, ParameterTuple, nn

# What BatchNorms of `mindspore.nn` and of `mindspore.mint` call their running statistics.
STATISTICS = (("moving_mean", "moving_variance"), ("running_mean", "running_var", "num_batches_tracked"))
TRAINED = "mindpet_trained_"  # begins the names of an adapter's copies of the base's Parameters


def model_parameters(network: nn.Cell) -> dict[str, Parameter]:
    """The parameters of `network` by key, without the state of an optimizer that is a Cell inside of it.

    A key is the path of attributes from the network to the Parameter. In a network as it was built this is
    `Parameter.name`, but that can change: MindSpore renames what is put into a list, and a slice of a CellList in
    `construct`, `for layer in self.layers[:2]`, is a new list. As in MindSpore's names, the components down to the
    first Cell with `auto_prefix` are left out (training cells, PeftModel), and what stands before the path in the names
    of a network inside of another one stands before the keys. A Parameter of the network itself has its own name. A
    delta that `mindpet.peft` put in has the path of its layer. A Parameter in several places has the path that its name
    tells, else the first. Where keys would be equal, they are paths with nothing left out.

    Args:
        network: a model, or a Cell that trains one.

    Returns:
        The Parameters by key, in the network's order.
    """
    cells = list(_cells(network, "", "", set()))
    places = _places(cells)
    outer = _outer_prefix(places)
    tops = [cell for cell, path, _ in cells if not path]
    keys = [_key(place, outer, tops) for place in places]
    while len(set(keys)) < len(keys):
        counts = Counter(keys)
        keys = [outer + place.full if counts[key] > 1 else key for key, place in zip(keys, places)]
    return {key: place.param for key, place in zip(keys, places)}


def parameter_paths(network: nn.Cell) -> dict[str, Parameter]:
    """Every path of every Parameter; a Parameter in several places has several, of which `model_parameters` has one."""
    outer, cells = outer_prefix(network), _cells(network, "", "", set())
    return {outer + path + name: param for cell, path, _ in cells for name, param in cell._params.items()}


def trainable_parameters(network: nn.Cell) -> dict[str, Parameter]:
    """`model_parameters` that have `requires_grad`."""
    return {key: param for key, param in model_parameters(network).items() if param.requires_grad}


def running_statistics(network: nn.Cell) -> dict[str, Parameter]:
    """`model_parameters` that are the running statistics of a BatchNorm, or instead of them an adapter's copies.

    They are buffers, not weights: the network writes them while it trains, and no optimizer may have them. A Cell with
    two Parameters `moving_mean` and `moving_variance`, or `running_mean` and `running_var`, counts as a BatchNorm.
    """
    ids = set()
    for cell, _, _ in _cells(network, "", "", set()):
        held = {name: param for name, param in cell._params.items() if param is not None}
        for names in STATISTICS:
            if held.keys() >= set(names[:2]):
                ids.update(id(held.get(TRAINED + name, held.get(name))) for name in names)
    return {key: param for key, param in model_parameters(network).items() if id(param) in ids}


def quantized_parameters(network: nn.Cell) -> dict[str, Parameter]:
    """`model_parameters` that are codes of quantised weights, and their scales: they never train."""
    layers = [cell for cell, _, _ in _cells(network, "", "", set()) if getattr(cell, "is_quantized", False)]
    ids = {id(cell._params[name]) for cell in layers for name in cell.form.shapes(cell.shape)}
    return {key: param for key, param in model_parameters(network).items() if id(param) in ids}


def outer_prefix(network: nn.Cell) -> str:
    """What the names of a network's parameters begin with before their paths: '' unless it is inside of another one."""
    return _outer_prefix(_places(_cells(network, "", "", set())))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of the fnmatch patterns, letter case counting."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class _Place(NamedTuple):
    """Where a Parameter is.

    Attributes:
        param: the Parameter.
        path: of attributes, as in names.
        full: the same with nothing left out.
        is_top: whether all components before the attribute are left out.
        in_tuple: whether a ParameterTuple holds it there; a training cell has one of all that it trains.
    """

    param: Parameter
    path: str
    full: str
    is_top: bool
    in_tuple: bool


def _places(cells):
    """The first place of each Parameter; one in a ParameterTuple counts if there is no other."""
    places = {}
    for cell, path, full in cells:
        if not cell._params:
            continue
        tuples = {name: value for name, value in cell.__dict__.items() if isinstance(value, ParameterTuple)}
        in_tuple = {id(param): f"{name}." for name, params in tuples.items() for param in params}
        for name, param in cell._params.items():
            if param is not None and (id(param) not in places or places[id(param)].in_tuple):
                whole = full + in_tuple.get(id(param), "") + name
                places[id(param)] = _Place(param, path + name, whole, not path, id(param) in in_tuple)
    return list(places.values())


def _cells(cell, path, full, seen):
    """`cell` and the Cells in it with their paths, each once; optimizers and what is in them are left out."""
    if id(cell) in seen or isinstance(cell, nn.Optimizer):
        return
    seen.add(id(cell))
    yield cell, path, full
    for name, child in cell._cells.items():
        if child is not None:
            yield from _cells(child, path + _component(cell, path, name, child), f"{full}{name}.", seen)


def _component(cell, path, name, child):
    """What the attribute `name` of a Cell adds to the path: nothing where `mindpet.peft` puts deltas."""
    left_out = getattr(child, "is_patched_in", False) or (not path and not cell._auto_prefix)
    return "" if left_out else f"{name}."


def _outer_prefix(places):
    """The most frequent difference between names and paths."""
    pairs = [(place.param.name, place.path) for place in places]
    starts = Counter(name[: -len(path)] for name, path in pairs if f".{name}".endswith(f".{path}"))
    return max(starts, key=starts.get, default="")


def _key(place, outer, tops):
    name = place.param.name
    leads_to_it = name.startswith(outer) and any(_at(top, name[len(outer) :]) is place.param for top in tops)
    return name if place.is_top or leads_to_it else outer + place.path


def _at(cell, path):
    """The Parameter at a path, or None."""
    *parts, name = path.split(".")
    for part in parts:
        cell = cell and cell._cells.get(part)
    return cell and cell._params.get(name)

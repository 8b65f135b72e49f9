"""Which layers of a network a configuration means. Everything is matched, and checked, before anything is changed."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Optional, Union

from mindspore import nn

from mindpet.errors import ConfigError, NoMatchError
from mindpet.network.kinds import layer_kind, why_not
from mindpet.utils.quote import quote
from mindpet.utils.validate import is_int

ALL_LINEAR = "all-linear"
# Names of output layers, which 'all-linear' leaves out.
HEADS = ("classifier", "score", "lm_head", "qa_outputs", "output_layer", "head")
# For networks without `target_modules` in the configuration: the first that is in the network as a whole.
USUAL_TARGETS = (("q_proj", "v_proj"), ("query", "value"), ("query_key_value",), ("c_attn",), ("q", "v"))


@dataclass
class Layer:
    """A Cell of a network, wherever it stands.

    Attributes:
        cell: the layer.
        paths: dotted, from the network; several if the Cell is shared.
        places: (parent Cell, key), one for each path.
    """

    cell: nn.Cell
    paths: list[str]
    places: list[tuple[nn.Cell, str]]

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]


def list_layers(network: nn.Cell) -> list[Layer]:
    """Every Cell below a network, in its order; a shared Cell is one entry with all of its paths."""
    layers = {}

    def walk(parent, prefix, above):
        for key, cell in parent._cells.items():
            if cell is None or id(cell) in above:  # a Cell that holds itself
                continue
            layer = layers.setdefault(id(cell), Layer(cell, [], []))
            layer.paths.append(f"{prefix}{key}")
            layer.places.append((parent, key))
            walk(cell, f"{prefix}{key}.", above | {id(cell)})

    walk(network, "", {id(network)})
    return list(layers.values())


def find_targets(
    network: nn.Cell,
    config: Any,
    supported: Callable[[nn.Cell], bool],
    unmatched: Optional[list[str]] = None,
    deltas: tuple[type, ...] = (),
) -> list[Layer]:
    """The layers that a configuration means.

    A list matches a path or its end after a dot, a str is a regular expression for the whole path, 'all-linear' is
    every linear layer but output layers.

    Args:
        network: the base network.
        config: says which layers.
        supported: whether a Cell can carry the method.
        unmatched: where to note, for a file, entries that match nothing. Default: None, to refuse them.
        deltas: classes of Cells that carry a delta already. Default: ().

    Returns:
        The layers in the network's order.

    Raises:
        NoMatchError: an entry matches no layer, the nearest names are in the message; with `unmatched`, if there is
            no layer at all.
        ConfigError: a matched layer is not supported, carries a delta already, or is shared by places of which only
            some match; no layers are given, and none are known.
    """
    layers = list_layers(network)
    missing = []
    targets = config.target_modules
    if targets is None:
        targets = default_targets(layers, config.usual_targets)
    wanted = _matcher("target_modules", targets, layers, missing)
    excluded = _matcher("exclude_modules", config.exclude_modules, layers, missing)
    numbered = _layer_numbers(config, layers, missing)
    targeted, torn = [], []
    for layer in layers:
        hits = [wanted(layer, path) and not excluded(layer, path) and numbered(path) for path in layer.paths]
        if any(hits) and not all(hits):
            named = [path for path, hit in zip(layer.paths, hits) if hit]
            torn.append(f"{named} is the same layer as {sorted(set(layer.paths) - set(named))}: match all or none")
        elif any(hits):
            targeted.append(layer)
    if unmatched is not None and (targeted or torn):
        unmatched += missing
        missing = []
    if missing or torn:
        error = NoMatchError if missing else ConfigError
        raise error(f"{type(config).__name__}: " + "; ".join(missing + torn) + ".")
    _check_supported(config, targeted, supported, deltas)
    return targeted


def check_patterns(config: Any, layers: Sequence[Layer], unmatched: Optional[list[str]] = None) -> None:
    """Refuse keys of `rank_pattern` and `alpha_pattern`, and entries of `choices`, that fit none of the layers.

    Args:
        config: the configuration.
        layers: its targets.
        unmatched: where to note such keys instead, for a file. Default: None.

    Raises:
        NoMatchError: a key fits no layer; the nearest names are in the message.
    """
    problems = []
    for name in getattr(config, "patterns", ()):
        problems += _unmatched(name, list(getattr(config, name, {})), _is_in_patterns, layers)
    for name in getattr(config, "choices", ()):
        problems += _unmatched(name, _in_order(getattr(config, name)), chooses, layers)
    if unmatched is not None:
        unmatched += problems
    elif problems:
        raise NoMatchError(f"{type(config).__name__}: " + "; ".join(problems) + ".")


def default_targets(layers: Sequence[Layer], usual: Sequence[tuple[str, ...]] = USUAL_TARGETS) -> list[str]:
    """The names of the layers that get a delta if the configuration says nothing.

    Args:
        layers: of the network.
        usual: tuples of names, of which the first is taken that is there as a whole. Default: USUAL_TARGETS.

    Raises:
        ConfigError: none are known.
    """
    ends = {path.rsplit(".", 1)[-1] for layer in layers for path in layer.paths}
    for names in usual:
        if ends.issuperset(names):
            return list(names)
    raise ConfigError("'target_modules' must be given: the network has none of the layers that are known.")


def _matcher(name, entries, layers, problems):
    """A function (layer, path) -> bool; entries without a match are noted."""
    if entries is None:
        return lambda layer, path: False
    if entries == ALL_LINEAR:
        return lambda layer, path: _is_linear(layer.cell) and path.rsplit(".", 1)[-1] not in HEADS
    problems += _unmatched(name, _in_order(entries), names_module, layers)
    return lambda layer, path: names_module(entries, path)


def _in_order(entries):
    """A regular expression as it is, and a list or set of names sorted."""
    return entries if isinstance(entries, str) else sorted(entries or ())


def _unmatched(name, entries, means, layers):
    """What to say of the entries of a field that mean none of the layers.

    Args:
        name (str): of the field.
        entries (Union[str, list of str]): one that stands for itself, or several.
        means (callable): whether entries, given as they are here, mean a path.
        layers (list of Layer): the layers.

    Returns:
        list of str.
    """
    each = {entries: entries} if isinstance(entries, str) else {entry: [entry] for entry in entries}
    paths = [path for layer in layers for path in layer.paths]
    return [no_match(name, entry, layers) for entry, one in each.items() if not any(means(one, path) for path in paths)]


def _is_linear(cell):
    kind = layer_kind(cell)
    return kind is not None and kind.name == "linear"


def ends_with(path: str, entry: str) -> bool:
    """Whether a path is an entry, or ends like it after a dot."""
    return path == entry or path.endswith(f".{entry}")


def exactly(path: str) -> str:
    """The key of `rank_pattern` or `alpha_pattern` that fits this path alone, here and in Hugging Face PEFT."""
    return f"^{re.escape(path)}$"


def exact_targets(paths: Iterable[str], known: Optional[Iterable[str]] = None) -> Union[list[str], str]:
    """What `target_modules` must be to mean these paths alone, here and in Hugging Face PEFT.

    Args:
        paths: what is meant.
        known: every path that there is. Default: None, if that is not known.

    Returns:
        The paths, or, where one is the end of a path that is not meant, a regular expression.
    """
    paths = sorted(set(paths))
    others = None if known is None else set(known).difference(paths)
    if others is None or any(ends_with(other, path) for other in others for path in paths):
        return f"(?:{'|'.join(map(re.escape, paths))})"
    return paths


def names_module(entries: Union[Collection[str], str, None], path: str) -> bool:
    """Whether a list of names or a regular expression, as `target_modules` is one, means a path; None means none."""
    if isinstance(entries, str):
        return re.fullmatch(entries, path) is not None
    return any(ends_with(path, entry) for entry in entries or ())


def chooses(entries: Union[Collection[str], str, None], path: str) -> bool:
    """Whether entries that choose some of the targets mean a path: a regular expression, or a list of ends of names.

    As in Hugging Face PEFT an end may be inside of a part of the path: 'proj' chooses 'c_proj'. None chooses none.
    """
    return names_module(entries, path) if isinstance(entries, str) else path.endswith(tuple(entries or ()))


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value for a path in `rank_pattern` or `alpha_pattern`: of the first key that is the path or its end.

    A key is a regular expression.
    """
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def _is_in_patterns(patterns, path):
    """Whether one of the keys of `rank_pattern` or `alpha_pattern` fits a path."""
    return pattern_value(dict.fromkeys(patterns, True), path, False)


def listed(entries: Union[Collection[str], str, None]) -> list[str]:
    """Entries that are one str, several, or None, as a list."""
    return [entries] if isinstance(entries, str) else sorted(entries or ())


def _layer_numbers(config, layers, problems):
    """A function path -> bool: whether the number of the layer is one of `layers_to_transform`.

    An entry of `target_modules` that is a whole path counts whatever its number, as in Hugging Face PEFT.
    """
    if config.layers_to_transform in (None, [], ()):
        return lambda path: True
    wanted = [config.layers_to_transform] if is_int(config.layers_to_transform) else list(config.layers_to_transform)
    entries = config.target_modules or ()
    exact = () if isinstance(entries, str) else entries
    names = config.layers_pattern or []
    names = [names] if isinstance(names, str) else list(names)
    matched = {path: layer_number(path, names) for layer in layers for path in layer.paths}
    numbers = set(matched.values()) - {None}
    missing = [number for number in wanted if number not in numbers]
    if missing:
        known = f"those of {names}" if names else "the numbers"
        problems.append(f"'layers_to_transform': no layer {missing}; {known} are {sorted(numbers)}")
    return lambda path: path in exact or matched[path] in wanted


def layer_number(path: str, names: Sequence[str] = ()) -> Optional[int]:
    """The number after the name of the list of layers; without names, the first number in the path; or None.

    Args:
        path: dotted path of a Cell.
        names: regular expressions for the name. Default: ().
    """
    starts = [rf"(?:.*\.)?{name}\." for name in names] or [r"(?:[^.]+\.)*?"]
    match = next(filter(None, (re.match(rf"{start}(\d+)\.", f"{path}.") for start in starts)), None)
    return int(match.group(1)) if match else None


def no_match(name: str, entry: str, layers: Sequence[Layer]) -> str:
    """What to say of an entry that fits nothing."""
    names = {part for layer in layers for path in layer.paths for part in (path, path.rsplit(".", 1)[-1])}
    near = difflib.get_close_matches(entry, sorted(names), n=3)
    hint = f"; near: {near}" if near else ""
    return f"'{name}': no layer matches {quote(entry)}{hint}"


def _check_supported(config, layers, supported, deltas):
    """Refuse layers that cannot carry the method, or carry a delta already."""
    wrapped = [layer.path for layer in layers if isinstance(layer.cell, deltas)]
    other = [
        f"{layer.path} ({why_not(layer.cell) or type(layer.cell).__name__})"
        for layer in layers
        if not supported(layer.cell) and layer.path not in wrapped
    ]
    problems = [f"carry a delta already: {wrapped}"] if wrapped else []
    problems += [f"of a type that cannot carry it: {other}"] if other else []
    if problems:
        raise ConfigError(f"{type(config).__name__}: matched layers " + "; ".join(problems) + ".")

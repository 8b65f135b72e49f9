"""What a configuration would do to a network. Everything is found, and checked, before anything is changed."""

import copy
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from mindspore import Parameter, nn

from mindpet.delta._base import Delta
from mindpet.delta._config import PeftConfig
from mindpet.delta.registry import METHODS, Method, method_of
from mindpet.errors import ConfigError, MindPetError, NoMatchError
from mindpet.network.kinds import SLOTS, layer_kind, place_kind, slot_of
from mindpet.network.match import (
    Layer,
    check_patterns,
    default_targets,
    ends_with,
    find_targets,
    list_layers,
    listed,
    no_match,
)
from mindpet.network.parameters import STATISTICS, matches, quantized_parameters
from mindpet.peft.strategies import find_cuts
from mindpet.utils.validate import is_int

Place = tuple[str, nn.Cell, str]  # of a Parameter: path of a Cell, the Cell, attribute


@dataclass
class Target:
    """A place of a network that gets a delta.

    Attributes:
        cell: the layer, block, attention, ...
        paths: dotted paths from the network; several if the Cell is shared.
        kind: of the Cell, see `mindpet.network.kinds`.
        delta: the Delta for it.
        arguments: delta arguments.
        config: of the method.
        tied: further layers with the same weight, see `Delta.tied_deltas`.
    """

    cell: nn.Cell
    paths: list[str]
    kind: Any
    delta: type[Delta]
    arguments: dict[str, Any]
    config: PeftConfig
    tied: list["Target"] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer with a weight."""
        return hasattr(self.kind, "weight")

    @property
    def is_slot(self) -> bool:
        """Whether the Cell has an attribute for the delta."""
        return self.kind.name in SLOTS


@dataclass
class Plan:
    """What a configuration does to a network.

    Attributes:
        config: completed by what was found in the network.
        targets: what gets a delta.
        copied: Cells that `target_modules` means, of a method that trains copies of these.
        modules_to_save: Cells that are trained and saved as they are.
        trained: by path the Parameters of the network that the adapter has a copy of, and trains.
        places: path -> where the copy takes its place.
        buffers: paths in `trained` that are not trained, but move: running statistics of a BatchNorm.
        still: BatchNorms whose running statistics stay.
    """

    config: PeftConfig
    targets: list[Target] = field(default_factory=list)
    copied: list[Layer] = field(default_factory=list)
    modules_to_save: list[Layer] = field(default_factory=list)
    trained: dict[str, Parameter] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    still: list[nn.Cell] = field(default_factory=list)

    @property
    def methods(self) -> list[Method]:
        """Of the registry, those of the configuration."""
        return [method_of(part) for part in self.config.parts]

    @property
    def trainable(self) -> tuple[str, ...]:
        """Patterns of the parameters that train, of the deltas."""
        return tuple(pattern for method in self.methods for pattern in method.trainable)

    @property
    def reached(self) -> list[Target]:
        """The targets, and the further layers that are tied to them."""
        return [reached for target in self.targets for reached in (target, *target.tied)]

    def renew_kinds(self) -> None:
        """Have the kinds of the targets that their Cells have now, which compute in another type than before."""
        for target in self.reached:
            if not target.is_slot:
                target.kind = place_kind(target.cell, (target.kind.name,))

    def __str__(self) -> str:
        rows = [(target.path, type(target.cell).__name__, target.config.peft_name) for target in self.reached]
        whole = [*self.copied, *self.modules_to_save]
        rows += [(layer.path, type(layer.cell).__name__, "trained as a whole") for layer in whole]
        inside = tuple(f"{layer.path}." for layer in whole)
        rows += [
            (path, "Parameter", "moves with the adapter" if path in self.buffers else "trained")
            for path in self.trained
            if not path.startswith(inside)
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{path:<{widths[0]}}  {kind:<{widths[1]}}  {what}" for path, kind, what in rows)


def plan_targets(
    network: nn.Cell, config: PeftConfig, batch_statistics: bool = False, unmatched: Optional[list[str]] = None
) -> Plan:
    """What `get_peft_model` would do; the network is not changed. `print` the result to see it.

    Args:
        network: the base network.
        config: says what.
        batch_statistics: whether the running statistics of BatchNorms move while training; then they belong to the
            adapter. Default: False.
        unmatched: where to note, for a file, entries of the configuration that match nothing. Default: None, to refuse
            them.

    Raises:
        TypeError: an argument has the wrong type.
        NoMatchError, ConfigError: an entry of the configuration matches nothing, the nearest names are in the message;
            a layer cannot carry the method, or carries a delta already; all that is wrong is in one error.
    """
    if not isinstance(network, nn.Cell):
        raise TypeError(f"'network' must be a Cell, but got {network!r}.")
    if getattr(config, "peft_type", None) is None:
        raise TypeError(f"'config' must be the configuration of a method, but got {config!r}.")
    config.check_supported()
    plan = Plan(copy.deepcopy(config))
    errors = []
    for step in (_find_targets, _find_tied, _find_modules_to_save, _check_targets):
        try:
            step(network, plan, unmatched)
        except MindPetError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])("\n".join(map(str, errors)))
    _find_trained(network, plan, batch_statistics)
    if not (plan.targets or plan.trained):
        raise ConfigError(f"{type(config).__name__}: there is nothing to train in {type(network).__name__}.")
    return plan


def _find_targets(network, plan, unmatched):
    """The targets of all methods."""
    errors = []
    for part in plan.config.parts:
        try:
            _find_part(network, plan, part, unmatched)
        except MindPetError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])("\n".join(map(str, errors)))


def _find_part(network, plan, config, unmatched):
    """The Cells that `target_modules` means; without such a field all that have a slot for the method."""
    deltas = method_of(config).deltas
    kinds = [name for name in deltas if name in config.kinds_of_targets(deltas)]
    if hasattr(config, "target_modules"):
        if config.target_modules is None:
            config.target_modules = default_targets(list_layers(network), config.usual_targets)
        carrying = tuple(cell for method in METHODS.values() for cell in method.cells)
        copies = config.copied_as is not None
        supported = _has_parameters if copies else lambda cell: _is_place(cell, kinds)
        layers = find_targets(network, config, supported, unmatched, carrying)
        check_patterns(config, layers, unmatched)
        if copies:
            plan.copied += layers
            return
        layers = config.choose(layers)
    else:
        layers = _all_slots(network, type(config).__name__, kinds)
    with_slot = [layer for layer in layers if slot_of(layer.cell, kinds)]
    slots = _slot_kinds(type(config).__name__, kinds, with_slot)
    config.complete(list(slots.values()))
    for layer in layers:
        kind = slots.get(layer.path) or place_kind(layer.cell, kinds)
        arguments = config.delta_arguments(layer.path)
        plan.targets.append(Target(layer.cell, layer.paths, kind, deltas[kind.name], arguments, config))


def _is_place(cell, kinds):
    return slot_of(cell, kinds) is not None or place_kind(cell, kinds) is not None


def _has_parameters(cell):
    return any(True for _ in cell.get_parameters())


def _find_tied(network, plan, unmatched):
    """The further layers that have the weight of a target, where the method reaches these, too."""
    targets = [target for target in plan.targets if target.delta.tied_deltas]
    places = {id(_parameter(group)): group for group in parameter_places("", network).values()} if targets else {}
    meant, problems = {id(target.cell) for target in targets}, []
    for target in targets:
        for path, cell, key in places[id(target.kind.weight_of(target.cell))]:
            if cell is target.cell:
                continue
            kind = layer_kind(cell)
            is_weight = kind is not None and kind.weight == key and id(cell) not in meant
            delta = target.delta.tied_deltas.get(kind.name) if is_weight else None
            if delta is None:
                where = f"{path or 'the network'} ({type(cell).__name__})"
                problems.append(f"{where} has the weight of {target.path} as {key}")
            else:
                target.tied.append(Target(cell, [path], kind, delta, target.arguments, target.config))
    if problems:
        raise ConfigError(
            f"{type(plan.config).__name__}: all that have the weight of a target must see its delta, but these are no "
            f"layers that can, or targets themselves: {'; '.join(problems)}."
        )


def _all_slots(network, owner, kinds):
    """All Cells of a network that have an attribute for a delta of these kinds."""
    cells = [Layer(network, [""], []), *list_layers(network)] if kinds else []
    layers = [layer for layer in cells if slot_of(layer.cell, kinds)]
    if kinds and not layers:
        cls = SLOTS[kinds[0]]
        raise ConfigError(
            f"{owner}: no Cell of {type(network).__name__} has an attribute {cls.slot!r}; see docs/peft.md for how a "
            f"network takes a {cls.slot.split('_')[0]}."
        )
    return layers


def _slot_kinds(owner, kinds, layers):
    """Path -> kind of Cells with a slot, which must be free, and all of the same sizes: they share one table."""
    if not layers:
        return {}
    problems, sizes, cls = [], {}, slot_of(layers[0].cell, kinds)
    names = [field.name for field in fields(cls)]
    for layer in layers:
        size = [getattr(layer.cell, name, None) for name in names]
        where = layer.path or "the network"
        if getattr(layer.cell, cls.slot) is not None:
            problems.append(f"{where} carries a {cls.slot.split('_')[0]} already")
        elif not all(is_int(value) and value > 0 for value in size):
            problems.append(f"{where}: {' and '.join(map(repr, names))} must be positive ints, but are {size}")
        else:
            sizes[layer.path] = tuple(size)
    if len(set(sizes.values())) > 1:
        problems.append(
            f"all Cells with {cls.slot!r} must have the same {' and '.join(map(repr, names))}, but they are {sizes}"
        )
    if problems:
        raise ConfigError(f"{owner}: " + "; ".join(problems) + ".")
    return {path: cls(*size) for path, size in sizes.items()}


def _check_targets(network, plan, unmatched):
    """Refuse deltas that the method, or the strategies of a layer, speak against."""
    problems, owners = [], {}
    for target in plan.reached:
        if owners.setdefault(target.path, target) is not target:
            problems.append(f"{target.path} would have two deltas, of {owners[target.path].config.peft_name} too")
        try:
            is_sharded = find_cuts(target.cell, target.kind) is not None
        except ConfigError as error:
            problems.append(f"{target.path or 'the network'}: {error}")
        else:
            objections = target.delta.problems(target.cell, target.kind, is_sharded, **target.arguments)
            problems += [f"{target.path or 'the network'}: {problem}" for problem in objections]
    if problems:
        raise ConfigError(f"{type(plan.config).__name__}: " + "; ".join(problems) + ".")


def _find_modules_to_save(network, plan, unmatched):
    config = plan.config
    heads = config.task_heads
    layers = list_layers(network)
    problems, missing = [], False
    for entry in dict.fromkeys([*listed(config.modules_to_save), *heads]):
        matching = [layer for layer in layers if any(ends_with(path, entry) for path in layer.paths)]
        plan.modules_to_save += [layer for layer in matching if layer not in plan.modules_to_save]
        if not matching and entry not in heads:
            missing = unmatched is None
            (problems if missing else unmatched).append(no_match("modules_to_save", entry, layers))
    for index, layer in enumerate(plan.copied):
        others = [other.path for other in (*plan.copied[index + 1 :], *plan.modules_to_save)]
        both = [path for path in others if f"{path}.".startswith(f"{layer.path}.")]
        both += [path for path in others if layer.path.startswith(f"{path}.")]
        if both:
            problems.append(f"the target {layer.path} has Parameters in common with {both}, which train as a whole")
    for layer in plan.modules_to_save:
        both = [target.path for target in plan.reached if f"{target.path}.".startswith(f"{layer.path}.")]
        if both:
            problems.append(
                f"'modules_to_save': {layer.path} is to be trained as a whole, but carries {both} of the targets"
            )
    whole = [*plan.copied, *plan.modules_to_save]
    coded = [layer.path for layer in whole if quantized_parameters(layer.cell)]
    if coded:
        problems.append(f"{coded} are to be trained as a whole, but have quantised weights")
    if problems:
        raise (NoMatchError if missing else ConfigError)(f"{type(config).__name__}: " + "; ".join(problems) + ".")


def _find_trained(network, plan, batch_statistics):
    """The base's parameters that the adapter has copies of, and where the copies go.

    A copy of a module's own parameter goes into that module only, also where another Cell has the same Parameter.
    """
    everywhere = parameter_places("", network)
    for layer in (*plan.copied, *plan.modules_to_save):
        _take(plan, parameter_places(layer.path, layer.cell))
    patterns = plan.config.trained_parameters
    targets = [target for target in plan.targets if target.config.trains_target_biases]
    biases = {id(target.kind.bias_of(target.cell)) for target in targets}
    statistics = {path: places for path, places in everywhere.items() if _is_statistic(places[0])}
    for path, places in everywhere.items():
        if path not in statistics and (matches(path, patterns) or id(_parameter(places)) in biases):
            _take(plan, {path: places})
    for path, places in statistics.items():
        # Only Cells with this attribute can be told to leave their statistics alone.
        if batch_statistics or not hasattr(places[0][1], "use_batch_statistics"):
            _take(plan, {path: places})
    plan.trained = {path: _parameter(places) for path, places in plan.places.items()}
    plan.buffers = {path for path, places in plan.places.items() if _is_statistic(places[0])}
    moving = {id(cell) for path in plan.buffers for _, cell, _ in plan.places[path]}
    still = {id(cell): cell for places in statistics.values() for _, cell, _ in places}
    plan.still = [cell for key, cell in still.items() if key not in moving]


def _take(plan, places):
    """Add places to those of a plan; one that a copy goes to already is left out."""
    taken = {(id(cell), key) for group in plan.places.values() for _, cell, key in group}
    for group in places.values():
        free = [place for place in group if (id(place[1]), place[2]) not in taken]
        if free:
            plan.places[".".join(filter(None, (free[0][0], free[0][2])))] = free


def parameter_places(prefix: str, network: nn.Cell) -> dict[str, list[Place]]:
    """The places of every Parameter in a network by the path of the first; several if it is shared."""
    places = {}
    for name, cell in network.cells_and_names():
        path = ".".join(filter(None, (prefix, name)))
        for key, param in cell._params.items():
            if param is not None:
                places.setdefault(id(param), []).append((path, cell, key))
    return {".".join(filter(None, (group[0][0], group[0][2]))): group for group in places.values()}


def _parameter(places):
    _, cell, key = places[0]
    return cell._params[key]


def _is_statistic(place):
    _, cell, key = place
    return any(key in names and set(names[:2]) <= set(cell._params) for names in STATISTICS)

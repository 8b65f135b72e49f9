"""What a configuration would do to a network. Everything is found, and checked, before anything is changed."""

import copy
import math
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import nn

from mindpet.delta.lora_layer import starts_from_weight
from mindpet.errors import ConfigError, MindPetError, NoMatchError
from mindpet.graph.parameters import STATISTICS, matches
from mindpet.layers.kinds import layer_kind
from mindpet.peft.config import PeftType, TaskType
from mindpet.peft.match import check_patterns, default_targets, ends_with, find_targets, list_layers, listed, no_match
from mindpet.peft.strategies import find_problems
from mindpet.utils.validate import is_int

# New output layers that a task brings with it; they are trained and saved, as far as the network has them.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
BIASES = ("*.bias", "*.beta", "bias", "beta")  # a LayerNorm calls its bias beta


@dataclass
class Plan:
    """What a configuration does to a network.

    Attributes:
        config (PeftConfig): the configuration, completed by what was found in the network.
        method (Method): of the registry.
        targets (list of Layer): layers that get a delta.
        attentions (list of Layer): attentions that get keys and values in front of theirs.
        modules_to_save (list of Layer): Cells that are trained and saved as they are.
        trained (dict): path -> Parameter of the network that the adapter has a copy of, and trains.
        places (dict): path -> list of (path of a Cell, Cell, attribute) where the copy takes its place.
        buffers (set): paths in `trained` that are not trained, but move: running statistics of a BatchNorm.
        still (list of Cell): BatchNorms whose running statistics stay.
    """

    config: object
    method: object
    targets: list = field(default_factory=list)
    attentions: list = field(default_factory=list)
    modules_to_save: list = field(default_factory=list)
    trained: dict = field(default_factory=dict)
    places: dict = field(default_factory=dict)
    buffers: set = field(default_factory=set)
    still: list = field(default_factory=list)

    def __str__(self):
        method = self.config.peft_type.value
        rows = [(layer.path, type(layer.cell).__name__, method) for layer in self.targets + self.attentions]
        rows += [(layer.path, type(layer.cell).__name__, "trained as a whole") for layer in self.modules_to_save]
        inside = tuple(f"{layer.path}." for layer in self.modules_to_save)
        rows += [
            (path, "Parameter", "moves with the adapter" if path in self.buffers else "trained")
            for path in self.trained
            if not path.startswith(inside)
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{path:<{widths[0]}}  {kind:<{widths[1]}}  {what}" for path, kind, what in rows)


def plan_targets(network, config, batch_statistics=False, unmatched=None):
    """What `get_peft_model` would do; the network is not changed. `print` the result to see it.

    Args:
        network (Cell): the base network.
        config (PeftConfig): the configuration.
        batch_statistics (bool): whether the running statistics of BatchNorms move while training; then they belong to
            the adapter. Default: False.
        unmatched (list): where to note, for a file, entries of the configuration that match nothing. Default: None, to
            refuse them.

    Returns:
        Plan.

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
    plan = Plan(copy.deepcopy(config), config.method)
    errors = []
    for step in (_find_layers, _find_attentions, _find_modules_to_save):
        try:
            step(network, plan, unmatched)
        except MindPetError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])("\n".join(map(str, errors)))
    problems = find_problems(plan)
    if problems:
        raise ConfigError(f"{type(config).__name__}: " + "; ".join(problems) + ".")
    _find_trained(network, plan, batch_statistics)
    if not (plan.targets or plan.attentions or plan.trained):
        raise ConfigError(f"{type(config).__name__}: there is nothing to train in {type(network).__name__}.")
    return plan


def _find_layers(network, plan, unmatched):
    kinds = plan.method.kinds
    if not kinds:
        return
    config = plan.config
    if config.target_modules is None:
        config.target_modules = default_targets(list_layers(network))
    plan.targets = find_targets(network, config, lambda cell: _name(cell) in kinds, unmatched)
    check_patterns(config, plan.targets, unmatched)
    if config.peft_type == PeftType.LORA:
        _check_lora(config, plan.targets)


def _check_lora(config, targets):
    problems = []
    for layer in targets:
        kind, rank = layer_kind(layer.cell), config.sizes(layer.path)["rank"]
        name, group = kind.name, kind.groups_of(layer.cell)
        if rank % group:
            problems.append(f"{layer.path}: the rank, {rank}, must be a multiple of its {group} groups")
        if group > 1 and config.use_dora:
            problems.append(f"{layer.path}: no DoRA beside a convolution in groups")
        scale, dtype = config.scaling(layer.path), kind.compute_dtype
        with np.errstate(over="ignore"):
            held = abs(float(np.asarray(scale, ms.dtype_to_nptype(dtype))))
        if not 0 < held < math.inf:
            problems.append(f"{layer.path}: the scale, {scale:g}, must be a number of {dtype}, in which it computes")
        if name == "embedding" and config.lora_bias:
            problems.append(f"{layer.path}: an embedding has no lora_bias")
        if name != "linear" and is_from_weight(config):
            problems.append(f"{layer.path}: init_lora_weights={config.init_lora_weights!r} is for linear layers")
    if problems:
        raise ConfigError("LoraConfig: " + "; ".join(problems) + ".")


def is_from_weight(config):
    """Whether A and B of a configuration start from the layer's weight: PiSSA and OLoRA."""
    return starts_from_weight(getattr(config, "init_lora_weights", None))


def _find_attentions(network, plan, unmatched):
    if not plan.config.is_prompt_learning:
        return
    config, owner = plan.config, type(plan.config).__name__
    plan.attentions = [layer for layer in list_layers(network) if hasattr(layer.cell, "prefix_source")]
    if not plan.attentions:
        raise ConfigError(
            f"{owner}: no Cell of {type(network).__name__} has an attribute 'prefix_source'; see docs/peft.md for how "
            "an attention takes a prefix."
        )
    _check_attentions(owner, plan.attentions)
    problems, first = [], plan.attentions[0].cell
    known = {
        "num_layers": len(plan.attentions),
        "num_attention_heads": first.kv_heads,
        "token_dim": first.kv_heads * first.head_dim,
    }
    for name, value in known.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
        elif getattr(config, name) != value:
            problems.append(f"'{name}' must be {value} for this network, but is {getattr(config, name)}")
    if config.num_virtual_tokens is None:
        problems.append("'num_virtual_tokens' must be given")
    if problems:
        raise ConfigError(f"{owner}: " + "; ".join(problems) + ".")


def _check_attentions(owner, attentions):
    """Refuse attentions that a prefix of one table for all cannot be laid in front of."""
    problems, sizes = [], {}
    for layer in attentions:
        size = [getattr(layer.cell, name, None) for name in ("kv_heads", "head_dim")]
        if layer.cell.prefix_source is not None:
            problems.append(f"{layer.path} carries a prefix already")
        elif not all(is_int(value) and value > 0 for value in size):
            problems.append(f"{layer.path}: 'kv_heads' and 'head_dim' must be positive ints, but are {size}")
        else:
            sizes[layer.path] = tuple(size)
    if len(set(sizes.values())) > 1:
        problems.append(f"all attentions must have the same 'kv_heads' and 'head_dim', but they are {sizes}")
    if problems:
        raise ConfigError(f"{owner}: " + "; ".join(problems) + ".")


def _find_modules_to_save(network, plan, unmatched):
    config = plan.config
    heads = TASK_HEADS.get(config.task_type, ())
    layers = list_layers(network)
    problems, missing = [], False
    for entry in dict.fromkeys([*listed(config.modules_to_save), *heads]):
        found = [layer for layer in layers if any(ends_with(path, entry) for path in layer.paths)]
        plan.modules_to_save += [layer for layer in found if layer not in plan.modules_to_save]
        if not found and entry not in heads:
            missing = unmatched is None
            (problems if missing else unmatched).append(no_match("modules_to_save", entry, layers))
    for layer in plan.modules_to_save:
        both = [target.path for target in plan.targets if f"{target.path}.".startswith(f"{layer.path}.")]
        if both:
            problems.append(
                f"'modules_to_save': {layer.path} is to be trained as a whole, but carries {both} of the targets"
            )
    if problems:
        raise (NoMatchError if missing else ConfigError)(f"{type(config).__name__}: " + "; ".join(problems) + ".")


def _find_trained(network, plan, batch_statistics):
    """The base's parameters that the adapter has copies of, and where the copies go.

    A copy of a module's own parameter goes into that module only, also where another Cell has the same Parameter.
    """
    everywhere = parameter_places("", network)
    for layer in plan.modules_to_save:
        _take(plan, parameter_places(layer.path, layer.cell))
    patterns = plan.method.trainable if not (plan.method.kinds or plan.method.cells) else ()
    bias = getattr(plan.config, "bias", "none")
    patterns += BIASES if bias == "all" else ()
    own = {id(layer_kind(layer.cell).bias_of(layer.cell)) for layer in plan.targets} if bias == "lora_only" else set()
    statistics = {path: places for path, places in everywhere.items() if _is_statistic(places[0])}
    for path, places in everywhere.items():
        if path not in statistics and (matches(path, patterns) or id(_parameter(places)) in own):
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
    taken = {(id(cell), key) for found in plan.places.values() for _, cell, key in found}
    for found in places.values():
        free = [place for place in found if (id(place[1]), place[2]) not in taken]
        if free:
            plan.places[".".join(filter(None, (free[0][0], free[0][2])))] = free


def parameter_places(prefix, network):
    """path -> list of (path of a Cell, Cell, attribute), of every Parameter in a network; several if it is shared."""
    places = {}
    for name, cell in network.cells_and_names():
        own = ".".join(filter(None, (prefix, name)))
        for key, param in cell._params.items():
            if param is not None:
                places.setdefault(id(param), []).append((own, cell, key))
    return {".".join(filter(None, (found[0][0], found[0][2]))): found for found in places.values()}


def _parameter(places):
    _, cell, key = places[0]
    return cell._params[key]


def _is_statistic(place):
    _, cell, key = place
    return any(key in names and set(names[:2]) <= set(cell._params) for names in STATISTICS)


def _name(cell):
    kind = layer_kind(cell)
    return kind and kind.name

"""Freezing: which parameters train. Freeze before the optimizer is made, for it keeps what it was given."""

import difflib
import os
import warnings
from collections.abc import Sequence
from typing import Optional

import mindspore as ms
from mindspore import nn

from mindpet.delta.registry import METHODS, find_method
from mindpet.errors import LinkPathError, ModelConfigFreezeInfoError, NoMatchError, ReadYamlFileError
from mindpet.network.parameters import TRAINED, matches, model_parameters, quantized_parameters, running_statistics
from mindpet.network.precision import check_half, plan_half, store_half
from mindpet.network.recompute import renew_recompute
from mindpet.utils.hints import PathLike
from mindpet.utils.parse import LARGEST_YAML, parse_yaml
from mindpet.utils.quote import quote
from mindpet.utils.validate import FLOAT_TYPES, Checker

MOST_HINTS = 20  # to find the nearest names takes time


def freeze_modules(
    model: nn.Cell,
    include: Optional[Sequence[str]] = None,
    exclude: Optional[Sequence[str]] = None,
    strict: bool = True,
) -> None:
    """Freeze the parameters whose names fit `include`, and let those train that fit `exclude`.

    Names are paths in the network, see `mindpet.network.parameters.model_parameters`. A name that fits both is left as
    it was, and so is one that fits neither. An integer parameter is never set to train; the running statistics of
    BatchNorms, and quantised weights, are never trainable.

    Args:
        model: the network.
        include: fnmatch patterns of names to freeze. Default: None.
        exclude: fnmatch patterns of names to train. Default: None.
        strict: whether a pattern that fits no name is an error; else it is a warning. Default: True.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: neither list is given.
        NoMatchError: a pattern fits no name, or one of `exclude` only what never trains; the network is unchanged.
    """
    _check_arguments("freeze_modules", model, include, exclude, strict)
    if not include and not exclude:
        raise ValueError(
            "freeze_modules: 'include' or 'exclude' must hold a pattern, but got "
            f"include={quote(include)}, exclude={quote(exclude)}."
        )
    params, fixed = _parameters(model)
    _report("freeze_modules", _unmatched(params, fixed, include, exclude), strict)
    _apply(model, params, fixed, {}, include, exclude)


def freeze_delta(
    model: nn.Cell,
    mode: str,
    include: Optional[Sequence[str]] = None,
    exclude: Optional[Sequence[str]] = None,
    strict: bool = True,
    frozen_dtype: Optional[ms.Type] = None,
) -> None:
    """Freeze all parameters but those of delta methods; then apply `include` and `exclude`, see `freeze_modules`.

    Args:
        model: the network, its delta in place.
        mode: name or alias of a method, see `mindpet.delta.registry`, in any letter case; or a list.
        include: fnmatch patterns of further names to freeze. Default: None.
        exclude: fnmatch patterns of further names to train, say the head. Default: None.
        strict: whether a mode whose delta is not in the network, or a pattern that fits no name, is an error; else it
            is a warning. Default: True.
        frozen_dtype: float16 or bfloat16, to store the frozen weights of layers in, and to have these layers compute
            in; there is no float32 copy of them. Default: None, to leave both as they are.

    Raises:
        TypeError: an argument but `mode` has the wrong type.
        ValueError: `mode`, or one of several, is unknown.
        NoMatchError: the delta is not in the network, or a pattern fits no name; no frozen weight is one of a layer.
        ConfigError: `frozen_dtype` cannot hold a number of a weight; an adapter of `mindpet.peft` is in the network.
            After each of these errors the network is unchanged.
    """
    _check_arguments("freeze_delta", model, include, exclude, strict, frozen_dtype)
    methods = [find_method(one) for one in (mode if isinstance(mode, (list, tuple)) and mode else [mode])]
    params, fixed = _parameters(model)
    trained = {name for name in params if name not in fixed and any(_fits(name, one.trainable) for one in methods)}
    flags = {name: name in trained for name in params}
    missing = [one for one in methods if not any(_fits(name, one.trainable) for name in trained)]
    problems = [_missing_delta(one, params) for one in missing]
    problems += _unmatched(params, fixed, include, exclude)
    half = None
    if frozen_dtype is not None and not (strict and problems):
        trained = {id(params[name]) for name, train in _flags(params, fixed, flags, include, exclude).items() if train}
        half = plan_half(model, set(map(id, params.values())) - trained, frozen_dtype)
    _report("freeze_delta", problems, strict)
    if half is not None:
        store_half(half, "freeze_delta")
    _apply(model, params, fixed, flags, include, exclude)


def freeze_from_config(model: nn.Cell, config_path: PathLike, strict: bool = True) -> None:
    """Apply `freeze_modules` with the lists of a YAML file.

    The file holds exactly `freeze: {include: [...], exclude: [...]}`, at least one of the two. Aliases, keys that stand
    twice and files of more than 300,000 bytes are refused.

    Args:
        model: the network.
        config_path: path of the file; it must not be a symbolic link.
        strict: as in `freeze_modules`. Default: True.

    Raises:
        ReadYamlFileError: the file cannot be read or parsed; the cause is chained (`LinkPathError` for a link).
        ModelConfigFreezeInfoError: the file holds something else.
        TypeError: `config_path` is not a path, or as in `freeze_modules`.
        NoMatchError: as in `freeze_modules`.
    """
    check = Checker("freeze_from_config")
    check.require(isinstance(config_path, (str, os.PathLike)), TypeError, "config_path", config_path, "a path")
    check.done()
    lists = _read_freeze_lists(config_path)
    freeze_modules(model, lists.get("include"), lists.get("exclude"), strict)


def _check_arguments(owner, model, include, exclude, strict, frozen_dtype=None):
    check = Checker(owner)
    check.require(isinstance(model, nn.Cell), TypeError, "model", model, "a Cell")
    for name, patterns in (("include", include), ("exclude", exclude)):
        is_list = isinstance(patterns, (list, tuple)) and all(isinstance(pattern, str) for pattern in patterns)
        check.require(patterns is None or is_list, TypeError, name, patterns, "a list of str or None")
    check.boolean(strict=strict)
    check_half(check, frozen_dtype)
    check.done()


def _parameters(model):
    """The parameters by name, and names of what never trains.

    That is running statistics, quantised weights, and what an adapter has a copy of.
    """
    params = model_parameters(model)
    copied = {name.replace(TRAINED, "") for name in params if TRAINED in name}
    return params, copied.union(running_statistics(model), quantized_parameters(model))


def _fits(name, patterns):
    """Whether a pattern fits a name; that of an adapter's copy of a base parameter counts as the base's, too."""
    return matches(name, patterns) or matches(name.replace(TRAINED, ""), patterns)


def _flags(params, fixed, flags, include, exclude):
    """name -> whether it trains: as `flags` says, then the lists where only one of them has a say."""
    trains = {}
    for name, param in params.items():
        frozen, trained = _fits(name, include or ()), _fits(name, exclude or ())
        train = flags.get(name, param.requires_grad) if frozen == trained else trained
        can = not train or param.dtype in (*FLOAT_TYPES, ms.float64)
        trains[name] = train and name not in fixed if can else param.requires_grad
    return trains


def _apply(model, params, fixed, flags, include, exclude):
    """Set requires_grad."""
    for name, train in _flags(params, fixed, flags, include, exclude).items():
        params[name].requires_grad = train
    renew_recompute(model)


def _unmatched(params, fixed, include, exclude):
    """A line for each pattern that fits no name, or is to train running statistics alone."""
    problems = []
    for which, patterns in (("include", include or ()), ("exclude", exclude or ())):
        for pattern in patterns:
            fitting = {name for name in params if _fits(name, [pattern])}
            if not fitting:
                near = f"; nearest: {_nearest(pattern, params)}" if len(problems) < MOST_HINTS else ""
                problems.append(f"pattern {quote(pattern)} of '{which}' matches no parameter{near}")
            elif which == "exclude" and fitting <= fixed:
                rule = "matches only running statistics, or quantised weights, which no optimizer may have"
                problems.append(f"pattern {quote(pattern)} of '{which}' {rule}: {sorted(fitting)}")
    return problems


def _missing_delta(method, params):
    present = [
        other.name
        for other in METHODS.values()
        if other.cells and any(matches(name, other.trainable) for name in params)
    ]
    hint = f"deltas in the network: {present}" if present else f"nearest: {_nearest(method.trainable[0], params)}"
    return f"mode {method.name!r} finds no parameter like {list(method.trainable)}; {hint}"


def _nearest(pattern, params):
    """The names, or parts of names, that look most like a pattern."""
    parts = {part for name in params for part in name.split(".")}
    return (
        difflib.get_close_matches(pattern.strip("*."), sorted(parts.union(params)), n=3, cutoff=0.3) or list(params)[:3]
    )


def _report(owner, problems, strict):
    if problems and strict:
        raise NoMatchError(f"{owner}: " + "; ".join(problems) + ". Nothing was changed; strict=False only warns.")
    for problem in problems:
        warnings.warn(f"{owner}: {problem}.", stacklevel=3)


def _read_freeze_lists(path):
    try:
        content = _read_yaml(path)
    except (OSError, ValueError) as error:
        raise ReadYamlFileError(f"freeze_from_config: cannot read 'config_path' {path!r}: {error}") from error
    lists = content.get("freeze") if isinstance(content, dict) and list(content) == ["freeze"] else None
    if not isinstance(lists, dict) or not lists or not set(lists) <= {"include", "exclude"}:
        raise ModelConfigFreezeInfoError(
            f"freeze_from_config: {path!r} must hold 'freeze' with 'include', 'exclude' "
            f"or both, and nothing else, but holds {quote(content)}."
        )
    for name, patterns in lists.items():
        if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) for p in patterns):
            raise ModelConfigFreezeInfoError(
                f"freeze_from_config: '{name}' in {path!r} must be a list of names, but is {quote(patterns)}."
            )
    return lists


def _read_yaml(path):
    """The content of a regular file that is no symbolic link, opened for reading only."""
    if os.path.islink(path):
        raise LinkPathError(f"{path!r} is a symbolic link")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path!r} is not a file")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
        return parse_yaml(file.read(LARGEST_YAML + 1))

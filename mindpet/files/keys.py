"""How the tensors of a delta are called in an adapter's file."""

from collections.abc import Iterable
from typing import NamedTuple, Optional

from mindpet.delta._config import PeftConfig
from mindpet.delta.registry import method_of
from mindpet.network.match import names_module
from mindpet.utils.hints import Arrays


class Key(NamedTuple):
    """What a key of an adapter's file says.

    Attributes:
        path: of the layer in the PyTorch model; None for a tensor that layers share.
        name: of the parameter in the Delta.
        kinds: of layers whose Delta has a parameter of this name in a file.
        config: of the method, one of the `parts` of that of the adapter.
    """

    path: Optional[str]
    name: str
    kinds: tuple[str, ...]
    config: PeftConfig


def shared_key(file: str) -> str:
    """The key of a tensor that the layers share."""
    return f"base_model.{file}"


def parse_keys(keys: Iterable[str], config: PeftConfig) -> dict[str, Key]:
    """The keys that are of deltas, with what they say."""
    parsed = {}
    for part in config.parts:
        kinds, shared = {}, {}  # (name in a file, name in the Delta), (key, name in the Delta) -> kinds
        for kind, delta in method_of(part).deltas.items():
            for name, file in (delta.file_names or {}).items():
                kinds.setdefault((file, name), []).append(kind)
            for name, file in delta.shared_names.items():
                shared.setdefault((shared_key(file), name), []).append(kind)
        for key in keys:
            for (whole, name), of in shared.items():
                if key == whole:
                    parsed[key] = Key(None, name, tuple(of), part)
            for (file, name), of in kinds.items():
                if key.startswith(part.key_start) and key.endswith(f".{file}"):
                    parsed[key] = Key(key[len(part.key_start) : -len(file) - 1], name, tuple(of), part)
    return parsed


def target_paths(keys: Iterable[str], config: PeftConfig) -> list[str]:
    """The paths of the layers that have a delta in a file, or a copy, in its order."""
    copied = [copied_layer(key, config) for key in keys if copied_layer(key, config) is not None]
    return list(dict.fromkeys([*copied, *(key.path for key in parse_keys(keys, config).values() if key.path)]))


def copied_key(layer: str, name: str, config: PeftConfig) -> str:
    """The key of a parameter of a layer that is copied, see `TargetConfig.copied_as`.

    Args:
        layer: path of the layer in the PyTorch model.
        name: of the parameter there, which begins with the path.
        config: of the adapter.
    """
    return f"{config.key_start}{layer}.{_infix(config)}{name[len(layer) :]}"


def copied_layer(key: str, config: PeftConfig) -> Optional[str]:
    """The path of the layer that a key of `copied_key` is of; None for any other key."""
    infix, name = _infix(config), key[len(config.key_start) :]
    path, mark, _ = name.partition(f".{infix}.") if infix and key.startswith(config.key_start) else ("", "", "")
    return path if mark else None


def _infix(config):
    """What stands between path and parameter in the keys of `copied_key`; None if no method has any."""
    return next(filter(None, (getattr(part, "copied_as", None) for part in config.parts)), None)


def base_name(key: str, config: PeftConfig) -> str:
    """The name in the base of a parameter that an adapter has a value of its own for, from its key."""
    layer, name = copied_layer(key, config), key[len(config.key_start) :] if key.startswith(config.key_start) else key
    if layer is not None:
        return f"{layer}.{name[len(f'{layer}.{_infix(config)}.') :]}"
    return name.replace(".base_layer.", ".")


def tied_keys(tensors: Arrays, config: PeftConfig) -> set[str]:
    """The keys of layers that `target_modules` does not mean, which have the tensor of one that it means.

    Hugging Face PEFT saves what layers of one weight have in common for each of them, see `Delta.tied_deltas`.

    Args:
        tensors: those of an adapter's file, by key.
        config: of the adapter.
    """
    ties = set()
    for part in config.parts:
        if any(delta.tied_deltas for delta in method_of(part).deltas.values()):
            keys = parse_keys(tensors, part)
            meant = {key for key, said in keys.items() if names_module(part.target_modules, said.path)}
            known = {(keys[key].name, tensors[key].tobytes()) for key in meant}
            ties |= {key for key in set(keys) - meant if (keys[key].name, tensors[key].tobytes()) in known}
    return ties


def without_ties(tensors: Arrays, config: PeftConfig) -> Arrays:
    """The tensors of an adapter without those of `tied_keys`."""
    ties = tied_keys(tensors, config)
    return {key: value for key, value in tensors.items() if key not in ties}

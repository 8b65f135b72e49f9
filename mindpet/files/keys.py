"""How the tensors of a delta are called in an adapter's file."""

from collections.abc import Iterable
from typing import NamedTuple, Optional

from mindpet.delta._config import PeftConfig
from mindpet.delta.registry import method_of


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
    """The paths of the layers that have a delta in a file, in its order."""
    return list(dict.fromkeys(key.path for key in parse_keys(keys, config).values() if key.path is not None))

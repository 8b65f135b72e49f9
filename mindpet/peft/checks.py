"""Checks of what a PeftModel is given."""

import re
from collections.abc import Collection
from typing import Any

from mindspore import nn
from mindspore.parallel.auto_parallel import AutoParallel

from mindpet.errors import AdapterError, ConfigError
from mindpet.files.adapter import FILES
from mindpet.peft.batch import BASE
from mindpet.peft.placement import MARK


def check_bare(network: Any) -> None:
    """Refuse a network that has adapters already."""
    if not isinstance(network, nn.Cell):
        raise TypeError(f"'network' must be a Cell, but got {network!r} ({type(network).__name__}).")
    if isinstance(network, AutoParallel):
        raise ConfigError(
            "an AutoParallel goes around the PeftModel, not into it: AutoParallel(get_peft_model(network, config))."
        )
    if any(MARK in vars(cell) for _, cell in network.cells_and_names()):
        raise ConfigError(
            f"the {type(network).__name__} has adapters already; use add_adapter() or load_adapter() of its PeftModel, "
            "or unload() it first."
        )


def check_names(argument: str, value: Any) -> list[str]:
    """A list of names; one that is a str is not taken for a list of letters."""
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"'{argument}' must be a list of str, but got {value!r} ({type(value).__name__}).")
    return list(value)


def check_name(name: Any, taken: Collection[str]) -> None:
    """Refuse what cannot be an adapter's name: it becomes the name of a folder, beside files of 'default'."""
    if not isinstance(name, str):
        raise TypeError(f"'adapter_name' must be a str, but got {name!r} ({type(name).__name__}).")
    if not re.fullmatch(r"\w[\w\-.]*", name) or name == BASE or name in FILES:
        raise AdapterError(
            f"'adapter_name' must be of letters, digits, '_', '-' and '.', and not the name of a file that is saved, "
            f"but got {name!r}."
        )
    if name in taken:
        raise AdapterError(f"'adapter_name': there is an adapter {name!r} already.")

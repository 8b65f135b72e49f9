"""The one table of delta methods. What is done to a network asks it, and never a class name."""

import enum
from importlib import import_module

from mindpet.delta._config import PeftConfig
from mindpet.delta._method import Method

# The files of this folder that have a METHOD, in the order in which messages list the methods.
FILES = (
    "lora",
    "prefix_layer",
    "adapter",
    "low_rank_adapter",
    "bitfit",
    "ptuning2",
    "ia3",
    "vera",
    "hira",
    "miss",
    "adalora",
    "oft",
    "loha",
    "lokr",
    "trainable_tokens",
    "ln_tuning",
    "adaption_prompt",
    "prompt_tuning",
    "p_tuning",
    "compacter",
)
METHODS = {method.name: method for method in (import_module(f"mindpet.delta.{name}").METHOD for name in FILES)}

# The methods by the names that `adapter_config.json` uses.
_names = [method.config.peft_type for method in METHODS.values()]
PeftType = enum.Enum("PeftType", dict(zip(_names, _names)), type=str)
for _method in METHODS.values():
    _method.config.peft_type = PeftType(_method.config.peft_type)


def method_of(config: PeftConfig) -> Method:
    """The method of a configuration that is no union, see `PeftConfig.parts`."""
    return METHODS[config.method_name]


def find_method(mode: str) -> Method:
    """The method of a mode name or alias, in any letter case.

    Raises:
        ValueError: no method has that name.
    """
    for method in METHODS.values():
        if isinstance(mode, str) and mode.lower() in (method.name, *method.aliases):
            return method
    raise ValueError(f"'mode' must be one of {list(METHODS)}, but got {mode!r} ({type(mode).__name__}).")

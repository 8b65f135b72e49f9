"""mindpet: parameter-efficient fine-tuning (delta tuning) for MindSpore."""

import importlib

__version__ = "2.0.0"
__all__ = ["delta", "graph", "parallel", "peft"]


def __getattr__(name):
    if name in __all__:  # not before they are used, for they import MindSpore
        return importlib.import_module(f"mindpet.{name}")
    raise AttributeError(f"module 'mindpet' has no attribute {name!r}")

"""mindpet: parameter-efficient fine-tuning (delta tuning) for MindSpore."""

from mindpet import delta, graph, parallel, peft

__version__ = "2.0.0"
__all__ = ["delta", "graph", "parallel", "peft"]

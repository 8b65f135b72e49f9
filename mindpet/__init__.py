"""mindpet: parameter-efficient fine-tuning (delta tuning) for MindSpore."""

__version__ = "2.0.0"

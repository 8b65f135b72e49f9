"""The interface of Hugging Face PEFT: configurations."""

from mindpet.peft.config import (
    AdapterConfig,
    BitFitConfig,
    LoraConfig,
    LowRankAdapterConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptLearningConfig,
    Ptuning2Config,
    TaskType,
    get_peft_config,
)

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "LoraConfig",
    "LowRankAdapterConfig",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptLearningConfig",
    "Ptuning2Config",
    "TaskType",
    "get_peft_config",
]

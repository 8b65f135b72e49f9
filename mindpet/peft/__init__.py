"""The interface of Hugging Face PEFT: configurations, networks with adapters, and their files."""

from mindpet.layers.kinds import register_layer
from mindpet.peft.auto import AutoPeftModel
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
from mindpet.peft.model import PeftModel, get_peft_model, inject_adapter_in_model
from mindpet.peft.names import NameMap
from mindpet.peft.plan import plan_targets

__all__ = [
    "AdapterConfig",
    "AutoPeftModel",
    "BitFitConfig",
    "LoraConfig",
    "LowRankAdapterConfig",
    "NameMap",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "PrefixTuningConfig",
    "PromptLearningConfig",
    "Ptuning2Config",
    "TaskType",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
    "plan_targets",
    "register_layer",
]

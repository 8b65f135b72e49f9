"""The interface of Hugging Face PEFT: configurations, networks with adapters, and their files."""

from mindpet.layers.kinds import register_layer
from mindpet.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    register_base_model,
)
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
from mindpet.peft.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from mindpet.peft.status import get_layer_status, get_model_status

__all__ = [
    "AdapterConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
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
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "plan_targets",
    "register_base_model",
    "register_layer",
    "set_peft_model_state_dict",
]

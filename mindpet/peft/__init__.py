"""The interface of Hugging Face PEFT: configurations, networks with adapters, and their files."""

from mindpet.delta._config import PeftConfig, PromptLearningConfig, TaskType, get_peft_config
from mindpet.delta.adapter import AdapterConfig, BottleneckConfig
from mindpet.delta.bitfit import BitFitConfig
from mindpet.delta.ia3 import IA3Config
from mindpet.delta.lora import LoraConfig
from mindpet.delta.low_rank_adapter import LowRankAdapterConfig
from mindpet.delta.prefix_layer import PrefixTuningConfig
from mindpet.delta.prompt_tuning import PromptTuningConfig
from mindpet.delta.ptuning2 import Ptuning2Config
from mindpet.delta.registry import PeftType
from mindpet.delta.union import UnionConfig, mam_config
from mindpet.delta.vera import VeraConfig
from mindpet.files.names import NameMap
from mindpet.network.kinds import register_layer
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
from mindpet.peft.model import PeftModel, get_peft_model, inject_adapter_in_model
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
    "BottleneckConfig",
    "IA3Config",
    "LoraConfig",
    "LowRankAdapterConfig",
    "NameMap",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "PrefixTuningConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "Ptuning2Config",
    "TaskType",
    "UnionConfig",
    "VeraConfig",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "mam_config",
    "plan_targets",
    "register_base_model",
    "register_layer",
    "set_peft_model_state_dict",
]

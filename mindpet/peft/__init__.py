"""The interface of Hugging Face PEFT: configurations, networks with adapters, and their files."""

from mindpet.delta._config import PeftConfig, PromptLearningConfig, TaskType, get_peft_config
from mindpet.delta.adalora import AdaLoraConfig
from mindpet.delta.adapter import AdapterConfig, BottleneckConfig
from mindpet.delta.adaption_prompt import AdaptionPromptConfig
from mindpet.delta.bitfit import BitFitConfig
from mindpet.delta.compacter import CompacterConfig
from mindpet.delta.hira import HiraConfig
from mindpet.delta.ia3 import IA3Config
from mindpet.delta.ln_tuning import LNTuningConfig
from mindpet.delta.loha import LoHaConfig
from mindpet.delta.lokr import LoKrConfig
from mindpet.delta.lora import LoraConfig
from mindpet.delta.low_rank_adapter import LowRankAdapterConfig
from mindpet.delta.mam import mam_config
from mindpet.delta.miss import MissConfig
from mindpet.delta.oft import OFTConfig
from mindpet.delta.p_tuning import PromptEncoderConfig
from mindpet.delta.prefix_layer import PrefixTuningConfig
from mindpet.delta.prompt_tuning import PromptTuningConfig
from mindpet.delta.ptuning2 import Ptuning2Config
from mindpet.delta.registry import PeftType
from mindpet.delta.trainable_tokens import TrainableTokensConfig
from mindpet.delta.union import UnionConfig
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
from mindpet.peft.drop import AdapterDrop, drop_adapter_layers
from mindpet.peft.model import PeftModel, get_peft_model, inject_adapter_in_model
from mindpet.peft.plan import plan_targets
from mindpet.peft.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from mindpet.peft.status import get_layer_status, get_model_status
from mindpet.peft.words import start_prefix

__all__ = [
    "AdaLoraConfig",
    "AdapterConfig",
    "AdaptionPromptConfig",
    "AdapterDrop",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BitFitConfig",
    "BottleneckConfig",
    "CompacterConfig",
    "HiraConfig",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "LNTuningConfig",
    "LoraConfig",
    "LowRankAdapterConfig",
    "MissConfig",
    "NameMap",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "Ptuning2Config",
    "TaskType",
    "UnionConfig",
    "TrainableTokensConfig",
    "VeraConfig",
    "drop_adapter_layers",
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
    "start_prefix",
]

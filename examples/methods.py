"""What `finetune_text.py` knows of each method: its configuration for a BERT, and the learning rate to start from."""

from typing import NamedTuple

from mindpet.peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LowRankAdapterConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    Ptuning2Config,
    TrainableTokensConfig,
    VeraConfig,
    mam_config,
)


class Method(NamedTuple):
    """A method of the script.

    Attributes:
        config: its configuration; None for what is no method, but is compared with them.
        learning_rate: with AdamW; docs/examples.md says which were tried on what.
        by_hand: whether models/bert.py replaces layers for it; the others are put in by `mindpet.peft`.
    """

    config: PeftConfig
    learning_rate: float
    by_hand: bool = False


QUERY_VALUE = {"target_modules": ["query", "value"]}
OUTPUTS = {"target_modules": ["output.dense"]}  # the last layers of attention and feed-forward block
FEED_FORWARD = {"target_modules": r".*layer\.\d+\.output\.dense"}
PREFIX = {"num_virtual_tokens": 8, "prefix_projection": True, "encoder_hidden_size": 64}
TOKENS = {"num_virtual_tokens": 8}
METHODS = {
    "lora": Method(LoraConfig(r=8, lora_alpha=16, **QUERY_VALUE), 2e-3, by_hand=True),
    "adalora": Method(AdaLoraConfig(init_r=12, target_r=8, lora_alpha=24, total_step=100, **QUERY_VALUE), 2e-3),
    "ia3": Method(
        IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]), 2e-2
    ),
    "vera": Method(VeraConfig(r=256, **QUERY_VALUE), 2e-2),
    "hira": Method(HiraConfig(r=8, **QUERY_VALUE), 2e-2),
    "miss": Method(MissConfig(r=16, **QUERY_VALUE), 1e-3),
    "oft": Method(OFTConfig(oft_block_size=32, **QUERY_VALUE), 2e-3),
    "loha": Method(LoHaConfig(r=8, alpha=16, **QUERY_VALUE), 4e-3),
    "lokr": Method(LoKrConfig(r=8, alpha=16, **QUERY_VALUE), 4e-3),
    "trainable_tokens": Method(  # the script takes the tokens that every text has
        TrainableTokensConfig(token_indices=[0], modules_to_save=["classifier"]), 2e-2
    ),
    "ln_tuning": Method(LNTuningConfig(target_modules=["LayerNorm"]), 4e-3),
    "bitfit": Method(BitFitConfig(), 8e-3, by_hand=True),
    "adapter": Method(BottleneckConfig(bottleneck_size=64, **OUTPUTS), 2e-3, by_hand=True),
    "low_rank_adapter": Method(LowRankAdapterConfig(reduction_factor=32, **OUTPUTS), 8e-3, by_hand=True),
    "compacter": Method(CompacterConfig(reduction_factor=8, phm_dim=4, **OUTPUTS), 8e-3),
    "prefixtuning": Method(PrefixTuningConfig(**PREFIX), 5e-3, by_hand=True),
    "ptuning2": Method(Ptuning2Config(**TOKENS), 2e-2, by_hand=True),
    "adaption_prompt": Method(AdaptionPromptConfig(target_modules="self", adapter_len=8, adapter_layers=2), 1e-2),
    "prompt_tuning": Method(PromptTuningConfig(**TOKENS), 2e-2),
    "p_tuning": Method(PromptEncoderConfig(encoder_hidden_size=64, **TOKENS), 5e-3),
    "mam": Method(mam_config(bottleneck_size=64, **FEED_FORWARD, **PREFIX), 2e-3),
    "full": Method(None, 2e-4, by_hand=True),
    "head": Method(None, 2e-2, by_hand=True),
}
for method in METHODS.values():
    if method.config is not None:
        method.config.task_type = "SEQ_CLS"
PEFT_METHODS = [name for name, method in METHODS.items() if method.config is not None]

"""Every method for the networks of the examples: its configuration, and the learning rate to start from."""

from typing import NamedTuple, Optional, Union

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

    config: Optional[PeftConfig]
    learning_rate: float
    by_hand: bool = False


class Places(NamedTuple):
    """Where the methods go in a network, as `target_modules` of the configurations."""

    task_type: str
    attention: list[str]  # what makes query and value
    ia3: list[str]
    outputs: list[str]  # the last layers of attention and feed-forward block
    feed_forward: Union[str, list[str]]  # the last layer of the feed-forward block
    norms: list[str]
    attentions: str
    heads: Optional[list[str]] = None  # which layers train beside trained tokens


BERT = Places(
    "SEQ_CLS",
    ["query", "value"],
    ["key", "value", "output.dense"],
    ["output.dense"],
    r".*layer\.\d+\.output\.dense",
    ["LayerNorm"],
    "self",
    ["classifier"],
)
GPT2 = Places(
    "CAUSAL_LM", ["c_attn"], ["c_attn", "c_proj"], ["c_proj"], r".*mlp\.c_proj", ["ln_1", "ln_2", "ln_f"], "attn"
)


def methods_for(places: Places) -> dict[str, Method]:
    """Every method, and the ends of the scale: everything trains, or only the head."""
    attention, outputs = {"target_modules": places.attention}, {"target_modules": places.outputs}
    prefix = {"num_virtual_tokens": 8, "prefix_projection": True, "encoder_hidden_size": 64}
    tokens = {"num_virtual_tokens": 8}
    methods = {
        "lora": Method(LoraConfig(r=8, lora_alpha=16, **attention), 2e-3, by_hand=True),
        "adalora": Method(AdaLoraConfig(init_r=12, target_r=8, lora_alpha=24, total_step=100, **attention), 2e-3),
        "ia3": Method(IA3Config(target_modules=places.ia3, feedforward_modules=places.outputs), 1e-1),
        "vera": Method(VeraConfig(r=256, **attention), 1e-1),
        "hira": Method(HiraConfig(r=8, **attention), 1e-1),
        "miss": Method(MissConfig(r=16, **attention), 1e-3),
        "oft": Method(OFTConfig(oft_block_size=32, **attention), 2e-3),
        "loha": Method(LoHaConfig(r=8, alpha=16, **attention), 4e-3),
        "lokr": Method(LoKrConfig(r=8, alpha=16, **attention), 4e-3),
        "trainable_tokens": Method(  # the scripts choose the tokens by their texts
            TrainableTokensConfig(token_indices=[0], modules_to_save=places.heads), 2e-2
        ),
        "ln_tuning": Method(LNTuningConfig(target_modules=places.norms), 4e-3),
        "bitfit": Method(BitFitConfig(), 8e-3, by_hand=True),
        "adapter": Method(BottleneckConfig(bottleneck_size=64, **outputs), 2e-3, by_hand=True),
        "low_rank_adapter": Method(LowRankAdapterConfig(reduction_factor=32, **outputs), 8e-3, by_hand=True),
        "compacter": Method(CompacterConfig(reduction_factor=8, phm_dim=4, **outputs), 8e-3),
        "prefixtuning": Method(PrefixTuningConfig(**prefix), 5e-3, by_hand=True),
        "ptuning2": Method(Ptuning2Config(**tokens), 2e-2, by_hand=True),
        "adaption_prompt": Method(
            AdaptionPromptConfig(target_modules=places.attentions, adapter_len=8, adapter_layers=2), 1e-2
        ),
        "prompt_tuning": Method(PromptTuningConfig(**tokens), 2e-2),
        "p_tuning": Method(PromptEncoderConfig(encoder_hidden_size=64, **tokens), 5e-3),
        "mam": Method(mam_config(bottleneck_size=64, target_modules=places.feed_forward, **prefix), 2e-3),
        "full": Method(None, 2e-4, by_hand=True),
        "head": Method(None, 2e-2, by_hand=True),
    }
    for method in methods.values():
        if method.config is not None:
            method.config.task_type = places.task_type
    return methods


METHODS = methods_for(BERT)
PEFT_METHODS = [name for name, method in METHODS.items() if method.config is not None]

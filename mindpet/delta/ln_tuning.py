"""LayerNorm tuning: the norms of the network train, as copies."""

from dataclasses import dataclass

from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method


@dataclass
class LNTuningConfig(TargetConfig):
    """LayerNorm tuning, Zhao et al. 2023, arXiv:2312.11420: scale and shift of every norm train.

    The targets are Cells with Parameters of their own, of any class; all of their Parameters train, and the running
    statistics of a BatchNorm belong to the adapter.
    """

    peft_type, method_name = "LN_TUNING", "ln_tuning"

    by_hand = ("*gamma", "*beta", "*[Nn]orm*.weight", "*[Nn]orm*.bias", "*ln_*.weight", "*ln_*.bias")  # `freeze_delta`
    copied_as = "ln_tuning_layers"
    not_in_peft = ("layers_to_transform", "layers_pattern")
    usual_targets = (
        ("input_layernorm", "post_attention_layernorm", "norm"),
        ("ln_1", "ln_2", "ln_f"),
        ("LayerNorm",),
    )


METHOD = Method("ln_tuning", LNTuningConfig, LNTuningConfig.by_hand, aliases=("layernorm",), identity=True)

"""The one table of delta methods. What is done to a network asks it, and never a class name."""

import enum
from dataclasses import dataclass, field

from mindpet.delta._base import Delta
from mindpet.delta._config import PeftConfig
from mindpet.delta.adalora import AdaLoraConfig, AdaLoRADelta, AdaLoRADense
from mindpet.delta.adapter import (
    AdapterDelta,
    AdapterDense,
    AdapterLayer,
    BottleneckConfig,
    MultiHeadAdapterDelta,
    MultiHeadAdapterLayer,
)
from mindpet.delta.adaption_prompt import AdaptionPrompt, AdaptionPromptConfig, AdaptionPromptDelta
from mindpet.delta.bitfit import BitFitConfig
from mindpet.delta.compacter import CompacterConfig, CompacterDelta, CompacterDense, CompacterLayer
from mindpet.delta.hira import HiraConfig, HiraConvolution, HiraDelta, HiraDense, HiraEmbedding
from mindpet.delta.ia3 import IA3Config, IA3Delta, IA3Dense
from mindpet.delta.ln_tuning import LNTuningConfig
from mindpet.delta.loha import LoHaConfig, LohaConvolution, LohaDelta, LoHaDense
from mindpet.delta.lokr import LoKrConfig, LokrConvolution, LokrDelta, LoKrDense
from mindpet.delta.lora import LoraConfig, LoraConvolution, LoraDelta, LoRADense, LoraEmbedding
from mindpet.delta.low_rank_adapter import (
    LowRankAdapterConfig,
    LowRankAdapterDelta,
    LowRankAdapterDense,
    LowRankAdapterLayer,
)
from mindpet.delta.miss import MissConfig, MissDelta, MissDense
from mindpet.delta.oft import OFTConfig, OFTDelta, OFTDense, OFTEmbedding
from mindpet.delta.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderDelta
from mindpet.delta.prefix_layer import PrefixLayer, PrefixLayerDelta, PrefixTuningConfig
from mindpet.delta.prompt_tuning import PromptDelta, PromptEmbedding, PromptTuningConfig
from mindpet.delta.ptuning2 import PrefixEncoder, PrefixEncoderDelta, Ptuning2Config
from mindpet.delta.trainable_tokens import TrainableTokensConfig, TrainableTokensDelta, TrainableTokensEmbedding
from mindpet.delta.vera import VeraConfig, VeraDelta, VeraDense


@dataclass(frozen=True)
class Method:
    """What generic code needs to know about a method.

    Attributes:
        name: of the method, a mode of `freeze_delta`.
        config: its PeftConfig.
        trainable: patterns (fnmatch) of the parameters that it trains.
        deltas: kind of a place, see `mindpet.network.kinds` -> Delta for it; empty for a method that only chooses base
            parameters.
        cells: its hand-made Cells.
        constants: patterns of its parameters that are fixed by construction and need not be in a checkpoint.
        saved: patterns of its parameters that do not train, but belong in a checkpoint of what was trained.
        aliases: further names of the mode.
        identity: whether a fresh delta leaves the network's output as it was.
    """

    name: str
    config: type[PeftConfig]
    trainable: tuple[str, ...]
    deltas: dict[str, type[Delta]] = field(default_factory=dict)
    cells: tuple[type, ...] = ()
    constants: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    identity: bool = False

    @property
    def mergeable(self) -> bool:
        """Whether its deltas, if it has any, can be folded into the weights of their layers."""
        return not self.deltas or any(delta.fold for delta in self.deltas.values())


METHODS = {
    method.name: method
    for method in (
        Method(
            "lora",
            LoraConfig,
            ("*mindpet_delta_lora*",),
            {
                "linear": LoraDelta,
                "embedding": LoraEmbedding,
                "conv1d": LoraConvolution,
                "conv2d": LoraConvolution,
                "conv3d": LoraConvolution,
            },
            (LoRADense,),
            constants=("*mindpet_lora_scaling",),
            saved=("*mindpet_lora_start_*",),
            identity=True,
        ),
        Method(
            "prefixtuning",
            PrefixTuningConfig,
            ("*mindpet_delta_prefixtuning*",),
            {"attention": PrefixLayerDelta},
            (PrefixLayer,),
            aliases=("prefix",),
        ),
        Method(
            "adapter",
            BottleneckConfig,
            ("*mindpet_delta_adapter*",),
            {
                "linear": AdapterDelta,
                "embedding": AdapterDelta,
                "block": AdapterDelta,
                "context": MultiHeadAdapterDelta,
            },
            (AdapterDense, AdapterLayer, MultiHeadAdapterLayer),
            identity=True,
        ),
        Method(
            "low_rank_adapter",
            LowRankAdapterConfig,
            ("*mindpet_delta_low_rank_adapter*",),
            {"linear": LowRankAdapterDelta, "embedding": LowRankAdapterDelta},
            (LowRankAdapterDense, LowRankAdapterLayer),
        ),
        Method("bitfit", BitFitConfig, BitFitConfig.trained_parameters, identity=True),
        Method(
            "ptuning2",
            Ptuning2Config,
            # All but the token ids, mindpet_delta_ptuning2_prefix.
            ("*mindpet_delta_ptuning2", "*mindpet_delta_ptuning2[!_]*", "*mindpet_delta_ptuning2_[!p]*"),
            {"attention": PrefixEncoderDelta},
            (PrefixEncoder,),
            constants=("*mindpet_delta_ptuning2_prefix",),
        ),
        Method(
            "ia3",
            IA3Config,
            ("*mindpet_delta_ia3",),
            {"linear": IA3Delta, "conv2d": IA3Delta, "conv3d": IA3Delta},
            (IA3Dense,),
            identity=True,
        ),
        Method(
            "vera",
            VeraConfig,
            ("*mindpet_delta_vera*",),
            {"linear": VeraDelta},
            (VeraDense,),
            saved=("*mindpet_vera_a", "*mindpet_vera_b"),
            identity=True,
        ),
        Method(
            "hira",
            HiraConfig,
            ("*mindpet_delta_hira_*",),
            {
                "linear": HiraDelta,
                "embedding": HiraEmbedding,
                "conv1d": HiraConvolution,
                "conv2d": HiraConvolution,
                "conv3d": HiraConvolution,
            },
            (HiraDense,),
            identity=True,
        ),
        Method("miss", MissConfig, ("*mindpet_delta_miss",), {"linear": MissDelta}, (MissDense,), identity=True),
        Method(
            "adalora",
            AdaLoraConfig,
            ("*mindpet_delta_adalora_?",),
            {"linear": AdaLoRADelta},
            (AdaLoRADense,),
            identity=True,
        ),
        Method(
            "oft",
            OFTConfig,
            ("*mindpet_delta_oft",),
            {"linear": OFTDelta, "embedding": OFTEmbedding},
            (OFTDense,),
            identity=True,
        ),
        Method(
            "loha",
            LoHaConfig,
            ("*mindpet_delta_loha*",),
            {"linear": LohaDelta, "conv1d": LohaConvolution, "conv2d": LohaConvolution},
            (LoHaDense,),
            identity=True,
        ),
        Method(
            "lokr",
            LoKrConfig,
            ("*mindpet_delta_lokr*",),
            {"linear": LokrDelta, "conv2d": LokrConvolution},
            (LoKrDense,),
            identity=True,
        ),
        Method(
            "trainable_tokens",
            TrainableTokensConfig,
            ("*mindpet_delta_trainable_tokens",),
            {"embedding": TrainableTokensDelta},
            (TrainableTokensEmbedding,),
            constants=("*mindpet_trainable_tokens_slots",),
            identity=True,
        ),
        Method("ln_tuning", LNTuningConfig, LNTuningConfig.by_hand, aliases=("layernorm",), identity=True),
        Method(
            "adaption_prompt",
            AdaptionPromptConfig,
            ("*mindpet_delta_adaption_prompt*",),
            {"output": AdaptionPromptDelta, "context": AdaptionPromptDelta},
            (AdaptionPrompt,),
            identity=True,
        ),
        Method(
            "prompt_tuning",
            PromptTuningConfig,
            ("*mindpet_delta_prompt",),
            {"input_embedding": PromptDelta},
            (PromptEmbedding,),
        ),
        Method(
            "p_tuning",
            PromptEncoderConfig,
            ("*mindpet_delta_p_tuning*",),
            {"input_embedding": PromptEncoderDelta},
            (PromptEncoder,),
        ),
        Method(
            "compacter",
            CompacterConfig,
            ("*mindpet_delta_compacter*",),
            {"linear": CompacterDelta, "embedding": CompacterDelta, "block": CompacterDelta},
            (CompacterDense, CompacterLayer),
            identity=True,
        ),
    )
}


# The methods by the names that `adapter_config.json` uses.
_names = [method.config.peft_type for method in METHODS.values()]
PeftType = enum.Enum("PeftType", dict(zip(_names, _names)), type=str)
for _method in METHODS.values():
    _method.config.peft_type = PeftType(_method.config.peft_type)


def method_of(config: PeftConfig) -> Method:
    """The method of a configuration that is no union, see `PeftConfig.parts`."""
    return METHODS[config.method_name]


def find_method(mode: str) -> Method:
    """The method of a mode name or alias, in any letter case.

    Raises:
        ValueError: no method has that name.
    """
    for method in METHODS.values():
        if isinstance(mode, str) and mode.lower() in (method.name, *method.aliases):
            return method
    raise ValueError(f"'mode' must be one of {list(METHODS)}, but got {mode!r} ({type(mode).__name__}).")

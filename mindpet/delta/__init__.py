"""The delta Cells, one method a file."""

from mindpet.delta.adalora import AdaLoRADense, AdaLoraOptimizer, OrthogonalLoss
from mindpet.delta.adapter import AdapterDense, AdapterLayer, MultiHeadAdapterLayer
from mindpet.delta.adaption_prompt import AdaptionPrompt
from mindpet.delta.compacter import CompacterDense, CompacterLayer
from mindpet.delta.hira import HiraDense
from mindpet.delta.ia3 import IA3Dense
from mindpet.delta.loha import LoHaDense
from mindpet.delta.lokr import LoKrDense
from mindpet.delta.lora import LoRADense
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from mindpet.delta.miss import MissDense
from mindpet.delta.oft import OFTDense
from mindpet.delta.p_tuning import PromptEncoder
from mindpet.delta.prefix_layer import PrefixLayer
from mindpet.delta.prompt_tuning import PromptEmbedding
from mindpet.delta.ptuning2 import PrefixEncoder
from mindpet.delta.r_drop import RDropLoss, RDropWithLossCell, rdrop_repeat
from mindpet.delta.trainable_tokens import TrainableTokensEmbedding
from mindpet.delta.vera import VeraDense

__all__ = [
    "AdaLoRADense",
    "AdaLoraOptimizer",
    "AdapterDense",
    "AdapterLayer",
    "AdaptionPrompt",
    "CompacterDense",
    "CompacterLayer",
    "HiraDense",
    "IA3Dense",
    "LoHaDense",
    "LoKrDense",
    "LoRADense",
    "LowRankAdapterDense",
    "LowRankAdapterLayer",
    "MultiHeadAdapterLayer",
    "MissDense",
    "OrthogonalLoss",
    "OFTDense",
    "PrefixEncoder",
    "PrefixLayer",
    "PromptEmbedding",
    "PromptEncoder",
    "RDropLoss",
    "RDropWithLossCell",
    "TrainableTokensEmbedding",
    "VeraDense",
    "rdrop_repeat",
]

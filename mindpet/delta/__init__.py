"""The delta Cells, one method a file."""

from mindpet.delta.adapter import AdapterDense, AdapterLayer, MultiHeadAdapterLayer
from mindpet.delta.compacter import CompacterDense, CompacterLayer
from mindpet.delta.hira import HiraDense
from mindpet.delta.ia3 import IA3Dense
from mindpet.delta.lora import LoRADense
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from mindpet.delta.miss import MissDense
from mindpet.delta.prefix_layer import PrefixLayer
from mindpet.delta.prompt_tuning import PromptEmbedding
from mindpet.delta.ptuning2 import PrefixEncoder
from mindpet.delta.r_drop import RDropLoss, rdrop_repeat
from mindpet.delta.vera import VeraDense

__all__ = [
    "AdapterDense",
    "AdapterLayer",
    "CompacterDense",
    "CompacterLayer",
    "HiraDense",
    "IA3Dense",
    "LoRADense",
    "LowRankAdapterDense",
    "LowRankAdapterLayer",
    "MultiHeadAdapterLayer",
    "MissDense",
    "PrefixEncoder",
    "PrefixLayer",
    "PromptEmbedding",
    "RDropLoss",
    "VeraDense",
    "rdrop_repeat",
]

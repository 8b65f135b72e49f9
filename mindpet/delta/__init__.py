"""The delta Cells, one method a file."""

from mindpet.delta.adapter import AdapterDense, AdapterLayer
from mindpet.delta.lora import LoRADense
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from mindpet.delta.prefix_layer import PrefixLayer
from mindpet.delta.ptuning2 import PrefixEncoder
from mindpet.delta.r_drop import RDropLoss, rdrop_repeat

__all__ = [
    "AdapterDense",
    "AdapterLayer",
    "LoRADense",
    "LowRankAdapterDense",
    "LowRankAdapterLayer",
    "PrefixEncoder",
    "PrefixLayer",
    "RDropLoss",
    "rdrop_repeat",
]

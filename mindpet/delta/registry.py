"""The one table of delta methods. What is done to a network asks it, and never a class name."""

from dataclasses import dataclass
from typing import Callable, Optional

from mindpet.delta.adapter import AdapterDense, AdapterLayer, adapter_behind
from mindpet.delta.lora import LoRADense
from mindpet.delta.lora_layer import lora_layer
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer, low_rank_adapter_behind
from mindpet.delta.prefix_layer import PrefixLayer, prefix_layer
from mindpet.delta.ptuning2 import PrefixEncoder, prefix_encoder


@dataclass(frozen=True)
class Method:
    """What generic code needs to know about a method.

    Attributes:
        name (str): of the method, a mode of `freeze_delta`.
        cells (tuple): its Cells; empty for a method that only chooses base parameters.
        trainable (tuple): patterns (fnmatch) of the parameters that it trains.
        constants (tuple): patterns of its parameters that are fixed by construction and need not be in a checkpoint.
        saved (tuple): patterns of its parameters that do not train, but belong in a checkpoint of what was trained.
        aliases (tuple): further names of the mode.
        identity (bool): whether a fresh delta leaves the network's output as it was.
        mergeable (bool): whether its delta can be folded into the weight of its layer.
        peft_type (str): its name in `adapter_config.json`.
        kinds (tuple): names of the `mindpet.layers.kinds` that can carry it beside or behind them.
        make (callable): of a method with `kinds`, `(cell, kind, **config.sizes(path))` -> Cell that takes
            the layer's input and output, and has `reset()`; of a method that lays keys and values in front of an
            attention, `(heads, head_dim, **config.sizes(path))` -> Cell, see `mindpet.delta.prefix_layer.prefix_layer`.
        before_activation (bool): whether the delta comes before the layer's own activation.
        prefix (str): what stands between the path of the layer and the names of the delta's parameters.
    """

    name: str
    cells: tuple
    trainable: tuple
    constants: tuple = ()
    saved: tuple = ()
    aliases: tuple = ()
    identity: bool = False
    mergeable: bool = False
    peft_type: str = ""
    kinds: tuple = ()
    make: Optional[Callable] = None
    before_activation: bool = False
    prefix: str = ""


METHODS = {
    method.name: method
    for method in (
        Method(
            "lora",
            (LoRADense,),
            ("*mindpet_delta_lora*",),
            constants=("*mindpet_lora_scaling",),
            saved=("*mindpet_lora_start_*",),
            identity=True,
            mergeable=True,
            peft_type="LORA",
            kinds=("linear", "embedding", "conv1d", "conv2d", "conv3d"),
            make=lora_layer,
            before_activation=True,
        ),
        Method(
            "prefixtuning",
            (PrefixLayer,),
            ("*mindpet_delta_prefixtuning*",),
            aliases=("prefix",),
            peft_type="PREFIX_TUNING",
            make=prefix_layer,
        ),
        Method(
            "adapter",
            (AdapterDense, AdapterLayer),
            ("*mindpet_delta_adapter*",),
            identity=True,
            peft_type="ADAPTER",
            kinds=("linear", "embedding"),
            make=adapter_behind,
            prefix="mindpet_delta_adapter.",
        ),
        Method(
            "low_rank_adapter",
            (LowRankAdapterDense, LowRankAdapterLayer),
            ("*mindpet_delta_low_rank_adapter*",),
            peft_type="LOW_RANK_ADAPTER",
            kinds=("linear", "embedding"),
            make=low_rank_adapter_behind,
            prefix="mindpet_delta_low_rank_adapter.",
        ),
        Method("bitfit", (), ("*bias",), identity=True, peft_type="BITFIT"),
        Method(
            "ptuning2",
            (PrefixEncoder,),
            # All but the token ids, mindpet_delta_ptuning2_prefix.
            ("*mindpet_delta_ptuning2", "*mindpet_delta_ptuning2[!_]*", "*mindpet_delta_ptuning2_[!p]*"),
            constants=("*mindpet_delta_ptuning2_prefix",),
            peft_type="PTUNING2",
            make=prefix_encoder,
        ),
    )
}


def find_method(mode):
    """The method of a mode name or alias, in any letter case.

    Raises:
        ValueError: no method has that name.
    """
    for method in METHODS.values():
        if isinstance(mode, str) and mode.lower() in (method.name, *method.aliases):
            return method
    raise ValueError(f"'mode' must be one of {list(METHODS)}, but got {mode!r} ({type(mode).__name__}).")

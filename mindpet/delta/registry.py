"""The one table of delta methods. What is done to a network asks it, and never a class name."""

from dataclasses import dataclass

from mindpet.delta.adapter import AdapterDense, AdapterLayer
from mindpet.delta.lora import LoRADense
from mindpet.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from mindpet.delta.prefix_layer import PrefixLayer
from mindpet.delta.ptuning2 import PrefixEncoder


@dataclass(frozen=True)
class Method:
    """What generic code needs to know about a method.

    Attributes:
        name (str): of the method, a mode of `freeze_delta`.
        cells (tuple): its Cells; empty for a method that only chooses base parameters.
        trainable (tuple): patterns (fnmatch) of the parameters that it trains.
        constants (tuple): patterns of its parameters that are fixed by construction and need not be in a checkpoint.
        aliases (tuple): further names of the mode.
        identity (bool): whether a fresh delta leaves the network's output as it was.
        mergeable (bool): whether its Dense Cell has `merged_weight()`.
    """

    name: str
    cells: tuple
    trainable: tuple
    constants: tuple = ()
    aliases: tuple = ()
    identity: bool = False
    mergeable: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("lora", (LoRADense,), ("*mindpet_delta_lora_*",), identity=True, mergeable=True),
        Method("prefixtuning", (PrefixLayer,), ("*mindpet_delta_prefixtuning_*",), aliases=("prefix",)),
        Method("adapter", (AdapterDense, AdapterLayer), ("*mindpet_delta_adapter_*",), identity=True),
        Method("low_rank_adapter", (LowRankAdapterDense, LowRankAdapterLayer), ("*mindpet_delta_low_rank_adapter_*",)),
        Method("bitfit", (), ("*bias",), identity=True),
        Method(
            "ptuning2",
            (PrefixEncoder,),
            ("*mindpet_delta_ptuning2_embedding*", "*mindpet_delta_ptuning2_dense_*"),
            constants=("*mindpet_delta_ptuning2_prefix",),
        ),
    )
}


def find_method(mode):
    """The method of a mode name or alias, in any letter case.

    Raises:
        TypeError: `mode` is not a str.
        ValueError: no method has that name.
    """
    if not isinstance(mode, str):
        raise TypeError(f"'mode' must be a str, but got {mode!r} ({type(mode).__name__}).")
    for method in METHODS.values():
        if mode.lower() in (method.name, *method.aliases):
            return method
    raise ValueError(f"'mode' must be one of {list(METHODS)}, but got {mode!r}.")

"""The MAM adapter: a prefix and a scaled parallel adapter in one."""

from typing import Any, Optional, Union

from mindpet.delta.adapter import BottleneckConfig
from mindpet.delta.prefix_layer import PrefixTuningConfig
from mindpet.delta.union import UnionConfig


def mam_config(
    target_modules: Union[list[str], str],
    num_virtual_tokens: int = 30,
    bottleneck_size: int = 512,
    scale: Union[float, str] = 4.0,
    modules_to_save: Optional[Union[list[str], str]] = None,
    **prefix: Any,
) -> UnionConfig:
    """The configuration of a MAM adapter: prefixes in the attentions, scaled parallel adapters at feed-forward blocks.

    Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366,
    section 4.6; the defaults are those of the paper.

    Args:
        target_modules: the feed-forward blocks, see `TargetConfig`.
        num_virtual_tokens: tokens of the prefix. Default: 30.
        bottleneck_size: features inside of the adapters. Default: 512.
        scale: of the adapters, see `BottleneckConfig`. Default: 4.0.
        modules_to_save: names of further Cells that are trained and saved as a whole. Default: None.
        prefix: further fields of PrefixTuningConfig, such as `prefix_projection`.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    beside = BottleneckConfig(
        target_modules=target_modules,
        bottleneck_size=bottleneck_size,
        non_linearity="relu",
        form="parallel",
        scale=scale,
    )
    attention = PrefixTuningConfig(num_virtual_tokens=num_virtual_tokens, **prefix)
    return UnionConfig(configs=[attention, beside], modules_to_save=modules_to_save)

"""Several methods in one adapter, as the MAM adapter is."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from mindpet.delta._config import PeftConfig, PromptLearningConfig, get_peft_config
from mindpet.delta.adapter import BottleneckConfig
from mindpet.delta.prefix_layer import PrefixTuningConfig
from mindpet.utils.validate import Checker

# Fields that an adapter has once, and its methods have not.
OF_ADAPTER = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "modules_to_save")


@dataclass
class UnionConfig(PeftConfig):
    """Several methods in one adapter: they train, are saved, loaded and switched together.

    Each has places of its own; one method may be there once, and one of those that add tokens, keys or values.

    Args beyond those of PeftConfig:
        configs: of the methods, or dicts of their fields as in a file. What concerns the adapter as a
            whole, as `task_type` and `modules_to_save` do, stands here and not in them. Default: [].
    """

    peft_type = "UNION"
    required = ("configs",)

    configs: list[Union[PeftConfig, dict]] = field(default_factory=list)

    def __post_init__(self):
        if isinstance(self.configs, (list, tuple)):
            self.configs = [get_peft_config(one) if isinstance(one, dict) else one for one in self.configs]
        super().__post_init__()

    @property
    def parts(self) -> list[PeftConfig]:
        return self.configs

    def with_parts(self, parts: Iterable[PeftConfig]) -> "UnionConfig":
        return dataclasses.replace(self, configs=list(parts))

    @property
    def trained_parameters(self) -> tuple[str, ...]:
        return tuple(pattern for part in self.parts for pattern in part.trained_parameters)

    def check_fields(self, check: Checker) -> None:
        methods = isinstance(self.configs, list) and all(_is_method(one) for one in self.configs)
        rule = "a list of at least two configurations of methods, no union among them"
        if not check.require(methods and len(self.configs) > 1, TypeError, "configs", self.configs, rule):
            return
        names = [one.peft_name for one in self.configs]
        once = len(set(names)) == len(names)
        once = once and sum(isinstance(one, PromptLearningConfig) for one in self.configs) <= 1
        rule = "of different methods, and at most one of them a prefix or a prompt"
        check.require(once, ValueError, "configs", names, rule)
        for one in self.configs:
            given = [name for name in OF_ADAPTER if getattr(one, name) is not None]
            rule = "given once, to the UnionConfig"
            check.require(not given, ValueError, f"configs ({one.peft_name})", given, rule)

    def computed(self) -> "UnionConfig":
        return self.with_parts(part.computed() for part in self.parts)

    def check_supported(self, from_file: bool = False) -> None:
        super().check_supported(from_file)
        for part in self.parts:
            part.check_supported(from_file)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "configs": [part.to_dict() for part in self.parts]}


def _is_method(config):
    return isinstance(config, PeftConfig) and config.method_name is not None


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

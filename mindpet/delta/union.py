"""Several methods in one adapter, as the MAM adapter is."""

import dataclasses
from dataclasses import dataclass, field
from typing import Optional

from mindpet.delta._config import PeftConfig, PromptLearningConfig, get_peft_config
from mindpet.delta.adapter import BottleneckConfig
from mindpet.delta.prefix_layer import PrefixTuningConfig

# Fields that an adapter has once, and its methods have not.
OF_ADAPTER = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "modules_to_save")


@dataclass
class UnionConfig(PeftConfig):
    """Several methods in one adapter: they train, are saved, loaded and switched together.

    Each has places of its own; one method may be there once, and one of those that add tokens, keys or values.

    Args beyond those of PeftConfig:
        configs (list): of the methods, each a PeftConfig, or a dict of its fields as in a file. What concerns the
            adapter as a whole, as `task_type` and `modules_to_save` do, stands here and not in them. Default: [].
    """

    peft_type = "UNION"
    required = ("configs",)

    configs: list = field(default_factory=list)

    def __post_init__(self):
        if isinstance(self.configs, (list, tuple)):
            self.configs = [get_peft_config(one) if isinstance(one, dict) else one for one in self.configs]
        super().__post_init__()

    @property
    def parts(self):
        return self.configs

    def with_parts(self, parts):
        return dataclasses.replace(self, configs=list(parts))

    @property
    def trained_parameters(self):
        return tuple(pattern for part in self.parts for pattern in part.trained_parameters)

    def check_fields(self, check):
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
            own = [name for name in OF_ADAPTER if getattr(one, name) is not None]
            rule = "given once, to the UnionConfig"
            check.require(not own, ValueError, f"configs ({one.peft_name})", own, rule)

    def computed(self):
        return self.with_parts(part.computed() for part in self.parts)

    def check_supported(self, from_file=False):
        super().check_supported(from_file)
        for part in self.parts:
            part.check_supported(from_file)

    def unpack(self, tensors):
        return self._each("unpack", tensors)

    def pack(self, tensors):
        return self._each("pack", tensors)

    def _each(self, change, tensors):
        parts = []
        for part in self.parts:
            part, tensors = getattr(part, change)(tensors)
            parts.append(part)
        return self.with_parts(parts), tensors

    def to_dict(self):
        return {**super().to_dict(), "configs": [part.to_dict() for part in self.parts]}


def _is_method(config):
    return isinstance(config, PeftConfig) and config.method_name is not None


def mam_config(
    target_modules,
    num_virtual_tokens: int = 30,
    bottleneck_size: int = 512,
    scale=4.0,
    modules_to_save: Optional[list] = None,
    **prefix,
) -> UnionConfig:
    """The configuration of a MAM adapter: prefixes in the attentions, scaled parallel adapters at feed-forward blocks.

    Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366,
    section 4.6; the defaults are those of the paper.

    Args:
        target_modules (Union[list, str]): the feed-forward blocks, see `TargetConfig`.
        num_virtual_tokens: tokens of the prefix. Default: 30.
        bottleneck_size: features inside of the adapters. Default: 512.
        scale (Union[float, str]): of the adapters, see `BottleneckConfig`. Default: 4.0.
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

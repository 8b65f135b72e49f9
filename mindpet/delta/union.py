"""Several methods in one adapter."""

import dataclasses
from dataclasses import dataclass, field

from mindpet.delta._config import PeftConfig, PromptLearningConfig, get_peft_config

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

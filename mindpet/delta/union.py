"""Several methods in one adapter."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Union

from mindpet.delta._config import PeftConfig, PromptLearningConfig, get_peft_config
from mindpet.utils.hints import Arrays
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

    def unpack(self, tensors: Arrays) -> tuple[PeftConfig, Arrays]:
        return self._each("unpack", tensors)

    def pack(self, tensors: Arrays) -> tuple[PeftConfig, Arrays]:
        return self._each("pack", tensors)

    def _each(self, change, tensors):
        parts = []
        for part in self.parts:
            part, tensors = getattr(part, change)(tensors)
            parts.append(part)
        return self.with_parts(parts), tensors

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "configs": [part.to_dict() for part in self.parts]}


def _is_method(config):
    return isinstance(config, PeftConfig) and config.method_name is not None

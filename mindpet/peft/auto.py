"""A base and its adapter from the adapter's folder alone."""

from typing import Any, Callable, Optional

from mindspore import nn

from mindpet.delta._config import PeftConfig, TaskType
from mindpet.errors import ConfigError
from mindpet.peft.model import PeftModel
from mindpet.utils.hints import PathLike
from mindpet.utils.quote import quote
from mindpet.utils.validate import Checker

_BASES = {}  # 'module.Class' -> class


def register_base_model(cls: type) -> type:
    """Let the configurations of adapters name a class as that of their base; can be used as a decorator.

    A configuration is a file, which may come from anybody: nothing is imported that it names.

    Args:
        cls: has a class method `from_pretrained`, from what `base_model_name_or_path` says to the network.

    Returns:
        `cls`.

    Raises:
        TypeError: `cls` is not such a class.
    """
    check = Checker("register_base_model")
    loads = isinstance(cls, type) and callable(getattr(cls, "from_pretrained", None))
    check.require(loads, TypeError, "cls", cls, "a class with a method 'from_pretrained'")
    check.done()
    _BASES[f"{cls.__module__}.{cls.__name__}"] = cls
    return cls


class AutoPeftModel:
    """Makes the base that an adapter's configuration names, and puts the adapter into it."""

    task_type = None  # that the adapter must be for

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Optional[PeftConfig] = None,
        loader: Optional[Callable[[Optional[str]], nn.Cell]] = None,
        **keywords: Any,
    ) -> PeftModel:
        """A base with an adapter.

        The configuration says where the base's weights are, `base_model_name_or_path`, and `auto_mapping`, which class
        of which module it is; `save_pretrained` of a PeftModel notes the class if it has a method `from_pretrained`.
        It must be one that was registered, see `register_base_model`.

        Args:
            pretrained_model_name_or_path: the adapter's folder.
            adapter_name: Default: 'default'.
            is_trainable: whether the adapter trains. Default: False.
            config: takes the place of the one in the folder. Default: None.
            loader: from `base_model_name_or_path`, which may be None, to the base network. Default: None, for the
                method `from_pretrained` of the registered class in `auto_mapping`.
            keywords: of `PeftModel.from_pretrained`: `force`, `name_map` and others.

        Raises:
            FileNotFoundError: there is no such folder.
            ConfigError: the configuration does not name a base, or a class that is not registered; the adapter is for
                another task.
            CheckpointError, ...: see `PeftModel.from_pretrained`.
        """
        folder = pretrained_model_name_or_path
        config = PeftConfig.from_pretrained(folder) if config is None else config
        if cls.task_type is not None and config.task_type not in (None, cls.task_type):
            raise ConfigError(
                f"{folder}: 'task_type' must be {cls.task_type.value} for {cls.__name__}, but is "
                f"{config.task_type.value}."
            )
        if loader is None and not config.base_model_name_or_path:
            raise ConfigError(f"{folder}: 'base_model_name_or_path' must name the base, but is not set; give 'loader'.")
        load = loader or _class_of(config.auto_mapping, folder).from_pretrained
        base = load(config.base_model_name_or_path)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable, config, **keywords)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for causal language models."""

    task_type = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for language models from sequence to sequence."""

    task_type = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for the classification of sequences."""

    task_type = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for the classification of tokens."""

    task_type = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for question answering."""

    task_type = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for embeddings of texts."""

    task_type = TaskType.FEATURE_EXTRACTION


def _class_of(mapping, folder):
    mapping = mapping or {}
    name = f"{mapping.get('parent_library')}.{mapping.get('base_model_class')}"
    if name not in _BASES:
        raise ConfigError(
            f"{folder}: 'auto_mapping' must name the base's class and its module, one of {sorted(_BASES)}, but is "
            f"{quote(mapping)}; call register_base_model() with the class, or give 'loader'."
        )
    return _BASES[name]

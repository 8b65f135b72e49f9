"""The configurations of adapters: names, defaults and files are those of Hugging Face PEFT."""

import copy
import dataclasses
import enum
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from mindpet.errors import CheckpointError, ConfigError
from mindpet.network.match import USUAL_TARGETS, chooses, exact_targets, exactly, pattern_value
from mindpet.utils.files import atomic
from mindpet.utils.hints import Arrays, PathLike, Shape
from mindpet.utils.parse import read_json
from mindpet.utils.quote import quote
from mindpet.utils.validate import Checker, is_int

CONFIG_NAME = "adapter_config.json"
# Fields of other libraries' files that would change what is computed if they are set.
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Sizes of a delta that a tensor of its file has, too.
AXES = ("rank", "bottleneck_size", "low_rank_size", "tokens")


class TaskType(str, enum.Enum):
    """What a model is fine-tuned for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


BIASES = ("*.bias", "*.beta", "bias", "beta")  # patterns of all biases; a LayerNorm calls its bias beta
# New output layers that a task brings with it; they are trained and saved, as far as the network has them.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
CONFIGS = {}  # name of a method -> class


@dataclass
class PeftConfig:
    """What all configurations have in common.

    Fields of a file that are not known here are kept in `unknown` and written back with the others.

    Args:
        task_type: what the model is fine-tuned for. Default: None.
        auto_mapping: where the base model's class is found; kept as it is. Default: None.
        peft_version: version of the library that wrote the file; kept as it is. Default: None.
        base_model_name_or_path: of the base model. Default: None.
        revision: of the base model. Default: None.
        inference_mode: whether the adapter is loaded frozen. Default: False.
        modules_to_save: names of further Cells that are trained and saved as a whole. Default: None.
        unknown: fields of a file without a place here. Default: {}.

    Raises:
        TypeError, ValueError: a field is wrong; all wrong ones are in the message.
    """

    task_type: Optional[Union[TaskType, str]] = None
    auto_mapping: Optional[dict] = None
    peft_version: Optional[str] = None
    base_model_name_or_path: Optional[str] = None
    revision: Optional[str] = None
    inference_mode: bool = False
    modules_to_save: Optional[Union[list[str], str]] = None
    unknown: dict[str, Any] = field(default_factory=dict)

    # Of a method's class; no fields, for they cannot be chosen.
    peft_type = None  # the method's name in a file
    method_name = None  # its name in `mindpet.delta.registry`
    key_start = "base_model.model."  # begins the keys of an adapter's file
    trained_parameters = ()  # patterns (fnmatch) of the base's own parameters that train, too
    trains_target_biases = False
    required = ()  # fields that a configuration in a file must have, for a default would be a guess
    told_by_tensors = ()  # further ones, which of a delta file the tensors tell
    not_in_peft = ()  # fields that Hugging Face PEFT does not have; they are in a file only if they are set

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        if "peft_type" in vars(cls):
            CONFIGS[cls.peft_type] = cls

    def __post_init__(self):
        check = Checker(type(self).__name__)
        if self.task_type is not None:
            check.choice("task_type", self.task_type, [kind.value for kind in TaskType])
        check.boolean(inference_mode=self.inference_mode)
        check_names(check, "modules_to_save", self.modules_to_save)
        for name in ("peft_version", "base_model_name_or_path", "revision"):
            value = getattr(self, name)
            check.require(value is None or isinstance(value, str), TypeError, name, value, "a str or None")
        mapped = self.auto_mapping is None or isinstance(self.auto_mapping, dict)
        check.require(mapped, TypeError, "auto_mapping", self.auto_mapping, "a dict or None")
        check.require(isinstance(self.unknown, dict), TypeError, "unknown", self.unknown, "a dict")
        self.check_fields(check)
        check.done()
        self.task_type = None if self.task_type is None else TaskType(self.task_type)

    def check_fields(self, check: Checker) -> None:
        """Note what is wrong with the fields of a subclass."""

    @property
    def peft_name(self) -> str:
        """The method's name in a file."""
        return getattr(self.peft_type, "value", self.peft_type)

    @property
    def task_heads(self) -> tuple[str, ...]:
        """Names of output layers that are trained and saved for the task, without being named in modules_to_save."""
        return TASK_HEADS.get(self.task_type, ())

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds tokens or keys and values, rather than layers."""
        return isinstance(self, PromptLearningConfig)

    @property
    def parts(self) -> list["PeftConfig"]:
        """The configurations of the adapter's methods; this one alone, if it is no union of several."""
        return [self]

    def with_parts(self, parts: Iterable["PeftConfig"]) -> "PeftConfig":
        """This configuration with others in place of its `parts`."""
        (part,) = parts
        return part

    def delta_arguments(self, path: str) -> dict[str, Any]:
        """The keywords of `Delta.setup` for the layer at `path`."""
        return {}

    def kinds_of_targets(self, kinds: Collection[str]) -> Collection[str]:
        """Those of the method's kinds of places, names in `mindpet.network.kinds`, that this configuration is for."""
        return kinds

    def choose(self, layers: list) -> list:
        """Those of the layers that `target_modules` means that get a delta.

        Args:
            layers: each a Layer, in the network's order.

        Raises:
            ConfigError: there are too few of them.
        """
        return layers

    def complete(self, kinds: Sequence[Any]) -> None:
        """Set what a network tells.

        Args:
            kinds: of its Cells with a slot, see `mindpet.network.kinds.SLOTS`; all alike.

        Raises:
            ConfigError: a field says otherwise, or is missing.
        """

    def computed(self) -> "PeftConfig":
        """The configuration of this adapter as a file has it: what was computed is there, and not what it is from."""
        return self

    def of_delta_file(self, shapes: dict[str, dict[str, Shape]], tensors: Arrays) -> tuple["PeftConfig", Arrays]:
        """The configuration, and the tensors, of an adapter from a delta file of mindpet.

        Args:
            shapes: path of a layer -> name -> shape, of its delta.
            tensors: of the adapter, by key.

        Returns:
            The configuration with what the tensors tell, and the tensors that belong in an adapter's file.

        Raises:
            ConfigError: the configuration does not fit the tensors.
        """
        return copy.deepcopy(self), tensors

    def unpack(self, tensors: Arrays) -> tuple["PeftConfig", Arrays]:
        """The inverse of `pack`: the configuration and the tensors of an adapter, from those of a file."""
        return self, tensors

    def pack(self, tensors: Arrays) -> tuple["PeftConfig", Arrays]:
        """What a file has, where it lacks a part that can be told from the rest.

        Args:
            tensors: those of the adapter, by key.

        Returns:
            The configuration and the tensors of the file.
        """
        return self, tensors

    def check_supported(self, from_file: bool = False) -> None:
        """Refuse fields that would change what is computed, but have no place here.

        Args:
            from_file: whether the adapter has its values already, from a file. Default: False.

        Raises:
            ConfigError: the file asks for something that mindpet does not do.
        """
        neutral = (None, False, {}, [], "")
        used = {name: self.unknown[name] for name in UNSUPPORTED if self.unknown.get(name) not in neutral}
        if used:
            raise ConfigError(f"{type(self).__name__}: not supported: {quote(used)}.")

    def check_sizes(self, folder: PathLike, paths: Iterable[str], shapes: Iterable[Shape]) -> None:
        """Refuse sizes that no tensor of a file has, before anything of such a size is made.

        Args:
            folder: of the adapter, for the message.
            paths: of the layers with a delta.
            shapes: of the file's tensors.

        Raises:
            CheckpointError: a rank or the like is larger than every axis in the file; all are in the message.
        """
        longest = max((size for shape in shapes for size in shape), default=0)
        problems = [
            f"{path}: {name} {size}, but no axis of a tensor is longer than {longest}"
            for path in paths
            for name, size in self.delta_arguments(path).items()
            if name in AXES and size > longest
        ]
        if problems:
            raise CheckpointError(
                f"{folder}: the adapter does not fit its configuration; the network is unchanged:\n  "
                + "\n  ".join(problems)
            )

    @classmethod
    def of_content(cls, content: dict[str, Any]) -> type["PeftConfig"]:
        """The class for the fields of a file, which may be one that shares its `peft_type` with this."""
        return cls

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them: sets as sorted lists, types by their names."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "unknown"}
        content = {name: value for name, value in content.items() if not (value is None and name in self.not_in_peft)}
        content = {**self.unknown, **content, "peft_type": self.peft_type}
        return {name: _to_json(value) for name, value in content.items()}

    def to_json(self) -> str:
        """What `adapter_config.json` holds."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def save_pretrained(self, save_directory: PathLike) -> None:
        """Write `adapter_config.json` into a folder, which is made if it is missing.

        Raises:
            ConfigError: the configuration has no method; use one of the subclasses.
        """
        if self.peft_type is None:
            raise ConfigError(f"{type(self).__name__}: no method to save; use one of {sorted(CONFIGS)}.")
        folder = pathlib.Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / CONFIG_NAME) as staged:
            pathlib.Path(staged).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: PathLike, **overrides: Any) -> "PeftConfig":
        """The configuration of an adapter's folder, of the class of its method.

        Args:
            pretrained_model_name_or_path: of the folder, or of the file itself.
            overrides: fields that take the place of those in the file.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: it is not the JSON of a configuration, of an unknown method, or of another class's.
            TypeError, ValueError: a field is wrong.
        """
        path = pathlib.Path(pretrained_model_name_or_path)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such file or folder; adapters are read from local folders only, so one of a hub must be "
                "downloaded first."
            )
        path = path / CONFIG_NAME if path.is_dir() else path
        content = read_json(path, ConfigError)
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: must hold an object, but holds {quote(content)}.")
        config = get_peft_config({**content, **overrides})
        if not isinstance(config, cls):
            raise ConfigError(f"{path}: is a {type(config).__name__}, but a {cls.__name__} is asked for.")
        return config


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration that a dict describes, of the class of its method.

    Args:
        config_dict: has at least `peft_type`.

    Raises:
        ConfigError: `peft_type` is missing or unknown.
        TypeError, ValueError: a field is wrong.
    """
    if not isinstance(config_dict, dict):
        raise TypeError(f"'config_dict' must be a dict, but got {quote(config_dict)} ({type(config_dict).__name__}).")
    content = dict(config_dict)
    name = content.pop("peft_type", None)
    if not isinstance(name, str) or name not in CONFIGS:
        raise ConfigError(f"'peft_type' must be one of {sorted(CONFIGS)}, but got {quote(name)}.")
    cls = CONFIGS[name].of_content(content)
    known = {f.name for f in dataclasses.fields(cls)} - {"unknown"}
    unknown = {key: value for key, value in content.items() if key not in known}
    return cls(**{key: value for key, value in content.items() if key in known}, unknown=unknown)


def check_names(check: Checker, name: str, value: Any) -> None:
    """None, a str, or a list, tuple or set of str."""
    names = [value] if isinstance(value, str) else [] if value is None else value
    listed = isinstance(names, (list, tuple, set)) and all(isinstance(entry, str) for entry in names)
    check.require(listed, TypeError, name, value, "a str, a list of str or None")


def _to_json(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, enum.Enum) else value


@dataclass
class TargetConfig(PeftConfig):
    """What methods that change layers have in common: which layers.

    Args:
        target_modules: a list matches a path or its end after a dot; a str is a regular expression for the whole path,
            or 'all-linear' for every linear layer but the head. Default: None, for what is known of the model.
        exclude_modules: layers to leave out, matched alike. Default: None.
        layers_to_transform: numbers of the layers. Default: None, for all.
        layers_pattern: name of the list of layers, if it is not the only one with numbers. Default: None.
    """

    target_modules: Optional[Union[list[str], str]] = None
    exclude_modules: Optional[Union[list[str], str]] = None
    layers_to_transform: Optional[Union[list[int], int]] = None
    layers_pattern: Optional[Union[list[str], str]] = None

    choices = ()  # fields that choose some of the targets, see `mindpet.network.match.chooses`
    patterns = ("rank_pattern", "alpha_pattern")  # fields with numbers of some of the targets, if the method has them
    usual_targets = USUAL_TARGETS  # without `target_modules`: names of layers, the first tuple that is there in full
    copied_as = None  # of a method that trains copies of its targets: what a file has between path and parameter
    bias = "none"  # the methods with such a field know 'none', 'all', and a name of their own for the targets' biases

    @property
    def trained_parameters(self) -> tuple[str, ...]:
        return BIASES if self.bias == "all" else ()

    @property
    def trains_target_biases(self) -> bool:
        return self.bias not in ("none", "all")

    def with_targets(self, pairs: Sequence[tuple[str, str]], known: Iterable[str]) -> "TargetConfig":
        """A configuration that means these layers alone, by their new names.

        Args:
            pairs: of each layer its path before and after.
            known: every path that there is after.
        """
        fields = {}
        for name in self.patterns:
            patterns, default = getattr(self, name, {}), object()
            said = {new: pattern_value(patterns, old, default) for old, new in pairs}
            if hasattr(self, name):
                fields[name] = {exactly(path): value for path, value in said.items() if value is not default}
        for name in self.choices:
            chosen = [new for old, new in pairs if chooses(getattr(self, name), old)]
            fields[name] = exact_targets(chosen) if chosen else None
        return dataclasses.replace(
            self,
            target_modules=exact_targets([new for _, new in pairs], known),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            **fields,
        )

    def check_fields(self, check: Checker) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", *self.choices):
            check_names(check, name, getattr(self, name))
        for name in ("target_modules", "exclude_modules", *self.choices):
            if isinstance(getattr(self, name), str):
                rule = "a regular expression"
                check.require(_compiles(getattr(self, name)), ValueError, name, getattr(self, name), rule)
        layers = self.layers_to_transform
        layers = [] if layers is None else [layers] if is_int(layers) else layers
        numbers = isinstance(layers, (list, tuple)) and all(is_int(layer) and layer >= 0 for layer in layers)
        rule = "an int, a list of ints or None, from 0 on"
        check.require(numbers, TypeError, "layers_to_transform", self.layers_to_transform, rule)
        pattern = self.layers_pattern
        given = not pattern or self.layers_to_transform is not None
        check.require(given, ValueError, "layers_pattern", pattern, "given with layers_to_transform")
        names = [pattern] if isinstance(pattern, str) else pattern if isinstance(pattern, (list, tuple, set)) else ()
        compile_all = all(_compiles(name) for name in names if isinstance(name, str))
        check.require(compile_all, ValueError, "layers_pattern", pattern, "of regular expressions")
        for name in self.patterns:
            value = getattr(self, name, {})
            if check.require(isinstance(value, dict), TypeError, name, value, "a dict"):
                for pattern, number in value.items():
                    rule = "keyed by regular expressions"
                    check.require(isinstance(pattern, str) and _compiles(pattern), ValueError, name, pattern, rule)
                    entry = {f"{name}[{quote(pattern)}]": number}
                    (check.positive_int if name == "rank_pattern" else check.nonzero_number)(**entry)


def _compiles(pattern):
    """Whether a str is a regular expression, also as a part of another one."""
    try:
        re.compile(pattern)
        re.compile(f"(.*)({pattern})")
    except (re.error, OverflowError, RecursionError):  # the latter for numbers and levels without end
        return False
    return True


@dataclass
class PromptLearningConfig(PeftConfig):
    """What methods that add tokens, or keys and values, have in common. Sizes of the model are found in it if None.

    Args beyond those of PeftConfig:
        num_virtual_tokens: tokens added. Default: None; it must be given before the adapter is made.
        token_dim: features of a token, of all key and value heads. Default: None.
        num_transformer_submodules: 1 for an encoder or a decoder, 2 for both. Default: None.
        num_attention_heads: key and value heads. Default: None.
        num_layers: layers. Default: None.
    """

    num_virtual_tokens: Optional[int] = None
    token_dim: Optional[int] = None
    num_transformer_submodules: Optional[int] = None
    num_attention_heads: Optional[int] = None
    num_layers: Optional[int] = None

    key_start = "base_model."  # Hugging Face PEFT does not wrap the model twice

    def complete(self, kinds: Sequence[Any]) -> None:
        problems = []
        for name, value in self.network_sizes(kinds).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
            elif getattr(self, name) != value:
                problems.append(f"'{name}' must be {value} for this network, but is {getattr(self, name)}")
        if self.num_virtual_tokens is None:
            problems.append("'num_virtual_tokens' must be given")
        if problems:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(problems) + ".")

    @staticmethod
    def network_sizes(kinds: Sequence[Any]) -> dict[str, int]:
        """Name of a field -> its value, of those that a network tells; see `complete`."""
        raise NotImplementedError

    @property
    def table_shape(self) -> Optional[Shape]:
        """The shape of the one tensor in a file, or None where the fields do not tell it."""
        raise NotImplementedError

    def check_fields(self, check: Checker) -> None:
        names = [f.name for f in dataclasses.fields(PromptLearningConfig) if f.type == Optional[int]]
        sizes = {name: getattr(self, name) for name in names}
        check.positive_int(**{name: size for name, size in sizes.items() if size is not None})

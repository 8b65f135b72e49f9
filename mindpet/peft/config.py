"""The configurations of adapters: names, defaults and files are those of Hugging Face PEFT."""

import dataclasses
import enum
import json
import math
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from mindpet.delta.registry import METHODS
from mindpet.errors import CheckpointError, ConfigError
from mindpet.layers.activation import ACTIVATIONS
from mindpet.utils.files import atomic
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
FOREIGN_INITS = ("corda", "lora_ga", "loftq")
APPROXIMATE_INITS = r"pissa_niter_\d+"
# Sizes of a delta that a tensor of its file has, too.
AXES = ("rank", "bottleneck_size", "low_rank_size", "tokens")
LORA_INITS = rf"gaussian|pissa|{APPROXIMATE_INITS}|olora"


class PeftType(str, enum.Enum):
    """The methods, by the names that `adapter_config.json` uses; the last four are mindpet's own."""

    LORA = "LORA"
    PREFIX_TUNING = "PREFIX_TUNING"
    ADAPTER = "ADAPTER"
    LOW_RANK_ADAPTER = "LOW_RANK_ADAPTER"
    PTUNING2 = "PTUNING2"
    BITFIT = "BITFIT"


class TaskType(str, enum.Enum):
    """What a model is fine-tuned for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


CONFIGS = {}  # name of a method -> class


@dataclass
class PeftConfig:
    """What all configurations have in common.

    Fields of a file that are not known here are kept in `unknown` and written back with the others.

    Args:
        task_type (Union[TaskType, str]): what the model is fine-tuned for. Default: None.
        auto_mapping (dict): where the base model's class is found; kept as it is. Default: None.
        peft_version (str): version of the library that wrote the file; kept as it is. Default: None.
        base_model_name_or_path (str): of the base model. Default: None.
        revision (str): of the base model. Default: None.
        inference_mode (bool): whether the adapter is loaded frozen. Default: False.
        modules_to_save (Union[list, str]): names of further Cells that are trained and saved as a whole.
            Default: None.
        unknown (dict): fields of a file without a place here. Default: {}.

    Raises:
        TypeError, ValueError: a field is wrong; all wrong ones are in the message.
    """

    task_type: Optional[TaskType] = None
    auto_mapping: Optional[dict] = None
    peft_version: Optional[str] = None
    base_model_name_or_path: Optional[str] = None
    revision: Optional[str] = None
    inference_mode: bool = False
    modules_to_save: Optional[list] = None
    unknown: dict = field(default_factory=dict)

    peft_type = None  # of a subclass; not a field, for it cannot be chosen

    def __init_subclass__(cls, peft_type=None, **keywords):
        super().__init_subclass__(**keywords)
        if peft_type is not None:
            cls.peft_type = peft_type
            CONFIGS[str(peft_type.value)] = cls

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

    def check_fields(self, check):
        """Note what is wrong with the fields of a subclass."""

    def sizes(self, path):
        """The keywords with which the method's delta is made for the layer at `path`, see `delta.registry`."""
        return {}

    def check_supported(self, from_file=False):
        """Refuse fields that would change what is computed, but have no place here.

        Args:
            from_file (bool): whether the adapter has its values already, from a file. Default: False.

        Raises:
            ConfigError: the file asks for something that mindpet does not do.
        """
        neutral = (None, False, {}, [], "")
        used = {name: self.unknown[name] for name in UNSUPPORTED if self.unknown.get(name) not in neutral}
        if used:
            raise ConfigError(f"{type(self).__name__}: not supported: {quote(used)}.")

    def check_sizes(self, folder, paths, shapes):
        """Refuse sizes that no tensor of a file has, before anything of such a size is made.

        Args:
            folder (str): of the adapter, for the message.
            paths (iterable of str): of the layers with a delta.
            shapes (iterable of tuple): of the file's tensors.

        Raises:
            CheckpointError: a rank or the like is larger than every axis in the file; all are in the message.
        """
        longest = max((size for shape in shapes for size in shape), default=0)
        problems = [
            f"{path}: {name} {size}, but no axis of a tensor is longer than {longest}"
            for path in paths
            for name, size in self.sizes(path).items()
            if name in AXES and size > longest
        ]
        if problems:
            raise CheckpointError(
                f"{folder}: the adapter does not fit its configuration; the network is unchanged:\n  "
                + "\n  ".join(problems)
            )

    @property
    def method(self):
        """The Method of `delta.registry`."""
        return next(method for method in METHODS.values() if method.peft_type == self.peft_type)

    @property
    def is_prompt_learning(self):
        """Whether the method adds tokens or keys and values, rather than layers."""
        return self.peft_type in (PeftType.PREFIX_TUNING, PeftType.PTUNING2)

    def to_dict(self):
        """All fields as JSON has them: sets as sorted lists, types by their names."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "unknown"}
        content = {**self.unknown, **content, "peft_type": self.peft_type}
        return {name: _to_json(value) for name, value in content.items()}

    def to_json(self):
        """What `adapter_config.json` holds."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def save_pretrained(self, save_directory):
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
    def from_pretrained(cls, pretrained_model_name_or_path, **overrides):
        """The configuration of an adapter's folder, of the class of its method.

        Args:
            pretrained_model_name_or_path (str): the folder, or the file itself.
            overrides: fields that take the place of those in the file.

        Returns:
            PeftConfig.

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


def get_peft_config(config_dict):
    """The configuration that a dict describes.

    Args:
        config_dict (dict): has at least `peft_type`.

    Returns:
        PeftConfig, of the class of its method.

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
    if name == PeftType.PREFIX_TUNING and "dropout_prob" in content:
        name = PeftType.PTUNING2
    cls = CONFIGS[name]
    known = {f.name for f in dataclasses.fields(cls)} - {"unknown"}
    unknown = {key: value for key, value in content.items() if key not in known}
    return cls(**{key: value for key, value in content.items() if key in known}, unknown=unknown)


def check_names(check, name, value):
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
        target_modules (Union[list, str]): a list matches a path or its end after a dot; a str is a regular expression
            for the whole path, or 'all-linear' for every linear layer but the head. Default: None, for what is known
            of the model.
        exclude_modules (Union[list, str]): layers to leave out, matched alike. Default: None.
        layers_to_transform (Union[int, list]): numbers of the layers. Default: None, for all.
        layers_pattern (Union[list, str]): name of the list of layers, if it is not the only one with numbers.
            Default: None.
    """

    target_modules: Optional[Union[list, str]] = None
    exclude_modules: Optional[Union[list, str]] = None
    layers_to_transform: Optional[Union[list, int]] = None
    layers_pattern: Optional[Union[list, str]] = None

    def check_fields(self, check):
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(check, name, getattr(self, name))
        for name in ("target_modules", "exclude_modules"):
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


@dataclass
class LoraConfig(TargetConfig, peft_type=PeftType.LORA):
    """LoRA, Hu et al. 2021, arXiv:2106.09685.

    Args beyond those of PeftConfig and TargetConfig:
        r (int): rank. Default: 8.
        lora_alpha (Union[int, float]): scale; the update is multiplied by `lora_alpha / r`. Default: 8.
        lora_dropout (float): probability in [0, 1) of zeroing an input of the update. Default: 0.0.
        fan_in_fan_out (bool): whether the linear layers of the PyTorch model store their weight as `(in, out)`; kept
            for Hugging Face PEFT. Which way up a Cell's weight is, `mindpet.layers.kinds` knows. Default: False.
        bias (str): which biases train: 'none', 'all', or 'lora_only' for those of the targets. Default: 'none'.
        use_rslora (bool): scale by `lora_alpha / sqrt(r)`, Kalajdzievski 2023, arXiv:2312.03732. Default: False.
        init_lora_weights (Union[bool, str]): True for Kaiming A and zero B, False for both random, 'gaussian',
            'pissa', 'pissa_niter_N', which is computed exactly here, or 'olora'; of an adapter that is loaded,
            whatever it says. Default: True.
        rank_pattern (dict): layer name or regular expression -> another rank. Default: {}.
        alpha_pattern (dict): layer name or regular expression -> another alpha. Default: {}.
        use_dora (bool): magnitude and direction apart, Liu et al. 2024, arXiv:2402.09353. Default: False.
        lora_bias (bool): a bias of B. Default: False.
    """

    r: int = 8
    lora_alpha: Union[int, float] = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: Any = True
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False

    def scaling(self, path):
        """The scale of the layer at `path`."""
        sizes = self.sizes(path)
        return sizes["alpha"] / self.divisor(sizes["rank"])

    def divisor(self, rank):
        """What alpha is divided by."""
        return math.sqrt(rank) if self.use_rslora else rank

    def check_supported(self, from_file=False):
        super().check_supported(from_file)
        init = self.init_lora_weights
        # A fresh adapter starts from the exact decomposition; in a file it was an approximation with random numbers.
        random = isinstance(init, str) and re.fullmatch(APPROXIMATE_INITS, init) and (from_file or self.inference_mode)
        if random or init in FOREIGN_INITS:
            raise ConfigError(
                f"LoraConfig: not supported: init_lora_weights={quote(init)}, which takes a part off the base that "
                "cannot be told from the file; save the adapter as plain LoRA, with "
                "path_initial_model_for_weight_conversion of save_pretrained in Hugging Face PEFT."
            )

    def sizes(self, path):
        return {
            "rank": pattern_value(self.rank_pattern, path, self.r),
            "alpha": pattern_value(self.alpha_pattern, path, self.lora_alpha),
            "dropout": float(self.lora_dropout),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "init": self.init_lora_weights,
        }

    def check_fields(self, check):
        super().check_fields(check)
        check.require(not (self.use_dora and self.lora_bias), ValueError, "lora_bias", True, "False with DoRA")
        check.positive_int(r=self.r)
        check.nonzero_number(lora_alpha=self.lora_alpha)
        check.probability((int, float), lora_dropout=self.lora_dropout)
        for name in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"):
            check.boolean(**{name: getattr(self, name)})
        check.choice("bias", self.bias, ("none", "all", "lora_only"))
        init = self.init_lora_weights
        known = isinstance(init, bool) or (isinstance(init, str) and re.fullmatch(LORA_INITS, init))
        rule = "a bool, 'gaussian', 'pissa', 'pissa_niter_N' or 'olora'"
        check.require(known or self.inference_mode, ValueError, "init_lora_weights", init, rule)
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if check.require(isinstance(value, dict), TypeError, name, value, "a dict"):
                for pattern, number in value.items():
                    rule = "keyed by regular expressions"
                    check.require(isinstance(pattern, str) and _compiles(pattern), ValueError, name, pattern, rule)
                    entry = {f"{name}[{quote(pattern)}]": number}
                    (check.positive_int if name == "rank_pattern" else check.nonzero_number)(**entry)


def pattern_value(patterns, path, default):
    """The value for a path in `rank_pattern` or `alpha_pattern`: of the first key that is the path or its end.

    A key is a regular expression.
    """
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def _compiles(pattern):
    """Whether a str is a regular expression, also as a part of another one."""
    try:
        re.compile(pattern)
        re.compile(f"(.*)({pattern})")
    except (re.error, OverflowError, RecursionError):  # the latter for numbers and levels without end
        return False
    return True


@dataclass
class AdapterConfig(TargetConfig, peft_type=PeftType.ADAPTER):
    """Bottleneck adapters, Houlsby et al. 2019, arXiv:1902.00751.

    Args beyond those of PeftConfig and TargetConfig:
        bottleneck_size (int): features inside. Default: 64.
        non_linearity (str): activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
    """

    bottleneck_size: int = 64
    non_linearity: str = "gelu"

    def sizes(self, path):
        return {"bottleneck_size": self.bottleneck_size, "non_linearity": self.non_linearity}

    def check_fields(self, check):
        super().check_fields(check)
        check.positive_int(bottleneck_size=self.bottleneck_size)
        check.choice("non_linearity", self.non_linearity, ACTIVATIONS)


@dataclass
class LowRankAdapterConfig(TargetConfig, peft_type=PeftType.LOW_RANK_ADAPTER):
    """Low-rank adapters, Mahabadi et al. 2021, arXiv:2106.04647, section 3.

    Args beyond those of PeftConfig and TargetConfig:
        reduction_factor (int): by how much the inner size is smaller than the features. Default: 32.
        low_rank_size (int): rank of both products. Default: 1.
        non_linearity (str): activation inside, see `mindpet.layers.get_activation`. Default: 'gelu'.
    """

    reduction_factor: int = 32
    low_rank_size: int = 1
    non_linearity: str = "gelu"

    def sizes(self, path):
        return {
            "reduction_factor": self.reduction_factor,
            "low_rank_size": self.low_rank_size,
            "non_linearity": self.non_linearity,
        }

    def check_fields(self, check):
        super().check_fields(check)
        check.positive_int(reduction_factor=self.reduction_factor, low_rank_size=self.low_rank_size)
        check.choice("non_linearity", self.non_linearity, ACTIVATIONS)


@dataclass
class PromptLearningConfig(PeftConfig):
    """What methods that add tokens, or keys and values, have in common. Sizes of the model are found in it if None.

    Args beyond those of PeftConfig:
        num_virtual_tokens (int): tokens added. Default: None; it must be given before the adapter is made.
        token_dim (int): features of a token, of all key and value heads. Default: None.
        num_transformer_submodules (int): 1 for an encoder or a decoder, 2 for both. Default: None.
        num_attention_heads (int): key and value heads. Default: None.
        num_layers (int): layers. Default: None.
    """

    num_virtual_tokens: Optional[int] = None
    token_dim: Optional[int] = None
    num_transformer_submodules: Optional[int] = None
    num_attention_heads: Optional[int] = None
    num_layers: Optional[int] = None

    def check_fields(self, check):
        names = [f.name for f in dataclasses.fields(PromptLearningConfig) if f.type == Optional[int]]
        sizes = {name: getattr(self, name) for name in names}
        check.positive_int(**{name: size for name, size in sizes.items() if size is not None})


@dataclass
class PrefixTuningConfig(PromptLearningConfig, peft_type=PeftType.PREFIX_TUNING):
    """Prefix tuning, Li and Liang 2021, arXiv:2101.00190.

    Args beyond those of PromptLearningConfig:
        encoder_hidden_size (int): features between the two layers of the projection. Default: None, for `token_dim`.
        prefix_projection (bool): whether two layers compute the prefix from an embedding. Default: False.
    """

    encoder_hidden_size: Optional[int] = None
    prefix_projection: bool = False

    def sizes(self, path):
        inner = {"mid_dim": self.encoder_hidden_size} if self.prefix_projection else {}
        return {"tokens": self.num_virtual_tokens, **inner}

    @property
    def method(self):
        return METHODS["prefixtuning" if self.prefix_projection else "ptuning2"]

    def check_fields(self, check):
        super().check_fields(check)
        if self.encoder_hidden_size is not None:
            check.positive_int(encoder_hidden_size=self.encoder_hidden_size)
        check.boolean(prefix_projection=self.prefix_projection)


@dataclass
class Ptuning2Config(PrefixTuningConfig, peft_type=PeftType.PTUNING2):
    """P-Tuning v2, Liu et al. 2021, arXiv:2110.07602: prefix tuning, with dropout on the prefix.

    A file says PREFIX_TUNING, which Hugging Face PEFT knows, and has `dropout_prob` besides.

    Args beyond those of PrefixTuningConfig:
        dropout_prob (float): probability in [0, 1) of zeroing an element of the prefix. Default: 0.0.
    """

    dropout_prob: float = 0.0

    def sizes(self, path):
        projection = {"prefix_projection": True, "projection_dim": self.encoder_hidden_size or 128}
        return {
            "tokens": self.num_virtual_tokens,
            "dropout_prob": float(self.dropout_prob),
            **(projection if self.prefix_projection else {}),
        }

    @property
    def method(self):
        return METHODS["ptuning2"]

    def to_dict(self):
        return {**super().to_dict(), "peft_type": PeftType.PREFIX_TUNING.value}

    def check_fields(self, check):
        super().check_fields(check)
        check.probability((int, float), dropout_prob=self.dropout_prob)


@dataclass
class BitFitConfig(PeftConfig, peft_type=PeftType.BITFIT):
    """BitFit, Ben Zaken et al. 2021, arXiv:2106.10199: every parameter that is named `bias` trains."""

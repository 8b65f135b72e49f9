"""Prompt tuning: trained vectors in front of the embeddings of the input."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.common.initializer import Normal

from mindpet.delta._base import PROMPT, Delta, delta_parameter
from mindpet.delta._config import PeftConfig, PromptLearningConfig
from mindpet.delta._method import Method
from mindpet.errors import ConfigError, NotPositiveIntError
from mindpet.network.kinds import InputEmbeddingKind, LayerKind
from mindpet.utils.hints import Arrays, InitLike, Shape
from mindpet.utils.validate import Checker, is_int

TABLE = "mindpet_delta_prompt"
INITS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")


@dataclass
class PromptConfig(PromptLearningConfig):
    """What methods have in common that put vectors in front of the embeddings, see `PromptCell`."""

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {"tokens": self.num_virtual_tokens}

    @staticmethod
    def network_sizes(kinds: Sequence[InputEmbeddingKind]) -> dict[str, int]:
        return {"token_dim": kinds[0].token_dim, "num_transformer_submodules": len(kinds)}

    @property
    def table_shape(self) -> Optional[Shape]:
        sizes = (self.num_virtual_tokens, self.token_dim)
        return None if None in sizes else (sizes[0] * (self.num_transformer_submodules or 1), sizes[1])

    def of_delta_file(self, shapes: dict[str, dict[str, Shape]], tensors: Arrays) -> tuple[PeftConfig, Arrays]:
        """The configuration with the sizes of the prompt; one that says others is refused."""
        config, tensors = super().of_delta_file(shapes, tensors)
        shape, parts = tensors[PROMPT].shape, self.num_transformer_submodules or 1
        if len(shape) == 2:
            sizes = {"num_virtual_tokens": shape[0] // parts, "token_dim": shape[1]}
            config = replace(config, **{name: getattr(self, name) or size for name, size in sizes.items()})
        if config.table_shape != shape:
            raise ConfigError(
                f"the prompt is {list(shape)}: the configuration must say (num_virtual_tokens * "
                f"num_transformer_submodules, token_dim) of it, but has {self.num_virtual_tokens} * {parts}, "
                f"{self.token_dim}."
            )
        return config, tensors


@dataclass
class PromptTuningConfig(PromptConfig):
    """Prompt tuning, Lester et al. 2021, arXiv:2104.08691.

    Args beyond those of PromptLearningConfig:
        prompt_tuning_init: what the prompt starts as. 'RANDOM': normal numbers with deviation 1; 'SAMPLE_VOCAB': the
            embeddings of tokens by chance, see `mindspore.set_seed`; 'TEXT': those of `prompt_tuning_init_ids`.
            Default: 'RANDOM'.
        prompt_tuning_init_ids: ids of the tokens of a text, as its tokenizer gives them; they are repeated, or cut, to
            `num_virtual_tokens`. Hugging Face PEFT does not have it, and a file neither. Default: None.
        prompt_tuning_init_text, tokenizer_name_or_path, tokenizer_kwargs: of that text, kept for Hugging Face PEFT;
            mindpet has no tokenizer. Default: None.
    """

    peft_type, method_name = "PROMPT_TUNING", "prompt_tuning"

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: Optional[str] = None
    tokenizer_name_or_path: Optional[str] = None
    tokenizer_kwargs: Optional[dict] = None
    prompt_tuning_init_ids: Optional[list[int]] = None

    not_in_peft = ("prompt_tuning_init_ids",)

    def delta_arguments(self, path: str) -> dict[str, Any]:
        starts = {"TEXT": self.prompt_tuning_init_ids or [], "SAMPLE_VOCAB": None}
        start = {"start_ids": starts[self.prompt_tuning_init]} if self.prompt_tuning_init in starts else {}
        return {**super().delta_arguments(path), **start}

    def computed(self) -> PeftConfig:
        return replace(self, prompt_tuning_init="RANDOM", prompt_tuning_init_ids=None)

    def to_dict(self) -> dict[str, Any]:
        """All fields; of a prompt with values without ids, and without a start that Hugging Face PEFT cannot read."""
        content = super().to_dict()
        if self.inference_mode:
            content.pop("prompt_tuning_init_ids", None)
            if self.prompt_tuning_init == "TEXT" and None in (
                self.prompt_tuning_init_text,
                self.tokenizer_name_or_path,
            ):
                content["prompt_tuning_init"] = "RANDOM"
        return content

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.choice("prompt_tuning_init", self.prompt_tuning_init, INITS)
        for name, kind in (
            ("prompt_tuning_init_text", str),
            ("tokenizer_name_or_path", str),
            ("tokenizer_kwargs", dict),
        ):
            value = getattr(self, name)
            fits = value is None or isinstance(value, kind)
            check.require(fits, TypeError, name, value, f"a {kind.__name__} or None")

        ids = [] if self.prompt_tuning_init_ids is None else self.prompt_tuning_init_ids
        listed = isinstance(ids, (list, tuple)) and all(is_int(one) and one >= 0 for one in ids)
        check.require(listed, TypeError, "prompt_tuning_init_ids", ids, "a list of ints, from 0 on, or None")
        rule = "None where 'prompt_tuning_init' is not 'TEXT'"
        check.require(self.prompt_tuning_init == "TEXT" or not ids, ValueError, "prompt_tuning_init_ids", ids, rule)


class PromptCell(nn.Cell):
    """Vectors in front of embeddings: `(batch, seq, features) -> (batch, tokens + seq, features)`.

    A method overrides `prompt` and makes its parameters.

    Args:
        tokens: vectors in front.
        features: of an embedding.

    Inputs:
        embeddings: `(batch, seq, features)`.

    Outputs:
        `(batch, tokens + seq, features)`, in the type of the input.
    """

    def __init__(self, tokens: int, features: int):
        super().__init__()
        self.tokens, self.features = tokens, features
        self.expand_dims, self.tile, self.concat = ops.ExpandDims(), ops.Tile(), ops.Concat(axis=1)

    def construct(self, embeddings):
        prompt = self.expand_dims(ops.cast(self.prompt(), embeddings.dtype), 0)
        return self.concat((self.tile(prompt, (embeddings.shape[0], 1, 1)), embeddings))

    def prompt(self):
        """The vectors, `(tokens, features)`."""
        raise NotImplementedError

    def shard(self, batch: int) -> "PromptCell":
        """Cut the result over the batch; the vectors are the same on every rank.

        Args:
            batch: slices of the batch.

        Returns:
            Itself.
        """
        layout = (batch, 1, 1)
        self.expand_dims.shard(((1, 1),))
        self.tile.shard((layout,))
        self.concat.shard((layout, layout))
        return self

    def extend_repr(self) -> str:
        return f"tokens={self.tokens}, features={self.features}"


class PromptEmbedding(PromptCell):
    """Trained vectors in front of embeddings: `(batch, seq, features) -> (batch, tokens + seq, features)`.

    .. math::
        E \\mapsto [P; E]

    Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, section 2.

    Args:
        tokens: vectors in front.
        features: of an embedding.
        init: of the vectors. Default: Normal(1.0).
        param_init_type: type of the vectors: float16, float32 or bfloat16. Default: float32.

    Parameters:
        mindpet_delta_prompt `(tokens, features)`.

    Inputs, Outputs: of `PromptCell`.

    Raises:
        TypeError: a size is not a positive int (also a ValueError, if it is an int), `init` or the type is none of
            those above.
        ValueError: `init` has the wrong shape or an unknown name.
    """

    def __init__(self, tokens: int, features: int, init: InitLike = Normal(1.0), param_init_type: ms.Type = ms.float32):
        check = Checker(type(self).__name__)
        check.positive_int(NotPositiveIntError, tokens=tokens, features=features)
        check.initial("init", init, (tokens, features))
        check.float_type(param_init_type=param_init_type)
        check.done()
        super().__init__(tokens, features)
        self.mindpet_delta_prompt = delta_parameter(init, (tokens, features), param_init_type, TABLE)

    def prompt(self):
        return self.mindpet_delta_prompt


class PromptDelta(PromptEmbedding, Delta):
    """A PromptEmbedding that a network calls as its attribute `prompt_source`.

    Delta arguments:
        tokens (int): vectors in front.
        start_ids (list of int): tokens whose embeddings they start as, repeated or cut; None for tokens by chance.
            Default: none, for normal numbers.
    """

    can_reset = False
    file_names = {}
    usual_path = "prompt"

    @classmethod
    def create(cls, cell: nn.Cell, kind: InputEmbeddingKind, tokens: int, **start: Any) -> "PromptDelta":
        return cls(tokens, kind.token_dim)

    @classmethod
    def problems(cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, tokens: int, **start: Any) -> list[str]:
        if not start:
            return []
        try:
            vocab = kind.weight_of(cell).shape[0]
        except ConfigError as error:
            return [str(error)]
        ids = start["start_ids"]
        if ids == []:
            return ["a start from a text needs the ids of its tokens, 'prompt_tuning_init_ids'"]
        return [f"'prompt_tuning_init_ids' must be below {vocab}, but are {ids}"] if max(ids or [0]) >= vocab else []

    @classmethod
    def start_names(cls, tokens: int, **start: Any) -> tuple[str, ...]:
        return (TABLE,) if start else ()

    @classmethod
    def start(cls, matrix: np.ndarray, values: Arrays, tokens: int, start_ids: Optional[Sequence[int]]) -> Arrays:
        ids = np.random.randint(len(matrix), size=tokens) if start_ids is None else np.resize(start_ids, tokens)
        return {TABLE: matrix[ids]}

    @classmethod
    def to_file(cls, values: dict[str, Arrays]) -> Arrays:
        """One table of all prompts, `(prompts * tokens, features)`; Hugging Face PEFT has two for two submodules."""
        return {PROMPT: np.concatenate([prompt[TABLE] for prompt in values.values()])}

    @classmethod
    def from_file(cls, tensors: Arrays, paths: Sequence[str]) -> dict[str, Arrays]:
        parts = np.split(tensors[PROMPT], len(paths))
        return {path: {TABLE: np.ascontiguousarray(part)} for path, part in zip(paths, parts)}


METHOD = Method(
    "prompt_tuning",
    PromptTuningConfig,
    ("*mindpet_delta_prompt",),
    {"input_embedding": PromptDelta},
    (PromptEmbedding,),
)

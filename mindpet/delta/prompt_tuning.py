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
from mindpet.errors import ConfigError, NotPositiveIntError
from mindpet.network.kinds import InputEmbeddingKind
from mindpet.utils.hints import Arrays, InitLike, Shape
from mindpet.utils.quote import quote
from mindpet.utils.validate import Checker

TABLE = "mindpet_delta_prompt"
INITS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")  # of Hugging Face PEFT, in files


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning, Lester et al. 2021, arXiv:2104.08691.

    Args beyond those of PromptLearningConfig:
        prompt_tuning_init: 'RANDOM': normal numbers with deviation 1. Default: 'RANDOM'.
        prompt_tuning_init_text: kept for Hugging Face PEFT; must be None. Default: None.
        tokenizer_name_or_path, tokenizer_kwargs: kept for Hugging Face PEFT. Default: None.
    """

    peft_type, method_name = "PROMPT_TUNING", "prompt_tuning"

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: Optional[str] = None
    tokenizer_name_or_path: Optional[str] = None
    tokenizer_kwargs: Optional[dict] = None

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

    def check_supported(self, from_file: bool = False) -> None:
        super().check_supported(from_file)
        if self.prompt_tuning_init != "RANDOM" and not (from_file or self.inference_mode):
            raise ConfigError(
                f"PromptTuningConfig: 'prompt_tuning_init' must be 'RANDOM', but is {quote(self.prompt_tuning_init)}; "
                "set_peft_model_state_dict gives a prompt other values."
            )


class PromptEmbedding(nn.Cell):
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

    Inputs:
        embeddings: `(batch, seq, features)`.

    Outputs:
        `(batch, tokens + seq, features)`, in the type of the input.

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
        super().__init__()
        self.tokens, self.features = tokens, features
        self.mindpet_delta_prompt = delta_parameter(init, (tokens, features), param_init_type, TABLE)
        self.expand_dims, self.tile, self.concat = ops.ExpandDims(), ops.Tile(), ops.Concat(axis=1)

    def construct(self, embeddings):
        prompt = self.expand_dims(ops.cast(self.mindpet_delta_prompt, embeddings.dtype), 0)
        return self.concat((self.tile(prompt, (embeddings.shape[0], 1, 1)), embeddings))

    def shard(self, batch: int) -> "PromptEmbedding":
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


class PromptDelta(PromptEmbedding, Delta):
    """A PromptEmbedding that a network calls as its attribute `prompt_source`.

    Delta arguments:
        tokens (int): vectors in front.
    """

    can_reset = False
    file_names = {}
    usual_path = "prompt"

    @classmethod
    def create(cls, cell: nn.Cell, kind: InputEmbeddingKind, tokens: int) -> "PromptDelta":
        return cls(tokens, kind.token_dim)

    @classmethod
    def to_file(cls, values: dict[str, Arrays]) -> Arrays:
        """One table of all prompts, `(prompts * tokens, features)`; Hugging Face PEFT has two for two submodules."""
        return {PROMPT: np.concatenate([prompt[TABLE] for prompt in values.values()])}

    @classmethod
    def from_file(cls, tensors: Arrays, paths: Sequence[str]) -> dict[str, Arrays]:
        parts = np.split(tensors[PROMPT], len(paths))
        return {path: {TABLE: np.ascontiguousarray(part)} for path, part in zip(paths, parts)}

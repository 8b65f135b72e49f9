"""Prefix tuning: trained keys and values before those of an attention layer."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindpet.delta._base import PROMPT, PrefixDelta
from mindpet.delta._config import CONFIGS, PeftConfig, PromptLearningConfig
from mindpet.delta._method import Method
from mindpet.errors import ConfigError, NotPositiveIntError
from mindpet.network.kinds import AttentionKind
from mindpet.utils.hints import Arrays, Shape
from mindpet.utils.sharding import shard_whole
from mindpet.utils.validate import Checker
from mindpet.utils.version_control import get_dropout


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning, Li and Liang 2021, arXiv:2101.00190.

    Args beyond those of PromptLearningConfig:
        encoder_hidden_size: features between the two layers of the projection. Default: None, for `token_dim`.
        prefix_projection: whether two layers compute the prefix from an embedding. Default: False.
    """

    peft_type = "PREFIX_TUNING"

    encoder_hidden_size: Optional[int] = None
    prefix_projection: bool = False

    def delta_arguments(self, path: str) -> dict[str, Any]:
        inner = {"mid_dim": self.encoder_hidden_size} if self.prefix_projection else {}
        return {"tokens": self.num_virtual_tokens, **inner}

    @property
    def method_name(self) -> str:
        """A prefix that is not computed is that of P-Tuning v2."""
        return "prefixtuning" if self.prefix_projection else "ptuning2"

    def computed(self) -> "PrefixTuningConfig":
        return replace(self, prefix_projection=False)

    @staticmethod
    def network_sizes(kinds: Sequence[AttentionKind]) -> dict[str, int]:
        heads = kinds[0].kv_heads
        return {"num_layers": len(kinds), "num_attention_heads": heads, "token_dim": heads * kinds[0].head_dim}

    @property
    def table_shape(self) -> Optional[Shape]:
        sizes = (self.num_virtual_tokens, self.num_layers, self.token_dim)
        return None if None in sizes else (sizes[0], sizes[1] * 2 * sizes[2])

    def of_delta_file(self, shapes: dict[str, dict[str, Shape]], tensors: Arrays) -> tuple[PeftConfig, Arrays]:
        table = tensors[PROMPT].shape
        if self.num_attention_heads is None or self.table_shape != table:
            names = ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads")
            raise ConfigError(
                f"the prefixes are {list(table)}: the configuration must say (num_virtual_tokens, num_layers * 2 * "
                f"token_dim) of it, and num_attention_heads, but has { {name: getattr(self, name) for name in names} }."
            )
        return super().of_delta_file(shapes, tensors)

    @classmethod
    def of_content(cls, content: dict[str, Any]) -> type[PeftConfig]:
        return CONFIGS["PTUNING2"] if "dropout_prob" in content else cls

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        if self.encoder_hidden_size is not None:
            check.positive_int(encoder_hidden_size=self.encoder_hidden_size)
        check.boolean(prefix_projection=self.prefix_projection)


class PrefixLayer(nn.Cell):
    """The prefix of one attention layer, reparametrised by a small network.

    .. math::
        [P_k, P_v] = dropout(W_2 tanh(W_1 wte(0..n-1) + b_1) + b_2)

    Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190,
    section 4.3. Key and value each have their own half of the last layer's output. Call the layer inside of
    `construct`, `past_key, past_value = self.prefix()`: only so does it train.

    Args:
        prefix_token_num: rows of the prefix, a multiple of `batch_size`.
        batch_size: samples that share the rows out among themselves, `prefix_token_num // batch_size` each; 1 for a
            prefix that all samples share.
        num_heads: heads of the attention.
        hidden_dim: features of a key or value over all heads.
        embed_dim: features of the prefix embedding.
        mid_dim: features between the two Dense layers. Default: 512.
        dropout_rate: probability in [0, 1) of zeroing an element while training. Default: 0.1.

    Parameters:
        mindpet_delta_prefixtuning_wte.embedding_table `(prefix_token_num, embed_dim)`,
        mindpet_delta_prefixtuning_control_trans: two Dense layers, weights `(mid_dim, embed_dim)` and
        `(2 * hidden_dim, mid_dim)`.

    Outputs:
        past_key, past_value: each `(prefix_token_num, hidden_dim)`, float32.

    Raises:
        TypeError: a size is not a positive int (also a ValueError, if it is an int), `dropout_rate` not a number.
        ValueError: `prefix_token_num` is no multiple of `batch_size`, `dropout_rate` outside [0, 1).
    """

    def __init__(
        self,
        prefix_token_num: int,
        batch_size: int,
        num_heads: int,
        hidden_dim: int,
        embed_dim: int,
        mid_dim: int = 512,
        dropout_rate: Union[int, float] = 0.1,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(
            NotPositiveIntError,
            prefix_token_num=prefix_token_num,
            batch_size=batch_size,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            embed_dim=embed_dim,
            mid_dim=mid_dim,
        )
        check.probability((int, float), dropout_rate=dropout_rate)
        if not check.problems:
            check.require(
                prefix_token_num % batch_size == 0,
                ValueError,
                "prefix_token_num",
                prefix_token_num,
                f"a multiple of batch_size, {batch_size}",
            )
        check.done()
        super().__init__()
        self.prefix_token_num = prefix_token_num
        self.batch_size = batch_size
        self.num_heads = num_heads
        self.hidden_dim = hidden_dim
        self.embed_dim = embed_dim
        self.mid_dim = mid_dim
        self.dropout_rate = dropout_rate
        self.tokens = Tensor(list(range(prefix_token_num)), ms.int32)
        self.mindpet_delta_prefixtuning_wte = nn.Embedding(prefix_token_num, embed_dim)
        self.mindpet_delta_prefixtuning_control_trans = nn.SequentialCell(
            nn.Dense(embed_dim, mid_dim), nn.Tanh(), nn.Dense(mid_dim, 2 * hidden_dim)
        )
        self.dropout = get_dropout(dropout_rate)
        self.split = ops.Split(axis=1, output_num=2)

    def construct(self):
        return self.prefix()

    def prefix(self):
        """What `construct` returns."""
        embedded = self.mindpet_delta_prefixtuning_wte(self.tokens)
        return self.split(self.dropout(self.mindpet_delta_prefixtuning_control_trans(embedded)))

    def shard(self) -> "PrefixLayer":
        """Have every rank compute the whole prefix, without communication; without it the tokens are cut over all.

        Returns:
            Itself.
        """
        shard_whole(self.mindpet_delta_prefixtuning_wte, *self.mindpet_delta_prefixtuning_control_trans, self.dropout)
        self.split.shard(((1, 1),))
        return self

    @property
    def past_key_reparam(self):
        """The keys `(prefix_token_num, hidden_dim)`, computed when read: in `construct`, not in `__init__`."""
        warn_of_snapshot()
        return self.construct()[0]

    @property
    def past_value_reparam(self):
        """The values `(prefix_token_num, hidden_dim)`, computed when read: in `construct`, not in `__init__`."""
        warn_of_snapshot()
        return self.construct()[1]

    def extend_repr(self) -> str:
        return (
            f"prefix_token_num={self.prefix_token_num}, batch_size={self.batch_size}, num_heads={self.num_heads}, "
            f"hidden_dim={self.hidden_dim}, embed_dim={self.embed_dim}, mid_dim={self.mid_dim}, "
            f"dropout_rate={self.dropout_rate}"
        )


# A constexpr runs as plain Python in PyNative mode and once at compile time in graph mode, where warnings do not parse.
@ops.constexpr
def warn_of_snapshot() -> None:
    """Warn if a prefix property is read in an `__init__`: the value stays what it is while the prefix trains."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name not in ("construct", "compile"):
        if frame.f_code.co_name == "__init__":
            warnings.warn(
                "PrefixLayer: past_key_reparam and past_value_reparam read in __init__ are a snapshot that "
                "never trains; use `past_key, past_value = self.prefix()` in construct.",
                stacklevel=4,
            )
            return
        frame = frame.f_back


class PrefixLayerDelta(PrefixDelta, PrefixLayer):
    """A PrefixLayer in front of the keys and values of an attention.

    Delta arguments:
        tokens (int): of the prefix.
        embed_dim, mid_dim (int): see `PrefixLayer`. Default: None, for as many as a key has features over all heads.
    """

    table = "mindpet_delta_prefixtuning_wte.embedding_table"
    projection = ("mindpet_delta_prefixtuning_control_trans.0", "mindpet_delta_prefixtuning_control_trans.2")

    @classmethod
    def create(
        cls,
        cell: nn.Cell,
        kind: AttentionKind,
        tokens: int,
        embed_dim: Optional[int] = None,
        mid_dim: Optional[int] = None,
    ) -> "PrefixLayerDelta":
        width = kind.kv_heads * kind.head_dim
        delta = cls(tokens, 1, kind.kv_heads, width, embed_dim or width, mid_dim or width, dropout_rate=0.0)
        delta.concat, delta.transpose, delta.tile = ops.Concat(axis=2), ops.Transpose(), ops.Tile()
        return delta

    @property
    def positions(self) -> int:
        return self.prefix_token_num

    def past(self, batch, dtype):
        key, value = self.prefix()
        return self.split_heads(key, batch, dtype), self.split_heads(value, batch, dtype)

    def split_heads(self, rows, batch, dtype):
        """`(tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)`."""
        rows = ops.cast(ops.reshape(rows, (1, self.prefix_token_num, self.num_heads, -1)), dtype)
        return self.tile(self.transpose(rows, (0, 2, 1, 3)), (batch, 1, 1, 1))

    def shard(self, batch: int, heads: int) -> "PrefixLayerDelta":
        PrefixLayer.shard(self)
        self.transpose.shard(((1, 1, 1, 1),))  # cut where it is repeated, which needs no communication
        self.tile.shard(((batch, heads, 1, 1),))
        return super().shard(batch, heads)


METHOD = Method(
    "prefixtuning",
    PrefixTuningConfig,
    ("*mindpet_delta_prefixtuning*",),
    {"attention": PrefixLayerDelta},
    (PrefixLayer,),
    aliases=("prefix",),
)

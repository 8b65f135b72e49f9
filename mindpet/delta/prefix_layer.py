"""Prefix tuning: trained keys and values before those of an attention layer."""

import sys
import warnings

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindpet.delta._base import InFront
from mindpet.errors import NotPositiveIntError
from mindpet.utils.sharding import shard_whole
from mindpet.utils.validate import Checker
from mindpet.utils.version_control import get_dropout


class PrefixLayer(nn.Cell):
    """The prefix of one attention layer, reparametrised by a small network.

    .. math::
        [P_k, P_v] = dropout(W_2 tanh(W_1 wte(0..n-1) + b_1) + b_2)

    Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190,
    section 4.3. Key and value each have their own half of the last layer's output. Call the layer inside of
    `construct`, `past_key, past_value = self.prefix()`: only so does it train.

    Args:
        prefix_token_num (int): rows of the prefix, a multiple of `batch_size`.
        batch_size (int): samples that share the rows out among themselves, `prefix_token_num // batch_size` each; 1 for
            a prefix that all samples share.
        num_heads (int): heads of the attention.
        hidden_dim (int): features of a key or value over all heads.
        embed_dim (int): features of the prefix embedding.
        mid_dim (int): features between the two Dense layers. Default: 512.
        dropout_rate (float): probability in [0, 1) of zeroing an element while training. Default: 0.1.

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

    def __init__(self, prefix_token_num, batch_size, num_heads, hidden_dim, embed_dim, mid_dim=512, dropout_rate=0.1):
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
        embedded = self.mindpet_delta_prefixtuning_wte(self.tokens)
        return self.split(self.dropout(self.mindpet_delta_prefixtuning_control_trans(embedded)))

    def shard(self):
        """Have every rank compute the whole prefix, without communication; without it the tokens are cut over all.

        Returns:
            PrefixLayer, itself.
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

    def extend_repr(self):
        return (
            f"prefix_token_num={self.prefix_token_num}, batch_size={self.batch_size}, num_heads={self.num_heads}, "
            f"hidden_dim={self.hidden_dim}, embed_dim={self.embed_dim}, mid_dim={self.mid_dim}, "
            f"dropout_rate={self.dropout_rate}"
        )


# A constexpr runs as plain Python in PyNative mode and once at compile time in graph mode, where warnings do not parse.
@ops.constexpr
def warn_of_snapshot():
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


class PrefixLayerInFront(InFront):
    """A PrefixLayer in front of the keys and values of its attention."""

    def __init__(self, delta):
        super().__init__(delta)
        self.transpose = ops.Transpose()
        self.tile = ops.Tile()

    def past(self, batch, dtype):
        key, value = self.delta()
        return self.split_heads(key, batch, dtype), self.split_heads(value, batch, dtype)

    def split_heads(self, rows, batch, dtype):
        """`(tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)`."""
        tokens, heads = self.delta.prefix_token_num, self.delta.num_heads
        rows = ops.cast(ops.reshape(rows, (1, tokens, heads, -1)), dtype)
        return self.tile(self.transpose(rows, (0, 2, 1, 3)), (batch, 1, 1, 1))

    def shard(self, batch, heads):
        self.delta.shard()
        self.transpose.shard(((1, 1, 1, 1),))  # cut where it is repeated, which needs no communication
        self.tile.shard(((batch, heads, 1, 1),))
        return super().shard(batch, heads)


def prefix_layer(heads, head_dim, tokens, embed_dim=None, mid_dim=None):
    """A prefix of `tokens` for an attention with `heads` of `head_dim`; the sizes inside are as wide if not given."""
    width = heads * head_dim
    layer = PrefixLayer(tokens, 1, heads, width, embed_dim or width, mid_dim or width, dropout_rate=0.0)
    return PrefixLayerInFront(layer)

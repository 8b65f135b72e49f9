"""P-Tuning v2: trained keys and values before those of every attention layer."""

from dataclasses import dataclass
from typing import Any, Union

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mindpet.delta._base import PrefixDelta
from mindpet.delta._method import Method
from mindpet.delta.prefix_layer import PrefixTuningConfig
from mindpet.errors import NotPositiveIntError
from mindpet.network.kinds import AttentionKind
from mindpet.utils.sharding import shard_whole
from mindpet.utils.validate import Checker
from mindpet.utils.version_control import get_dropout


@dataclass
class Ptuning2Config(PrefixTuningConfig):
    """P-Tuning v2, Liu et al. 2021, arXiv:2110.07602: prefix tuning, with dropout on the prefix.

    A file says PREFIX_TUNING, which Hugging Face PEFT knows, and has `dropout_prob` besides.

    Args beyond those of PrefixTuningConfig:
        dropout_prob: probability in [0, 1) of zeroing an element of the prefix. Default: 0.0.
    """

    peft_type, method_name = "PTUNING2", "ptuning2"

    dropout_prob: float = 0.0

    def delta_arguments(self, path: str) -> dict[str, Any]:
        projection = {"prefix_projection": True, "projection_dim": self.encoder_hidden_size or 128}
        return {
            "tokens": self.num_virtual_tokens,
            "dropout_prob": float(self.dropout_prob),
            **(projection if self.prefix_projection else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_type": "PREFIX_TUNING"}

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        check.probability((int, float), dropout_prob=self.dropout_prob)


class PrefixEncoder(nn.Cell):
    """The prefixes of all layers of a network.

    .. math::
        P = dropout(E)\\quad or\\quad P = dropout(W_2 tanh(W_1 E + b_1) + b_2)

    viewed as `(pre_seq_len, 2 * num_layers, num_heads, kv_channels)`: layer i has its keys in slot 2i and its values in
    slot 2i + 1.

    Source: Liu et al. 2021, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and
    Tasks", arXiv:2110.07602, section 3.2.

    Args:
        pre_seq_len: prefix tokens a layer.
        num_layers: layers of the network.
        num_heads: key and value heads of a layer.
        kv_channels: features of a head.
        prefix_projection: whether a network of two Dense layers computes the prefixes from the embedding.
            Default: False.
        projection_dim: features between those two layers. Default: 128.
        dropout_prob: probability in [0, 1) of zeroing an element while training. Default: 0.0.
        out_perm: order of the axes (batch, token, slot, head, channel) in the result. Its first entry must be 2, the
            slots, which are what the result is split along. Default: (2, 0, 3, 1, 4).
        parallel_config: has `data_parallel` and `model_parallel`, for `shard()`. Default: None.

    Parameters:
        mindpet_delta_ptuning2_prefix `(pre_seq_len,)`: token ids, int32, not trained;
        mindpet_delta_ptuning2_embedding.embedding_table
        `(pre_seq_len, num_layers * 2 * num_heads * kv_channels)`; with `prefix_projection`
        mindpet_delta_ptuning2_dense_in and mindpet_delta_ptuning2_dense_out.

    Inputs:
        batch_size (int): samples in the batch.
        dtype (mindspore.dtype): type of the result. Default: float16.

    Outputs:
        tuple of `num_layers` tensors `(2, batch_size, num_heads, pre_seq_len, kv_channels)`: keys, values.

    Raises:
        TypeError: a size is not a positive int (also a ValueError, if it is an int), `prefix_projection` not a bool,
            `dropout_prob` not a number.
        ValueError: `dropout_prob` outside [0, 1), `out_perm` no order of five axes with the slots first.
    """

    def __init__(
        self,
        pre_seq_len: int,
        num_layers: int,
        num_heads: int,
        kv_channels: int,
        prefix_projection: bool = False,
        projection_dim: int = 128,
        dropout_prob: Union[int, float] = 0.0,
        out_perm: tuple[int, ...] = (2, 0, 3, 1, 4),
        parallel_config: Any = None,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(
            NotPositiveIntError,
            pre_seq_len=pre_seq_len,
            num_layers=num_layers,
            num_heads=num_heads,
            kv_channels=kv_channels,
            projection_dim=projection_dim,
        )
        check.boolean(prefix_projection=prefix_projection)
        check.probability((int, float), dropout_prob=dropout_prob)
        check.require(
            isinstance(out_perm, (tuple, list)) and sorted(out_perm) == [0, 1, 2, 3, 4] and out_perm[0] == 2,
            ValueError,
            "out_perm",
            out_perm,
            "an order of the axes 0 to 4 that begins with 2",
        )
        check.done()
        super().__init__()
        self.pre_seq_len = pre_seq_len
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.kv_channels = kv_channels
        self.prefix_projection = prefix_projection
        self.projection_dim = projection_dim
        self.dropout_prob = dropout_prob
        self.out_perm = tuple(out_perm)
        width = num_layers * 2 * num_heads * kv_channels
        self.mindpet_delta_ptuning2_prefix = Parameter(Tensor(list(range(pre_seq_len)), ms.int32), requires_grad=False)
        self.mindpet_delta_ptuning2_embedding = nn.Embedding(pre_seq_len, width)
        if prefix_projection:
            self.mindpet_delta_ptuning2_dense_in = nn.Dense(width, projection_dim)
            self.tanh = nn.Tanh()
            self.mindpet_delta_ptuning2_dense_out = nn.Dense(projection_dim, width)
        self.dropout = get_dropout(dropout_prob)
        self.expand_dims = ops.ExpandDims()
        self.tile = ops.Tile()
        self.transpose = ops.Transpose()
        self.split = ops.Split(axis=0, output_num=num_layers)
        if parallel_config is not None:
            self.shard(parallel_config.data_parallel, parallel_config.model_parallel)

    def construct(self, batch_size, dtype=ms.float16):
        return self.prefixes(batch_size, dtype)

    def prefixes(self, batch_size, dtype):
        """What `construct` returns."""
        prefix = self.mindpet_delta_ptuning2_embedding(self.mindpet_delta_ptuning2_prefix)
        if self.prefix_projection:
            prefix = self.mindpet_delta_ptuning2_dense_out(self.tanh(self.mindpet_delta_ptuning2_dense_in(prefix)))
        prefix = self.dropout(ops.cast(prefix, dtype))
        prefix = ops.reshape(prefix, (self.pre_seq_len, 2 * self.num_layers, self.num_heads, self.kv_channels))
        prefix = self.tile(self.expand_dims(prefix, 0), (batch_size, 1, 1, 1, 1))
        return self.split(self.transpose(prefix, self.out_perm))

    def shard(self, data_parallel: int, model_parallel: int) -> "PrefixEncoder":
        """Split the result over the batch and the heads; what comes before it is the same on every rank.

        Args:
            data_parallel: slices of the batch.
            model_parallel: slices of the heads.

        Returns:
            Itself.

        Raises:
            TypeError: a number of slices is not an int.
            ValueError: a number of slices below 1.
        """
        check = Checker("PrefixEncoder.shard")
        check.positive_int(data_parallel=data_parallel, model_parallel=model_parallel)
        check.done()
        layout = (data_parallel, 1, 1, model_parallel, 1)
        shard_whole(self.mindpet_delta_ptuning2_embedding, self.dropout)
        if self.prefix_projection:
            shard_whole(self.mindpet_delta_ptuning2_dense_in, self.tanh, self.mindpet_delta_ptuning2_dense_out)
        self.expand_dims.shard(((1, 1, 1, 1),))
        self.tile.shard((layout,))
        self.transpose.shard((layout,))
        self.split.shard((tuple(layout[axis] for axis in self.out_perm),))
        return self

    def extend_repr(self) -> str:
        return (
            f"pre_seq_len={self.pre_seq_len}, num_layers={self.num_layers}, num_heads={self.num_heads}, "
            f"kv_channels={self.kv_channels}, prefix_projection={self.prefix_projection}, "
            f"projection_dim={self.projection_dim}, dropout_prob={self.dropout_prob}"
        )


class PrefixEncoderDelta(PrefixDelta, PrefixEncoder):
    """A PrefixEncoder of one layer in front of the keys and values of an attention.

    Delta arguments:
        tokens (int): of the prefix.
        further ones: see `PrefixEncoder`.
    """

    table = "mindpet_delta_ptuning2_embedding.embedding_table"
    projection = ("mindpet_delta_ptuning2_dense_in", "mindpet_delta_ptuning2_dense_out")
    may_be_plain = True

    @classmethod
    def create(cls, cell: nn.Cell, kind: AttentionKind, tokens: int, **arguments: Any) -> "PrefixEncoderDelta":
        delta = cls(tokens, 1, kind.kv_heads, kind.head_dim, **arguments)
        delta.concat, delta.halves, delta.squeeze = ops.Concat(axis=2), ops.Split(axis=0, output_num=2), ops.Squeeze(0)
        return delta

    @property
    def positions(self) -> int:
        return self.pre_seq_len

    def past(self, batch, dtype):
        key, value = self.halves(self.prefixes(batch, dtype)[0])
        return self.squeeze(key), self.squeeze(value)

    def shard(self, batch: int, heads: int) -> "PrefixEncoderDelta":
        PrefixEncoder.shard(self, batch, heads)
        layout = (1, batch, heads, 1, 1)
        self.halves.shard((layout,))
        self.squeeze.shard((layout,))
        return super().shard(batch, heads)


METHOD = Method(
    "ptuning2",
    Ptuning2Config,
    # All but the token ids, mindpet_delta_ptuning2_prefix.
    ("*mindpet_delta_ptuning2", "*mindpet_delta_ptuning2[!_]*", "*mindpet_delta_ptuning2_[!p]*"),
    {"attention": PrefixEncoderDelta},
    (PrefixEncoder,),
    constants=("*mindpet_delta_ptuning2_prefix",),
)

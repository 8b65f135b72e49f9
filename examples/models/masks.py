"""What tells tokens apart from padding, and from a prompt, for every model of the examples."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

MASKED = -1e9  # added to the score of a token that must not be seen; float16 has no such number, so scores are float32


class Padding(nn.Cell):
    """The places of tokens among those that are no padding, and what hides the padding from all.

    Padding may stand on either side. It has no place of its own, and what the model makes of it means nothing.

    Inputs:
        attention_mask: `(batch, seq)`, of integers; 1 where there is a token, 0 where there is padding.

    Outputs:
        places `(batch, seq)`, int32, from 0 on; and what is added to scores, `(batch, 1, 1, seq)`, float32.
    """

    def __init__(self):
        super().__init__()
        self.count = ops.CumSum()
        self.before = ops.Sub()
        self.floor = ops.Maximum()
        self.absent = ops.Sub()
        self.hide = ops.Mul()

    def construct(self, attention_mask):
        seen = ops.cast(attention_mask, ms.int32)
        places = self.floor(self.before(self.count(seen, 1), 1), 0)
        hidden = self.hide(self.absent(1.0, ops.cast(seen, ms.float32)), MASKED)
        return places, ops.reshape(hidden, (hidden.shape[0], 1, 1, hidden.shape[1]))

    def shard(self, data_parallel):
        """Cut the batch."""
        layout = (data_parallel, 1)
        for primitive in (self.before, self.floor, self.hide):
            primitive.shard((layout, ()))
        self.count.shard((layout,))
        self.absent.shard(((), layout))


class Prompt(nn.Cell):
    """What a prompt changes, vectors in front of the embeddings: it is seen by all, and has no output of its own."""

    def __init__(self):
        super().__init__()
        self.tile = ops.Tile()
        self.concat = ops.Concat(axis=1)
        self.slice = ops.StridedSlice()

    def see(self, attention_mask, tokens):
        """A mask `(batch, seq)` with ones in front: `(batch, tokens + seq)`, int32."""
        ones = self.tile(ones_of(tokens), (attention_mask.shape[0], 1))
        return self.concat((ones, ops.cast(attention_mask, ms.int32)))

    def drop(self, hidden, tokens):
        """What comes after the prompt: `(batch, tokens + seq, hidden) -> (batch, seq, hidden)`."""
        return self.slice(hidden, (0, tokens, 0), hidden.shape, (1, 1, 1)) if tokens else hidden

    def shard(self, data_parallel):
        """Cut the batch."""
        layout = (data_parallel, 1)
        self.tile.shard((layout,))
        self.concat.shard((layout, layout))
        self.slice.shard(((data_parallel, 1, 1),))


@ops.constexpr
def ones_of(tokens):
    """Ones `(1, tokens)`, int32."""
    return Tensor(np.ones((1, tokens), np.int32))


@ops.constexpr
def check_length(tokens, most, name):
    """Refuse more tokens, with those of a prompt or prefix, than a model has positions.

    Raises:
        ValueError: there are more than `most`, which is called `name` in the model's configuration.
    """
    if tokens > most:
        raise ValueError(f"{tokens} tokens, with those of a prompt or prefix, but '{name}' is {most}")


def seen_by_all(mask, keys):
    """A mask of scores with columns in front for the keys of a prefix, so that there are as many as `keys`."""
    more = keys - mask.shape[3]
    return ops.concat((ops.zeros(mask.shape[:3] + (more,), mask.dtype), mask), 3) if more else mask

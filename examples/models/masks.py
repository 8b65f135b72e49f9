"""What tells tokens apart from padding, for every model of the examples."""

import mindspore as ms
from mindspore import nn, ops

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


def seen_by_all(mask, keys):
    """A mask of scores with columns in front for the keys of a prefix, so that there are as many as `keys`."""
    more = keys - mask.shape[3]
    return ops.concat((ops.zeros(mask.shape[:3] + (more,), mask.dtype), mask), 3) if more else mask

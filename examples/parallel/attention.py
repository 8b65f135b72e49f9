#!/usr/bin/env python3
"""Attention with a trained prefix, followed by an adapter, cut by data and tensor parallelism.

Its plan, without an accelerator: `mindpet plan examples/parallel/attention.py:build --device-num 8`.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet.delta import AdapterLayer, PrefixLayer
from mindpet.graph import freeze_modules
from mindpet.parallel import shard_like


class Attention(nn.Cell):
    """`AdapterLayer(W_o attention(q, [P_k, k], [P_v, v]))`, the prefix P shared by all samples.

    Args:
        hidden (int): features.
        heads (int): heads.
        prefix_tokens (int): rows of the prefix.
        data_parallel (int): slices of the batch.
        model_parallel (int): slices of the heads.

    Inputs:
        x: `(batch, seq, hidden)`.

    Outputs:
        `(batch, seq, hidden)`.
    """

    def __init__(self, hidden, heads, prefix_tokens, data_parallel, model_parallel):
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.query, self.key, self.value, self.output = (nn.Dense(hidden, hidden) for _ in range(4))
        self.prefix = PrefixLayer(prefix_tokens, 1, heads, hidden, embed_dim=64, mid_dim=64)
        self.adapter = AdapterLayer(hidden, bottleneck_size=16, compute_dtype=ms.float32)
        self.transpose = ops.Transpose()
        self.transpose_prefix = ops.Transpose()
        self.tile = ops.Tile()
        self.concat = ops.Concat(axis=2)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.scale = ops.Mul()
        self.softmax = ops.Softmax(axis=-1)
        self.context = ops.BatchMatMul()
        self.merge_heads = ops.Transpose()
        self.shard(data_parallel, model_parallel)

    def construct(self, x):
        batch = x.shape[0]
        query, key, value = (self.split_heads(layer(x)) for layer in (self.query, self.key, self.value))
        past_key, past_value = (self.repeat(part, batch) for part in self.prefix())
        scores = self.scores(query, self.concat((past_key, key)))
        weights = self.softmax(self.scale(scores, 1 / math.sqrt(self.head_dim)))
        context = self.merge_heads(self.context(weights, self.concat((past_value, value))), (0, 2, 1, 3))
        return self.adapter(self.output(ops.reshape(context, x.shape)))

    def split_heads(self, x):
        """`(batch, seq, hidden) -> (batch, heads, seq, head_dim)`."""
        return self.transpose(ops.reshape(x, (x.shape[0], x.shape[1], self.heads, self.head_dim)), (0, 2, 1, 3))

    def repeat(self, prefix, batch):
        """`(tokens, hidden) -> (batch, heads, tokens, head_dim)`."""
        prefix = ops.reshape(prefix, (1, prefix.shape[0], self.heads, self.head_dim))
        return self.tile(self.transpose_prefix(prefix, (0, 2, 1, 3)), (batch, 1, 1, 1))

    def shard(self, data_parallel, model_parallel):
        """Cut the batch and the heads."""
        dp, mp = data_parallel, model_parallel
        for dense in (self.query, self.key, self.value):
            dense.matmul.shard(((dp, 1), (mp, 1)))
            dense.bias_add.shard(((dp, mp), (mp,)))
        row_split = ((dp, mp), (1, mp))
        self.output.matmul.shard(row_split)
        self.output.bias_add.shard(((dp, 1), (1,)))
        shard_like(self.adapter, row_split)  # it follows the output layer
        self.prefix.shard()
        layout = (dp, mp, 1, 1)
        self.transpose.shard(((dp, 1, mp, 1),))
        self.transpose_prefix.shard(((1, 1, 1, 1),))  # cut where it is repeated, which needs no communication
        for primitive in (self.tile, self.softmax, self.merge_heads):
            primitive.shard((layout,))
        for primitive in (self.concat, self.scores, self.context):
            primitive.shard((layout, layout))
        self.scale.shard((layout, ()))


class Loss(nn.Cell):
    """The sum of the output, which stands for a loss."""

    def __init__(self, network, data_parallel):
        super().__init__(auto_prefix=False)
        self.network = network
        self.sum = ops.ReduceSum().shard(((data_parallel, 1, 1),))

    def construct(self, x):
        return self.sum(self.network(x))


def build(data_parallel=2, model_parallel=4):
    """What `dry_run` and `mindpet plan` take."""
    network = Attention(64, 8, 4, data_parallel, model_parallel)
    freeze_modules(network, include=["query.*", "key.*", "value.*", "output.*"])
    return Loss(network, data_parallel), Tensor(np.ones((2 * data_parallel, 16, 64), np.float32))


if __name__ == "__main__":
    from mindpet.parallel import dry_run

    print(dry_run(build, 8))

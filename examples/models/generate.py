"""Text from a causal language model."""

import mindspore as ms
import numpy as np
from mindspore import Tensor


def generate(model, ids, new_tokens):
    """Continue sequences by the most probable token, again and again.

    The sequences are padded to their final length, so that one compiled graph serves all steps: a token does not see
    what comes after it.

    Args:
        model (Cell): from ids `(batch, seq)` to logits `(batch, seq, vocab)`.
        ids (numpy.ndarray): `(batch, seq)`, the beginnings, of one length.
        new_tokens (int): how many tokens to add.

    Returns:
        numpy.ndarray `(batch, seq + new_tokens)`.
    """
    start = ids.shape[1]
    ids = np.pad(ids, ((0, 0), (0, new_tokens)))
    for position in range(start, start + new_tokens):
        logits = model(Tensor(ids, ms.int32))[:, position - 1]
        ids[:, position] = logits.asnumpy().argmax(-1)
    return ids

"""Text from a causal language model."""

import mindspore as ms
import numpy as np
from mindspore import Tensor


def generate(model, ids, new_tokens, attention_mask=None):
    """Continue sequences by the most probable token, again and again.

    The sequences are padded to their final length, so that one compiled graph serves all steps: a token does not see
    what comes after it.

    Args:
        model (Cell): from ids `(batch, seq)`, and a mask of the same shape if there is one, to logits
            `(batch, seq, vocab)`.
        ids (numpy.ndarray): `(batch, seq)`, the beginnings; shorter ones have padding on the left.
        new_tokens (int): how many tokens to add.
        attention_mask (numpy.ndarray): `(batch, seq)`, 0 where there is padding, else 1. Default: None, for no padding.

    Returns:
        numpy.ndarray `(batch, seq + new_tokens)`.

    Raises:
        ValueError: the mask is not of the shape of `ids`, or a row does not end with a token.
    """
    more = ((0, 0), (0, new_tokens))
    masks = ()
    if attention_mask is not None:
        if attention_mask.shape != ids.shape:
            raise ValueError(f"'attention_mask' must be of shape {ids.shape}, as 'ids' is, not {attention_mask.shape}")
        padded = np.flatnonzero(attention_mask[:, -1] == 0).tolist()
        if padded:
            raise ValueError(f"padding must be on the left, but 'attention_mask' ends with 0 in rows {padded}")
        masks = (Tensor(np.pad(attention_mask, more, constant_values=1), ms.int32),)
    start = ids.shape[1]
    ids = np.pad(ids, more)
    for position in range(start, start + new_tokens):
        logits = model(Tensor(ids, ms.int32), *masks)[:, position - 1]
        ids[:, position] = logits.asnumpy().argmax(-1)
    return ids


def pad_left(rows):
    """Sequences of several lengths as one array, with padding on the left.

    Args:
        rows (list of numpy.ndarray): token ids, `(length,)` each.

    Returns:
        ids and attention_mask, numpy.ndarray `(batch, longest)`, int32.
    """
    length = max(map(len, rows))
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int32)
    ids = np.zeros_like(mask)
    ids[mask == 1] = np.concatenate(rows)
    return ids, mask

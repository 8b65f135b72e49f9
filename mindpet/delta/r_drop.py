"""R-Drop: two dropout passes of each sample are pulled together by the loss."""

import mindspore as ms
from mindspore import Tensor, nn, ops


class RDropLoss(nn.Cell):
    """Cross entropy with the R-Drop regulariser.

    .. math::
        loss = \\frac{1}{2N}\\sum_{j} CE_j + \\frac{alpha}{4 N} \\sum_{i=1}^{N} (KL(p_i || q_i) + KL(q_i || p_i))

    where rows `2i` and `2i+1` of the logits are the two passes `p_i`, `q_i` of sample i, as `rdrop_repeat` lays them
    out, and KL is summed over the classes. It is half of the paper's loss and does not grow with the batch.

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", arXiv:2106.14448, equations 2 to 4.

    Inputs:
        logits: `(2N, classes)`, unnormalised log probabilities, a float type.
        label_ids: `(2N,)` class indices, int32 (or int64), or `(2N, classes)` class probabilities, a float type.
        alpha (Union[int, float]): weight of the regulariser. Default: 4.

    Outputs:
        scalar float32; it is computed in float32 whatever the type of `logits`.

    Raises:
        TypeError: `alpha` is neither an int nor a float.
        ValueError: the number of rows is odd.
    """

    def construct(self, logits, label_ids, alpha=4):
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            raise TypeError(f"RDropLoss: 'alpha' must be an int or a float, but got {alpha}.")
        rows = logits.shape[0]
        if rows % 2 != 0:
            raise ValueError(f"RDropLoss: 'logits' must have two rows a sample, but got {rows} rows.")
        logits = ops.cast(logits, ms.float32)
        if label_ids.ndim == 1:
            label_ids = ops.cast(label_ids, ms.int32)
        else:
            label_ids = ops.cast(label_ids, ms.float32)
        log_probs = ops.log_softmax(logits, axis=-1)
        pairs = ops.reshape(log_probs, (rows // 2, 2, logits.shape[-1]))
        log_p, log_q = pairs[:, 0], pairs[:, 1]
        # KL(p||q) + KL(q||p) = sum (p - q)(log p - log q)
        kl_sum = ((ops.exp(log_p) - ops.exp(log_q)) * (log_p - log_q)).sum(-1)
        return ops.cross_entropy(logits, label_ids) + alpha * kl_sum.mean() / 4


def rdrop_repeat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each row of each tensor of a batch (inputs, masks, labels) twice, side by side: `(N, *) -> (2N, *)`."""
    return tuple([ops.repeat_interleave(tensor, 2, 0) for tensor in tensors])

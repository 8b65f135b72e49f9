"""R-Drop: two dropout passes of each sample are pulled together by the loss."""

from typing import Callable, Optional, Union

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindpet.utils.validate import Checker, is_int, is_number


class RDropLoss(nn.Cell):
    """Cross entropy with the R-Drop regulariser, for classes of samples or of the tokens of a sequence.

    .. math::
        loss = \\frac{1}{2N}\\sum_{j} CE_j + \\frac{alpha}{4 N} \\sum_{i=1}^{N} (KL(p_i || q_i) + KL(q_i || p_i))

    where rows `2i` and `2i+1` of the logits are the two passes `p_i`, `q_i` of sample i, as `rdrop_repeat` lays them
    out, and KL is summed over the classes. It is half of the paper's loss and does not grow with the batch. Of
    sequences N is the number of tokens; those with the label `ignore_index` count in neither sum. Without any label
    the loss is 0.

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", arXiv:2106.14448, equations 2 to 4.

    Args:
        ignore_index: label of what has no class, of padding say. Default: -100.

    Inputs:
        logits: `(2N, *, classes)`, unnormalised log probabilities, a float type.
        label_ids: `(2N, *)` class indices, int32 (or int64), or `(2N, *, classes)` class probabilities, a float type.
        alpha (Union[int, float]): weight of the regulariser. Default: 4.

    Outputs:
        scalar float32; it is computed in float32 whatever the type of `logits`.

    Raises:
        TypeError: `alpha` is neither an int nor a float, `ignore_index` no int.
        ValueError: the number of rows is odd.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        check = Checker(type(self).__name__)
        check.require(is_int(ignore_index), TypeError, "ignore_index", ignore_index, "an int")
        check.done()
        super().__init__()
        self.ignore_index = ignore_index

    def construct(self, logits, label_ids, alpha=4):
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            raise TypeError(f"RDropLoss: 'alpha' must be an int or a float, but got {alpha}.")
        if logits.shape[0] % 2 != 0:
            raise ValueError(f"RDropLoss: 'logits' must have two rows a sample, but got {logits.shape[0]} rows.")
        log_probs = ops.log_softmax(ops.cast(logits, ms.float32), axis=-1)
        kept = self.kept(logits, label_ids)
        if label_ids.ndim == logits.ndim:
            entropy = -(ops.cast(label_ids, ms.float32) * log_probs).sum(-1)
        else:
            known = ops.cast(ops.select(kept > 0, label_ids, ops.zeros_like(label_ids)), ms.int32)
            entropy = -ops.gather_elements(log_probs, logits.ndim - 1, ops.expand_dims(known, -1)).squeeze(-1)
        return _mean(entropy, kept) + alpha * self.divergence(logits, label_ids) / 4

    def kept(self, logits, label_ids):
        """1 for what has a label, else 0: `(2N, *)`, float32."""
        if label_ids.ndim == logits.ndim:
            return ops.ones(logits.shape[:-1], ms.float32)
        return ops.cast(label_ids != self.ignore_index, ms.float32)

    def divergence(self, logits, label_ids):
        """The mean of `KL(p || q) + KL(q || p)` over what has a label, a scalar float32."""
        rows, classes = logits.shape[0], logits.shape[-1]
        log_probs = ops.log_softmax(ops.cast(logits, ms.float32), axis=-1)
        pairs = ops.reshape(log_probs, (rows // 2, 2, -1, classes))
        log_p, log_q = pairs[:, 0], pairs[:, 1]
        # KL(p||q) + KL(q||p) = sum (p - q)(log p - log q)
        kl_sum = ((ops.exp(log_p) - ops.exp(log_q)) * (log_p - log_q)).sum(-1)
        return _mean(kl_sum, ops.reshape(self.kept(logits, label_ids), (rows // 2, 2, -1))[:, 0])


def _mean(values, kept):
    """The mean of the values that are kept; 0 for none."""
    return (values * kept).sum() / ops.maximum(kept.sum(), 1.0)


class RDropWithLossCell(nn.Cell):
    """A network with R-Drop as its loss, in place of `mindspore.nn.WithLossCell`; the network gets each sample twice.

    Source: Liang et al. 2021, arXiv:2106.14448, algorithm 1.

    Args:
        network: returns logits `(N, *, classes)`, or a tuple that begins with them.
        alpha: weight of the regulariser. Default: 4.
        ignore_index: label of what has no class. Default: -100.
        loss_fn: from logits and labels to a scalar, in place of the cross entropy, say with smoothed labels; the
            regulariser is added to it. Default: None, for the cross entropy of `RDropLoss`.
        shift_labels: whether the logits of a token are for the label of the next one, as in causal language models
            whose labels are their input ids. Default: False.

    Inputs:
        inputs: of the network; every Tensor has the samples on its first axis.
        labels: the last one, `(N, *)`, see `RDropLoss`.

    Outputs:
        scalar float32.

    Raises:
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        network: nn.Cell,
        alpha: Union[int, float] = 4,
        ignore_index: int = -100,
        loss_fn: Optional[Callable] = None,
        shift_labels: bool = False,
    ) -> None:
        check = Checker(type(self).__name__)
        check.require(isinstance(network, nn.Cell), TypeError, "network", network, "a Cell")
        check.require(is_number(alpha), TypeError, "alpha", alpha, "an int or a float")
        check.require(is_int(ignore_index), TypeError, "ignore_index", ignore_index, "an int")
        check.require(loss_fn is None or callable(loss_fn), TypeError, "loss_fn", loss_fn, "callable or None")
        check.boolean(shift_labels=shift_labels)
        check.done()
        super().__init__(auto_prefix=False)
        self.network, self.alpha, self.loss_fn, self.shift_labels = network, alpha, loss_fn, shift_labels
        self.r_drop = RDropLoss(ignore_index)

    def construct(self, *inputs):
        repeated = [ops.repeat_interleave(x, 2, 0) if isinstance(x, Tensor) else x for x in inputs]
        logits, labels = self.network(*repeated[:-1]), repeated[-1]
        logits = logits[0] if isinstance(logits, tuple) else logits
        if self.shift_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if self.loss_fn is None:
            return self.r_drop(logits, labels, self.alpha)
        return self.loss_fn(logits, labels) + self.alpha * self.r_drop.divergence(logits, labels) / 4


def rdrop_repeat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each row of each tensor of a batch (inputs, masks, labels) twice, side by side: `(N, *) -> (2N, *)`."""
    return tuple([ops.repeat_interleave(tensor, 2, 0) for tensor in tensors])

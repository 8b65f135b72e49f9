"""The loss of a causal language model, computed without ever having the logits of all words."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


class SomeWords(nn.Cell):
    """What some of the words contribute to the loss; the backward pass computes their logits again.

    Args:
        count: of the words.
        trains_weight: whether their rows of the head have a gradient.

    Inputs:
        hidden: `(tokens, features)`.
        words: their rows of the head, `(count, features)`.
        labels: `(tokens, 1)`, int32; the number of the word that is asked for, if it is one of them.

    Outputs:
        hidden, as it came in: the words after these take it from here, so that one gradient goes through all of them;
        the logarithm of the sum of `e ** logit`, and the logit that is asked for, else zero: `(tokens, 2)`, float32.
    """

    def __init__(self, count, trains_weight):
        super().__init__()
        self.trains_weight = trains_weight
        self.places = Tensor(np.arange(count, dtype=np.int32)[None])
        self.matmul, self.back_matmul = ops.MatMul(transpose_b=True), ops.MatMul()
        self.weight_matmul, self.zeros_like = ops.MatMul(transpose_a=True), ops.ZerosLike()

    def construct(self, hidden, words, labels):
        labels = ops.depend(labels, hidden)  # a graph takes these words after those before them
        logits = self.logits(hidden, words)
        chosen = (logits * self.asked(labels)).sum(1, keepdims=True)
        terms = ops.concat((ops.logsumexp(logits, 1, True), chosen), 1)
        return ops.depend(hidden, terms), terms

    def bprop(self, hidden, words, labels, out, dout):
        # A graph computes this after the words behind these, and keeps nothing for it.
        hidden, labels = ops.depend(hidden, dout), ops.depend(labels, dout)
        shares = ops.exp(self.logits(hidden, words) - out[1][:, :1])
        change = shares * dout[1][:, :1] + self.asked(labels) * dout[1][:, 1:]
        change = ops.cast(change, hidden.dtype)
        back = dout[0] + self.back_matmul(change, ops.cast(words, hidden.dtype))
        if self.trains_weight:
            weight = ops.cast(self.weight_matmul(change, hidden), words.dtype)
        else:
            weight = self.zeros_like(words)
        return back, weight, self.zeros_like(labels)

    def logits(self, hidden, words):
        """`(tokens, count)`, float32."""
        return ops.cast(self.matmul(hidden, ops.cast(words, hidden.dtype)), ms.float32)

    def asked(self, labels):
        """One where a word is asked for, else zero: `(tokens, count)`, float32."""
        return ops.cast(self.places == labels, ms.float32)


class ChunkedCrossEntropy(nn.Cell):
    """Mean cross entropy of the tokens that are asked for, from hidden states h and the weight W of the head.

    .. math::
        L = \\frac{1}{n} \\sum_t \\log \\sum_v e^{h_t W_v} - h_t W_{y_t}

    The words are taken `chunk` at a time. Beside h it keeps two numbers for each token and chunk; it costs one more
    matmul with the head.

    Args:
        vocab_size: number of words.
        chunk: how many of them have logits at the same time. Default: 4096.
        trains_weight: whether W has a gradient. Default: False.

    Inputs:
        hidden: `(tokens, features)`.
        weight: `(vocab, features)`.
        labels: `tokens` numbers, int32; a negative one where nothing is asked for.

    Outputs:
        loss, float32.
    """

    def __init__(self, vocab_size, chunk=4096, trains_weight=False):
        super().__init__()
        self.starts = list(range(0, vocab_size, chunk))
        self.parts = nn.CellList([SomeWords(min(chunk, vocab_size - start), trains_weight) for start in self.starts])
        self.chunk = chunk

    def construct(self, hidden, weight, labels):
        labels = ops.reshape(labels, (-1, 1))
        sums, chosen = (), 0.0
        for start, part in zip(self.starts, self.parts):
            hidden, terms = part(hidden, weight[start : start + self.chunk], labels - start)
            sums, chosen = sums + (terms[:, :1],), chosen + terms[:, 1:]
        asked = ops.cast(labels >= 0, ms.float32)
        losses = ops.logsumexp(ops.concat(sums, 1), 1, True) - chosen
        return (losses * asked).sum() / asked.sum()


class ChunkedLoss(nn.Cell):
    """A decoder and its head with their loss; parameters keep their names. Make it after the adapter is in the network.

    Args:
        decoder: from ids and mask, each `(batch, seq)`, to hidden states.
        head: a linear layer without bias, and without a delta.
        chunk: see ChunkedCrossEntropy. Default: 4096.

    Inputs:
        input_ids, labels: `(batch, seq)`, int32; the label of a token is the next token, or negative.
        attention_mask: `(batch, seq)`, int32, or None.

    Outputs:
        loss, float32.

    Raises:
        ValueError: the head has a bias or a delta.
    """

    def __init__(self, decoder, head, chunk=4096):
        super().__init__(auto_prefix=False)
        surplus = [name for name in ("bias", "mindpet_delta") if getattr(head, name, None) is not None]
        if surplus:
            raise ValueError(f"ChunkedLoss: the head has {surplus}, which logits of some words do not see")
        self.decoder, self.head = decoder, head
        self.loss = ChunkedCrossEntropy(head.weight.shape[0], chunk, head.weight.requires_grad)

    def construct(self, input_ids, labels, attention_mask=None):
        hidden = self.decoder(input_ids, attention_mask)
        return self.loss(ops.reshape(hidden, (-1, hidden.shape[-1])), self.head.weight, labels)

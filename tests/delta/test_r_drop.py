"""RDropLoss against its formula, and rdrop_repeat."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.delta import RDropLoss, RDropWithLossCell, rdrop_repeat
from mindpet.delta.r_drop import RDropLoss as ByModule


def reference(logits, labels, alpha):
    """The loss from the paper's quantities, sample by sample."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cross_entropy = -np.mean([np.log(row[label]) for row, label in zip(p, labels)])
    kl = [(a * np.log(a / b)).sum() + (b * np.log(b / a)).sum() for a, b in zip(p[0::2], p[1::2])]
    return cross_entropy + alpha * np.mean(kl) / 4


@pytest.fixture
def case(rng):
    return rng.normal(size=(6, 5)).astype(np.float32), np.array([1, 1, 4, 4, 0, 0], np.int32)


@pytest.mark.parametrize("alpha", [4, 0, 2.5])
def test_formula(case, alpha, mode):
    logits, labels = case
    loss = RDropLoss()(Tensor(logits), Tensor(labels), alpha)
    np.testing.assert_allclose(loss.asnumpy(), reference(logits, labels, alpha), rtol=1e-5)
    assert loss.shape == () and loss.dtype == ms.float32


def test_alpha_is_4_by_default(case, mode):
    logits, labels = case
    np.testing.assert_allclose(
        RDropLoss()(Tensor(logits), Tensor(labels)).asnumpy(), reference(logits, labels, 4), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_labels_as_probabilities(case, dtype, mode):
    logits, labels = case
    loss = RDropLoss()(Tensor(logits), Tensor(np.eye(5)[labels].astype(dtype)))
    np.testing.assert_allclose(loss.asnumpy(), reference(logits, labels, 4), rtol=1e-5)


def test_float16_logits(case, mode):
    logits, labels = case
    loss = RDropLoss()(Tensor(logits.astype(np.float16)), Tensor(labels))
    np.testing.assert_allclose(loss.asnumpy(), reference(logits, labels, 4), rtol=1e-2)


def test_it_does_not_grow_with_the_batch(case, mode):
    logits, labels = case
    once = RDropLoss()(Tensor(logits), Tensor(labels)).asnumpy()
    thrice = RDropLoss()(Tensor(np.tile(logits, (3, 1))), Tensor(np.tile(labels, 3))).asnumpy()
    np.testing.assert_allclose(thrice, once, rtol=1e-5)


def test_equal_passes_leave_the_cross_entropy(case, mode):
    logits, labels = case
    same = np.repeat(logits[::2], 2, 0)
    np.testing.assert_allclose(
        RDropLoss()(Tensor(same), Tensor(labels)).asnumpy(), reference(same, labels, 0), rtol=1e-5
    )


@pytest.mark.parametrize("alpha", ["4", True, None])
def test_alpha_must_be_a_number(case, alpha, mode):
    logits, labels = case
    with pytest.raises(TypeError, match="'alpha' must be an int or a float"):
        RDropLoss()(Tensor(logits), Tensor(labels), alpha).asnumpy()


def tokens(rng, ignored=-100):
    """Logits and labels of 3 samples of 4 tokens, each twice, of which some have no label."""
    labels = np.repeat(np.array([[0, 1, ignored, 2], [4, ignored, ignored, 3], [ignored] * 4], np.int32), 2, 0)
    return rng.normal(size=(6, 4, 5)).astype(np.float32), labels


@pytest.mark.parametrize("ignored", [-100, 7])
def test_tokens_of_a_sequence_without_those_that_have_no_label(ignored, mode, rng):
    logits, labels = tokens(rng, ignored)
    loss = RDropLoss(ignored)(Tensor(logits), Tensor(labels), 3)
    pairs = [(i, j) for i in (0, 2, 4) for j in range(4) if labels[i, j] != ignored]
    flat = np.concatenate([logits[i : i + 2, j] for i, j in pairs])
    expected = reference(flat, np.concatenate([labels[i : i + 2, j] for i, j in pairs]), 3)
    np.testing.assert_allclose(loss.asnumpy(), expected, rtol=1e-5)
    grad = ms.grad(RDropLoss(ignored))(Tensor(logits), Tensor(labels), 3).asnumpy()
    assert not grad[labels == ignored].any() and np.abs(grad[labels != ignored]).min() > 0


def test_a_batch_without_labels_has_no_loss(mode, rng):
    logits, labels = tokens(rng)
    assert RDropLoss()(Tensor(logits), Tensor(np.full_like(labels, -100))).asnumpy() == 0


class Model(nn.Cell):
    """A network of two inputs, whose dropout tells the two passes apart."""

    def __init__(self, as_tuple):
        super().__init__()
        self.head, self.dropout, self.as_tuple = nn.Dense(4, 5), nn.Dropout(p=0.5), as_tuple

    def construct(self, x, factor):
        logits = self.head(self.dropout(x)) * factor.expand_dims(-1).expand_dims(-1)
        return (logits, x) if self.as_tuple else logits


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_around_a_network(as_tuple, shift, mode, rng):
    x, factor = rng.normal(size=(3, 4, 4)).astype(np.float32), np.array([1, 2, 3], np.float32)
    labels = tokens(rng)[1][::2]
    network = Model(as_tuple)
    loss = RDropWithLossCell(network, alpha=2, shift_labels=shift).set_train(False)
    logits = (x @ network.head.weight.asnumpy().T + network.head.bias.asnumpy()) * factor[:, None, None]
    logits, kept = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    one = logits[kept != -100], kept[kept != -100]
    expected = reference(np.repeat(one[0], 2, 0), np.repeat(one[1], 2, 0), 0)  # without dropout both passes are equal
    got = loss(Tensor(x), Tensor(factor), Tensor(labels)).asnumpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    loss.set_train()
    dropped = loss(Tensor(x), Tensor(factor), Tensor(labels)).asnumpy()
    assert np.isfinite(dropped) and abs(dropped - expected) > 1e-3


def test_another_loss_gets_the_regulariser_too(mode, rng):
    logits, labels = tokens(rng)

    class Fixed(nn.Cell):
        def construct(self, x):
            return Tensor(logits) + 0 * x.sum()

    class Mean(nn.Cell):
        def construct(self, logits, labels):
            return logits.mean()

    loss = RDropWithLossCell(Fixed(), 3, loss_fn=Mean())
    got = loss(Tensor(np.zeros(3, np.float32)), Tensor(labels[::2])).asnumpy()
    difference = RDropLoss()(Tensor(logits), Tensor(labels), 3) - RDropLoss()(Tensor(logits), Tensor(labels), 0)
    np.testing.assert_allclose(got, logits.mean() + difference.asnumpy(), rtol=1e-4)


def test_wrong_arguments_of_the_wrapper():
    rules = (
        "'network' .* got 3.*'alpha' .* got '4'.*'ignore_index' .* got 0.5.*'loss_fn' .* got 1.*'shift_labels' .* got 0"
    )
    with pytest.raises(TypeError, match=rules):
        RDropWithLossCell(3, "4", 0.5, 1, 0)


def test_rows_must_come_in_pairs(case, mode):
    logits, labels = case
    with pytest.raises(ValueError, match="'logits' must have two rows a sample, but got 5 rows"):
        RDropLoss()(Tensor(logits[:5]), Tensor(labels[:5])).asnumpy()


def test_rdrop_repeat(mode):
    ids, labels = rdrop_repeat(Tensor([[1, 2], [3, 4]]), Tensor([7, 8]))
    assert ids.asnumpy().tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert labels.asnumpy().tolist() == [7, 7, 8, 8]
    assert isinstance(rdrop_repeat(labels), tuple) and RDropLoss is ByModule


def test_training_with_it(mode, rng):
    class LossNetwork(nn.Cell):
        def __init__(self, network):
            super().__init__(auto_prefix=False)
            self.network = network
            self.loss = RDropLoss()

        def construct(self, x, labels):
            x, labels = rdrop_repeat(x, labels)
            return self.loss(self.network(x), labels, alpha=2)

    network = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dropout(p=0.2), nn.Dense(16, 3))
    x = rng.normal(size=(30, 8)).astype(np.float32)
    labels = x[:, :3].argmax(1).astype(np.int32)
    step = nn.TrainOneStepCell(LossNetwork(network), nn.Adam(network.trainable_params(), 0.02)).set_train()
    losses = [float(step(Tensor(x), Tensor(labels)).asnumpy()) for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])

"""RDropLoss against its formula, and rdrop_repeat."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.delta import RDropLoss, rdrop_repeat
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

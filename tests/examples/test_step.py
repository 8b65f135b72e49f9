"""A step over parts of a batch."""

import functools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from models.step import AccumulatedStep

ROWS, WIDTH = 12, 6


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.fc, self.head, self.loss = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, 3), nn.CrossEntropyLoss()

    def construct(self, x, labels):
        return self.loss(self.head(ops.tanh(self.fc(x))), labels)


def steps(make, rng, count=3):
    """Losses and values after some steps."""
    ms.set_seed(3)
    np.random.seed(3)
    network = Net()
    step = make(network, nn.Momentum(network.trainable_params(), 0.1, 0.9)).set_train()
    rng = np.random.default_rng(7)
    losses = []
    for _ in range(count):
        x, labels = rng.normal(size=(ROWS, WIDTH)).astype(np.float32), rng.integers(0, 3, ROWS).astype(np.int32)
        losses.append(float(step(Tensor(x), Tensor(labels))))
    return losses, [param.asnumpy() for param in network.trainable_params()]


def test_it_is_the_step_of_the_whole_batch(mode, rng):
    losses, values = steps(nn.TrainOneStepCell, rng)
    for parts in (1, 3):
        got, others = steps(functools.partial(AccumulatedStep, parts=parts), rng)
        np.testing.assert_allclose(got, losses, atol=1e-6)
        for one, other in zip(values, others):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_batch_that_cannot_be_cut_is_refused(rng):
    with pytest.raises(ValueError, match="must be a multiple of the parts"):
        steps(functools.partial(AccumulatedStep, parts=5), rng)

"""The optimizer of the examples against torch.optim.AdamW."""

import numpy as np
import pytest
from adamw import AdamW
from mindspore import Parameter, Tensor, nn

pytestmark = pytest.mark.interop


def test_steps_are_those_of_torch(mode, rng):
    """A hundred with a learning rate that changes, over gradients of many sizes."""
    import torch

    start = (0.1 * rng.normal(size=(4, 6))).astype(np.float32)
    slopes = (rng.normal(size=(100, 4, 6)) * np.logspace(-8, 1, 6)).astype(np.float32)
    rates = np.linspace(5e-3, 1e-4, 100)

    class Plane(nn.Cell):
        def __init__(self):
            super().__init__()
            self.weight = Parameter(Tensor(start), name="weight")

        def construct(self, slope):
            return (self.weight * slope).sum()

    ours = Plane()
    step = nn.TrainOneStepCell(ours, AdamW(ours.trainable_params(), rates.tolist())).set_train()
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs])  # beta, epsilon and decay as they are by default, here as there
    for slope, rate in zip(slopes, rates):
        step(Tensor(slope))
        theirs.grad = torch.tensor(slope)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    np.testing.assert_allclose(ours.weight.asnumpy(), theirs.detach().numpy(), atol=1e-6)

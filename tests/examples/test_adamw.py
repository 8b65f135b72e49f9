"""The optimizer of the examples against the formula in float64; against torch: tests/interop."""

import mindspore as ms
import numpy as np
import pytest
from adamw import AdamW
from mindspore import Parameter, Tensor, nn


class Plane(nn.Cell):
    """`sum(slope * weight)`, whose gradient is the slope."""

    def __init__(self, weights):
        super().__init__()
        self.params = ms.ParameterTuple([Parameter(Tensor(value), name=name) for name, value in weights.items()])

    def construct(self, *slopes):
        total = 0.0
        for param, slope in zip(self.params, slopes):
            total = total + (param * slope).sum()
        return total


def formula(weight, slopes, rates, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    weight, m, v = weight.astype(np.float64), 0.0, 0.0
    for t, (slope, rate) in enumerate(zip(slopes, rates), 1):
        g = slope.astype(np.float64)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        weight = weight * (1 - rate * decay) - rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return weight


STEPS = 200
RATES = np.concatenate([np.linspace(1e-4, 1e-2, 20), np.linspace(1e-2, 1e-4, STEPS - 20)])


class Line(nn.learning_rate_schedule.LearningRateSchedule):
    def construct(self, step):
        return 1e-2 - 4e-5 * step.astype(ms.float32)


@pytest.mark.parametrize(
    "rate, rates",
    [(1e-2, [1e-2] * STEPS), (RATES.tolist(), RATES), (Line(), 1e-2 - 4e-5 * np.arange(STEPS))],
    ids=["number", "list", "schedule"],
)
def test_steps_are_those_of_the_formula(rate, rates, mode, rng):
    """Also with gradients around epsilon, and of zero."""
    start = {"weight": rng.normal(size=(3, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    scales = {"weight": np.array([1e-8, 1e-3, 1.0, 0.0]), "bias": 1.0}
    slopes = {name: (rng.normal(size=(STEPS, *start[name].shape)) * scales[name]).astype(np.float32) for name in start}
    plane = Plane(start)
    step = nn.TrainOneStepCell(plane, AdamW(plane.trainable_params(), rate, weight_decay=0.1)).set_train()
    for t in range(STEPS):
        step(*(Tensor(slopes[name][t]) for name in start))
    for param in plane.get_parameters():
        expected = formula(start[param.name], slopes[param.name], rates, 0.1)
        np.testing.assert_allclose(param.asnumpy(), expected, atol=2e-6, err_msg=param.name)


def test_groups_have_rates_and_decays_of_their_own(mode, rng):
    start = {name: rng.normal(size=4).astype(np.float32) for name in ("a", "b", "gamma")}
    slopes = {name: rng.normal(size=(5, 4)).astype(np.float32) for name in start}
    plane = Plane(start)
    params = {param.name: param for param in plane.get_parameters()}
    groups = [
        {"params": [params["a"]], "lr": 1e-2, "weight_decay": 0.5},
        {"params": [params["b"], params["gamma"]], "weight_decay": 0.0},
        {"order_params": list(params.values())},
    ]
    step = nn.TrainOneStepCell(plane, AdamW(groups, 1e-3)).set_train()
    for t in range(5):
        step(*(Tensor(slopes[name][t]) for name in start))
    for name, rate, decay in (("a", 1e-2, 0.5), ("b", 1e-3, 0.0), ("gamma", 1e-3, 0.0)):
        expected = formula(start[name], slopes[name], [rate] * 5, decay)
        np.testing.assert_allclose(params[name].asnumpy(), expected, atol=1e-6, err_msg=name)


def test_wrong_arguments_are_all_named():
    params = Plane({"w": np.ones(2, np.float32)}).trainable_params()
    with pytest.raises(ValueError, match=r"'beta1' must be in \(0, 1\), but got 1; 'beta2' .* nan; 'eps' .* but got 0"):
        AdamW(params, beta1=1, beta2=float("nan"), eps=0)

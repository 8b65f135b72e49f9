"""DeltaGuard and summary."""

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import nn
from mindspore.train import Model
from toy import LABELS, WIDTH, Toy, lora

from mindpet.errors import NotLearningError
from mindpet.graph import DeltaGuard, freeze_delta, freeze_modules, summary


def dataset(rng, rows=8):
    columns = {"x": rng.normal(size=(rows, 5, WIDTH)).astype(np.float32), "y": np.arange(rows, dtype=np.int32) % LABELS}
    return ds.NumpySlicesDataset(columns, shuffle=False).batch(4)


def fit(network, optimizer, guard, rng, epochs=2):
    Model(network, nn.CrossEntropyLoss(), optimizer).train(
        epochs, dataset(rng), callbacks=guard, dataset_sink_mode=False
    )


def test_a_network_that_learns(mode, rng, capsys):
    network = lora()
    fit(network, nn.Adam(network.trainable_params(), 0.01), DeltaGuard(steps=3), rng)
    assert capsys.readouterr().out.startswith(
        "DeltaGuard: trainable parameters 59 of 131 (45.0382 %); bytes: weights 524, gradients 236, optimizer state "
    )


def test_a_parameter_without_a_path_to_the_loss(mode, rng):
    network = lora()
    network.unused = ms.Parameter(np.ones(3, np.float32), name="unused")
    with pytest.raises(NotLearningError, match="trainable but unmoved after 3 steps: \\['unused'\\]"):
        fit(network, nn.Adam(network.trainable_params(), 0.01), DeltaGuard(steps=3), rng)


def test_a_parameter_that_the_optimizer_was_not_given(rng):
    network = lora()
    optimizer = nn.Adam([network.head.weight, network.head.bias], 0.01)
    with pytest.raises(
        NotLearningError, match="unmoved after 4 steps: \\['fc.mindpet_delta_lora_a', 'fc.mindpet_delta_lora_b'\\]"
    ):
        fit(network, optimizer, DeltaGuard(steps=100), rng)


def test_freezing_after_the_optimizer_was_made(rng):
    ms.set_context(mode=ms.GRAPH_MODE)
    network = Toy("lora")
    optimizer = nn.Adam(network.trainable_params(), 0.01)
    freeze_delta(network, "lora", exclude=["head.*"])
    with pytest.raises(NotLearningError, match="frozen but changed after 2 steps: \\['fc.weight', 'fc.bias'\\]"):
        fit(network, optimizer, DeltaGuard(steps=2), rng)


def test_parameters_that_get_their_values_late_are_compared_from_the_first_step_on(rng, monkeypatch):
    network = lora()
    network.unused = ms.Parameter(np.ones(3, np.float32), name="unused")
    optimizer = nn.Adam(network.trainable_params(), 0.01)
    guard = DeltaGuard(steps=2)
    begin = guard.on_train_begin

    def begin_in_a_parallel_mode(run_context):
        with monkeypatch.context() as patch:
            patch.setattr(type(network.unused), "has_init", True)
            begin(run_context)

    guard.on_train_begin = begin_in_a_parallel_mode
    with pytest.raises(NotLearningError, match="unmoved after 2 steps: \\['unused'\\]"):
        fit(network, optimizer, guard, rng)


def test_one_step_is_too_few_to_tell(rng):
    network = lora()
    data = dataset(rng).take(1)
    model = Model(network, nn.CrossEntropyLoss(), nn.Adam(network.trainable_params(), 0.01))
    with pytest.warns(UserWarning, match="too short to tell"):
        model.train(1, data, callbacks=DeltaGuard(), dataset_sink_mode=False)


def test_evaluation_in_fit_does_not_start_it_anew(rng, capsys):
    network = lora()
    network.unused = ms.Parameter(np.ones(3, np.float32), name="unused")
    model = Model(network, nn.CrossEntropyLoss(), nn.Adam(network.trainable_params(), 0.01), metrics={"loss"})
    with pytest.raises(NotLearningError, match="unmoved after 4 steps"):
        model.fit(3, dataset(rng), dataset(rng), callbacks=DeltaGuard(steps=4), dataset_sink_mode=False)
    assert capsys.readouterr().out.count("DeltaGuard: ") == 1


def test_not_strict_only_warns(rng):
    network = lora()
    with pytest.warns(UserWarning, match="unmoved after 2 steps"):
        fit(network, nn.SGD(network.trainable_params(), 0.0), DeltaGuard(steps=2, strict=False), rng)


def test_nothing_trainable(rng):
    network = Toy("lora")
    optimizer = nn.Adam(network.trainable_params())
    freeze_modules(network, include=["*"])
    with pytest.raises(NotLearningError, match="nothing is trainable"):
        fit(network, optimizer, DeltaGuard(), rng)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"steps": 0}, ValueError, "'steps' must be a positive int, but got 0"),
        ({"steps": 1.5}, TypeError, "'steps' must be a positive int"),
        ({"strict": 1}, TypeError, "'strict' must be a bool"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        DeltaGuard(**arguments)


def test_summary_counts():
    network = lora()
    result = summary(network)
    assert result[:5] == (2 * 8 + 8 * 2 + 3 * 8 + 3, 59 + 8 * 8 + 8, 4 * 131, 4 * 59, 8 * 59)
    assert str(result) == (
        "trainable parameters 59 of 131 (45.0382 %); bytes: weights 524, gradients 236, optimizer state 472"
    )
    momentum = nn.Momentum(network.trainable_params(), 0.1, 0.9)
    assert summary(network, momentum).optimizer_bytes == 236 + 3 * 4  # learning_rate, momentum, global_step


def test_summary_of_half_precision_and_of_nothing():
    network = nn.Dense(4, 2, dtype=ms.float16)
    assert summary(network).weight_bytes == 2 * (8 + 2)
    assert summary(nn.ReLU())[:3] == (0, 0, 0) and summary(nn.ReLU()).share == 0.0

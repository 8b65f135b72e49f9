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
from mindpet.peft import LoraConfig, get_peft_model


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


class After(ms.train.Callback):
    """Does something after a step."""

    def __init__(self, step, change):
        super().__init__()
        self.step, self.change = step, change

    def on_train_step_end(self, run_context):
        if run_context.original_args().cur_step_num == self.step:
            self.change()


@pytest.mark.parametrize("step", [1, 3])  # before and after it has compared
def test_what_is_trainable_changes_while_training(step, mode, rng):
    network = lora()
    optimizer = nn.Adam(network.trainable_params(), 0.01)
    change = After(step, lambda: freeze_modules(network, include=["head.weight"], exclude=["fc.bias"]))
    with pytest.raises(
        NotLearningError, match="changed while training: new ones \\['fc.bias'\\], gone ones \\['head.weight'\\]"
    ):
        fit(network, optimizer, [change, DeltaGuard(steps=2)], rng)


def test_another_parameter_under_the_same_name(rng):
    network = lora()
    optimizer = nn.Adam(network.trainable_params(), 0.01)
    other = ms.Parameter(network.head.bias.asnumpy(), name="head.bias")
    change = After(2, lambda: network.head._params.update(bias=other))
    with pytest.raises(NotLearningError, match="new ones \\['head.bias'\\], gone ones \\['head.bias'\\]"):
        fit(network, optimizer, [change, DeltaGuard()], rng)


def test_a_changed_set_is_told_once_and_looked_at_anew(rng):
    network = lora()
    optimizer = nn.Adam(network.trainable_params(), 0.01)
    change = After(1, lambda: freeze_modules(network, exclude=["fc.bias"]))
    with pytest.warns(UserWarning) as caught:
        fit(network, optimizer, [change, DeltaGuard(steps=2, strict=False)], rng)
    messages = [str(warning.message) for warning in caught if "DeltaGuard" in str(warning.message)]
    assert len(messages) == 2 and "new ones ['fc.bias'], gone ones []" in messages[0]
    assert "trainable but unmoved after 2 steps: ['fc.bias']" in messages[1]


def test_changes_after_the_last_step_are_not_its_business(rng):
    network = lora()

    class Last(ms.train.Callback):
        def on_train_end(self, run_context):
            freeze_modules(network, exclude=["fc.*"])

    fit(network, nn.Adam(network.trainable_params(), 0.01), [Last(), DeltaGuard()], rng)


def adapters(**keywords):
    config = LoraConfig(target_modules=["fc"], modules_to_save=["head"], **keywords)
    model = get_peft_model(Toy(), config)
    model.add_adapter("other", config)
    return model


def test_another_adapter_while_training(mode, rng):
    model = adapters()
    optimizer = nn.Adam(model.trainable_params(), 0.01)
    with pytest.raises(NotLearningError, match="changed while training: new ones .*fc.mindpet_delta_lora_a.*head"):
        fit(model, optimizer, [After(1, lambda: model.set_adapter("other")), DeltaGuard(steps=2)], rng)


def test_copies_of_an_adapter(mode, rng):
    model = adapters()
    fit(model, nn.Adam(model.trainable_params(), 0.01), DeltaGuard(steps=3), rng)
    model.set_adapter("other")
    with pytest.raises(NotLearningError, match="unmoved after 3 steps: .*'head.mindpet_trained_weight'"):
        fit(model, nn.SGD(model.trainable_params(), 0.0), DeltaGuard(steps=3), rng)


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

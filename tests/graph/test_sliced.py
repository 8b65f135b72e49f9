"""Saving, loading, watching and freezing a network whose parameters get other names when it is called."""

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import nn
from mindspore.train import CheckpointConfig, Model
from sliced import LABELS, WIDTH, Sliced, ones

from mindpet.errors import CheckpointError, NotLearningError
from mindpet.graph import DeltaGuard, TrainableParamsCheckPoint, freeze_delta, freeze_modules, load_delta, summary
from mindpet.network.parameters import model_parameters

LAYERS = ["layers.0", "layers.1", "layers.2", "more.first", "more.second"]
DELTAS = {f"{layer}.mindpet_delta_lora_{side}": (2, 4) if side == "a" else (4, 2) for layer in LAYERS for side in "ab"}


def network(called=False):
    result = Sliced(lora=True)
    freeze_delta(result, "lora")
    if called:
        result(ones())
    return result


def dataset(rng):
    columns = {"x": rng.normal(size=(8, WIDTH)).astype(np.float32), "y": np.arange(8, dtype=np.int32) % LABELS}
    return ds.NumpySlicesDataset(columns, shuffle=False).batch(4)


def fit(net, rng, *callbacks, learning_rate=0.05):
    """The first step changes the names; before it they must differ, or MindSpore makes no optimizer."""
    model = Model(net, nn.CrossEntropyLoss(), nn.Adam(net.trainable_params(), learning_rate))
    model.train(2, dataset(rng), callbacks=list(callbacks), dataset_sink_mode=False)


def names(net):
    return [param.name for param in net.get_parameters()]


def trainable(net):
    return {key for key, param in model_parameters(net).items() if param.requires_grad}


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
def test_a_checkpoint_has_every_delta_under_its_path(format, mode, rng, tmp_path):
    net = network()
    checkpoint = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(format=format))
    fit(net, rng, checkpoint)
    assert "more.first.weight" not in names(net)
    file = checkpoint.latest_ckpt_file_name
    saved = ms.load_checkpoint(file, format=format)
    assert {key: value.shape for key, value in saved.items()} == DELTAS
    trained = model_parameters(net)
    for key, value in saved.items():
        np.testing.assert_array_equal(value.asnumpy(), trained[key].asnumpy())
    base = {key: param for key, param in trained.items() if key not in DELTAS}

    by_mindspore, by_mindpet, renamed = Sliced(lora=True), Sliced(lora=True), network(called=True)
    ms.save_checkpoint([{"name": key, "data": param} for key, param in base.items()], str(tmp_path / "base.ckpt"))
    missing, _ = ms.load_param_into_net(by_mindspore, {**base, **saved})
    assert not missing
    for other in (by_mindpet, renamed):
        load_delta(other, str(tmp_path / "base.ckpt"), file)
    load_delta(renamed, file)  # without the base
    expected = net(ones()).asnumpy()
    for other in (by_mindspore, by_mindpet, renamed):
        np.testing.assert_array_equal(other(ones()).asnumpy(), expected)


@pytest.mark.parametrize("error", [None, OSError("no space")])
def test_saving_leaves_the_names(error, mode, rng, tmp_path, monkeypatch):
    net, seen = network(), []

    def save_checkpoint(cell, *_, **__):
        seen.append([param.name for _, param in cell.parameters_and_names()])
        if error:
            raise error

    class Watch(ms.train.Callback):
        def on_train_step_end(self, run_context):
            self.before = names(net)

    monkeypatch.setattr("mindspore.train.callback._checkpoint.save_checkpoint", save_checkpoint)
    checkpoint, watch = TrainableParamsCheckPoint(str(tmp_path)), Watch()
    with (
        pytest.raises(CheckpointError, match="no space")
        if error
        else pytest.warns(UserWarning, match="was not written")
    ):
        fit(net, rng, watch, checkpoint)
    assert seen[0] == list(DELTAS)
    assert names(net) == watch.before


def test_a_breakpoint_file_has_paths_too(rng, tmp_path):
    class Stop(ms.train.Callback):
        def on_train_step_end(self, run_context):
            raise KeyboardInterrupt

    config = CheckpointConfig(save_checkpoint_steps=100, exception_save=True)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), rng, TrainableParamsCheckPoint(str(tmp_path), config=config), Stop())
    (file,) = tmp_path.glob("*breakpoint*.ckpt")
    assert DELTAS.keys() <= ms.load_checkpoint(str(file)).keys()


def test_a_file_with_changed_names_is_refused(tmp_path):
    file = str(tmp_path / "changed.ckpt")
    changed = network(called=True)
    ms.save_checkpoint([{"name": param.name, "data": param} for param in changed.trainable_params()], file)
    for other in (changed, network()):
        with pytest.raises(CheckpointError, match="missing: layers.0.mindpet_delta_lora_a"):
            load_delta(other, file)


def test_summary_counts_all():
    net = network()
    optimizer = nn.Adam(net.trainable_params())
    before = summary(net, optimizer)
    assert before[:2] == (5 * 16, 5 * (16 + 20) + 10)
    net(ones())
    assert summary(net, optimizer) == before
    assert 2 * before.gradient_bytes <= before.optimizer_bytes < 3 * before.gradient_bytes


def test_guard_sees_a_learning_rate_of_zero(mode, rng):
    with pytest.raises(NotLearningError, match="unmoved after 3 steps") as caught:
        fit(network(), rng, DeltaGuard(steps=3), learning_rate=0.0)
    assert all(key in str(caught.value) for key in DELTAS)


def test_guard_sees_that_it_learns(mode, rng, capsys):
    fit(network(), rng, DeltaGuard(steps=3))
    assert "trainable parameters 80 of 190" in capsys.readouterr().out


def test_guard_sees_what_changes_though_it_is_frozen(mode, rng):
    net = network()
    frozen = net.layers[2].weight

    class Shift(ms.train.Callback):
        def on_train_step_end(self, run_context):
            ms.ops.assign_add(frozen, ms.Tensor(np.ones(frozen.shape, np.float32)))

    with pytest.raises(NotLearningError, match="frozen but changed after 2 steps: \\['layers.2.weight'\\]"):
        fit(net, rng, Shift(), DeltaGuard(steps=2))


@pytest.mark.parametrize("called", [False, True])
def test_freezing_goes_by_paths(called):
    net = network(called)
    freeze_modules(net, include=["layers.2.*"], exclude=["more.second.weight", "head.*"])
    deltas = {key for key in DELTAS if not key.startswith("layers.2.")}
    assert trainable(net) == {*deltas, "more.second.weight", "head.weight", "head.bias"}
    freeze_delta(net, "bitfit")
    assert trainable(net) == {f"{layer}.bias" for layer in [*LAYERS, "head"]}

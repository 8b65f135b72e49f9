"""Running statistics of BatchNorms: buffers that follow the data, no weights."""

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn
from mindspore.train import Model

from mindpet.delta import LoRADense
from mindpet.errors import NoMatchError, NotLearningError
from mindpet.graph import DeltaGuard, TrainableParamsCheckPoint, freeze_delta, freeze_modules, load_delta
from mindpet.network.parameters import model_parameters, running_statistics, trainable_parameters

WIDTH = 4
STATISTICS = ["bn.moving_mean", "bn.moving_variance"]
DELTAS = ["fc.mindpet_delta_lora_a", "fc.mindpet_delta_lora_b"]


class Normed(nn.Cell):
    def __init__(self):
        super().__init__()
        self.fc = LoRADense(WIDTH, WIDTH, 2, 4, compute_dtype=ms.float32, weight_init="xavier_uniform")
        self.bn = nn.BatchNorm1d(WIDTH)
        self.head = nn.Dense(WIDTH, 2)

    def construct(self, x):
        return self.head(self.bn(self.fc(x)))


def network():
    result = Normed()
    freeze_delta(result, "lora")
    return result


def dataset():
    rng = np.random.default_rng(3)
    columns = {"x": rng.normal(1, 2, size=(8, WIDTH)).astype(np.float32), "y": np.arange(8, dtype=np.int32) % 2}
    return ds.NumpySlicesDataset(columns, shuffle=False).batch(4)


def fit(net, *callbacks):
    model = Model(net, nn.CrossEntropyLoss(), nn.Adam(net.trainable_params(), 0.01))
    model.train(2, dataset(), callbacks=list(callbacks), dataset_sink_mode=False)


def test_which_they_are():
    class Other(nn.Cell):
        """A network with an average of its own, which is a weight."""

        def __init__(self):
            super().__init__()
            self.bn, self.second, self.mint = nn.BatchNorm2d(3), nn.SyncBatchNorm(3), mint.nn.BatchNorm1d(3)
            self.no_statistics = mint.nn.BatchNorm1d(3, track_running_stats=False)
            self.moving_mean = Parameter(Tensor(np.ones(3, np.float32)), name="moving_mean")

    assert list(running_statistics(Other())) == [
        "bn.moving_mean",
        "bn.moving_variance",
        "second.moving_mean",
        "second.moving_variance",
        "mint.running_mean",
        "mint.running_var",
        "mint.num_batches_tracked",
    ]
    assert list(running_statistics(nn.BatchNorm1d(3))) == [
        "mean",
        "variance",
    ]  # names of its own, as MindSpore has them
    net = network()
    net.bn._params["mindpet_trained_moving_mean"] = Parameter(Tensor(np.ones(3, np.float32)))
    assert set(running_statistics(net)) == {"bn.moving_variance", "bn.mindpet_trained_moving_mean"}


@pytest.mark.parametrize("exclude", [["bn.*"], ["*"], ["bn.g*", "*mean", "bn.beta"]])
def test_freezing_never_makes_them_trainable(exclude):
    net = network()
    strict = "*mean" not in exclude
    if not strict:
        with pytest.raises(
            NoMatchError, match="'\\*mean' of 'exclude' matches only running statistics, .*bn.moving_mean"
        ):
            freeze_delta(net, "lora", exclude=exclude)
        assert list(trainable_parameters(net)) == DELTAS
        with pytest.warns(UserWarning, match="matches only running statistics"):
            freeze_delta(net, "lora", exclude=exclude, strict=False)
    else:
        freeze_delta(net, "lora", exclude=exclude)
    assert not any(param.requires_grad for param in running_statistics(net).values())
    assert {"bn.gamma", "bn.beta", *DELTAS} <= trainable_parameters(net).keys()
    freeze_modules(net, include=["fc.*"], exclude=["bn*"])
    assert not any(param.requires_grad for param in running_statistics(net).values())


def test_freezing_takes_them_back():
    net = network()
    net.bn.moving_mean.requires_grad = True
    freeze_modules(net, include=["head.*"])
    assert not net.bn.moving_mean.requires_grad


def test_guard_tells_them_from_weights(mode, capsys):
    net = network()
    start = {key: param.asnumpy().copy() for key, param in running_statistics(net).items()}
    fit(net, DeltaGuard(steps=3))
    assert "running statistics, which follow the data: 2" in capsys.readouterr().out
    assert all((param.asnumpy() != start[key]).all() for key, param in running_statistics(net).items())


def test_guard_refuses_them_in_an_optimizer(mode):
    net = network()
    net.bn.moving_mean.requires_grad = True
    with pytest.raises(NotLearningError, match="running statistics that are trainable: \\['bn.moving_mean'\\]"):
        fit(net, DeltaGuard())


def test_a_checkpoint_of_what_was_trained_gives_the_same_network(mode, tmp_path):
    net = network()
    base = str(tmp_path / "base.ckpt")
    ms.save_checkpoint(net, base, choice_func=lambda name: "lora" not in name)
    checkpoint = TrainableParamsCheckPoint(str(tmp_path))
    fit(net, checkpoint)
    saved = ms.load_checkpoint(checkpoint.latest_ckpt_file_name)
    assert list(saved) == [*DELTAS, *STATISTICS]
    fresh, x = network(), Tensor(np.random.default_rng(4).normal(size=(3, WIDTH)).astype(np.float32))
    load_delta(fresh, base, checkpoint.latest_ckpt_file_name)
    np.testing.assert_array_equal(fresh.set_train(False)(x).asnumpy(), net.set_train(False)(x).asnumpy())
    assert not any(param.requires_grad for param in running_statistics(fresh).values())
    # A file without them, as older versions wrote it, loads as before.
    ms.save_checkpoint([{"name": key, "data": saved[key]} for key in DELTAS], str(tmp_path / "old.ckpt"))
    load_delta(network(), str(tmp_path / "old.ckpt"))
    assert list(model_parameters(fresh)) == [param.name for param in fresh.get_parameters()]

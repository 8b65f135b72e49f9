"""PrefixEncoder: the layout of its result, that it trains, and its arguments."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindpet.delta import PrefixEncoder
from mindpet.delta.ptuning2 import PrefixEncoder as ByModule

GOOD = {"pre_seq_len": 3, "num_layers": 2, "num_heads": 2, "kv_channels": 4}


def stacked(outputs):
    return np.stack([output.asnumpy() for output in outputs])


def test_layout(mode):
    cell = PrefixEncoder(**GOOD)
    table = cell.mindpet_delta_ptuning2_embedding.embedding_table.asnumpy()
    outputs = cell(5, ms.float32)
    # (tokens, layers, key/value, heads, channels) -> (layers, key/value, batch, heads, tokens, channels)
    expected = np.broadcast_to(table.reshape(3, 2, 2, 2, 4).transpose(1, 2, 3, 0, 4)[:, :, None], (2, 2, 5, 2, 3, 4))
    assert isinstance(outputs, tuple) and len(outputs) == 2
    np.testing.assert_array_equal(stacked(outputs), expected)


def test_projection_formula(mode):
    cell = PrefixEncoder(**GOOD, prefix_projection=True, projection_dim=5)
    params = {
        name.replace("mindpet_delta_ptuning2_", ""): param.asnumpy() for name, param in cell.parameters_and_names()
    }
    table = np.tanh(params["embedding.embedding_table"] @ params["dense_in.weight"].T + params["dense_in.bias"])
    table = table @ params["dense_out.weight"].T + params["dense_out.bias"]
    expected = table.reshape(3, 2, 2, 2, 4).transpose(1, 2, 3, 0, 4)[:, :, None]
    np.testing.assert_allclose(stacked(cell(1, ms.float32)), expected, rtol=1e-5, atol=1e-6)


def test_default_type_is_float16(mode):
    assert PrefixEncoder(**GOOD)(2)[0].dtype == ms.float16


def test_out_perm():
    normal, swapped = PrefixEncoder(**GOOD), PrefixEncoder(**GOOD, out_perm=(2, 0, 1, 3, 4))
    ms.load_param_into_net(swapped, normal.parameters_dict())
    np.testing.assert_array_equal(stacked(swapped(2)).swapaxes(3, 4), stacked(normal(2)))


def test_the_gradient_reaches_every_parameter_but_the_token_ids(mode):
    class Loss(nn.Cell):
        def __init__(self):
            super().__init__()
            self.encoder = PrefixEncoder(**GOOD, prefix_projection=True, projection_dim=5)

        def construct(self):
            return sum([(past * past).sum() for past in self.encoder(2, ms.float32)])

    network = Loss()
    names = [param.name for param in network.trainable_params()]
    gradients = ms.grad(network, None, network.trainable_params())()
    assert len(names) == 5 and "encoder.mindpet_delta_ptuning2_prefix" not in names
    assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)


def test_dropout_only_while_training(mode):
    cell = PrefixEncoder(**GOOD, dropout_prob=0.5)
    assert (stacked(cell.set_train(True)(1, ms.float32)) == 0).any()
    assert not (stacked(cell.set_train(False)(1, ms.float32)) == 0).any()


def test_parallel_config_sets_the_strategies():
    cell = PrefixEncoder(**GOOD, parallel_config=SimpleNamespace(data_parallel=4, model_parallel=2))
    assert cell.tile.in_strategy == ((4, 1, 1, 2, 1),)
    assert cell.split.in_strategy == ((1, 4, 2, 1, 1),)
    with pytest.raises(ValueError, match="'model_parallel' must be a positive int, but got 0"):
        cell.shard(2, 0)
    assert PrefixEncoder is ByModule


@pytest.mark.parametrize("name", [*GOOD, "projection_dim"])
@pytest.mark.parametrize("value", ["4", 4.0, True, None, 0, -1])
def test_sizes_must_be_positive_ints(name, value):
    with pytest.raises(TypeError, match=f"'{name}' must be a positive int, but got"):
        PrefixEncoder(**{**GOOD, "projection_dim": 5, name: value})


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"dropout_prob": 1.0}, ValueError, "'dropout_prob' must be in \\[0, 1\\), but got 1.0"),
        ({"dropout_prob": -0.1}, ValueError, "'dropout_prob' must be in"),
        ({"dropout_prob": "0"}, TypeError, "'dropout_prob' must be a float"),
        ({"prefix_projection": 1}, TypeError, "'prefix_projection' must be a bool"),
        (
            {"out_perm": (0, 1, 2, 3, 4)},
            ValueError,
            "'out_perm' must be an order of the axes 0 to 4 that begins with 2",
        ),
        ({"out_perm": (2, 0, 3)}, ValueError, "'out_perm' must be"),
    ],
)
def test_wrong_arguments(changes, error, match):
    with pytest.raises(error, match=match):
        PrefixEncoder(**{**GOOD, **changes})

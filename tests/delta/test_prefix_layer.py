"""PrefixLayer: its formula, that it trains, and its arguments."""

import warnings

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindpet.delta import PrefixLayer
from mindpet.delta.prefix_layer import PrefixLayer as ByModule

GOOD = {"prefix_token_num": 4, "batch_size": 2, "num_heads": 2, "hidden_dim": 8, "embed_dim": 6, "mid_dim": 5}


class Past(nn.Cell):
    """Uses a prefix as attention does: by calling it, or by reading its properties."""

    def __init__(self, by_property):
        super().__init__()
        self.prefix = PrefixLayer(**GOOD, dropout_rate=0.0)
        self.by_property = by_property

    def construct(self):
        if self.by_property:
            key, value = self.prefix.past_key_reparam, self.prefix.past_value_reparam
        else:
            key, value = self.prefix()
        return (key * key).sum() + value.sum()


def test_formula(mode):
    cell = PrefixLayer(**GOOD, dropout_rate=0.0)
    table, w1, b1, w2, b2 = (param.asnumpy() for param in cell.get_parameters())
    expected = np.tanh(table @ w1.T + b1) @ w2.T + b2
    key, value = cell()
    assert key.shape == value.shape == (4, 8)
    np.testing.assert_allclose(np.concatenate([key.asnumpy(), value.asnumpy()], 1), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(key.asnumpy() - value.asnumpy()).max() > 1e-3
    np.testing.assert_array_equal(cell.past_key_reparam.asnumpy(), key.asnumpy())
    np.testing.assert_array_equal(cell.past_value_reparam.asnumpy(), value.asnumpy())


@pytest.mark.parametrize("by_property", [False, True])
def test_the_gradient_reaches_every_parameter(by_property, mode):
    network = Past(by_property)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients = ms.grad(network, None, network.trainable_params())()
    assert len(gradients) == 5
    assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)


def test_dropout_only_while_training(mode):
    cell = PrefixLayer(**GOOD, dropout_rate=0.5)
    assert (cell.set_train(True)()[0].asnumpy() == 0).any()
    assert not (cell.set_train(False)()[0].asnumpy() == 0).any()


@pytest.mark.parametrize("name", ["past_key_reparam", "past_value_reparam"])
def test_a_snapshot_in_init_does_not_pass_unnoticed(name, mode):
    class Attention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.prefix = PrefixLayer(**GOOD)
            self.past = getattr(self.prefix, name)

    with pytest.warns(UserWarning, match="never trains; use `past_key, past_value = self.prefix\\(\\)` in construct"):
        Attention()


def test_a_forward_that_an_init_runs_is_no_snapshot(mode):
    class Trainer:
        def __init__(self):
            self.loss = Past(by_property=True)()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer()


def test_attributes_and_import_path():
    cell = PrefixLayer(**GOOD)
    assert {name: getattr(cell, name) for name in GOOD} == GOOD
    assert cell.dropout_rate == 0.1 and PrefixLayer is ByModule
    assert PrefixLayer(4, 2, 2, 8, 6).mid_dim == 512


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", ["4", 4.0, True, None, 0, -1])
def test_sizes_must_be_positive_ints(name, value):
    with pytest.raises(TypeError, match=f"'{name}' must be a positive int, but got"):
        PrefixLayer(**{**GOOD, name: value})


@pytest.mark.parametrize("name", GOOD)
def test_a_size_below_one_is_a_value_error_too(name):
    with pytest.raises(ValueError, match=f"'{name}' must be a positive int, but got 0"):
        PrefixLayer(**{**GOOD, name: 0})


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"prefix_token_num": 5}, ValueError, "'prefix_token_num' must be a multiple of batch_size, 2, but got 5"),
        ({"dropout_rate": 1.0}, ValueError, "'dropout_rate' must be in \\[0, 1\\), but got 1.0"),
        ({"dropout_rate": -0.5}, ValueError, "'dropout_rate' must be in"),
        ({"dropout_rate": "0.1"}, TypeError, "'dropout_rate' must be a float"),
        ({"dropout_rate": False}, TypeError, "'dropout_rate' must be a float"),
    ],
)
def test_wrong_arguments(changes, error, match):
    with pytest.raises(error, match=match):
        PrefixLayer(**{**GOOD, **changes})

"""LoHa: its formulas, by pairs of columns and as a matrix, and the layers that it is on."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import numbers

from mindpet.delta import LoHaDense
from mindpet.peft import LoHaConfig, get_peft_model

NAMES = [f"mindpet_delta_loha_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")]
SIZES = {"by pairs": (20, 30, 2), "as a matrix": (5, 4, 3)}  # features that go in and come out, rank


def fill(rng, cell):
    """Give what trains in a Cell other values; returns them."""
    for param in cell.trainable_params():
        param.set_data(Tensor(rng.normal(size=param.shape).astype(np.float32)))
    return [param.asnumpy() for param in cell.trainable_params()]


@pytest.mark.parametrize("way", list(SIZES))
def test_the_layer_is_that_of_the_formula(way, mode, rng):
    ins, outs, rank = SIZES[way]
    cell = LoHaDense(ins, outs, rank, 5, activation="relu", compute_dtype=ms.float32, bias_init="ones")
    assert cell.by_pairs == (way == "by pairs")
    assert [(p.name, p.shape) for p in cell.get_parameters()][2:] == list(
        zip(NAMES, [(outs, rank), (rank, ins), (outs, rank), (rank, ins)])
    )
    assert [not param.asnumpy().any() for param in cell.get_parameters()][2:] == [False, False, False, True]
    weight, bias, w1_a, w1_b, w2_a, w2_b = fill(rng, cell)
    x = rng.normal(size=(2, 3, ins)).astype(np.float32)
    expected = weight + 5 / rank * (w1_a @ w1_b) * (w2_a @ w2_b)
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ expected.T + bias, 0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cell.merged_weight().asnumpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(cell.merged_bias().asnumpy(), bias)
    cell.mindpet_delta_loha_w1_a.set_data(Tensor(np.full((outs, rank), np.nan, np.float32)))
    cell.reset()
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ weight.T + bias, 0), atol=1e-5)


@pytest.mark.parametrize("way", list(SIZES))
def test_gradients_are_those_of_the_formula(way, mode, rng):
    ins, outs, rank = SIZES[way]
    cell = LoHaDense(ins, outs, rank, 5, compute_dtype=ms.float32)
    _, _, w1_a, w1_b, w2_a, w2_b = fill(rng, cell)
    x = rng.normal(size=(3, ins)).astype(np.float32)

    def total(x):
        return cell(x).sum()

    got = ms.grad(total, None, [getattr(cell, name) for name in NAMES])(Tensor(x))
    of_matrix = 5 / rank * np.tile(x.sum(0), (outs, 1))
    first, second = of_matrix * (w2_a @ w2_b), of_matrix * (w1_a @ w1_b)
    expected = [first @ w1_b.T, w1_a.T @ first, second @ w2_b.T, w2_a.T @ second]
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one.asnumpy(), other, rtol=1e-4, atol=1e-3)


def test_the_rank_can_be_the_square(rng):
    cell = LoHaDense(40, 40, 3, 3, compute_dtype=ms.float32, weight_init="zeros")
    fill(rng, cell)
    cell.weight.set_data(Tensor(np.zeros((40, 40), np.float32)))
    assert np.linalg.matrix_rank(cell.merged_weight().asnumpy(), tol=1e-3) == 9


CONVOLUTIONS = {
    "of one axis": (lambda: nn.Conv1d(4, 6, 3, has_bias=True), (2, 4, 7)),
    "of two axes": (lambda: nn.Conv2d(4, 6, (3, 2), has_bias=True), (2, 4, 5, 6)),
    "in groups": (lambda: nn.Conv2d(4, 6, 3, group=2, has_bias=True), (2, 4, 5, 6)),
}


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions(name, effective, mode, rng):
    make, shape = CONVOLUTIONS[name]
    network = nn.SequentialCell(make())
    model = get_peft_model(
        network, LoHaConfig(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=effective, init_weights=False)
    )
    values = [param.asnumpy() for param in model.trainable_params()]
    if effective:
        w1_a, w1_b, t1, w2_a, w2_b, t2 = values
        one, other = (np.einsum("pqkl,po,qi->oikl", t, a, b) for t, a, b in ((t1, w1_a, w1_b), (t2, w2_a, w2_b)))
    else:
        w1_a, w1_b, w2_a, w2_b = values
        one, other = w1_a @ w1_b, w2_a @ w2_b
    weight = network[0].weight.asnumpy()
    plain = make()
    plain.weight.set_data(Tensor(weight + 1.5 * (one * other).reshape(weight.shape)))
    plain.bias.set_data(network[0].bias)
    x = Tensor(rng.normal(size=shape).astype(np.float32))
    np.testing.assert_allclose(numbers(model, x), numbers(plain, x), atol=1e-5)
    np.testing.assert_allclose(model.merge_and_unload()[0].weight.asnumpy(), plain.weight.asnumpy(), atol=1e-6)


def test_wrong_arguments_are_all_told():
    with pytest.raises(ValueError, match="'loha_rank' .* got 0.*'loha_alpha' .* got 0.*'rank_dropout' .* got 1.0.*'mo"):
        LoHaDense(4, 6, 0, 0, rank_dropout=1.0, module_dropout=-0.1)

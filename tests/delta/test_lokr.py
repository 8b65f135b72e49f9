"""LoKr: its formulas with whole and factored matrices, and how sizes are split."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import numbers

from mindpet.delta import LoKrDense
from mindpet.delta.lokr import split
from mindpet.errors import ConfigError
from mindpet.peft import LoKrConfig, get_peft_model

# Of 20 inputs and 30 outputs: C is (5, 4) and B (6, 5), and with a factor of 2 (2, 2) and (15, 10).
VARIANTS = {
    "whole": ({"lokr_rank": 3}, {"w1": (5, 4), "w2": (6, 5)}),
    "B in two": ({"lokr_rank": 2}, {"w1": (5, 4), "w2_a": (6, 2), "w2_b": (2, 5)}),
    "both in two": (
        {"lokr_rank": 2, "decompose_both": True},
        {"w1_a": (5, 2), "w1_b": (2, 4), "w2_a": (6, 2), "w2_b": (2, 5)},
    ),
    "C of another size": (
        {"lokr_rank": 2, "decompose_factor": 2, "decompose_both": True},
        {"w1": (2, 2), "w2_a": (15, 2), "w2_b": (2, 10)},
    ),
}


def matrices(cell):
    """C and B."""
    values = {param.name.rpartition("lokr_")[2]: param.asnumpy() for param in cell.get_parameters()}
    return [values[w] if w in values else values[f"{w}_a"] @ values[f"{w}_b"] for w in ("w1", "w2")]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_layer_is_that_of_the_formula(variant, mode, rng):
    arguments, shapes = VARIANTS[variant]
    cell = LoKrDense(20, 30, lokr_alpha=5, activation="relu", compute_dtype=ms.float32, bias_init="ones", **arguments)
    found = {param.name.rpartition("lokr_")[2]: param.shape for param in cell.get_parameters()}
    assert found == {"weight": (30, 20), "bias": (30,), **shapes}
    assert not matrices(cell)[0].any() and matrices(cell)[1].any()
    for param in cell.get_parameters():
        param.set_data(Tensor(rng.normal(size=param.shape).astype(np.float32)))
    weight, bias, x = cell.weight.asnumpy(), cell.bias.asnumpy(), rng.normal(size=(2, 3, 20)).astype(np.float32)
    expected = weight + 5 / arguments["lokr_rank"] * np.kron(*matrices(cell))
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ expected.T + bias, 0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cell.merged_weight().asnumpy(), expected, atol=1e-4)
    np.testing.assert_array_equal(cell.merged_bias().asnumpy(), bias)
    for param in cell.get_parameters():
        if "lokr" in param.name:
            param.set_data(Tensor(np.full(param.shape, np.nan, np.float32)))
    cell.reset()
    np.testing.assert_allclose(numbers(cell, Tensor(x)), np.maximum(x @ weight.T + bias, 0), atol=1e-5)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 12, 100])
def test_a_size_is_split_as_even_as_can_be(factor):
    for size in range(1, 130):
        first, second = split(size, factor)
        assert first * second == size
        if size % factor == 0 and factor > 0:
            assert first == factor
        else:
            pairs = [n for n in range(1, size + 1) if size % n == 0 and n * n <= size and (factor < 0 or n <= factor)]
            assert first == max(pairs)


@pytest.mark.parametrize("init, zero", [(True, "w1"), ("lycoris", "w2_b"), (False, None)])
def test_what_starts_as_zeros(init, zero):
    model = get_peft_model(
        nn.SequentialCell(nn.Dense(20, 30)), LoKrConfig(r=2, target_modules=["0"], init_weights=init)
    )
    names = [param.name.rpartition("lokr_")[2] for param in model.trainable_params() if not param.asnumpy().any()]
    assert names == ([zero] if zero else [])


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("rank, both, group", [(1, False, 1), (1, True, 2), (9, True, 1)])
def test_convolutions(rank, both, group, effective, mode, rng):
    def make():
        return nn.Conv2d(12, 16, (3, 2), group=group, has_bias=True)

    network = nn.SequentialCell(make())
    fields = {"decompose_both": both, "use_effective_conv2d": effective, "init_weights": False}
    model = get_peft_model(network, LoKrConfig(r=rank, alpha=3, target_modules=["0"], **fields))
    values = {param.name.rpartition("lokr_")[2]: param.asnumpy() for param in model.trainable_params()}
    assert set(values) == (
        {"w1", "w2"}
        if rank > 8
        else {"w2_a", "w2_b", *(["w1_a", "w1_b"] if both else ["w1"]), *(["t2"] if effective else [])}
    )
    c = values["w1"] if "w1" in values else values["w1_a"] @ values["w1_b"]
    if "w2" in values:
        b = values["w2"]
    elif effective:
        b = np.einsum("pqhw,pk,qn->knhw", values["t2"], values["w2_a"], values["w2_b"])
    else:
        b = (values["w2_a"] @ values["w2_b"]).reshape(4, -1, 3, 2)
    weight = network[0].weight.asnumpy()
    plain = make()
    plain.weight.set_data(Tensor(weight + 3 / rank * np.kron(c[:, :, None, None], b).astype(np.float32)))
    plain.bias.set_data(network[0].bias)
    x = Tensor(rng.normal(size=(2, 12, 4, 5)).astype(np.float32))
    np.testing.assert_allclose(numbers(model, x), numbers(plain, x), atol=1e-4)
    np.testing.assert_allclose(model.merge_and_unload()[0].weight.asnumpy(), plain.weight.asnumpy(), atol=1e-5)


def test_a_convolution_along_one_axis_is_refused():
    with pytest.raises(ConfigError, match="of a type that cannot carry it: .'0 .Conv1d"):
        get_peft_model(nn.SequentialCell(nn.Conv1d(4, 6, 3)), LoKrConfig(target_modules=["0"]))


def test_wrong_arguments_are_all_told():
    with pytest.raises(ValueError, match="'lokr_rank' .* got 0.*'decompose_both' .* got 1.*'decompose_factor'.* got 0"):
        LoKrDense(4, 6, 0, 1, decompose_both=1, decompose_factor=0)
    with pytest.raises(ValueError, match="'init_weights' must be a bool or 'lycoris', but got 'lora'.*'rank_dropout_s"):
        LoKrConfig(init_weights="lora", rank_dropout_scale=None)
    with pytest.raises(TypeError, match="'decompose_factor' must be an int, but got 1.5"):
        LoKrConfig(decompose_factor=1.5)

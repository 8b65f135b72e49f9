"""The Dense layer with separate types for storage and computation."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpet.layers import Dense


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4), (2, 0, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_formula(shape, has_bias, mode, rng):
    layer = Dense(4, 6, bias_init="normal", has_bias=has_bias, activation="relu")
    x = rng.normal(size=shape).astype(np.float32)
    expected = np.maximum(x @ layer.weight.asnumpy().T + (layer.bias.asnumpy() if has_bias else 0), 0)
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [ms.float16, ms.float32, ms.bfloat16])
@pytest.mark.parametrize("compute_dtype", [ms.float16, ms.float32])
@pytest.mark.parametrize("input_type", [np.float16, np.float32])
def test_types(dtype, compute_dtype, input_type, mode):
    layer = Dense(4, 6, dtype=dtype, compute_dtype=compute_dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer(Tensor(np.ones((2, 4), input_type))).asnumpy().dtype == input_type


def test_computation_happens_in_the_compute_type(mode):
    x = Tensor(np.array([[2049.0, 0, 0, 0]], np.float32))  # float16 has no 2049
    assert Dense(4, 1, "ones")(x).asnumpy() == 2049.0
    assert Dense(4, 1, "ones", compute_dtype=ms.float16)(x).asnumpy() == 2048.0


def test_a_wrong_number_of_features_is_an_error():
    with pytest.raises(ValueError):
        Dense(4, 6)(Tensor(np.ones((2, 2, 6), np.float32))).asnumpy()

"""Formats of quantised weights, against formulas."""

import numpy as np
import pytest

from mindpet.utils.quantization import (
    NF4,
    RANGE,
    SCALE,
    WEIGHT,
    Format,
    dequantize_matrix,
    format_of,
    quantize_matrix,
    quantize_rows,
    rows_of_block,
    scales_of,
)

FORMATS = [Format("int8"), *(Format(bits, 8, double) for bits in ("int4", "nf4") for double in (False, True))]


def nearest(values, table):
    return table[np.abs(values[..., None] - table).argmin(-1)]


def test_int8(rng):
    weight = rng.normal(size=(5, 12)).astype(np.float32)
    weight[2] = 0
    arrays = quantize_matrix(weight, Format("int8"))
    scale = np.abs(weight).max(1) / 127
    np.testing.assert_allclose(arrays[SCALE], scale, rtol=1e-6)
    np.testing.assert_array_equal(arrays[WEIGHT], np.rint(weight / np.where(scale, scale, 1)[:, None]))
    error = np.abs(dequantize_matrix(arrays, Format("int8")) - weight)
    assert (error <= scale[:, None] / 2 + 1e-7).all() and not error[2].any()


@pytest.mark.parametrize("bits, table", [("int4", np.arange(-7, 8) / 7), ("nf4", np.array(NF4))])
def test_groups_of_four_bits(bits, table, rng):
    """The nearest number of the table times the largest of the group."""
    weight = rng.normal(size=(6, 32)).astype(np.float32)
    weight[1, 8:16] = 0
    groups = weight.reshape(6, 4, 8).astype(np.float64)
    largest = np.abs(groups).max(2, keepdims=True)
    expected = nearest(groups / np.where(largest, largest, 1), table) * largest
    got = dequantize_matrix(quantize_matrix(weight, Format(bits, 8, False)), Format(bits, 8, False))
    np.testing.assert_allclose(got, expected.reshape(6, 32), atol=1e-6)


def test_the_code_book_is_that_of_the_paper():
    """QLoRA, section 3: quantiles of the normal distribution, 8 below and 9 above zero, which is there once."""
    from statistics import NormalDist

    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    table = np.sort([*above, 0, *below])
    np.testing.assert_allclose(NF4, table / table.max(), atol=2e-6)


def test_double_quantisation(rng):
    weight = rng.normal(size=(96, 64)).astype(np.float32)
    form = Format("nf4", 8, True)
    arrays, plain = quantize_matrix(weight, form), quantize_matrix(weight, Format("nf4", 8, False))[SCALE]
    assert rows_of_block(96, 8) == 32 and arrays[RANGE].shape == (3, 2) and arrays[SCALE].dtype == np.int8
    blocks = plain.reshape(3, 256)
    mean = blocks.mean(1, keepdims=True)
    step = np.abs(blocks - mean).max(1, keepdims=True) / 127
    np.testing.assert_allclose(arrays[RANGE], np.concatenate([step, mean], 1), rtol=1e-5)
    assert (np.abs(scales_of(arrays) - plain).reshape(3, 256) <= step / 2 * 1.001).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_sizes_and_parts(form, rng, monkeypatch):
    weight = rng.normal(size=(24, 16)).astype(np.float32)
    arrays = quantize_matrix(weight, form)
    assert sum(array.nbytes for array in arrays.values()) == form.nbytes(weight.shape)
    shapes, dtypes = ({name: getattr(a, what) for name, a in arrays.items()} for what in ("shape", "dtype"))
    found, shape = format_of(shapes, dtypes)
    assert shape == (24, 16) and found == (Format("int8") if form.bits == "int8" else form)
    monkeypatch.setattr("mindpet.utils.quantization.CHUNK", 40)  # two rows at a time
    again, largest, relative = quantize_rows(lambda begin, end: weight[begin:end], weight.shape, form, errors=True)
    assert all(np.array_equal(array, again[name]) for name, array in arrays.items())
    error = dequantize_matrix(arrays, form) - weight
    assert largest == np.abs(error).max() and relative == pytest.approx(
        np.sqrt(np.square(error).sum() / np.square(weight).sum())
    )


def test_bits_of_a_large_layer():
    """4 bits, 8 / 64 for the scales, and 2 * 32 / (64 * 256) for what scales them."""
    assert 8 * Format("nf4").nbytes((4096, 4096)) / 4096**2 == 4 + 8 / 64 + 64 / (64 * 256)
    assert 8 * Format("nf4", 64, False).nbytes((4096, 4096)) / 4096**2 == 4 + 32 / 64
    assert 8 * Format("int8").nbytes((4096, 4096)) / 4096**2 == 8 + 32 / 4096


def test_numbers_at_the_edge():
    for form in FORMATS:
        for value in (0.0, 1e-38, 1e-44, 3e38, -3e38):
            weight = np.full((2, 16), value, np.float32)
            got = dequantize_matrix(quantize_matrix(weight, form), form)
            np.testing.assert_allclose(got, weight, rtol=1e-2, atol=1e-40)
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match="NaN or infinite"):
                quantize_matrix(np.full((2, 16), value, np.float32), form)


def test_arrays_of_no_format():
    good = {
        name: (array.shape, array.dtype)
        for name, array in quantize_matrix(np.ones((4, 16), np.float32), FORMATS[4]).items()
    }
    for name, (shape, dtype) in good.items():
        for wrong in ((shape[:1], dtype), ((*shape, 1), dtype), ((0, 0), dtype), (shape, np.dtype(np.float64))):
            changed = {**good, name: wrong}
            with pytest.raises(ValueError, match="not the arrays of a quantised weight"):
                format_of({k: s for k, (s, _) in changed.items()}, {k: d for k, (_, d) in changed.items()})

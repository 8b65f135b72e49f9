"""Formats of quantised weights, in NumPy.

A weight W is a matrix `(out, in)`. Its scales belong to a row (int8), or to a group of a row's numbers that follow one
another (4 bits):

* **int8**: W = q s, with s = max |W| / 127 of a row and q an integer from -127 to 127. Source: absmax quantisation of
  Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, equation 1, for each row.
* **int4**: the same with s = max |W| / 7 of a group, and q from -7 to 7.
* **nf4**: W = t s, with s = max |W| of a group and t the nearest of 16 numbers, of which each is as likely where W is
  normally distributed. Source: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3 and appendix E.
* **double quantisation**: the scales of groups are int8 themselves, s = q step + mean, with a step and a mean for a
  block of whole rows that have at most 256 scales (one row, if it has more). Source: as nf4, which has one mean for all
  blocks, and floating point of 8 bits.

Two numbers of 4 bits are in a byte, the first one in its lower half. The types and shapes of the arrays tell the
format: codes of nf4 are uint8, the others int8, and of int8 the scales are `(out,)`.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable

import numpy as np

from mindpet.utils.hints import Arrays, Shape

# QLoRA, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
INT4 = tuple(float(number) for number in range(-8, 8))
TABLES = {"int4": INT4, "nf4": NF4}  # format -> the 16 numbers that codes of 4 bits stand for
BITS = ("int8", *TABLES)
CODES = {"int8": np.int8, "int4": np.int8, "nf4": np.uint8}  # type of a weight's array
WEIGHT, SCALE, RANGE = "weight", "weight_scale", "weight_scale_range"
SCALES_OF_BLOCK = 256
CHUNK = 2**20  # numbers that are quantised at a time


@dataclass(frozen=True)
class Format:
    """How a weight of a shape is stored.

    Attributes:
        bits: 'int8', 'int4' or 'nf4'.
        group_size: numbers of a row that share a scale, of 4 bits; even.
        double_quant: whether the scales of groups are quantised, too.
    """

    bits: str
    group_size: int = 64
    double_quant: bool = True

    @property
    def is_packed(self) -> bool:
        """Whether it has 4 bits."""
        return self.bits in TABLES

    @property
    def is_double(self) -> bool:
        """Whether its scales are quantised."""
        return self.is_packed and self.double_quant

    def problem(self, shape: Shape) -> str:
        """What speaks against a weight of a shape; empty if nothing does."""
        if len(shape) != 2 or 0 in shape:
            return f"is no matrix, but {list(shape)}"
        if self.is_packed and shape[1] % self.group_size:
            return f"has {shape[1]} input features, which is no multiple of group_size, {self.group_size}"
        return ""

    def shapes(self, shape: Shape) -> dict[str, tuple[Shape, np.dtype]]:
        """Shape and type of the arrays by name, for a weight `(out, in)`."""
        outs, ins = shape
        if not self.is_packed:
            return {WEIGHT: ((outs, ins), np.dtype(np.int8)), SCALE: ((outs,), np.dtype(np.float32))}
        groups = ins // self.group_size
        dtype = np.dtype(np.int8 if self.double_quant else np.float32)
        arrays = {WEIGHT: ((outs, ins // 2), np.dtype(CODES[self.bits])), SCALE: ((outs, groups), dtype)}
        if self.double_quant:
            arrays[RANGE] = ((outs // rows_of_block(outs, groups), 2), np.dtype(np.float32))
        return arrays

    def nbytes(self, shape: Shape) -> int:
        """Bytes that a weight `(out, in)` takes."""
        return sum(math.prod(size) * dtype.itemsize for size, dtype in self.shapes(shape).values())


def format_of(shapes: dict[str, Shape], dtypes: dict[str, np.dtype]) -> tuple[Format, Shape]:
    """The format, and the shape of the weight, that shapes and types of arrays by name tell.

    Raises:
        ValueError: they are those of no format.
    """
    with contextlib.suppress(KeyError, IndexError, ZeroDivisionError, TypeError, ValueError):
        (outs, columns), scale = shapes[WEIGHT], shapes[SCALE]
        is_int8 = len(scale) == 1
        bits = "int8" if is_int8 else "nf4" if dtypes[WEIGHT] == np.uint8 else "int4"
        shape = (outs, columns if is_int8 else 2 * columns)
        form = Format(bits) if is_int8 else Format(bits, shape[1] // scale[1], RANGE in shapes)
        if form.shapes(shape) == {name: (shapes[name], dtypes[name]) for name in shapes}:
            return form, shape
    raise ValueError(f"not the arrays of a quantised weight: {shapes}")


def rows_of_block(outs: int, groups: int) -> int:
    """Rows of a block of scales, a divisor of their number: as many as have at most 256 scales, at least one."""
    most = max(1, SCALES_OF_BLOCK // groups)
    return next(rows for rows in range(min(most, outs), 0, -1) if outs % rows == 0)


def pair_table(bits: str) -> np.ndarray:
    """The two numbers that each byte stands for, `(256, 2)`, float32; the first is that of the smallest code."""
    table, codes = np.array(TABLES[bits], np.float32), np.arange(256) - lowest(bits)
    return np.stack([table[codes & 15], table[codes >> 4 & 15]], 1)


def lowest(bits: str) -> int:
    """What is added to a byte of 4-bit codes for its place in `pair_table`."""
    return -int(np.iinfo(CODES[bits]).min)


def quantize_rows(
    read: Callable[[int, int], np.ndarray], shape: Shape, form: Format, errors: bool = False
) -> tuple[Arrays, float, float]:
    """Quantise a weight that is read some rows at a time.

    Args:
        read: from the number of a row, and that of the row behind the last one, to rows of the weight.
        shape: `(out, in)` of the weight.
        form: the format.
        errors: whether errors are computed. Default: False.

    Returns:
        The arrays by name; the largest absolute error; the root of the mean square error over that of the weight.

    Raises:
        ValueError: a number is not finite.
    """
    arrays = {name: np.empty(size, dtype) for name, (size, dtype) in form.shapes(shape).items()}
    scales = np.empty((shape[0], arrays[SCALE][0].size), np.float32)
    for begin, end in _chunks(shape):
        part = _groups(read(begin, end).astype(np.float32), form)
        if not np.isfinite(part).all():
            raise ValueError("it has NaN or infinite numbers")
        scales[begin:end] = np.abs(part).max(2) / (1 if form.bits == "nf4" else 7 if form.is_packed else 127)
    if form.is_double:
        arrays[SCALE], arrays[RANGE] = _quantize_scales(scales)
        scales = scales_of(arrays)
    else:
        arrays[SCALE] = scales.reshape(arrays[SCALE].shape)
    largest, square, total = 0.0, 0.0, 0.0
    for begin, end in _chunks(shape):
        part = read(begin, end).astype(np.float32)
        arrays[WEIGHT][begin:end] = _encode(_groups(part, form), scales[begin:end, :, None], form)
        if errors:
            error = _decode(arrays[WEIGHT][begin:end], scales[begin:end], form) - part
            largest = max(largest, float(np.abs(error).max()))
            square, total = square + float(np.square(error).sum()), total + float(np.square(part).sum())
    return arrays, largest, math.sqrt(square / total) if total else 0.0


def quantize_matrix(matrix: np.ndarray, form: Format) -> Arrays:
    """The arrays, by name, of a weight `(out, in)`; see `quantize_rows`."""
    return quantize_rows(lambda begin, end: matrix[begin:end], matrix.shape, form)[0]


def dequantize_matrix(arrays: Arrays, form: Format) -> np.ndarray:
    """The weight `(out, in)` that arrays stand for, float32."""
    return _decode(arrays[WEIGHT], scales_of(arrays), form)


def scales_of(arrays: Arrays) -> np.ndarray:
    """The scales `(out, scales of a row)`, float32."""
    if RANGE not in arrays:
        return arrays[SCALE].reshape(len(arrays[SCALE]), -1)
    ranges = arrays[RANGE]
    blocks = arrays[SCALE].reshape(len(ranges), -1).astype(np.float32)
    return (blocks * ranges[:, :1] + ranges[:, 1:]).reshape(arrays[SCALE].shape)


def _chunks(shape: Shape) -> Iterator[tuple[int, int]]:
    rows = max(1, CHUNK // shape[1])
    return ((begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows))


def _groups(part, form):
    """Rows as `(rows, scales of a row, numbers of a scale)`."""
    return part.reshape(len(part), -1, form.group_size if form.is_packed else part.shape[1])


def _quantize_scales(scales):
    """int8 of the scales, and `(step, mean)` of each block."""
    outs, groups = scales.shape
    blocks = scales.reshape(outs // rows_of_block(outs, groups), -1)
    mean = blocks.mean(1, dtype=np.float64, keepdims=True)  # a sum can be beyond float32
    step = np.abs(blocks - mean).max(1, keepdims=True) / 127
    codes = np.rint(np.divide(blocks - mean, step, out=np.zeros(blocks.shape), where=step > 0))
    return codes.astype(np.int8).reshape(scales.shape), np.concatenate([step, mean], 1).astype(np.float32)


def _encode(part, scales, form):
    """The codes of rows in groups, from their scales."""
    with np.errstate(over="ignore"):  # a scale of a denormal number
        numbers = np.divide(part, scales, out=np.zeros_like(part), where=scales != 0)
    if form.bits == "nf4":
        table = np.array(NF4, np.float32)
        codes = np.searchsorted((table[1:] + table[:-1]) / 2, numbers)
    else:
        most = 7 if form.is_packed else 127
        codes = np.rint(np.clip(numbers, -most, most)) + (8 if form.is_packed else 0)
    if not form.is_packed:
        return codes.astype(np.int8).reshape(len(part), -1)
    codes = codes.astype(np.uint8).reshape(len(part), -1)
    return (codes[:, ::2] | codes[:, 1::2] << 4).view(CODES[form.bits])


def _decode(codes, scales, form):
    """The rows that codes stand for."""
    if not form.is_packed:
        return codes.astype(np.float32) * scales
    numbers = pair_table(form.bits)[codes.astype(np.int16) + lowest(form.bits)].reshape(len(codes), scales.shape[1], -1)
    return (numbers * scales[:, :, None]).reshape(len(codes), -1)

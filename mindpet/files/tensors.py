"""Files in safetensors format, tensor by tensor, as NumPy arrays; bfloat16 is MindSpore's NumPy type.

The format: the length of a header as 8 bytes, little-endian; the header, JSON of name -> type, shape, and where in the
rest of the file the bytes begin and end; the bytes, without gaps.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from typing import Callable, Optional

import mindspore as ms
import numpy as np

from mindpet.errors import CheckpointError
from mindpet.utils.files import atomic
from mindpet.utils.hints import Arrays, PathLike, Shape
from mindpet.utils.parse import parse_json
from mindpet.utils.quote import LONGEST_VALUE, quote
from mindpet.utils.validate import is_int

BFLOAT16 = np.dtype(ms.dtype_to_nptype(ms.bfloat16))
TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in TYPES.items()}
LONGEST_HEADER = 100_000_000
MOST_AXES = 32  # that NumPy has in all of its versions
LARGEST = 2**60  # elements, of a shape of NumPy


class TensorFile:
    """A safetensors file to read from.

    Args:
        path: of the file.

    Attributes:
        metadata (dict): str -> str.
        shapes, dtypes (dict): of the tensors by name, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a whole safetensors file, or a name in it cannot be shown.
    """

    def __init__(self, path: PathLike):
        self.path = path
        size = os.path.getsize(path)
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(LONGEST_HEADER, size - 8):
                    raise ValueError(f"a header of {length} bytes")
                header = parse_json(file.read(length))
            _check_header(header)
            check_names(path, header)
            self.metadata = header.pop("__metadata__", {})
            codes = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in TYPES}
            if codes:
                raise CheckpointError(
                    f"{path}: of types that are not read here: {quote(codes)}; known are {list(TYPES)}."
                )
            self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            self.dtypes = {name: TYPES[entry["dtype"]] for name, entry in header.items()}
            self._places = {name: entry["data_offsets"] for name, entry in header.items()}
            self._data = 8 + length
            self._check(size)
        except CheckpointError:
            raise
        except (struct.error, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read, not a whole safetensors file ({size} bytes): {error}"
            ) from error

    def _check(self, file_size):
        end = 0
        for name, (begin, stop) in sorted(self._places.items(), key=lambda item: item[1]):
            size = math.prod(self.shapes[name]) * self.dtypes[name].itemsize
            if begin != end or stop - begin != size:
                raise ValueError(f"{name}: bytes {begin} to {stop}, but {size} from {end} on are expected")
            end = stop
        if file_size != self._data + end:
            raise ValueError(f"{self._data + end} bytes are expected")

    def read(self, name: str) -> np.ndarray:
        """A tensor."""
        return self._read(name, 0, self._places[name][1] - self._places[name][0], self.shapes[name])

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """The rows of a tensor from one number to the one before another."""
        shape = (end - begin, *self.shapes[name][1:])
        row = math.prod(shape[1:]) * self.dtypes[name].itemsize
        return self._read(name, begin * row, end * row, shape)

    def _read(self, name, begin, end, shape):
        """The bytes of a tensor from one to another, as an array."""
        data = bytearray(end - begin)
        with open(self.path, "rb") as file:
            file.seek(self._data + self._places[name][0] + begin)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{self.path}: has become shorter while it was read.")
        return np.frombuffer(data, self.dtypes[name]).reshape(shape)

    def read_all(self) -> Arrays:
        """All tensors by name."""
        return {name: self.read(name) for name in self.shapes}


def check_names(path: PathLike, names: Iterable[str]) -> None:
    """Refuse a file with names that cannot be shown in a line.

    Args:
        path: of the file, for the message.
        names: of its tensors.

    Raises:
        CheckpointError: a name is too long, or has control characters.
    """
    for name in names:
        if len(name) > LONGEST_VALUE or not name.isprintable():
            raise CheckpointError(f"{path}: {quote(name)} is no name of a tensor.")


def _check_header(header):
    """Refuse what has not the structure of a header, by a ValueError."""
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("'__metadata__' must hold texts")
    for name, entry in header.items():
        if name != "__metadata__" and not _is_entry(entry):
            raise ValueError(f"{quote(name)}: {quote(entry)} does not tell type, shape and place of a tensor")


def _is_entry(entry):
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    sizes = isinstance(shape, list) and len(shape) <= MOST_AXES and all(is_int(size) and size >= 0 for size in shape)
    # Without tensors of no elements these would not be in a file.
    possible = sizes and math.prod(max(size, 1) for size in shape) < LARGEST
    return possible and isinstance(place, list) and len(place) == 2 and all(map(is_int, place))


def write_tensors(
    path: PathLike,
    shapes: dict[str, Shape],
    dtypes: dict[str, np.dtype],
    read: Callable[[str], np.ndarray],
    metadata: Optional[dict[str, str]] = None,
) -> None:
    """Write a safetensors file, one tensor after the other; it appears under its name when it is whole.

    Args:
        path: of the file.
        shapes: by name.
        dtypes: by name.
        read: gives the tensor of a name.
        metadata: of the file. Default: None, for `{"format": "pt"}`.

    Raises:
        OSError: the file cannot be written; one that was there is left as it was.
    """
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": CODES[dtypes[name]], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data is aligned
    with atomic(path) as staged, open(staged, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            file.write(np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8))  # without a copy


def save_tensors(path: PathLike, tensors: Arrays, metadata: Optional[dict[str, str]] = None) -> None:
    """Write arrays by name; see `write_tensors`."""
    shapes = {name: value.shape for name, value in tensors.items()}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    write_tensors(path, shapes, dtypes, tensors.__getitem__, metadata)

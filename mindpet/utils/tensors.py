"""Files in safetensors format, tensor by tensor, as NumPy arrays; bfloat16 is MindSpore's NumPy type.

The format: the length of a header as 8 bytes, little-endian; the header, JSON of name -> type, shape, and where in the
rest of the file the bytes begin and end; the bytes, without gaps.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
import struct

import mindspore as ms
import numpy as np

from mindpet.errors import CheckpointError
from mindpet.utils.files import atomic

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
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in TYPES.items()}
LONGEST_HEADER = 100_000_000


class TensorFile:
    """A safetensors file to read from.

    Args:
        path (str): the file.

    Attributes:
        metadata (dict): str -> str.
        shapes, dtypes (dict): of the tensors by name, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a whole safetensors file.
    """

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > LONGEST_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
            self.metadata = header.pop("__metadata__", {})
            codes = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in TYPES}
            if codes:
                raise CheckpointError(f"{path}: of types that are not read here: {codes}; known are {list(TYPES)}.")
            self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            self.dtypes = {name: TYPES[entry["dtype"]] for name, entry in header.items()}
            self._places = {name: entry["data_offsets"] for name, entry in header.items()}
            self._data = 8 + length
            self._check()
        except CheckpointError:
            raise
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            size = os.path.getsize(path)
            raise CheckpointError(f"{path}: not a whole safetensors file ({size} bytes): {error!r}") from error

    def _check(self):
        end = 0
        for name, (begin, stop) in sorted(self._places.items(), key=lambda item: item[1]):
            size = math.prod(self.shapes[name]) * self.dtypes[name].itemsize
            if begin != end or stop - begin != size:
                raise ValueError(f"{name}: bytes {begin} to {stop}, but {size} from {end} on are expected")
            end = stop
        if os.path.getsize(self.path) != self._data + end:
            raise ValueError(f"{self._data + end} bytes are expected")

    def read(self, name):
        """A tensor."""
        begin, stop = self._places[name]
        with open(self.path, "rb") as file:
            file.seek(self._data + begin)
            data = bytearray(file.read(stop - begin))
        return np.frombuffer(data, self.dtypes[name]).reshape(self.shapes[name])

    def read_all(self):
        """All tensors by name."""
        return {name: self.read(name) for name in self.shapes}


def write_tensors(path, shapes, dtypes, read, metadata=None):
    """Write a safetensors file, one tensor after the other; it appears under its name when it is whole.

    Args:
        path (str): the file.
        shapes (dict): name -> shape.
        dtypes (dict): name -> NumPy type.
        read (callable): name -> numpy.ndarray of that shape and type.
        metadata (dict): str -> str. Default: None, for `{"format": "pt"}`.

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
            file.write(read(name).tobytes())


def save_tensors(path, tensors, metadata=None):
    """Write arrays by name; see `write_tensors`."""
    shapes = {name: value.shape for name, value in tensors.items()}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    write_tensors(path, shapes, dtypes, tensors.__getitem__, metadata)

"""Checkpoints of MindSpore, read after a check.

`mindspore.load_checkpoint` takes shapes as they stand: where the bytes of a .ckpt file are more or less than that, it
writes or reads beyond the tensor's memory.
"""

import itertools
import math
import os
from typing import Optional

import mindspore as ms
from google.protobuf.message import DecodeError
from mindspore import Parameter
from mindspore.train.checkpoint_pb2 import Checkpoint

from mindpet.errors import CheckpointError
from mindpet.files.tensors import LARGEST, TensorFile, check_names
from mindpet.utils.hints import PathLike

# Types in a .ckpt file -> bytes of a number. A `str` is read by NumPy, which knows its length.
SIZES = {"Bool": 1, "BFloat16": 2, **{f"Float{bits}": bits // 8 for bits in (16, 32, 64)}}
SIZES.update({f"{kind}{bits}": bits // 8 for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)})


def read_checkpoint(
    path: PathLike, dec_key: Optional[bytes] = None, dec_mode: str = "AES-GCM", crc_check: bool = False
) -> dict[str, Parameter]:
    """The parameters, by name, in a file that ends in .ckpt or .safetensors.

    Args:
        path: of the file.
        dec_key, dec_mode, crc_check: see `mindspore.load_checkpoint`. What is encrypted is trusted.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = os.fspath(path)
    kind = os.path.splitext(path)[1].lstrip(".")
    try:
        if dec_key is None:
            check_checkpoint(path)
        content = ms.load_checkpoint(path, dec_key=dec_key, dec_mode=dec_mode, crc_check=crc_check, format=kind)
    except CheckpointError:
        raise
    except Exception as error:  # MindSpore, protobuf and safetensors each raise their own for a damaged file
        raise CheckpointError(f"{path}: cannot be read ({os.path.getsize(path)} bytes): {error}") from error
    check_names(path, content)
    return {name: value for name, value in content.items() if isinstance(value, Parameter)}


def check_checkpoint(path: PathLike) -> None:
    """Refuse a file whose tensors are not of the bytes that their shapes and types say.

    Raises:
        CheckpointError: a tensor is not, or the file is no checkpoint at all.
    """
    if os.fspath(path).endswith(".safetensors"):
        TensorFile(path)
        return
    with open(path, "rb") as file:
        data = file.read()
    checkpoint = Checkpoint()
    try:
        checkpoint.ParseFromString(data[:-17] if data[-17:-10] == b"crc_num" else data)
    except DecodeError as error:
        raise CheckpointError(f"{path}: cannot be read ({len(data)} bytes): {error}") from error
    check_names(path, (value.tag for value in checkpoint.value))
    for name, parts in itertools.groupby(checkpoint.value, lambda value: value.tag):  # a large tensor is in parts
        parts = [value.tensor for value in parts if value.HasField("tensor")]
        if not parts or parts[-1].tensor_type == "str":
            continue
        shape, dtype = list(parts[-1].dims), parts[-1].tensor_type
        length = sum(len(part.tensor_content) for part in parts)
        is_shape = all(size >= 0 for size in shape) and math.prod(max(size, 1) for size in shape) < LARGEST
        size = 1 if shape == [0] else math.prod(shape)  # so a scalar is written
        if dtype not in SIZES or not is_shape or length != size * SIZES[dtype]:
            raise CheckpointError(f"{path}: {name}: {length} bytes cannot be {shape} of {dtype[:20]!r}.")

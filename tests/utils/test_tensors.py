"""Files in safetensors format."""

import json
import struct

import pytest

from mindpet.errors import CheckpointError
from mindpet.utils.tensors import TensorFile


def test_a_type_that_is_not_read_is_named(tmp_path):
    """The file is whole, so the message must not say that it is damaged."""
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(CheckpointError, match="of types that are not read here: {'w': 'F8_E4M3'}; known are .*'BF16'"):
        TensorFile(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        TensorFile(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        TensorFile(tmp_path / "c.safetensors")

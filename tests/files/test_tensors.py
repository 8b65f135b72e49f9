"""Files in safetensors format."""

import json
import struct

import pytest

from mindpet.errors import CheckpointError
from mindpet.files.tensors import TensorFile


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


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path, header, data=bytes(24)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_file_made_by_hand_is_read(tmp_path):
    file = TensorFile(write(tmp_path / "a.safetensors", {"__metadata__": {"a": "b"}, "w": ENTRY}))
    assert file.shapes == {"w": (2, 3)} and file.metadata == {"a": "b"} and not file.read("w").any()


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"w": 1, "w": 2}',
        [],
        3,
        {"w": 3},
        {"w": {}},
        {"__metadata__": [], "w": ENTRY},
        {"__metadata__": {"a": 1}, "w": ENTRY},
        *({"w": {**ENTRY, "shape": shape}} for shape in ([2.0, 3], [-2, -3], "23", [True, 6], [1] * 99 + [6], None)),
        *({"w": {**ENTRY, "data_offsets": place}} for place in ([0.0, 24], [0], "ab", [0, None], [0, 2**62], {})),
        *({"w": {**ENTRY, "dtype": code}} for code in (["F32"], None, 3)),
        {"w": {**ENTRY, "shape": [0, 2**62], "data_offsets": [0, 0]}},
        {"w" * 1000: ENTRY},
        {"\x1b[2J": ENTRY},
        {"w\nx": ENTRY},
        {"\x1b[2J": 3},
    ],
    ids=range(28),
)
def test_a_header_that_is_wrong_is_one_line(header, tmp_path):
    with pytest.raises(CheckpointError, match="not a whole safetensors file|is no name of a tensor") as caught:
        TensorFile(write(tmp_path / "a.safetensors", header))
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_a_length_of_the_header_beyond_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (90_000_000, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + bytes(20))
        with pytest.raises(CheckpointError, match=f"a header of {length} bytes"):
            TensorFile(path)

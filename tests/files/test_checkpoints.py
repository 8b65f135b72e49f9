"""Checkpoints of MindSpore whose tensors are not what they say."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.train.checkpoint_pb2 import Checkpoint

from mindpet.errors import CheckpointError
from mindpet.files.checkpoints import read_checkpoint

VALUES = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((), np.int64),
    "c.d": np.array([True, False]),
    "e": np.ones((2, 1), np.float16),
}


def save(path, **options):
    ms.save_checkpoint([{"name": key, "data": Tensor(value)} for key, value in VALUES.items()], str(path), **options)
    return path


@pytest.mark.parametrize("ending, options", [("ckpt", {}), ("ckpt", {"crc_check": True}), ("safetensors", {})])
def test_what_mindspore_writes_is_read(ending, options, tmp_path):
    path = save(tmp_path / f"a.{ending}", format=ending, **options)
    found = read_checkpoint(path, **options)
    assert set(found) == set(VALUES)
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found[name].asnumpy().reshape(value.shape), value)


def test_a_tensor_in_parts_is_read(tmp_path):
    checkpoint = Checkpoint()
    for part in (VALUES["a"][:1], VALUES["a"][1:]):
        value = checkpoint.value.add()
        value.tag, value.tensor.tensor_type, value.tensor.tensor_content = "a", "Float32", part.tobytes()
        value.tensor.dims.extend([2, 3])
    (tmp_path / "a.ckpt").write_bytes(checkpoint.SerializeToString())
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "a.ckpt")["a"].asnumpy(), VALUES["a"])


@pytest.mark.parametrize(
    "dims, dtype",
    [([2, 4], "Float32"), ([1], "Float32"), ([2, 3], "Float64"), ([2, 3], "Int8"), ([-2, -3], "Float32")]
    + [([2**40, 2**40], "Float32"), ([0, 2**62], "Float32"), ([2, 3], "Float7"), ([], "Float32"), ([0], "Float32")],
)
def test_sizes_that_the_bytes_are_not_of(dims, dtype, tmp_path):
    """MindSpore itself would write beyond the memory of the tensor."""
    path = save(tmp_path / "a.ckpt")
    checkpoint = Checkpoint()
    checkpoint.ParseFromString(path.read_bytes())
    tensor = checkpoint.value[0].tensor
    tensor.dims[:], tensor.tensor_type = dims, dtype
    path.chmod(0o600)
    path.write_bytes(checkpoint.SerializeToString())
    with pytest.raises(CheckpointError, match="a: 24 bytes cannot be") as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()

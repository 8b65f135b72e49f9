"""Do the ranks of a data-parallel run hold the same?

All ranks must call these functions alike, whatever they hold: each is a collective operation. Outside of data parallel
there is one rank.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.communication import GlobalComm, get_group_size

from mindpet.network.values import digest

WORDS = 4  # int32s of a digest: a CPU gathers no smaller integers


def agree(answer: bool) -> bool:
    """Whether all ranks answer yes."""
    return bool(_gather(np.array([answer], np.int32)).all())


def differences(copies: dict[str, str], digests: list[bytes]) -> list[str]:
    """What the ranks have different copies of: one line, or none if all are the same.

    The ranks first compare one hash of all, and only if it differs those of each parameter.

    Args:
        copies: name of a parameter -> what is the same on all ranks beside its value.
        digests: of the values, in the same order.
    """
    kinds = [digest(np.frombuffer(f"{name} {kind}".encode(), np.uint8)) for name, kind in copies.items()]
    table = np.array([[*_words(kind), *_words(value)] for kind, value in zip(kinds, digests)], np.int32)
    table = table.reshape(-1, 2 * WORDS)  # also if it is empty
    heads = _gather(np.array([len(table), *_words(digest(table))], np.int32))
    if (heads == heads[0]).all():
        return []
    padded = np.zeros((heads[:, 0].max(), 2 * WORDS), np.int32)
    padded[: len(table)] = table
    tables = _gather(padded.ravel()).reshape(len(heads), *padded.shape)
    differs = (tables != tables[0]).any(axis=0)
    row = int(np.argmax(differs.any(axis=1)))
    name = [*copies, *["none"] * len(padded)][row]  # this rank may have fewer
    if differs[row, :WORDS].any():
        what = f"other parameters, shapes, dtypes or trainable ones, from number {row + 1} on, which here is {name!r}"
    else:
        count = np.count_nonzero(differs.any(axis=1))
        what = f"other values of {count} of {len(copies)} parameters, the first of them {name!r}"
    groups = {}  # ranks that hold the same
    for rank, head in enumerate(heads):
        groups.setdefault(head.tobytes(), []).append(f"rank_{rank}")
    ranks = " / ".join(", ".join(group) for group in groups.values())
    return [f"the ranks of data parallel differ: {ranks} have {what} (another seed, or another checkpoint?)"]


def _words(value):
    return np.frombuffer(value, np.int32)


def _gather(row):
    """A row of each rank."""
    mode = ms.get_auto_parallel_context("parallel_mode")
    if mode != ms.ParallelMode.DATA_PARALLEL or not GlobalComm.INITED or get_group_size() == 1:
        return row[None]
    return ops.AllGather()(Tensor(row[None])).asnumpy()

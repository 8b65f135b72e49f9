"""What is written beside an adapter: for which base it was trained, and which files belong together."""

import contextlib
import hashlib
import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

import mindpet
from mindpet.delta._config import CONFIG_NAME
from mindpet.errors import CheckpointError
from mindpet.utils.hints import PathLike
from mindpet.utils.parse import read_json

WEIGHTS_NAME = "adapter_model.safetensors"
PASSPORT_NAME = "mindpet_passport.json"
SAMPLES = 64
# Name of a type that frozen weights can be stored in -> the type.
HALVES = {np.dtype(ms.dtype_to_nptype(dtype)).name: ms.dtype_to_nptype(dtype) for dtype in (ms.float16, ms.bfloat16)}


def make_passport(
    base: dict[str, Union[Parameter, np.ndarray]], network: nn.Cell, step: Optional[int]
) -> dict[str, Any]:
    """What is written beside an adapter: for which base it was trained, with what, and how long."""
    return {
        "mindpet": mindpet.__version__,
        "mindspore": ms.__version__,
        "step": step,
        "base": {
            "network": type(network).__name__,
            "parameters": {path: fingerprint(value) for path, value in base.items()},
        },
    }


def write_passport(staged: pathlib.Path, folder: PathLike, passport: dict[str, Any]) -> None:
    """Write a passport that tells which files belong together: those beside it, or those that are in the folder yet.

    Args:
        staged: a folder with the adapter's new files, and where the passport goes.
        folder: where the files go.
        passport: what `make_passport` returns, or {}.
    """
    passport = {**passport, "files": _digests(staged)}
    with contextlib.suppress(CheckpointError, OSError):
        before = read_passport(folder)
        if before.get("files") == _digests(folder):
            passport["before"] = {key: value for key, value in before.items() if key != "before"}
    (staged / PASSPORT_NAME).write_text(json.dumps(passport, indent=1), encoding="utf-8")


def _digests(folder):
    files = (pathlib.Path(folder) / name for name in (CONFIG_NAME, WEIGHTS_NAME))
    return {path.name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in files}


def check_files(folder: PathLike) -> dict[str, Any]:
    """The passport of the save that an adapter's files are of; an empty dict if there is none.

    Raises:
        CheckpointError: the files are not of one save, or have been changed.
    """
    passport = read_passport(folder)
    if not passport:
        missing = f"{folder}: no {PASSPORT_NAME}: whether the files are whole, and for which base, cannot be told."
        warnings.warn(missing, stacklevel=5)
        return passport
    saves = [save for save in (passport, passport.get("before", {})) if "files" in save]
    here = _digests(folder) if saves else None
    for save in saves:
        if save["files"] == here:
            return save
    if saves:
        raise CheckpointError(
            f"{folder}: {CONFIG_NAME} and {WEIGHTS_NAME} are not those that {PASSPORT_NAME} was written for: of two "
            "saves, damaged, or written by other software since (with force they are used all the same)."
        )
    return passport


def fingerprint(value: Union[np.ndarray, Parameter]) -> str:
    """Shape, type and a hash of up to 64 evenly spaced values, compared in float32.

    Args:
        value: of a Parameter only the samples leave the device.
    """
    if isinstance(value, Parameter):
        dtype = np.dtype(ms.dtype_to_nptype(value.dtype)).name
        flat = value.asnumpy().reshape(-1) if _is_on_host(value) else ops.reshape(value, (-1,))
    else:
        dtype, flat = value.dtype.name, value.reshape(-1)
    places = np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(np.int64)
    if isinstance(flat, Tensor):
        flat = ops.gather(flat, Tensor(places), 0).asnumpy()
    elif flat.size:
        flat = flat[places]
    content = np.ascontiguousarray(flat.astype(np.float32)).tobytes()
    return f"{list(value.shape)} {dtype} {hashlib.sha256(content).hexdigest()[:16]}"


def _is_on_host(param):
    """Whether a Parameter's value is read without a copy from a device, or cannot be gathered there."""
    return param.size == 0 or ms.get_context("device_target") == "CPU"


def read_passport(folder: PathLike) -> dict[str, Any]:
    """The passport of an adapter's folder; an empty dict if there is none.

    Raises:
        CheckpointError: it is not what `write_passport` writes.
    """
    path = pathlib.Path(folder) / PASSPORT_NAME
    if not path.is_file():
        return {}
    passport = read_json(path, CheckpointError)
    if not _is_passport(passport):
        raise CheckpointError(f"{path}: not a passport of mindpet.")
    return passport


def _is_passport(passport):
    """Whether a value has the structure of a passport."""
    if not isinstance(passport, dict):
        return False
    base = passport.get("base", {})
    texts = [base.get("parameters", {}) if isinstance(base, dict) else None, passport.get("files", {})]
    if not all(isinstance(text, dict) and all(isinstance(value, str) for value in text.values()) for text in texts):
        return False
    return "before" not in passport or _is_passport(passport["before"])


def base_problems(
    expected: dict[str, str], base: Mapping[str, Union[Parameter, np.ndarray]], any_precision: bool = False
) -> list[str]:
    """In what a base differs from fingerprints, as texts.

    Args:
        expected: fingerprints by path.
        base: values by path.
        any_precision: whether float32 values may stand for what was in half precision. Default: False.
    """
    problems, print_of = [], _print_as if any_precision else lambda value, other: fingerprint(value)
    for name, print_there in expected.items():
        here = print_of(base[name], print_there) if name in base else None
        if here is None:
            problems.append(f"{name}: not in this base")
        elif here != print_there:
            same_shape = here.rpartition(" ")[0] == print_there.rpartition(" ")[0]
            what = "other values" if same_shape else f"{print_there.rpartition(' ')[0]}, here {here.rpartition(' ')[0]}"
            problems.append(f"{name}: {what}")
    return problems


def check_base(folder: PathLike, passport: dict[str, Any], base: Mapping[str, Union[Parameter, np.ndarray]]) -> None:
    """Refuse an adapter that was trained on another base; one without a passport is taken to fit.

    Args:
        folder: of the adapter, for the message.
        passport: what `check_files` returns.
        base: the base's own values by path.

    Raises:
        CheckpointError: the base differs; the parameters are in the message.
    """
    problems = base_problems(passport.get("base", {}).get("parameters", {}), base, any_precision=True)
    if problems:
        raise CheckpointError(
            f"{folder}: trained on another base, whose parameters differ (with force it is used all the same):\n  "
            + "\n  ".join(problems)
        )


def _print_as(value, other):
    """The fingerprint of a value; where another one was taken in half precision, that of the value in that type."""
    dtype = HALVES.get(other.rpartition(" ")[0].rpartition(" ")[2])
    is_wider = isinstance(value, Parameter) and value.dtype == ms.float32 or value.dtype == np.float32
    if dtype is None or not is_wider:
        return fingerprint(value)
    value = value.asnumpy() if isinstance(value, Parameter) else value
    with np.errstate(over="ignore"):
        return fingerprint(value.astype(dtype))

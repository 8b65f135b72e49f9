"""The files of an adapter: tensors and configuration as Hugging Face PEFT has them, and a passport of the base."""

import dataclasses
import pathlib
import re
from typing import Any, Union

import numpy as np
from mindspore import Parameter

import mindpet
from mindpet.delta._config import CONFIG_NAME, PeftConfig
from mindpet.errors import CheckpointError
from mindpet.files.keys import copied_layer
from mindpet.files.names import PREFIX
from mindpet.files.passport import PASSPORT_NAME, WEIGHTS_NAME, fingerprint, write_passport
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.network.match import listed
from mindpet.utils.files import together
from mindpet.utils.hints import Arrays, PathLike, Shape

FILES = (WEIGHTS_NAME, "adapter_model.bin", PASSPORT_NAME, CONFIG_NAME)  # names that a folder of 'default' has
VERSION = f"0.21.2+mindpet.{mindpet.__version__}"  # of some methods Hugging Face PEFT takes it apart, by PEP 440
DOUBLES = re.compile(r"\.((modules_to_save|original_module)\.bias|num_batches_tracked)$")


def save_adapter(folder: PathLike, config: PeftConfig, tensors: Arrays, passport: dict[str, Any]) -> None:
    """Write an adapter's three files: a reader finds all of this save, or all of the one before.

    A configuration that names no version of Hugging Face PEFT gets the one whose format it has.

    Args:
        folder: of the adapter.
        config: of the adapter.
        tensors: by key.
        passport: see `mindpet.files.passport`.
    """
    config, tensors = config.pack(tensors)
    config = dataclasses.replace(config, peft_version=config.peft_version or VERSION)
    with together(folder, (PASSPORT_NAME, CONFIG_NAME, WEIGHTS_NAME)) as staged:
        save_tensors(staged / WEIGHTS_NAME, tensors)
        (staged / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
        write_passport(staged, folder, passport)


def read_tensors(folder: PathLike) -> Arrays:
    """The tensors of an adapter's folder.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds nothing.
    """
    folder = pathlib.Path(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{folder}: only adapter_model.bin, a pickle of PyTorch; save it again with safetensors, which is the "
                "default of Hugging Face PEFT since 0.6."
            )
        raise FileNotFoundError(f"{folder}: no {WEIGHTS_NAME} in this folder.")
    tensors = TensorFile(folder / WEIGHTS_NAME).read_all()
    if not tensors:
        raise CheckpointError(f"{folder / WEIGHTS_NAME}: holds no tensors.")
    return without_doubles(tensors)


def without_doubles(tensors: Arrays) -> Arrays:
    """The tensors of a file without those that say nothing more.

    With `bias="all"` Hugging Face PEFT has the biases of modules_to_save three times, two of them under names of its
    own; PyTorch's BatchNorms count their batches.
    """
    return {name: value for name, value in tensors.items() if not DOUBLES.search(name)}


def has_statistics(tensors: Arrays, config: PeftConfig) -> bool:
    """Whether a file has running statistics of BatchNorms other than those in modules that are saved as a whole."""
    modules = listed(config.modules_to_save)
    # Those of targets that are copied are in the adapter in any case.
    keys = [key for key in tensors if copied_layer(key, config) is None]
    paths = [f".{key.rpartition('.')[0]}." for key in keys if key.endswith((".running_mean", ".moving_mean"))]
    return any(not any(f".{module}." in path for module in modules) for path in paths)


def check_finite(folder: PathLike, values: Arrays, types: dict[str, np.dtype]) -> None:
    """Refuse what is not finite, in the type of the file or in that of the base's own parameter.

    Args:
        folder: for the message.
        values: by name.
        types: by name, of the parameter of the base that takes the value.

    Raises:
        CheckpointError: some are not finite; all are in the message.
    """
    problems = []
    for name, value in values.items():
        with np.errstate(over="ignore"):
            held = value.astype(types.get(name, value.dtype))
        if not np.isfinite(held.astype(np.float32)).all():
            problems.append(f"{name} as {held.dtype.name}")
    if problems:
        raise CheckpointError(
            f"{folder}: NaN or infinite numbers (with force they are used all the same):\n  " + "\n  ".join(problems)
        )


def take_base_layers(folder: PathLike, tensors: Arrays, weights: dict[str, Union[Parameter, np.ndarray]]) -> None:
    """Take out of `tensors` weights of the base, which Hugging Face PEFT saves with deltas of embeddings.

    Args:
        folder: for the message.
        tensors: by key.
        weights: of the layers, by their path in the PyTorch model.

    Raises:
        CheckpointError: they are not those of this base.
    """
    for path, weight in weights.items():
        theirs = tensors.pop(f"{PREFIX}{path}.base_layer.weight", None)
        if theirs is not None and (theirs.shape != weight.shape or fingerprint(theirs) != fingerprint(weight)):
            raise CheckpointError(
                f"{folder}: trained on another base: the weight {list(weight.shape)} of {path} is not the same."
            )


def check_tensors(
    folder: PathLike, tensors: Arrays, wanted: dict[str, Shape], what: str = "the network, which is unchanged"
) -> None:
    """Refuse tensors that do not fit.

    Args:
        folder: for the message.
        tensors: by key.
        wanted: shapes by key.
        what: what they must fit, for the message. Default: 'the network, which is unchanged'.

    Raises:
        CheckpointError: tensors are missing, surplus, or of the wrong shape or type; all are in the message.
    """
    problems = [f"missing: {key} {list(shape)}" for key, shape in wanted.items() if key not in tensors]
    problems += [f"surplus: {key} {list(tensors[key].shape)}" for key in tensors if key not in wanted]
    for key, shape in wanted.items():
        value = tensors.get(key)
        if value is not None and value.shape != tuple(shape):
            problems.append(f"{key}: {list(shape)} is needed, but it is {list(value.shape)}")
        elif value is not None and value.dtype.kind in "iubc":
            problems.append(f"{key}: must hold floating-point numbers, but is {value.dtype.name}")
    if problems:
        raise CheckpointError(f"{folder}: the adapter does not fit {what}:\n  " + "\n  ".join(problems))


def folder_of(directory: PathLike, adapter_name: str) -> pathlib.Path:
    """The folder of an adapter in a directory of several: 'default' is in the directory itself."""
    return pathlib.Path(directory) / ("" if adapter_name == "default" else adapter_name)


def is_adapter(folder: PathLike) -> bool:
    """Whether a folder has the configuration of an adapter."""
    return (pathlib.Path(folder) / CONFIG_NAME).is_file()

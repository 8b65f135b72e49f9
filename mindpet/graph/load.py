"""Loading a base and what was trained on it."""

import os
import warnings
from collections import Counter
from typing import Optional, Union

from mindspore import Tensor, nn

from mindpet.delta.registry import METHODS
from mindpet.errors import CheckpointError
from mindpet.files.checkpoints import read_checkpoint
from mindpet.graph.distributed import gather_delta
from mindpet.network.parameters import matches, model_parameters, parameter_paths
from mindpet.network.values import load
from mindpet.utils.hints import PathLike
from mindpet.utils.quote import quote
from mindpet.utils.validate import FLOAT_TYPES, Checker

FORMATS = ("ckpt", "safetensors")
# What MindSpore's optimizers and loss scaling add to the checkpoint of a train network.
OPTIMIZER_PREFIXES = (
    "accum",
    "accum_update",
    "adam_m",
    "adam_v",
    "ax_",
    "exp_avg",
    "lamb_m",
    "lamb_v",
    "linear",
    "mean_grad",
    "mean_square",
    "moment",
    "moment1",
    "moment2",
    "moments",
    "prev",
    "stat",
    "step_size",
    "vhat",
)
OPTIMIZER_NAMES = (
    "beta1_power",
    "beta2_power",
    "current_iterator_step",
    "epoch_num",
    "global_step",
    "last_overflow_iterator_step",
    "learning_rate",
    "momentum",
    "scale_sense",
    "step_num",
)


def load_delta(
    network: nn.Cell,
    *files: Union[PathLike, tuple[PathLike, PathLike]],
    strict: bool = True,
    dec_key: Optional[bytes] = None,
    dec_mode: str = "AES-GCM",
    crc_check: bool = False,
) -> None:
    """Load checkpoints of the base and of the delta into a network.

    Keys are paths in the network, see `mindpet.network.parameters.model_parameters`; a parameter's own name will do,
    too. Several files together must hold every parameter of the network. A single file must hold every delta parameter
    and, once the network is frozen, every trainable one: the rest is taken to be in place. Later files win. Keys of old
    checkpoints (`tk_delta` for `mindpet_delta`, `mindpet_delta_lora_A` and `_B`) are understood; state of an optimizer
    and appended scalars are passed over. Values are cast to the type of the parameter.

    The slices of a distributed run are gathered first, see `gather_delta`: evaluation after it is
    `load_delta(network, (base_folder, base_strategy), delta_folder)`.

    Args:
        network: the model, its delta in place.
        files: paths that end in '.ckpt' or '.safetensors'; folders with a folder `rank_N` for each rank; or pairs of
            such a folder and its strategy file.
        strict: whether missing and surplus keys are an error; else they are a warning. Default: True.
        dec_key: key of encrypted files; slices cannot be encrypted. Default: None.
        dec_mode: 'AES-GCM', 'AES-CBC' or 'SM4-CBC'. Default: 'AES-GCM'.
        crc_check: whether to check the CRC that the files were saved with. Default: False.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: no file is given, or one with another ending.
        FileNotFoundError: a file does not exist.
        CheckpointError: a file cannot be read, or keys are missing, surplus or of the wrong shape or type; all of them
            are listed, and the network is unchanged.
    """
    _check_load_arguments(network, files, strict)
    params = model_parameters(network)
    names = _known_names(network, params)
    content = {}
    for file in files:
        content.update(_read(file, names, dec_key, dec_mode, crc_check))
    values = {names[key]: value for key, value in content.items() if key in names}
    missing = _required(params, alone=len(files) == 1) - set(values)
    surplus = [key for key in content if key not in names and not _is_extra(key, content)]
    problems = [f"missing: {name} {params[name].shape}" for name in params if name in missing]
    problems += [f"surplus: {key} {content[key].shape}" for key in surplus]
    misfits = [
        f"{name}: {_text(params[name])} in the network, {_text(value)} in the file"
        for name, value in values.items()
        if not _fits(params[name], value)
    ]
    if misfits or (problems and strict):
        raise CheckpointError(
            f"load_delta: {list(map(str, files))} does not fit the network, which is unchanged:\n  "
            + "\n  ".join(problems + misfits)
        )
    for problem in problems:
        warnings.warn(f"load_delta: {problem}", stacklevel=2)
    for name, param in params.items():  # in this order a base parameter comes before an adapter's copy of it
        if name in values:
            same_type = values[name].dtype == param.dtype  # a cast of bfloat16 to itself has no CPU kernel
            load(param, Tensor(values[name].data) if same_type else Tensor(values[name]).astype(param.dtype))


def _check_load_arguments(network, files, strict):
    check = Checker("load_delta")
    check.require(isinstance(network, nn.Cell), TypeError, "network", network, "a Cell")
    check.require(files, ValueError, "files", files, "at least one path")
    paths = []
    for file in files:
        pair = file if isinstance(file, tuple) and len(file) == 2 else (file,)
        if check.require(all(isinstance(path, (str, os.PathLike)) for path in pair), TypeError, "files", file, "paths"):
            known = len(pair) == 2 or os.path.isdir(file) or _format(file) in FORMATS
            rule = "paths that end in .ckpt or .safetensors, or folders"
            check.require(known, ValueError, "files", file, rule)
            paths += pair
    check.boolean(strict=strict)
    check.done()
    lost = [str(path) for path in paths if not os.path.exists(path)]
    if lost:
        raise FileNotFoundError(f"load_delta: no such file: {lost}.")


def _format(file):
    return os.path.splitext(file)[1].lstrip(".")


def _read(file, names, dec_key, dec_mode, crc_check):
    """The parameters in a file, or in the slices of a folder, by canonical key; see `_known_names`."""
    if isinstance(file, tuple) or os.path.isdir(file):
        content = gather_delta(*file) if isinstance(file, tuple) else gather_delta(file)
    else:
        content = read_checkpoint(file, dec_key, dec_mode, crc_check)
    keys = {}
    for key in content:
        name = _canonical(key)
        keys.setdefault(names.get(name, name), []).append(key)
    twice = [alike for alike in keys.values() if len(alike) > 1]
    if twice:
        raise CheckpointError(f"load_delta: {file}: keys that mean the same parameter: {quote(twice)}.")
    return {_canonical(key): value for key, value in content.items()}


def _canonical(name):
    """One spelling for all historical keys."""
    for old, new in (("tk_delta", "mindpet_delta"), ("delta_lora_A", "delta_lora_a"), ("delta_lora_B", "delta_lora_b")):
        name = name.replace(old, new)
    return name


def _known_names(network, params):
    """What files may call the parameters -> their keys: the keys, and names of their own that leave no doubt.

    A number at the front is no name: MindSpore renames what a network slices in `construct`, and two lists alike. What
    deltas share may have the path of any of them: a file that was converted has it at the first that it names.
    """
    names = {_canonical(key): key for key in params}
    counts = Counter(_canonical(param.name) for param in params.values())
    for key, param in params.items():
        name = _canonical(param.name)
        if counts[name] == 1 and not name.partition(".")[0].isdigit():
            names.setdefault(name, key)
    saved = [pattern for method in METHODS.values() for pattern in method.saved]
    shared = {id(param): key for key, param in params.items() if matches(key, saved)}
    for path, param in parameter_paths(network).items():
        if id(param) in shared:
            names.setdefault(_canonical(path), shared[id(param)])
    return names


def _required(params, alone):
    """The names that the files must hold."""
    constants = [pattern for method in METHODS.values() for pattern in method.constants]
    variable = {name for name in params if not matches(name, constants)}
    if not alone:
        return variable
    deltas = [pattern for m in METHODS.values() if m.cells for pattern in (*m.trainable, *m.saved)]
    frozen = any(not params[name].requires_grad for name in variable)
    return {name for name in variable if matches(name, deltas) or (frozen and params[name].requires_grad)}


def _is_extra(key, content):
    """Whether a key is state of an optimizer or an appended scalar."""
    prefix, _, rest = key.partition(".")
    return key in OPTIMIZER_NAMES or content[key].ndim == 0 or (prefix in OPTIMIZER_PREFIXES and rest in content)


def _fits(param, value):
    same_kind = param.dtype == value.dtype or (param.dtype in FLOAT_TYPES and value.dtype in FLOAT_TYPES)
    return same_kind and param.shape == value.shape


def _text(param):
    return f"{param.shape} {param.dtype}"

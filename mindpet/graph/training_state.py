"""All that decides how a training goes on: values, counters, random states. It is read, compared and set here."""

import contextlib
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

import mindpet
from mindpet.delta.registry import METHODS
from mindpet.errors import CheckpointError
from mindpet.files.passport import base_problems, fingerprint
from mindpet.network.parameters import matches, model_parameters, running_statistics
from mindpet.network.values import assign, load, value_of
from mindpet.utils.hints import Arrays
from mindpet.utils.quote import quote

UNSEEDED = 5489  # MindSpore's seed of datasets that means: another one each time
BASE, ADAPTER, RANDOM = "base.", "adapter.", "random."  # begin the names of tensors that are no Parameters of their own
OF_TRAINING = "training."  # begins those of Parameters that are not the model's


def saved_parameters(network: nn.Cell) -> dict[str, Parameter]:
    """What a checkpoint of what was trained holds: trainable parameters, and what varies with them; see `Method`.

    Running statistics are among it: the network moves them while it trains, so the base's do not fit any more.
    """
    patterns = [pattern for method in METHODS.values() for pattern in method.saved]
    saved = {
        key: param for key, param in model_parameters(network).items() if param.requires_grad or matches(key, patterns)
    }
    return {**saved, **running_statistics(network)}


class Training(NamedTuple):
    """What trains: the parts of a `Model`, as callbacks are given them.

    Attributes:
        network: the user's model.
        train_network: with loss and optimizer around it.
        loss_scale: a LossScaleManager, or None.
        dataset: what it trains on.
    """

    network: nn.Cell
    train_network: nn.Cell
    loss_scale: Any
    dataset: ds.Dataset

    def trained(self) -> dict[str, Parameter]:
        """What moves: the model's parameters that train, and the state of optimizer, loss scale and training cells."""
        of_model = {id(param) for param in model_parameters(self.network).values()}
        counts, params = Counter(), saved_parameters(self.network)
        for param in self.train_network.get_parameters():
            if id(param) not in of_model:
                name = OF_TRAINING + param.name
                counts[name] += 1
                params[name if counts[name] == 1 else f"{name}#{counts[name]}"] = param
        return params

    def base(self) -> dict[str, Parameter]:
        """What does not move."""
        saved = {id(param) for param in saved_parameters(self.network).values()}
        return {key: param for key, param in model_parameters(self.network).items() if id(param) not in saved}

    def has_dropout(self) -> bool:
        """Whether an `nn.Dropout` of it does something."""
        return bool(_dropouts(self.train_network))

    def keepers(self) -> list[nn.Cell]:
        """The Cells that keep values outside of Parameters, as a PeftModel those of adapters that are not active."""
        return [cell for _, cell in self.train_network.cells_and_names() if hasattr(type(cell), "kept_values")]

    def facts(self) -> dict[str, Any]:
        """What must be equal where the training goes on."""
        rates = {name: param.asnumpy().tolist() for name, param in self.trained().items() if "learning_rate" in name}
        return {
            "network": type(self.network).__name__,
            "mode": "graph" if ms.get_context("mode") == ms.GRAPH_MODE else "PyNative",
            "optimizer": [_settings(cell) for cell in _optimizers(self.train_network)],
            "learning rates at the start": rates,
            "loss scale": self.loss_scale and type(self.loss_scale).__name__,
            "dropout": [dropout.keep_prob for dropout in _dropouts(self.train_network)],
            "adapters": [cell.kept_facts() for cell in self.keepers()],
            "dataset": {
                "batches": self.dataset.get_dataset_size(),
                "rows of a batch": self.dataset.get_batch_size(),
                "columns": self.dataset.get_col_names(),
            },
            "seed": {"mindspore": ms.get_seed(), "dataset": ds.config.get_seed()},
        }


class Start(NamedTuple):
    """What a training began with, which all of its states tell.

    Attributes:
        facts: see `Training.facts`.
        prints: fingerprint of each parameter of the base.
    """

    facts: dict[str, Any]
    prints: dict[str, str]

    @classmethod
    def of(cls, training: Training) -> "Start":
        """That of a training that begins now."""
        return cls(training.facts(), {key: fingerprint(param) for key, param in training.base().items()})


def read_state(training: Training, start: Start, step: int) -> tuple[Arrays, dict[str, Any]]:
    """Everything there is to save after a step.

    Returns:
        The tensors, and a record for JSON.
    """
    tensors = {name: value_of(param) for name, param in training.trained().items()}
    for name, param in training.base().items():  # buffers that the network moves, but does not train
        if fingerprint(param) != start.prints.get(name):
            tensors[BASE + name] = value_of(param)
    for cell in training.keepers():
        tensors.update({ADAPTER + name: value for name, value in cell.kept_values().items()})
    arrays, generators = _read_random()
    tensors.update(arrays)
    record = {
        "mindpet": mindpet.__version__,
        "mindspore": ms.__version__,
        "step": step,
        "facts": start.facts,
        "base": start.prints,
        "names": {name: param.name for name, param in training.trained().items()},  # that MindSpore's strategies have
        "random": generators,
        "loss scale": _numbers(training.loss_scale) if training.loss_scale else {},
    }
    return tensors, record


def is_state(tensors: Arrays, record: Any) -> bool:
    """Whether that is what `read_state` gave."""
    keys = {"facts", "base", "random", "loss scale", "runs", "prefix"}
    return record.keys() >= keys and all(RANDOM + name in tensors for name in ("mindspore", "numpy", "python"))


def problems(training: Training, tensors: Arrays, record: dict[str, Any], is_elastic: bool) -> list[str]:
    """What speaks against going on with a state.

    Args:
        training: that is to go on.
        tensors, record: of the state.
        is_elastic: whether it is of another number of ranks, which have other batches.
    """
    facts = training.facts()
    there = {**record["facts"], "dataset": dict(record["facts"]["dataset"])}
    if is_elastic:
        there["dataset"]["rows of a batch"] = facts["dataset"]["rows of a batch"]
    if any(param.name == "global_step" and param.asnumpy().any() for param in training.trained().values()):
        there.pop("learning rates at the start")  # this optimizer has made steps
        facts.pop("learning rates at the start")
    told = list(_differences("", there, facts))
    base, params = training.base(), training.trained()
    here = {name: (param.shape, np.dtype(ms.dtype_to_nptype(param.dtype))) for name, param in params.items()}
    for cell in training.keepers():
        here.update({ADAPTER + name: (value.shape, value.dtype) for name, value in cell.kept_values().items()})
    names = [name for name in tensors if not name.startswith((BASE, RANDOM))]
    told += [f"{name}: not in this training" for name in names if name not in here]
    told += [f"{name}: not in the state" for name in here if name not in names]
    for name, (shape, dtype) in here.items():
        there = (tensors[name].shape, tensors[name].dtype) if name in names else (shape, dtype)
        if there != (shape, dtype):
            told.append(f"{name}: {there[0]} {there[1]} there, {shape} {dtype} here")
    told += [f"base: {name}: not in that one" for name in base if name not in record["base"]]
    still = {name: there for name, there in record["base"].items() if BASE + name not in tensors or name not in base}
    return told + [f"base: {problem}" for problem in base_problems(still, base)]


def write_state(training: Training, tensors: Arrays, record: dict[str, Any]) -> None:
    """Set what was saved, but for random states; see `problems`."""
    for name, param in training.trained().items():
        assign(param, Tensor(tensors[name]))
    for name, param in training.base().items():
        if BASE + name in tensors:
            load(param, Tensor(tensors[BASE + name]))
    for cell in training.keepers():
        cell.keep_values({name: tensors[ADAPTER + name] for name in cell.kept_values()})
    if training.loss_scale:
        vars(training.loss_scale).update({name: record["loss scale"][name] for name in _numbers(training.loss_scale)})


def _differences(name, there, here):
    """A text for each fact that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(f"{name}{': ' if name else ''}{key}", there.get(key), here.get(key))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for one, other in zip(there, here):
            yield from _differences(name, one, other)
    elif there != here:
        yield f"{name}: {quote(there)} there, {quote(here)} here"


# Optimizers and loss scales


def _optimizers(network):
    return [cell for _, cell in network.cells_and_names() if isinstance(cell, nn.Optimizer)]


def _settings(optimizer):
    """The class of an optimizer and what it was made with, its schedules too, as far as JSON has it."""
    usual = vars(nn.Cell())
    settings = {}
    for path, cell in optimizer.cells_and_names():
        of_cell = {"class": type(cell).__name__}
        for name, value in vars(cell).items():
            plain = _plain(value)
            if name not in usual and not name.startswith("_") and name != "param_rank" and plain is not None:
                of_cell[name] = plain
        settings[path or "itself"] = of_cell
    return settings


def _plain(value):
    """A setting as JSON has it, a Tensor as the digest of its numbers; None for anything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and not isinstance(value, Parameter):
        numbers = value.asnumpy()
        return numbers.item() if numbers.ndim == 0 else hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()
    if isinstance(value, (list, tuple)):
        plain = [_plain(inner) for inner in value]
        return plain if plain and None not in plain else None
    return None


def _numbers(manager):
    return {name: value for name, value in vars(manager).items() if isinstance(value, (bool, int, float))}


# Random states


def _kernel_seeds():
    """MindSpore's numbers of how often functions such as `ops.dropout` drew; in 2.7 to 2.10 nothing else tells."""
    return sys.modules["mindspore.common.seed"]._KERNEL_SEED  # the package has a function of the same name


def _read_random():
    """The random states of MindSpore, NumPy and Python: arrays, and the rest for JSON."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    if not isinstance(numpy_state, tuple):
        raise CheckpointError(f"NumPy's random generator is {numpy_state['bit_generator']}, not MT19937.")
    arrays = {
        RANDOM + "mindspore": ms.get_rng_state().asnumpy(),
        RANDOM + "numpy": numpy_state[1],
        RANDOM + "python": np.array(python_state[1], np.uint32),
    }
    rest = {
        "numpy": [numpy_state[0], *numpy_state[2:]],
        "python": [python_state[0], python_state[2]],
        "mindspore": [[*key, value] for key, value in _kernel_seeds().items()],
    }
    return arrays, rest


def set_random(tensors: Arrays, record: dict[str, Any], of_numpy: bool = True, of_python: bool = True) -> None:
    """Set the random states.

    Args:
        tensors, record: of the state.
        of_numpy: whether NumPy's is set. Default: True.
        of_python: whether Python's is set. Default: True.
    """
    rest = record["random"]
    ms.set_rng_state(Tensor(tensors[RANDOM + "mindspore"]))
    _kernel_seeds().clear()
    _kernel_seeds().update({tuple(key): value for *key, value in rest["mindspore"]})
    if of_numpy:
        name, *numbers = rest["numpy"]
        np.random.set_state((name, tensors[RANDOM + "numpy"], *numbers))
    if of_python:
        version, gauss = rest["python"]
        random.setstate((version, tuple(tensors[RANDOM + "python"].tolist()), gauss))


class RepeatableDropout(ops.Dropout):
    """The Dropout operator of an `nn.Dropout`, which computes `ops.dropout` in PyNative mode: each call has new seeds.

    The operator's kernel goes on with random numbers of its own, which cannot be read or set; on a CPU they depend on
    how MindSpore (2.7 to 2.10) divides the work after some calls, so that even an equal run draws others.
    """

    def __call__(self, x):
        return ops.dropout(x, 1 - self.keep_prob), None


def _dropouts(network):
    """The operators of all `nn.Dropout` that do something."""
    cells = [cell for _, cell in network.cells_and_names() if isinstance(cell, nn.Dropout)]
    return [cell.dropout for cell in cells if cell.dropout.keep_prob < 1]


@contextlib.contextmanager
def repeatable_dropout(network: nn.Cell) -> Iterator[None]:
    """A context in which the Dropouts of a network draw what follows from `set_random`; in PyNative mode alone."""
    changed = [dropout for dropout in _dropouts(network) if type(dropout) is ops.Dropout]
    for dropout in changed:
        dropout.__class__ = RepeatableDropout
    try:
        yield
    finally:
        for dropout in changed:
            dropout.__class__ = ops.Dropout

"""Is it learning, and what does it cost?"""

import warnings
from typing import NamedTuple, Optional

import mindspore as ms
from mindspore import nn
from mindspore.train import RunContext

from mindpet.errors import NotLearningError
from mindpet.graph.callback import TrainCallback, model_of
from mindpet.graph.ranks import agree, differences
from mindpet.network.parameters import model_parameters, running_statistics, trainable_parameters
from mindpet.network.recompute import warn_of_dropout
from mindpet.network.values import digest
from mindpet.utils.validate import Checker


class Summary(NamedTuple):
    """What trains and what it takes; `str()` is one line.

    Attributes:
        trainable: number of trainable values.
        total: number of all values.
        weight_bytes: all parameters.
        gradient_bytes: gradients of the trainable parameters.
        optimizer_bytes: state of the optimizer; without one given, two moments a trainable value, as Adam has.
    """

    trainable: int
    total: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def share(self) -> float:
        """Trainable values in percent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return (
            f"trainable parameters {self.trainable:,} of {self.total:,} ({self.share:.4f} %); "
            f"bytes: weights {self.weight_bytes:,}, gradients {self.gradient_bytes:,}, "
            f"optimizer state {self.optimizer_bytes:,}"
        )


def summary(network: nn.Cell, optimizer: Optional[nn.Optimizer] = None) -> Summary:
    """Count the parameters of a network and the bytes that training it takes.

    Args:
        network: a model, frozen or not.
        optimizer: whose state is counted. Default: None, which counts two moments a trainable value.
    """
    params = model_parameters(network)
    trainable = [param for param in params.values() if param.requires_grad]
    gradient_bytes = _nbytes(trainable)
    known = set(map(id, params.values()))
    state = [param for param in optimizer.get_parameters() if id(param) not in known] if optimizer else None
    return Summary(
        sum(param.size for param in trainable),
        sum(param.size for param in params.values()),
        _nbytes(params.values()),
        gradient_bytes,
        2 * gradient_bytes if state is None else _nbytes(state),
    )


def _nbytes(params):
    return sum(param.size * param.itemsize for param in params)


class DeltaGuard(TrainCallback):
    """Checks that what should train moves and what is frozen does not.

    It prints the network's `summary` when training begins. After `steps` steps it compares every parameter with what
    it was: a trainable one must have changed, a frozen one must be the same bit for bit. It keeps one hash a
    parameter, and fetches one parameter at a time. A first step moves only some of a fresh delta (LoRA's A gets no
    gradient while B is zero), and loss scaling may skip steps: leave `steps` some room.

    Running statistics of BatchNorms are no weights, but buffers that follow the data: they may move or stay, but must
    not be trainable. After every step, what is trainable must be what it was when training began: an optimizer goes on
    with what it was given, so what another adapter brings, or what is set to train later, would not train. Dropout in
    Cells that recompute is a warning, see `mindpet.network.recompute.warn_of_dropout`.

    In data parallel, where every rank has a copy of the network, the copies must be the same at the first look: when
    training begins, or after the first step if only that gives the parameters their values (`parameter_broadcast` of
    the parallel context). The ranks compare hashes; every one of them must have a DeltaGuard. Parameters that are
    `layerwise_parallel` are left out. In semi-auto parallel it is `gather_delta` that compares.

    Args:
        steps: after how many steps it looks; at the end of training, if that comes first. Default: 10.
        strict: whether a finding is an error; else it is a warning. Default: True.

    Raises:
        TypeError, ValueError: an argument is wrong.
        NotLearningError: while training; the message names the parameters, and the ranks if these differ.
    """

    def __init__(self, steps: int = 10, strict: bool = True):
        super().__init__()
        check = Checker("DeltaGuard")
        check.positive_int(steps=steps)
        check.boolean(strict=strict)
        check.done()
        self.steps = steps
        self.strict = strict
        self._watched = None  # name -> Parameter, whether it trains, hash; empty once they have been compared
        self._trainable = {}
        self._first_step = 0  # when these two were taken

    def on_train_begin(self, run_context: RunContext) -> None:
        """Print the summary and remember the parameters."""
        callback_params = run_context.original_args()
        network = model_of(callback_params)
        params, statistics = model_parameters(network), running_statistics(network)
        buffers = f"; running statistics, which follow the data: {len(statistics)}" if statistics else ""
        print(f"DeltaGuard: {summary(network, callback_params.get('optimizer'))}{buffers}", flush=True)
        trained = [name for name, param in statistics.items() if param.requires_grad]
        problems = [f"running statistics that are trainable: {trained} (buffers, not weights)"] if trained else []
        if not any(param.requires_grad for param in params.values()):
            problems.append("nothing is trainable")
        # In a parallel mode, parameters get their values and slices only when the network is compiled.
        self._watched = None
        are_known = not ms.get_auto_parallel_context("parameter_broadcast") and not any(
            param.has_init for param in params.values()
        )
        if agree(are_known):
            problems += self._first_look(callback_params)
        self._report(problems)
        warn_of_dropout(network)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Compare once `steps` steps are done."""
        callback_params = run_context.original_args()
        if self._watched is None:
            self._report(self._first_look(callback_params))
        elif self._other_trainable(callback_params):
            self._remember(callback_params)
        elif self._watched and callback_params.cur_step_num - self._first_step >= self.steps:
            self._compare(callback_params)

    def on_train_end(self, run_context: RunContext) -> None:
        """Compare, if training was too short for `on_train_step_end` to; one step is too few to tell."""
        callback_params = run_context.original_args()
        if self._watched and callback_params.cur_step_num - self._first_step < 2:
            warnings.warn("DeltaGuard: training was too short to tell whether it learns.", stacklevel=2)
        elif self._watched:
            self._compare(callback_params)

    def _first_look(self, callback_params):
        """Remember the parameters; returns what differs between ranks, which all come here at the same time."""
        self._remember(callback_params)
        shared = {name: entry for name, entry in self._watched.items() if not entry[0].layerwise_parallel}
        copies = {name: f"{param.shape} {param.dtype} {trains}" for name, (param, trains, _) in shared.items()}
        return differences(copies, [value for _, _, value in shared.values()])

    def _remember(self, callback_params):
        network = model_of(callback_params)
        buffers = running_statistics(network)
        weights = {name: param for name, param in model_parameters(network).items() if name not in buffers}
        self._watched = {name: (param, param.requires_grad, digest(param.asnumpy())) for name, param in weights.items()}
        self._trainable = trainable_parameters(network)
        self._first_step = callback_params.cur_step_num

    def _other_trainable(self, callback_params):
        """Report what is trainable now and was not, and the reverse; returns whether there is any."""
        now = trainable_parameters(model_of(callback_params))
        new = [name for name, param in now.items() if self._trainable.get(name) is not param]
        gone = [name for name, param in self._trainable.items() if now.get(name) is not param]
        if new or gone:
            changes = f"new ones {new}, gone ones {gone}"
            self._report([f"the trainable parameters changed while training: {changes} (set_adapter, or freezing?)"])
        return bool(new or gone)

    def _compare(self, callback_params):
        watched, self._watched = self._watched, {}
        moved = {name for name, (param, _, before) in watched.items() if digest(param.asnumpy()) != before}
        still = [name for name, (_, trains, _) in watched.items() if trains and name not in moved]
        changed = [name for name, (_, trains, _) in watched.items() if not trains and name in moved]
        steps = callback_params.cur_step_num - self._first_step
        problems = []
        if still:
            problems.append(
                f"trainable but unmoved after {steps} steps: {still} (no path from it to the loss, a "
                "learning rate of zero, or an optimizer that was not given it)"
            )
        if changed:
            problems.append(f"frozen but changed after {steps} steps: {changed} (frozen after the optimizer was made?)")
        self._report(problems)

    def _report(self, problems):
        message = "DeltaGuard: " + "; ".join(problems) + "."
        if problems and self.strict:
            raise NotLearningError(message)
        if problems:
            warnings.warn(message, stacklevel=2)

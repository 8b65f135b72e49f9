"""Going on with a training that was interrupted."""

import contextlib
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any, Optional, Union

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore.parallel.auto_parallel import AutoParallel
from mindspore.train import Callback, Model, RunContext

from mindpet.errors import CheckpointError
from mindpet.graph.callback import TrainCallback, model_of
from mindpet.graph.distributed import place_among_ranks
from mindpet.graph.state_files import choose, read, steps
from mindpet.graph.state_writer import RESUMED
from mindpet.graph.training_state import Training, is_state, problems, repeatable_dropout, set_random, write_state
from mindpet.utils.hints import PathLike
from mindpet.utils.sharding import PARALLEL_MODES
from mindpet.utils.validate import Checker, is_int


def resume(
    model: Model,
    directory: PathLike,
    epoch: int,
    train_dataset: ds.Dataset,
    callbacks: Union[Callback, list[Callback], None] = None,
    *,
    step: Optional[int] = None,
    missing_ok: bool = False,
    replay: bool = True,
    **options: Any,
) -> int:
    """Go on with a training that `TrainableParamsCheckPoint(directory, resumable=True)` saved, to its end.

    It stands in place of `model.train(epoch, train_dataset, callbacks, ...)` of a script that otherwise does what it
    did the first time: the same seed, base, deltas, optimizer and dataset. It restores the last step that is complete
    of all ranks, and trains the rest, from the middle of an epoch if need be. The network ends with the bits that it
    would have had without the interruption.

    Restored are what trains, the optimizer, loss scale, learning rate, buffers that the network moves, inactive
    adapters, MindSpore's, NumPy's and Python's random state, the place in the dataset, and the number of the step that
    callbacks see.

    Args:
        model: with a network and an optimizer as at the start of the training.
        directory: of the checkpoints, as `TrainableParamsCheckPoint` got it.
        epoch: when the training is over, counted from its start; it may be more than was planned.
        train_dataset: as the training had it.
        callbacks: of the training; with a `TrainableParamsCheckPoint` that is resumable, it can be resumed again.
            Default: None.
        step: the step to go on after. Default: None, for the last one.
        missing_ok: whether the training starts from the beginning if no step is complete, so that a script can call
            this the first time, too. Default: False.
        replay: whether the data that was used is made again and dropped, which random changes of the data need. If
            not, MindSpore skips it where that is fast: exact for data that is only shuffled. Default: True.
        options: further ones of `Model.train`, or with `valid_dataset` of `Model.fit`.

    Returns:
        After which step it went on; 0 if from the beginning.

    Raises:
        TypeError, ValueError: an argument is wrong.
        CheckpointError: no step is complete, or not this one; it cannot be read; base, network, optimizer, dataset,
            seed or mode are others: all differences are in the message, and nothing is changed.
    """
    _check(model, directory, epoch, train_dataset, callbacks, step, missing_ok, replay, options)
    callbacks = [] if callbacks is None else list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    train = model.fit if "valid_dataset" in options else model.train
    chosen = choose(directory, step)
    if chosen is None:
        if missing_ok and step is None:
            train(epoch, train_dataset, callbacks=callbacks, **options)
            return 0
        there = sorted({str(other.step) for other in steps(directory) if other.ranks()}, key=int)
        what = "no step" if step is None else f"not step {step}"
        raise CheckpointError(
            f"resume: {os.fspath(directory)!r} has {what} that is complete of all ranks; complete are: "
            f"{', '.join(there) or 'none'}."
        )
    tensors, record = _restore(model, train_dataset, directory, chosen, epoch, options)
    done = chosen.step
    size = _steps_of_an_epoch(train_dataset, options)
    if done >= epoch * size:
        warnings.warn(f"resume: {chosen.path}: {done} steps are done, which is the whole training.", stacklevel=2)
        return done
    is_graph = ms.get_context("mode") == ms.GRAPH_MODE
    dropout = contextlib.nullcontext() if is_graph else repeatable_dropout(model.train_network)
    with dropout, _at(train_dataset, done, replay):
        going_on = _GoOn(done, tensors, record, done % size == 0)
        train(epoch, train_dataset, callbacks=[going_on, *callbacks], initial_epoch=done // size, **options)
    return done


def _check(model, directory, epoch, train_dataset, callbacks, step, missing_ok, replay, options):
    check = Checker("resume")
    if check.require(isinstance(model, Model), TypeError, "model", model, "a mindspore.train.Model"):
        # It sets the parallel context only while Model trains, too late for the check of what is restored.
        is_auto = isinstance(model._network, AutoParallel)
        rule = "a Model whose parallel mode is set by set_auto_parallel_context"
        check.require(not is_auto, ValueError, "model", "AutoParallel", rule)
    check.require(isinstance(directory, (str, os.PathLike)), TypeError, "directory", directory, "a path")
    check.positive_int(epoch=epoch)
    check.require(isinstance(train_dataset, ds.Dataset), TypeError, "train_dataset", train_dataset, "a Dataset")
    each = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks is not None else []
    known = all(isinstance(callback, Callback) for callback in each)
    check.require(known, TypeError, "callbacks", callbacks, "a Callback, a list of them or None")
    check.require(step is None or is_int(step), TypeError, "step", step, "an int or None")
    check.boolean(missing_ok=missing_ok, replay=replay)
    check.require("initial_epoch" not in options, TypeError, "initial_epoch", options, "left out: the state tells it")
    check.done()


def _restore(model, dataset, directory, chosen, epoch, options):
    """Set what a step has; all that speaks against it is one error, and then nothing is set."""
    (rank, ranks), there = place_among_ranks(), chosen.ranks()
    sharded = ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES
    if sharded and ranks != there:
        raise CheckpointError(
            f"resume: {chosen.path} is of {there} ranks, but here are {ranks}; reshard_state cuts it for them."
        )
    tensors, record = read(chosen, rank % there, there)
    if not is_state(tensors, record):
        raise CheckpointError(f"resume: {chosen.path}: not a state that TrainableParamsCheckPoint has saved.")
    if sharded:  # parameters get their slices when the network is compiled
        model.build(dataset, epoch=epoch, sink_mode=options.get("dataset_sink_mode", False))
    # MindSpore 2.7 to 2.10 give these to callbacks only; a training must not begin before they are checked.
    network = model_of({"network": model._network, "train_network": model.train_network})
    training = Training(network, model.train_network, model._loss_scale_manager, dataset)
    told = problems(training, tensors, record, is_elastic=ranks != there)
    if told:
        raise CheckpointError(
            f"resume: {chosen.path} is of another training; nothing is changed:\n  " + "\n  ".join(told)
        )
    write_state(training, tensors, record)
    return tensors, {**record, "directory": os.path.realpath(directory)}


def _steps_of_an_epoch(dataset, options):
    """How many steps `Model.train` takes for an epoch: with a sink as many as are sunk at a time."""
    sink_size = options.get("sink_size", -1)
    sinks = options.get("dataset_sink_mode", False) and ms.get_context("device_target") != "CPU"
    return sink_size if sinks and sink_size > 0 else dataset.get_dataset_size()


@contextlib.contextmanager
def _at(dataset, step, replay) -> Iterator[None]:
    """Have a dataset begin after a step, with the order of data that it would have then."""
    fast = ds.config.get_fast_recovery()
    ds.config.set_fast_recovery(not replay)
    dataset.set_init_step(step)
    try:
        yield
    finally:
        dataset.set_init_step(0)
        ds.config.set_fast_recovery(fast)


class _GoOn(TrainCallback):
    """Has a training go on after a step; it is the first of the callbacks.

    What the data pipeline draws from NumPy's and Python's global generators is drawn again while it catches up, from
    the seed that the script sets. So where these have moved when the first batch arrives, they stay.

    Args:
        step: after which.
        tensors, record: the state.
        is_between: whether that was the last step of an epoch.
    """

    def __init__(self, step, tensors, record, is_between):
        super().__init__()
        self.step, self.tensors, self.record, self.is_between = step, tensors, record, is_between
        self.before = _global_generators()
        self.has_begun = False

    def on_train_begin(self, run_context: RunContext) -> None:
        """Have callbacks see the number of the step."""
        callback_params = run_context.original_args()
        callback_params.cur_step_num = self.step
        callback_params[RESUMED] = self.record
        self.is_python = _runs_python(callback_params.train_dataset)

    def on_train_epoch_begin(self, run_context: RunContext) -> None:
        """Set the random states, if the training was interrupted between epochs."""
        if self.is_between and not self.is_python:
            self._set_random()

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Set the random states, if it was interrupted within one."""
        if not self.has_begun:
            self._set_random()

    def _set_random(self):
        if self.has_begun:
            return
        self.has_begun = True
        drawn = [one != other for one, other in zip(_global_generators(), self.before)] if self.is_python else [0, 0]
        set_random(self.tensors, self.record, *(not moved for moved in drawn))
        for name, moved in zip(("NumPy", "Python"), drawn):
            if moved:
                warnings.warn(
                    f"resume: {name}'s random state has moved since the training went on, as by functions in the data "
                    "pipeline; it is left there.",
                    stacklevel=2,
                )


def _global_generators():
    return str(np.random.get_state(legacy=False)["state"]), random.getstate()


def _runs_python(dataset):
    """Whether a data pipeline calls Python functions, which may draw from the global generators."""
    operations = getattr(dataset, "operations", None) or []
    is_python = isinstance(dataset, (ds.GeneratorDataset, ds.FilterDataset))
    is_python |= isinstance(getattr(dataset, "sampler", None), ds.Sampler) or bool(getattr(dataset, "per_batch_map", 0))
    is_python |= any(type(operation).__module__.partition(".")[0] != "mindspore" for operation in operations)
    return is_python or any(map(_runs_python, dataset.children))

"""When `TrainableParamsCheckPoint` saves the state of a training, and what it must be like for that."""

import contextlib
import os
import warnings
from typing import Any, Optional

import mindspore as ms
import mindspore.dataset as ds
from mindspore.train import CheckpointConfig

from mindpet.errors import CheckpointError
from mindpet.graph.callback import model_of
from mindpet.graph.distributed import place_among_ranks
from mindpet.graph.state_files import RunFolder
from mindpet.graph.training_state import UNSEEDED, Start, Training, read_state, repeatable_dropout
from mindpet.utils.hints import PathLike

RESUMED = "mindpet_resumed"  # where callbacks find the record that a training goes on from


class StateWriter:
    """Saves the state of a training for one rank.

    The state of the last step of an epoch is saved at the end of that epoch, so that it has what is done there, say by
    callbacks that change the learning rate.

    Args:
        directory: of the checkpoints of all ranks.
        config: of the callback; tells how many steps are kept.
    """

    def __init__(self, directory: PathLike, config: CheckpointConfig):
        self.directory, self._config = os.path.realpath(directory), config
        self._training, self._start, self._folder = None, None, None
        self._last = 0  # the last step that was saved, or that the training went on from
        self._waits = False  # for the end of the epoch
        self._open = contextlib.ExitStack()

    def begin(self, callback_params: dict[str, Any]) -> None:
        """Refuse a training that could not be resumed; note what it begins with.

        Raises:
            CheckpointError: the data is in another order each time; several ranks save by the clock.
        """
        dataset = callback_params.train_dataset
        rank, ranks = place_among_ranks()
        training = training_of(callback_params)
        is_unseeded = ds.config.get_seed() == UNSEEDED and _is_random(dataset)
        if is_unseeded or (ms.get_seed() is None and training.has_dropout()):
            raise CheckpointError(
                "TrainableParamsCheckPoint: a training with Dropout, or with data that is shuffled or changed at "
                "random, can be resumed only with a seed; call mindspore.set_seed() before they are made."
            )
        if ranks > 1 and not self._config.save_checkpoint_steps:
            raise CheckpointError(
                "TrainableParamsCheckPoint: 'resumable' on several ranks needs 'save_checkpoint_steps', for the clocks "
                "of the ranks differ."
            )
        self._training = training
        resumed = callback_params.get(RESUMED)
        self._start = Start(resumed["facts"], resumed["base"]) if resumed else Start.of(self._training)
        before = tuple(resumed["runs"]) if resumed else ()
        self._folder = RunFolder(self.directory, rank, ranks, self._config.keep_checkpoint_max or 1, before)
        self._last, self._waits = callback_params.cur_step_num, False
        self.close()
        if ms.get_context("mode") == ms.PYNATIVE_MODE:
            self._open.enter_context(repeatable_dropout(self._training.train_network))
        elif self._training.has_dropout() and ms.get_context("device_target") == "CPU":
            warnings.warn(
                "TrainableParamsCheckPoint: Dropout in graph mode on a CPU draws other numbers in every run; a "
                "training that is resumed ends with other values than one that was not interrupted.",
                stacklevel=2,
            )

    def close(self) -> None:
        """Leave the network as it was."""
        self._open.close()

    def step_end(self, callback_params: dict[str, Any], prefix: list[Optional[str]]) -> None:
        """Save after a step, or note that it is to be done when the epoch is over.

        Args:
            callback_params: of the callback.
            prefix: of the checkpoint files, as it was given and as it is.
        """
        self._waits = callback_params.cur_step_num % self._training.dataset.get_dataset_size() == 0
        if not self._waits:
            self._save(callback_params.cur_step_num, prefix)

    def epoch_end(self, callback_params: dict[str, Any], prefix: list[Optional[str]]) -> None:
        """Save what waits for that."""
        if self._waits:
            self._waits = False
            self._save(callback_params.cur_step_num, prefix)

    def end(self, callback_params: dict[str, Any], prefix: list[Optional[str]]) -> None:
        """Save the last step, unless that is done."""
        self._save(callback_params.cur_step_num, prefix)
        self.close()

    def _save(self, step, prefix):
        if step != self._last:
            tensors, record = read_state(self._training, self._start, step)
            self._folder.write(step, tensors, {**record, "prefix": prefix})
            self._last = step


def training_of(callback_params: dict[str, Any]) -> Training:
    """What trains, from the parameters of a callback."""
    return Training(
        model_of(callback_params),
        callback_params["train_network"],
        callback_params.get("loss_scale_mananger"),  # so MindSpore 2.7 to 2.10 spells it
        callback_params["train_dataset"],
    )


def _is_random(dataset: Optional[ds.Dataset]) -> bool:
    """Whether MindSpore shuffles data, or changes it by operations with a random part."""
    operations = getattr(dataset, "operations", None) or []
    names = [type(operation).__name__ for operation in operations]
    return dataset.is_shuffled() or any("Random" in name for name in names) or any(map(_is_random, dataset.children))

"""Saving what is trained."""

import contextlib
import copy
import functools
import multiprocessing
import os
import pathlib
import re
import tempfile
import threading
import time
import warnings
from typing import Any, Callable, Optional, Union

import mindspore as ms
from mindspore import nn
from mindspore.train import CheckpointConfig, ModelCheckpoint, RunContext
from mindspore.train.callback._checkpoint import CheckpointManager
from safetensors import SafetensorError

from mindpet.errors import AbsolutePathError, CheckpointError, LinkPathError
from mindpet.graph.callback import TrainCallback, model_of
from mindpet.graph.distributed import STRATEGY_FOLDER, this_rank
from mindpet.graph.state_writer import RESUMED, StateWriter
from mindpet.graph.training_state import saved_parameters
from mindpet.network.parameters import trainable_parameters
from mindpet.utils import files
from mindpet.utils.sharding import PARALLEL_MODES
from mindpet.utils.validate import Checker

CANNOT_SAVE = OSError, SafetensorError, LinkPathError


class TrainableParamsCheckPoint(TrainCallback, ModelCheckpoint):
    """`ModelCheckpoint` that saves only the parameters of the model that are trainable.

    Keys are the paths of parameters in the network, see `mindpet.network.parameters.model_parameters`; of a network
    that is cut over ranks MindSpore's names, as its strategy file has them. The running statistics of BatchNorms, which
    training moves, are saved too; state of the optimizer is not.

    All fields of `CheckpointConfig` hold. A file gets its final name when it is complete, and an old one is removed
    only after that: a process killed at any moment leaves the last complete file. What it left half written, the next
    one that saves to the folder removes. Of several processes that save to one folder each counts and removes its own
    files only, and takes the next free prefix (`x_1`, as MindSpore does for a second run) if another has its names.

    In data parallel, where all ranks hold the same, rank 0 saves. In semi-auto and auto parallel every rank saves its
    slices in a folder `rank_N` of its own (`integrated_save` is taken as False), and MindSpore's strategy file goes to
    the folder `strategy` beside it, unless the parallel context or `AutoParallel` names another; `gather_delta` puts
    them together. Which of these it is, is read when training begins, for `AutoParallel` sets the context only then.

    With `resumable`, every rank also saves all that `resume` needs to go on after that step, in the folder `resume` in
    `directory`; the files for inference are as without. Give it as the last of the callbacks: what others do after it
    at the end of a step is not in the state.

    Args:
        directory: absolute path of the folder for the files; made if missing. The folder itself, however it is spelled,
            is not a symbolic link; those above it may be.
        prefix: of the file names, or what makes one, as in `ModelCheckpoint`. Default: 'DELTA_CKP'.
        config: when and how to save. Default: None, for `CheckpointConfig()`.
        resumable: whether `resume` can go on from what is saved; of the complete steps, as many are kept as
            `keep_checkpoint_max` says. Default: False.

    Raises:
        TypeError: `directory` is not a str, `config` not a CheckpointConfig, `resumable` not a bool.
        ValueError: `prefix` is neither a str without '/' nor callable; `resumable` with an `enc_key`, for the state is
            not encrypted.
        AbsolutePathError: `directory` is not absolute.
        LinkPathError: `directory` is a symbolic link.
        OSError: `directory` cannot be made or written to.
        CheckpointError: before training starts, if nothing is trainable, or if the training could not be resumed; while
            training, if a file cannot be written: complete ones are left.
    """

    def __init__(
        self,
        directory: str,
        prefix: Union[str, Callable[..., str]] = "DELTA_CKP",
        config: Optional[CheckpointConfig] = None,
        resumable: bool = False,
    ):
        check = Checker("TrainableParamsCheckPoint")
        check.require(isinstance(directory, str), TypeError, "directory", directory, "a str")
        is_name = isinstance(prefix, str) and "/" not in prefix
        check.require(callable(prefix) or is_name, ValueError, "prefix", prefix, "callable or a str without '/'")
        check.require(
            config is None or isinstance(config, CheckpointConfig),
            TypeError,
            "config",
            config,
            "a CheckpointConfig or None",
        )
        check.boolean(resumable=resumable)
        is_secret = isinstance(config, CheckpointConfig) and config.enc_key is not None
        check.require(not (resumable and is_secret), ValueError, "resumable", resumable, "False with an 'enc_key'")
        check.done()
        config = copy.copy(config) if config else CheckpointConfig()
        _make_directory(directory)
        self._integrated = config.integrated_save
        self._user_network = config.saved_network
        # MindSpore's own exception_save writes the whole train network; __exit__ does it here.
        self._save_on_exception, config.exception_save = config.exception_save, False
        ModelCheckpoint.__init__(self, prefix, directory, config)
        self._make_manager = functools.partial(_AtomicManager, config.format, prefix=prefix)
        self._manager = self._make_manager(directory)
        self._saves = True  # whether this rank does
        self._states = StateWriter(directory, config) if resumable else None
        self._last = None  # of the last step: train network, model, epoch, step in the epoch, step
        self._root = directory
        self._follow_context()  # if it is set already, for `Model.build` compiles before training begins

    def _follow_context(self):
        """Save where the parallel mode of now has it, and as it does."""
        self._parallel_mode = ms.get_auto_parallel_context("parallel_mode")
        is_cut = self._parallel_mode in PARALLEL_MODES
        self._saves = self._parallel_mode != ms.ParallelMode.DATA_PARALLEL or this_rank() == 0
        self._config._integrated_save = self._integrated and not is_cut
        directory = _rank_directory(self._root) if is_cut else self._root
        if directory != self._manager.directory:
            self._directory, self._manager = directory, self._make_manager(directory)

    def on_train_begin(self, run_context: RunContext) -> None:
        """Refuse to start if there is nothing to save."""
        self._follow_context()
        if not trainable_parameters(self._network(run_context.original_args())):
            raise CheckpointError(
                "TrainableParamsCheckPoint: no parameter of the network is trainable, so there would "
                "be nothing to save; see freeze_delta."
            )
        params = run_context.original_args()
        if self._states or RESUMED in params:  # MindSpore's own never begins anew
            every = self._config.save_checkpoint_steps
            self._last_triggered_step = params.cur_step_num // every * every if every else params.cur_step_num
        if self._states:
            self._states.begin(params)
            resumed = params.get(RESUMED, {})
            if resumed.get("directory") == self._states.directory and resumed["prefix"][0] == self._manager.given:
                done = params.cur_step_num - 1
                position = done // params.batch_num + 1, done % params.batch_num + 1
                self._manager.adopt(resumed["prefix"][1], position)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Save if it is time to."""
        params = run_context.original_args()
        self._last_time = min(self._last_time, time.time())  # the clock may have been set back
        if not self._saves:
            if self._states and ModelCheckpoint._check_save_ckpt(self, params, False):
                self._last_triggered_step = params.cur_step_num
                self._write_state(self._states.step_end, params)
            return
        step_in_epoch = int((params.cur_step_num - 1) % params.batch_num + 1)
        position = params.cur_epoch_num, step_in_epoch, params.cur_step_num
        self._last = params.train_network, self._network(params), *position
        with self._manager.one_error():
            if self._config.async_save and not _writers():
                self._manager.publish()
            self.step_end(run_context)
        if self._states and self._last_triggered_step == params.cur_step_num:
            self._write_state(self._states.step_end, params)

    def on_train_epoch_end(self, run_context: RunContext) -> None:
        """Save the state of the last step of an epoch, with what other callbacks did at its end."""
        super().on_train_epoch_end(run_context)
        if self._states:
            self._write_state(self._states.epoch_end, run_context.original_args())

    def on_train_end(self, run_context: RunContext) -> None:
        """Save the last checkpoint."""
        if self._saves:
            with self._manager.one_error():
                self.end(run_context)
                self._manager.publish()
        if self._states:
            self._write_state(self._states.end, run_context.original_args())

    def _write_state(self, write, params):
        with self._manager.one_error():
            write(params, [self._manager.given, self._manager.prefix])

    def __exit__(self, *err: Any) -> None:
        if self._states:
            self._states.close()
        if err and err[0] is not None and self._last is not None:
            try:
                _wait_for_writing()
                self._manager.publish()
                if self._save_on_exception:
                    self._save_breakpoint(*self._last)
            except CANNOT_SAVE as error:  # the error that is under way says more
                warnings.warn(f"TrainableParamsCheckPoint: the last step is not saved: {error}", stacklevel=2)

    @property
    def latest_ckpt_file_name(self) -> str:
        """The last complete file that this callback has saved; '' before there is one."""
        return self._manager.latest

    def _network(self, callback_params):
        return self._user_network or model_of(callback_params)

    def _check_save_ckpt(self, cb_params, force_to_save):
        """Whether it is time to save; if so, MindSpore is to write to a staging folder."""
        is_due = super()._check_save_ckpt(cb_params, force_to_save)
        if is_due:
            self._open_staging()
        return is_due

    def _save_ckpt(self, cb_params, force_to_save=False):
        """Have MindSpore write the file if it is time to, then publish it."""
        with self._staged(), self._view(self._network(cb_params), cb_params.train_network) as view:
            self._config._saved_network = view
            super()._save_ckpt(cb_params, force_to_save)
        if not self._config.async_save:
            self._manager.publish()

    def _save_breakpoint(self, train_network, network, epoch, step_in_epoch, step):
        """What `exception_save` promises, for the trainable parameters."""
        self._append_dict_content(epoch, step)
        with self._staged(), self._view(network, train_network) as view:
            self._open_staging()
            name = f"{self._prefix}-{epoch}_{step_in_epoch}_breakpoint.{self._config.format}"
            self._latest_ckpt_file_name = os.path.join(self._directory, name)
            ms.save_checkpoint(
                view,
                self._latest_ckpt_file_name,
                self._config.integrated_save,
                False,
                self._append_dict,
                self._config.enc_key,
                self._config.enc_mode,
                crc_check=self._config.crc_check,
                format=self._config.format,
            )
        self._manager.publish()

    def _open_staging(self):
        self._directory = self._manager.open_staging()
        if not self._prefix_func:
            self._prefix = self._manager.prefix

    @contextlib.contextmanager
    def _staged(self):
        """Note the file that is written in a block, if a staging folder is opened there."""
        directory = self._directory
        try:
            yield
            if self._directory != directory:
                self._manager.stage(self._latest_ckpt_file_name, self._prefix)
        except BaseException:
            if self._directory != directory:
                self._manager.close_staging()
            raise
        finally:
            self._directory = directory

    @contextlib.contextmanager
    def _view(self, model, compiled):
        """What `save_checkpoint` is to see, under the right names: it takes `Parameter.name` for the key."""
        params = saved_parameters(model)
        names = [param.name for param in params.values()]
        try:
            if self._parallel_mode not in PARALLEL_MODES:
                _rename(params.values(), params)
            yield _View(params, model, compiled)
        finally:
            _rename(params.values(), names)


def _rename(params, names):
    for param, name in zip(params, names):
        param.name = name


class _View(nn.Cell):
    """A Cell for `save_checkpoint`, which sees only some parameters of `model`.

    Args:
        params (dict): the parameters by key.
        model (Cell): whose parameters they are.
        compiled (Cell): the Cell that was compiled, which knows the layouts of sharded parameters.
    """

    def __init__(self, params, model, compiled):
        super().__init__(auto_prefix=False)
        # Not as attributes of the Cell, which would make them its children.
        object.__setattr__(self, "_shown", params)
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_compiled", compiled)

    def parameters_and_names(self, name_prefix="", expand=True):
        yield from self._shown.items()

    def init_parameters_data(self, auto_parallel_mode=False):
        return self._model.init_parameters_data(auto_parallel_mode)

    @property
    def parameter_layout_dict(self):
        return self._compiled.parameter_layout_dict


class _AtomicManager(CheckpointManager):
    """Keeps files under their final name complete: new ones come from a staging folder, old ones go after that.

    It knows what it has published, and removes nothing else: other processes may save to the same folder.

    Args:
        format (str): 'ckpt' or 'safetensors'.
        directory (str): the folder of the files.
        prefix (Union[str, callable]): as the user gave it.
    """

    def __init__(self, format, directory, prefix):
        super().__init__(format)
        self.directory = directory
        self.latest = ""
        self.given = None if callable(prefix) else prefix
        self.prefix = None if callable(prefix) else _free_prefix(directory, prefix)
        self._published = {}  # path -> its identity, in order of time
        self._folder = None  # for staging
        self._staged = None  # a file that is or will be complete, and its prefix
        self._doomed = []

    @contextlib.contextmanager
    def one_error(self):
        """Whatever keeps a file from being written is a CheckpointError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"TrainableParamsCheckPoint: cannot save to {self.directory}: {error}; complete files there are left."
            ) from error

    def adopt(self, prefix, position):
        """Go on with the files of a run that is resumed, as if they had been published here.

        Args:
            prefix (str): of its files, or None.
            position (tuple): epoch and step in it after which it goes on. What was saved later goes first.
        """
        if prefix is None:
            return
        name = re.compile(rf"{re.escape(prefix)}-(\d+)_(\d+)\.(?:ckpt|safetensors)")
        there = []
        for match in map(name.fullmatch, os.listdir(self.directory)):
            if match:
                saved = int(match[1]), int(match[2])
                there.append((saved <= position, saved, os.path.join(self.directory, match[0])))
        self.prefix = prefix
        self._published = {path: _identity(path) for _, _, path in sorted(there)}

    def update_ckpoint_filelist(self, directory, prefix):
        """List the files that may go. MindSpore calls this before each save."""
        self._doomed = []
        self._published = {path: identity for path, identity in self._published.items() if _identity(path) == identity}
        # MindSpore counts no files of a callable prefix, and no breakpoints.
        self._ckpoint_filelist = [
            path for path in self._published if self.given is not None and "_breakpoint." not in path
        ]

    def remove_oldest_ckpoint_file(self):
        """Remove the file that was published first."""
        self.remove_ckpoint_file(self._ckpoint_filelist[0])

    def keep_one_ckpoint_per_minutes(self, minutes, cur_time):
        """Remove all but the first file of the last minutes."""
        with contextlib.suppress(FileNotFoundError):  # another process has removed one: next time
            super().keep_one_ckpoint_per_minutes(minutes, cur_time)

    def remove_ckpoint_file(self, file_name):
        """Remove the file when the next one is published."""
        self._doomed.append(file_name)

    def open_staging(self):
        """Publish what has been written, and make a folder for the next file; returns its path."""
        _wait_for_writing()
        self.publish()
        if not os.path.isdir(self.directory):
            warnings.warn(f"TrainableParamsCheckPoint: {self.directory} has gone; it is made again.", stacklevel=2)
        _refuse_link(self.directory)
        os.makedirs(self.directory, exist_ok=True)
        self._folder = files.open_staging(os.path.join(self.directory, "checkpoint"))
        return str(self._folder)

    def close_staging(self):
        """Remove the folder."""
        files.close_staging(self._folder)

    def stage(self, staged, prefix):
        """Note a file that is, or will be, complete in the staging folder."""
        self._staged = staged, prefix

    def publish(self):
        """Give the staged file its final name, then remove what it replaces."""
        if self._staged is None:
            return
        (staged, prefix), self._staged = self._staged, None
        try:
            if not os.path.exists(staged):  # an asynchronous writer has failed
                name = os.path.basename(staged)
                warnings.warn(f"TrainableParamsCheckPoint: {name} was not written; older files are kept.", stacklevel=2)
                return
            path = self._give_name(staged, prefix)
        finally:
            self.close_staging()
        self._published.pop(path, None)  # the last one comes last
        self._published[path] = _identity(path)
        self.latest = path
        for old in self._doomed:
            if old != path and _identity(old) == self._published[old]:
                try:
                    os.unlink(old)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    warnings.warn(f"TrainableParamsCheckPoint: {old} cannot be removed: {error}", stacklevel=2)
        self._doomed = []

    def _give_name(self, staged, prefix):
        """Give a file its final name: with another prefix if another process has that name; returns the path."""
        name = os.path.basename(staged)
        path = os.path.join(self.directory, name)
        while True:
            is_own = self.given is None or (path in self._published and _identity(path) == self._published[path])
            try:
                files.publish(staged, path, replace=is_own)
                return path
            except FileExistsError:
                self.prefix = _free_prefix(self.directory, self.given)
                path = os.path.join(self.directory, self.prefix + name[len(prefix) :])


def _identity(path):
    """Tells a file from another that has taken its name; None if there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = os.lstat(path)
        return status.st_ino, status.st_mtime_ns
    return None


def _free_prefix(directory, prefix):
    """`prefix`, or if there are checkpoints of it, with the next number behind it."""
    taken = re.compile(rf"{re.escape(prefix)}(?:_(\d+))?-\d.*\.(?:ckpt|safetensors)")
    matched = [taken.fullmatch(name) for name in os.listdir(directory)]
    numbers = [int(match[1] or 0) for match in matched if match]
    return f"{prefix}_{max(numbers) + 1}" if numbers else prefix


def _writers():
    """MindSpore's asynchronous writers that are at work."""
    return [
        writer
        for writer in (*threading.enumerate(), *multiprocessing.active_children())
        if writer.name == "asyn_save_ckpt"
    ]


def _wait_for_writing():
    for writer in _writers():
        writer.join()


def _rank_directory(directory):
    """The folder of this rank; MindSpore is told where to write the strategy file when it compiles."""
    rank = this_rank()
    if not ms.get_auto_parallel_context("strategy_ckpt_save_file"):
        file = os.path.join(directory, STRATEGY_FOLDER, f"rank_{rank}.ckpt")
        # Of all parameters: what is saved beside the trainable ones, the start of PiSSA, is cut as well.
        ms.set_auto_parallel_context(strategy_ckpt_config={"save_file": file, "only_trainable_params": False})
    directory = os.path.join(directory, f"rank_{rank}")
    _make_directory(directory)
    return directory


def _make_directory(directory):
    """Make the folder, and find out now whether it can be written to."""
    if not os.path.isabs(directory):
        raise AbsolutePathError(f"TrainableParamsCheckPoint: 'directory' must be absolute, but got {directory!r}.")
    _refuse_link(directory)
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def _refuse_link(directory):
    if pathlib.Path(directory).is_symlink():  # a Path has no '/' or '/.' at its end
        raise LinkPathError(
            f"TrainableParamsCheckPoint: 'directory' must not be a symbolic link, but got {directory!r}."
        )

"""Saving what is trained."""

import contextlib
import copy
import multiprocessing
import os
import tempfile
import threading
import warnings

import mindspore as ms
from mindspore import nn
from mindspore.communication import GlobalComm, get_rank
from mindspore.train import CheckpointConfig, ModelCheckpoint
from mindspore.train.callback._checkpoint import CheckpointManager

from mindpet.errors import AbsolutePathError, CheckpointError, LinkPathError
from mindpet.graph.callback import TrainCallback, model_of
from mindpet.graph.distributed import STRATEGY_FOLDER
from mindpet.graph.parameters import saved_parameters, trainable_parameters
from mindpet.utils.sharding import PARALLEL_MODES
from mindpet.utils.validate import Checker

STAGING = ".incomplete"  # subfolder for files that are being written


class TrainableParamsCheckPoint(TrainCallback, ModelCheckpoint):
    """`ModelCheckpoint` that saves only the parameters of the model that are trainable.

    Keys are the paths of parameters in the network, see `mindpet.graph.parameters.model_parameters`; of a network that
    is cut over ranks MindSpore's names, as its strategy file has them. The running statistics of BatchNorms, which
    training moves, are saved too; state of the optimizer is not.

    All fields of `CheckpointConfig` hold. A file gets its final name when it is complete, and an old one is removed
    only after that: a process killed at any moment leaves the last complete file.

    In data parallel, where all ranks hold the same, rank 0 saves. In semi-auto and auto parallel every rank saves its
    slices in a folder `rank_N` of its own (`integrated_save` is taken as False), and MindSpore's strategy file goes to
    the folder `strategy` beside it, unless the parallel context names another; `gather_delta` puts them together.
    Make it after the parallel context is set.

    Args:
        directory (str): absolute path of the folder for the files; made if missing; not a symbolic link.
        prefix (Union[str, callable]): of the file names, or what makes one, as in `ModelCheckpoint`.
            Default: 'DELTA_CKP'.
        config (CheckpointConfig): when and how to save. Default: None, for `CheckpointConfig()`.

    Raises:
        TypeError: `directory` is not a str, `config` not a CheckpointConfig.
        ValueError: `prefix` is neither a str without '/' nor callable.
        AbsolutePathError: `directory` is not absolute.
        LinkPathError: `directory` is a symbolic link.
        OSError: `directory` cannot be made or written to.
        CheckpointError: before training starts, if nothing is trainable, or if the parallel mode is no longer that
            in which it was made.
    """

    def __init__(self, directory, prefix="DELTA_CKP", config=None):
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
        check.done()
        config = copy.copy(config) if config else CheckpointConfig()
        _make_directory(directory)
        self._parallel_mode = ms.get_auto_parallel_context("parallel_mode")
        if self._parallel_mode in PARALLEL_MODES:
            config._integrated_save = False
            directory = _rank_directory(directory)
        self._user_network = config.saved_network
        # MindSpore's own exception_save writes the whole train network; __exit__ does it here.
        self._save_on_exception, config.exception_save = config.exception_save, False
        ModelCheckpoint.__init__(self, prefix, directory, config)
        self._manager = _AtomicManager(config.format, directory)
        self._saves = True  # whether this rank does
        self._last = None  # of the last step: train network, model, epoch, step in the epoch, step

    def on_train_begin(self, run_context):
        """Refuse to start if there is nothing to save."""
        parallel_mode = ms.get_auto_parallel_context("parallel_mode")
        if parallel_mode != self._parallel_mode:
            raise CheckpointError(
                f"TrainableParamsCheckPoint: it was made in the parallel mode {self._parallel_mode!r}, but this is "
                f"{parallel_mode!r}; make it after the parallel context is set."
            )
        self._saves = parallel_mode != ms.ParallelMode.DATA_PARALLEL or _rank() == 0
        if not trainable_parameters(self._network(run_context.original_args())):
            raise CheckpointError(
                "TrainableParamsCheckPoint: no parameter of the network is trainable, so there would "
                "be nothing to save; see freeze_delta."
            )

    def on_train_step_end(self, run_context):
        """Save if it is time to."""
        if not self._saves:
            return
        if self._config.async_save and not _writers():
            self._manager.publish()
        params = run_context.original_args()
        step_in_epoch = int((params.cur_step_num - 1) % params.batch_num + 1)
        position = params.cur_epoch_num, step_in_epoch, params.cur_step_num
        self._last = params.train_network, self._network(params), *position
        self.step_end(run_context)

    def on_train_end(self, run_context):
        """Save the last checkpoint."""
        if self._saves:
            self.end(run_context)
            self._manager.publish()

    def __exit__(self, *err):
        if err and err[0] is not None and self._last is not None:
            _wait_for_writing()
            self._manager.publish()
            if self._save_on_exception:
                self._save_breakpoint(*self._last)

    def _network(self, callback_params):
        return self._user_network or model_of(callback_params)

    def _save_ckpt(self, cb_params, force_to_save=False):
        """Have MindSpore write to the staging folder, then publish the file."""
        directory, self._directory = self._directory, self._manager.staging
        try:
            with self._view(self._network(cb_params), cb_params.train_network) as view:
                self._config._saved_network = view
                super()._save_ckpt(cb_params, force_to_save)
        finally:
            self._directory = directory
        if os.path.dirname(self._latest_ckpt_file_name) == self._manager.staging:
            self._latest_ckpt_file_name = self._manager.stage(self._latest_ckpt_file_name)
        if not self._config.async_save:
            self._manager.publish()

    def _save_breakpoint(self, train_network, network, epoch, step_in_epoch, step):
        """What `exception_save` promises, for the trainable parameters."""
        os.makedirs(self._manager.staging, exist_ok=True)
        name = f"{self._prefix}-{epoch}_{step_in_epoch}_breakpoint.{self._config.format}"
        staged = os.path.join(self._manager.staging, name)
        self._append_dict_content(epoch, step)
        with self._view(network, train_network) as view:
            ms.save_checkpoint(
                view,
                staged,
                self._config.integrated_save,
                False,
                self._append_dict,
                self._config.enc_key,
                self._config.enc_mode,
                crc_check=self._config.crc_check,
                format=self._config.format,
            )
        self._latest_ckpt_file_name = self._manager.stage(staged)
        self._manager.publish()

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
    """Keeps files under their final name complete: new ones come from `staging`, old ones go after that.

    Args:
        format (str): 'ckpt' or 'safetensors'.
        directory (str): the folder of the files.
    """

    def __init__(self, format, directory):
        super().__init__(format)
        self.directory = directory
        self.staging = os.path.join(directory, STAGING)
        self._staged = []
        self._doomed = []

    def update_ckpoint_filelist(self, directory, prefix):
        """List the files in the final folder. MindSpore calls this before each save.

        The staging folder stays: another process that saves to the same directory may be about to use it.
        """
        _wait_for_writing()
        self.publish()
        self._doomed = []
        os.makedirs(self.staging, exist_ok=True)
        super().update_ckpoint_filelist(self.directory, prefix)

    def remove_ckpoint_file(self, file_name):
        """Remove the file when the next one is published."""
        self._doomed.append(file_name)

    def stage(self, staged):
        """Note a file that is, or will be, complete in the staging folder; returns its final name."""
        self._staged.append(staged)
        return os.path.join(self.directory, os.path.basename(staged))

    def publish(self):
        """Give the staged files their final names, then remove what they replace."""
        staged, self._staged = self._staged, []
        for path in staged:
            if not os.path.exists(path):
                warnings.warn(f"TrainableParamsCheckPoint: {path} was not written; older files are kept.", stacklevel=2)
                return
            os.replace(path, os.path.join(self.directory, os.path.basename(path)))
        if staged:
            for path in self._doomed:
                super().remove_ckpoint_file(path)
            self._doomed = []


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


def _rank():
    return get_rank() if GlobalComm.INITED else ms.get_auto_parallel_context("global_rank")


def _rank_directory(directory):
    """The folder of this rank; MindSpore is told where to write the strategy file when it compiles."""
    rank = _rank()
    if not ms.get_auto_parallel_context("strategy_ckpt_save_file"):
        file = os.path.join(directory, STRATEGY_FOLDER, f"rank_{rank}.ckpt")
        ms.set_auto_parallel_context(strategy_ckpt_config={"save_file": file})
    directory = os.path.join(directory, f"rank_{rank}")
    os.makedirs(directory, exist_ok=True)
    return directory


def _make_directory(directory):
    """Make the folder, and find out now whether it can be written to."""
    if not os.path.isabs(directory):
        raise AbsolutePathError(f"TrainableParamsCheckPoint: 'directory' must be absolute, but got {directory!r}.")
    if os.path.islink(directory.rstrip(os.sep)):
        raise LinkPathError(
            f"TrainableParamsCheckPoint: 'directory' must not be a symbolic link, but got {directory!r}."
        )
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass

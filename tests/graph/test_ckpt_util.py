"""TrainableParamsCheckPoint."""

import os
import resource
import shutil

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from faults import DONE, KILLED, REFUSED, faults
from mindspore import nn
from mindspore.train import Callback, CheckpointConfig, Model, ModelCheckpoint
from mindspore.train.callback import _checkpoint
from stepper import load, number, stepper
from toy import DELTA, LABELS, WIDTH, Toy, lora

from mindpet.errors import AbsolutePathError, CheckpointError, LinkPathError
from mindpet.graph import TrainableParamsCheckPoint, freeze_modules, load_delta
from mindpet.graph.ckpt_util import _wait_for_writing


def fit(network, *callbacks, epochs=1, steps=3, rng=np.random.default_rng(3)):
    """Train for `epochs` epochs of `steps` steps."""
    columns = {
        "x": rng.normal(size=(4 * steps, 5, WIDTH)).astype(np.float32),
        "y": np.arange(4 * steps, dtype=np.int32) % LABELS,
    }
    data = ds.NumpySlicesDataset(columns, shuffle=False).batch(4)
    optimizer = nn.Adam(network.trainable_params(), 0.01)
    Model(network, nn.CrossEntropyLoss(), optimizer).train(
        epochs, data, callbacks=list(callbacks), dataset_sink_mode=False
    )


def names(folder):
    """The files in a folder, of MindSpore's but the checkpoints."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".meta"))


@pytest.mark.parametrize("file_format", ["ckpt", "safetensors"])
def test_it_saves_what_is_trainable_in_the_model_and_nothing_else(file_format, mode, tmp_path):
    network = lora()
    callback = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(format=file_format))
    assert isinstance(callback, ModelCheckpoint)
    fit(network, callback)
    assert names(tmp_path) == [f"DELTA_CKP-1_{step}.{file_format}" for step in (1, 2, 3)]
    assert callback.latest_ckpt_file_name == str(tmp_path / f"DELTA_CKP-1_3.{file_format}")
    saved = load(callback.latest_ckpt_file_name)
    assert set(saved) == DELTA
    for param in network.trainable_params():
        np.testing.assert_array_equal(saved[param.name].asnumpy(), param.asnumpy())


def test_a_network_that_is_its_own_train_cell_saves_no_optimizer_state(tmp_path):
    network = lora()
    optimizer = nn.Adam(network.trainable_params(), 0.01)
    cell = nn.TrainOneStepCell(nn.WithLossCell(network, nn.CrossEntropyLoss()), optimizer)
    data = ds.NumpySlicesDataset({"x": np.ones((4, 5, WIDTH), np.float32), "y": np.zeros(4, np.int32)}).batch(4)
    callback = TrainableParamsCheckPoint(str(tmp_path))
    Model(cell).train(1, data, callbacks=callback, dataset_sink_mode=False)
    assert set(load(callback.latest_ckpt_file_name)) == DELTA


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_keep_checkpoint_max(keep, tmp_path):
    fit(lora(), TrainableParamsCheckPoint(str(tmp_path), "x", CheckpointConfig(keep_checkpoint_max=keep)), steps=4)
    assert names(tmp_path) == [f"x-1_{step}.ckpt" for step in range(1, 5)][-keep:]


def test_keep_checkpoint_per_n_minutes(tmp_path):
    config = CheckpointConfig(keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=1)
    fit(lora(), TrainableParamsCheckPoint(str(tmp_path), "x", config), steps=5)
    kept = names(tmp_path)
    assert "x-1_1.ckpt" in kept and "x-1_5.ckpt" in kept and len(kept) == 2


def test_save_checkpoint_steps_and_the_last_step(tmp_path):
    fit(lora(), TrainableParamsCheckPoint(str(tmp_path), "x", CheckpointConfig(save_checkpoint_steps=2)), steps=3)
    assert names(tmp_path) == ["x-1_2.ckpt", "x-1_3.ckpt"]


@pytest.mark.parametrize("how", [True, "thread", "process"])
@pytest.mark.parametrize("keep", [1, 3])
def test_async_save(how, keep, tmp_path):
    network = lora()
    config = CheckpointConfig(save_checkpoint_steps=2, async_save=how, keep_checkpoint_max=keep)
    callback = TrainableParamsCheckPoint(str(tmp_path), "x", config)
    fit(network, callback, steps=4)
    assert names(tmp_path) == ["x-1_2.ckpt", "x-1_4.ckpt"][-keep:]
    saved = load(callback.latest_ckpt_file_name)
    for param in network.trainable_params():
        np.testing.assert_array_equal(saved[param.name].asnumpy(), param.asnumpy())


@pytest.mark.parametrize("enc_mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encryption(enc_mode, tmp_path):
    network, fresh, key = lora(), lora(), b"0123456789ABCDEF"
    callback = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(enc_key=key, enc_mode=enc_mode))
    fit(network, callback)
    file = callback.latest_ckpt_file_name
    assert set(load(file, dec_key=key, dec_mode=enc_mode)) == DELTA
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_delta(fresh, file)
    load_delta(fresh, file, dec_key=key, dec_mode=enc_mode)
    np.testing.assert_array_equal(fresh.head.weight.asnumpy(), network.head.weight.asnumpy())


def test_crc_check(tmp_path):
    callback = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(crc_check=True))
    fit(lora(), callback)
    load_delta(lora(), callback.latest_ckpt_file_name, crc_check=True)
    damaged = bytearray((tmp_path / "DELTA_CKP-1_3.ckpt").read_bytes())
    damaged[-40] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_delta(lora(), str(tmp_path / "damaged.ckpt"), crc_check=True)


def test_append_info_is_saved_and_passed_over_when_loading(tmp_path):
    config = CheckpointConfig(append_info=["epoch_num", "step_num", {"lr": 0.01, "note": "hello"}])
    callback = TrainableParamsCheckPoint(str(tmp_path), config=config)
    fit(lora(), callback, epochs=2)
    saved = load(callback.latest_ckpt_file_name)
    assert set(saved) == DELTA | {"epoch_num", "step_num", "lr", "note"}
    assert int(saved["epoch_num"].asnumpy()) == 2 and int(saved["step_num"].asnumpy()) == 6
    load_delta(lora(), callback.latest_ckpt_file_name)


def test_saved_network(tmp_path):
    network, other = lora(), Toy()
    freeze_modules(other, include=["fc.*"])
    callback = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(saved_network=other))
    fit(network, callback)
    saved = load(callback.latest_ckpt_file_name)
    assert set(saved) == {"head.weight", "head.bias"}
    np.testing.assert_array_equal(saved["head.weight"].asnumpy(), other.head.weight.asnumpy())


class FailAt(Callback):
    """Raises in the middle of training."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_step_end(self, run_context):
        if run_context.original_args().cur_step_num == self.step:
            raise RuntimeError("as planned")


@pytest.mark.parametrize("async_save", [False, True])
def test_exception_save_writes_the_trainable_parameters(async_save, tmp_path):
    config = CheckpointConfig(save_checkpoint_steps=100, exception_save=True, async_save=async_save)
    callback = TrainableParamsCheckPoint(str(tmp_path), "x", config)
    with pytest.raises(RuntimeError, match="as planned"):
        fit(lora(), callback, FailAt(2))
    assert names(tmp_path) == ["x-1_2_breakpoint.ckpt"]
    assert set(load(tmp_path / "x-1_2_breakpoint.ckpt")) == DELTA
    assert config.exception_save and config.saved_network is None, "the user's config is left as it was"


def test_an_exception_without_exception_save_keeps_what_was_saved(tmp_path):
    with pytest.raises(RuntimeError, match="as planned"):
        fit(lora(), TrainableParamsCheckPoint(str(tmp_path), "x", CheckpointConfig(async_save=True)), FailAt(2))
    assert names(tmp_path) in (["x-1_1.ckpt", "x-1_2.ckpt"], ["x-1_1.ckpt"])


def test_a_save_that_fails_loses_nothing(tmp_path, monkeypatch):
    callback = TrainableParamsCheckPoint(str(tmp_path), "x", CheckpointConfig(keep_checkpoint_max=1))
    save_checkpoint = _checkpoint.save_checkpoint

    def disk_full_at_step_3(network, file, *arguments, **options):
        if file.endswith("x-1_3.ckpt"):
            raise OSError("No space left on device")
        save_checkpoint(network, file, *arguments, **options)

    monkeypatch.setattr(_checkpoint, "save_checkpoint", disk_full_at_step_3)
    with pytest.raises(
        CheckpointError, match="cannot save to .*No space left on device; complete files there are left"
    ):
        fit(lora(), callback, steps=4)
    assert names(tmp_path) == ["x-1_2.ckpt"] and set(load(tmp_path / "x-1_2.ckpt")) == DELTA


def test_a_callable_prefix_replaces_its_file(tmp_path):
    callback = TrainableParamsCheckPoint(str(tmp_path), prefix=lambda callback_params: "latest")
    fit(lora(), callback)
    assert names(tmp_path) == ["latest.ckpt"] and set(load(tmp_path / "latest.ckpt")) == DELTA


def test_a_second_run_does_not_overwrite_the_first(tmp_path):
    for _ in range(2):
        fit(lora(), TrainableParamsCheckPoint(str(tmp_path), "x"), steps=1)
    assert names(tmp_path) == ["x-1_1.ckpt", "x_1-1_1.ckpt"]


def test_evaluation_in_fit_saves_nothing(tmp_path):
    network = lora()
    columns = {"x": np.ones((8, 5, WIDTH), np.float32), "y": np.zeros(8, np.int32)}
    train_data, valid_data = (ds.NumpySlicesDataset(columns, shuffle=False).batch(size) for size in (4, 1))
    model = Model(network, nn.CrossEntropyLoss(), nn.Adam(network.trainable_params(), 0.01), metrics={"loss"})
    config = CheckpointConfig(keep_checkpoint_max=20)
    model.fit(2, train_data, valid_data, callbacks=[TrainableParamsCheckPoint(str(tmp_path), "x", config)])
    assert names(tmp_path) == ["x-1_1.ckpt", "x-1_2.ckpt", "x-2_1.ckpt", "x-2_2.ckpt"]


def test_nothing_trainable_is_an_error_before_training(tmp_path):
    network = lora()
    optimizer = nn.Adam(network.trainable_params())
    freeze_modules(network, include=["*"])
    data = ds.NumpySlicesDataset({"x": np.ones((4, 5, WIDTH), np.float32), "y": np.zeros(4, np.int32)}).batch(4)
    with pytest.raises(CheckpointError, match="no parameter of the network is trainable"):
        Model(network, nn.CrossEntropyLoss(), optimizer).train(
            1, data, callbacks=TrainableParamsCheckPoint(str(tmp_path))
        )
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "directory, error, match",
    [
        (1, TypeError, "'directory' must be a str, but got 1"),
        (None, TypeError, "'directory' must be a str"),
        ("relative/folder", AbsolutePathError, "'directory' must be absolute, but got 'relative/folder'"),
        ("/proc/no/folder", OSError, "/proc/no"),
        ("/dev/null/folder", OSError, "/dev/null"),
    ],
)
def test_wrong_directory(directory, error, match):
    with pytest.raises(error, match=match):
        TrainableParamsCheckPoint(directory)


@pytest.mark.parametrize("end", ["", "/", "/.", "//", "/./", "/sub/../."])
def test_a_directory_that_is_a_link_however_it_is_spelled(end, tmp_path):
    (tmp_path / "real/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/inner").symlink_to(tmp_path / "real")
    directory = str(tmp_path / "link") + end if "sub" not in end else str(tmp_path / "real/sub/../inner/.")
    with pytest.raises(LinkPathError, match="must not be a symbolic link"):
        TrainableParamsCheckPoint(directory)
    assert sorted(os.listdir(tmp_path / "real")) == ["inner", "sub"]


@pytest.mark.parametrize("directory", ["link/sub", "link/../real/new", "link/sub/.."])
def test_a_directory_below_a_link(directory, tmp_path):
    (tmp_path / "real/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    callback, step = stepper(f"{tmp_path}/{directory}")
    step(1)
    assert os.path.realpath(os.path.dirname(callback.latest_ckpt_file_name)).startswith(str(tmp_path / "real"))


def test_a_link_that_somebody_put_into_the_folder_is_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "other/kept").touch()
    for name in (".incomplete", "x-1_1.ckpt"):
        (tmp_path / "folder" / name).symlink_to(tmp_path / "other" / ("kept" if "ckpt" in name else ""))
    callback, step = stepper(tmp_path / "folder")
    step(1)
    assert callback.latest_ckpt_file_name.endswith("/x_1-1_1.ckpt")
    assert os.listdir(tmp_path / "other") == ["kept"] and not (tmp_path / "other/kept").stat().st_size


@pytest.mark.parametrize("keep", [1, 2])
def test_two_runs_with_one_prefix_keep_their_own_files(keep, tmp_path):
    one, other = (stepper(tmp_path, value=value, keep_checkpoint_max=keep) for value in (0, 100))
    for step in range(1, 5):
        for _, make_step in (one, other):
            make_step(step)
    last = range(5 - keep, 5)
    assert names(tmp_path) == [f"{prefix}-1_{step}.ckpt" for prefix in ("x", "x_1") for step in last]
    assert [number(callback.latest_ckpt_file_name) for callback, _ in (one, other)] == [4, 104]
    assert [number(tmp_path / f"{prefix}-1_{step}.ckpt") for prefix in ("x", "x_1") for step in last] == [
        value + step for value in (0, 100) for step in last
    ]


@pytest.mark.parametrize("config", [{"keep_checkpoint_max": 1}, {"keep_checkpoint_max": 0}])
def test_a_file_that_another_process_has_removed_or_replaced(config, tmp_path):
    per_minutes = {} if config["keep_checkpoint_max"] else {"keep_checkpoint_per_n_minutes": 1}
    callback, step = stepper(tmp_path, **config, **per_minutes)
    step(1)
    os.unlink(tmp_path / "x-1_1.ckpt")
    step(2)
    ms.save_checkpoint([{"name": "delta", "data": ms.Tensor(np.full(1000, 9, np.float32))}], str(tmp_path / "y.ckpt"))
    os.replace(tmp_path / "y.ckpt", tmp_path / "x-1_2.ckpt")
    step(3)
    step(4)
    assert number(tmp_path / "x-1_2.ckpt") == 9, "it is not this run's to remove"
    assert number(callback.latest_ckpt_file_name) == 4


def test_a_file_that_is_replaced_while_the_next_is_written(tmp_path):
    _, step = stepper(tmp_path, keep_checkpoint_max=1, async_save="thread")
    step(1)
    _wait_for_writing()
    step(2)
    _wait_for_writing()
    ms.save_checkpoint([{"name": "delta", "data": ms.Tensor(np.full(1000, 9, np.float32))}], str(tmp_path / "y.ckpt"))
    os.replace(tmp_path / "y.ckpt", tmp_path / "x-1_1.ckpt")
    step(3)
    _wait_for_writing()
    assert number(tmp_path / "x-1_1.ckpt") == 9 and number(tmp_path / "x-1_2.ckpt") == 2


def test_processes_that_save_to_one_folder_at_once(tmp_path):
    steppers = [stepper(tmp_path, value=value, keep_checkpoint_max=30) for value in (0, 100, 200)]
    children = []
    for callback, step in steppers:
        children.append(os.fork())
        if not children[-1]:
            try:
                for position in range(1, 31):
                    step(position)
                (tmp_path / f"{callback.latest_ckpt_file_name}.done").touch()
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    done = list(tmp_path.glob("*.done"))
    assert sorted(number(path.with_suffix("")) for path in done) == [30, 130, 230], "each knows its own last file"
    assert len([number(path) for path in tmp_path.glob("*.ckpt")]) == 90
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore:.*cannot be removed")
@pytest.mark.parametrize("file_format", ["ckpt", "safetensors"])
def test_a_save_that_ends_at_any_moment_leaves_the_last_whole_file(file_format, tmp_path):
    config = {"format": file_format, "keep_checkpoint_max": 1}
    folder, first, second = tmp_path / "run", f"x-1_1.{file_format}", f"x-1_2.{file_format}"

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        _, step = stepper(folder, **config)
        step(1)
        return lambda: step(2)

    for fault, outcome in faults(folder, prepare):
        found = {path.name: number(path) for path in folder.glob("x*")}
        assert {first: 1, second: 2}.items() >= found.items() and found, fault
        assert outcome in (KILLED, REFUSED) or second in found, fault
        assert outcome != DONE or first not in found, fault
        callback, step = stepper(folder, **config)
        step(1)
        assert set(names(folder)) == {*found, os.path.basename(callback.latest_ckpt_file_name)}, fault


@pytest.mark.parametrize("file_format", ["ckpt", "safetensors"])
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(umask, mode, file_format, tmp_path):
    before = os.umask(umask)
    try:
        callback, step = stepper(tmp_path, format=file_format)
        step(1)
    finally:
        os.umask(before)
    assert os.stat(callback.latest_ckpt_file_name).st_mode & 0o777 == mode


@pytest.fixture
def full_disk():
    """A function after which no file can be longer than 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file_format", ["ckpt", "safetensors"])
def test_a_full_disk_is_one_error_and_the_last_file_stays(file_format, tmp_path, full_disk):
    callback, step = stepper(tmp_path, format=file_format, keep_checkpoint_max=1)
    step(1)
    full_disk()
    with pytest.raises(CheckpointError, match="cannot save to .*File too large.*complete files there are left"):
        step(2)
    assert names(tmp_path) == [f"x-1_1.{file_format}"] and number(callback.latest_ckpt_file_name) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_a_warning_when_saving_goes_on_beside_training(tmp_path, full_disk):
    callback, step = stepper(tmp_path, async_save="thread", keep_checkpoint_max=1)
    step(1)
    _wait_for_writing()
    step(2)
    _wait_for_writing()
    with pytest.warns(UserWarning, match="x-1_3.ckpt was not written; older files are kept"):
        full_disk()
        step(3)
        _wait_for_writing()
        step(4)
    _wait_for_writing()
    assert names(tmp_path)[-1] == "x-1_2.ckpt" and number(callback.latest_ckpt_file_name) == 2


def test_what_keeps_exception_save_from_writing_is_a_warning_beside_the_error(tmp_path, full_disk):
    class Full(FailAt):
        def on_train_step_end(self, run_context):
            full_disk()
            super().on_train_step_end(run_context)

    config = CheckpointConfig(save_checkpoint_steps=100, exception_save=True)
    with pytest.warns(UserWarning, match="the last step is not saved"), pytest.raises(RuntimeError, match="as planned"):
        network = lora()
        network.large = ms.Parameter(np.zeros(1000, np.float32), name="large")
        fit(network, TrainableParamsCheckPoint(str(tmp_path), "x", config), Full(1))
    assert names(tmp_path) == []


def test_a_folder_that_goes_while_training_is_made_again(tmp_path):
    callback, step = stepper(tmp_path / "folder")
    step(1)
    shutil.rmtree(tmp_path / "folder")
    with pytest.warns(UserWarning, match="folder has gone; it is made again"):
        step(2)
    assert names(tmp_path / "folder") == ["x-1_2.ckpt"]
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").touch()
    with pytest.warns(UserWarning, match="has gone"), pytest.raises(CheckpointError, match="cannot save to .*folder"):
        step(3)
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(LinkPathError, match="must not be a symbolic link"):
        step(4)
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"prefix": 1}, ValueError, "'prefix' must be callable or a str without '/', but got 1"),
        ({"prefix": "a/b"}, ValueError, "'prefix' must be"),
        ({"config": {}}, TypeError, "'config' must be a CheckpointConfig or None"),
    ],
)
def test_wrong_arguments(arguments, error, match, tmp_path):
    with pytest.raises(error, match=match):
        TrainableParamsCheckPoint(str(tmp_path), **arguments)

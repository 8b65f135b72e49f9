"""An adapter's files belong together: every state between two steps of a save is one of two saves, or an error."""

import json
import os
import shutil
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from small import Tiny, ids, numbers, same

from mindpet.errors import CheckpointError
from mindpet.peft import LoraConfig, PeftModel, get_peft_model
from mindpet.utils import files
from mindpet.utils.tensors import TensorFile, save_tensors

NAMES = ("mindpet_passport.json", "adapter_config.json", "adapter_model.safetensors")


def saved(folder, seed, alpha=4, **fields):
    """Save an adapter whose A and B are other ones for each seed."""
    ms.set_seed(3)
    model = get_peft_model(Tiny(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["query"], **fields))
    rng = np.random.default_rng(seed)
    adapter = model.adapters["default"]
    adapter.write({p: rng.normal(size=v.shape).astype(v.dtype) for p, v in adapter.values.items() if "delta" in p})
    model.save_pretrained(folder)
    return model


def base():
    ms.set_seed(3)
    return Tiny()


class Stopped(BaseException):
    """The process ends here."""


def stop_at(monkeypatch, step):
    """Have the save end before its `step`-th change of names; returns a list with the changes that were made."""
    done = []

    def counted(name, real):
        def call(*arguments, **keywords):
            if len(done) == step:
                raise Stopped
            done.append(name)
            return real(*arguments, **keywords)

        return call

    for owner, name in ((os, "replace"), (os, "rename"), (files, "exchange"), (files.pathlib.Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    monkeypatch.setattr(files.shutil, "rmtree", lambda *arguments, **keywords: None)  # nor does it tidy up
    return done


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("alpha", [4, 128])
@pytest.mark.parametrize("step", range(6))
def test_a_save_that_ends_at_any_step(step, alpha, alone, rng, tmp_path, monkeypatch):
    folder, x = tmp_path / "adapter", ids(rng)
    saved(folder, 1)
    before = numbers(PeftModel.from_pretrained(base(), folder), x)
    after = numbers(saved(tmp_path / "new", 2, alpha), x)
    if not alone:
        (folder / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched:
        done = stop_at(patched, step)
        try:
            saved(folder, 2, alpha)
            ended = False
        except Stopped:
            ended = True
    assert len(done) >= step or not ended
    has_tensors = (folder / NAMES[2]).exists()
    if has_tensors:
        got = numbers(PeftModel.from_pretrained(base(), folder), x)
        assert np.allclose(got, before, atol=1e-6) or np.allclose(got, after, atol=1e-6)
        assert ended or np.allclose(got, after, atol=1e-6)
        # What other readers go by: these two files.
        alpha_there = json.loads((folder / NAMES[1]).read_text())["lora_alpha"]
        tensors = TensorFile(folder / NAMES[2]).read_all()
        new = TensorFile(tmp_path / "new" / NAMES[2]).read_all()
        is_new = all(np.array_equal(tensors[key], new[key]) for key in new)
        assert alpha_there == (alpha if is_new else 4)
    else:  # where the folder has other content, the old tensors go before the new configuration comes
        assert not alone and alpha != 4
        with pytest.raises(FileNotFoundError):
            PeftModel.from_pretrained(base(), folder)
    saved(folder, 2, alpha)
    same(numbers(PeftModel.from_pretrained(base(), folder), x), after)
    assert sorted(os.listdir(folder)) == sorted([*NAMES, *([] if alone else ["notes.txt"])])


def test_a_killed_save_leaves_nothing_for_long(tmp_path):
    folder = tmp_path / "adapter"
    saved(folder, 1)
    code = (
        "import os, sys; from mindpet.utils.files import together\n"
        "with together(sys.argv[1], ('a',)) as staged: open(staged / 'a', 'w').close(); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=False)
    assert len(os.listdir(tmp_path)) == 2
    saved(folder, 2)
    assert os.listdir(tmp_path) == ["adapter"] and sorted(os.listdir(folder)) == sorted(NAMES)


@pytest.mark.parametrize("what", ["tensors", "configuration"])
def test_files_of_two_saves_are_an_error(what, rng, tmp_path):
    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2, alpha=128)
    name = NAMES[2] if what == "tensors" else NAMES[1]
    shutil.copyfile(tmp_path / "b" / name, tmp_path / "a" / name)
    network, x = base(), ids(rng)
    before = numbers(network, x)
    with pytest.raises(CheckpointError, match="of two saves, damaged, or written by other software"):
        PeftModel.from_pretrained(network, tmp_path / "a")
    same(numbers(network, x), before)
    assert PeftModel.from_pretrained(network, tmp_path / "a", force=True).active_adapter == "default"


def test_a_flipped_bit_is_an_error(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / NAMES[2]
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_without_a_passport_a_warning_says_what_cannot_be_told(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / NAMES[0]).unlink()
    with pytest.warns(UserWarning, match="no mindpet_passport.json: whether the files are whole"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("passport", ['{"base": 5}', "[]", '{"files": {"a": 1}}', "{", '{"before": 3}', "[" * 100_000])
def test_passports_that_are_none(passport, tmp_path):
    saved(tmp_path, 1)
    (tmp_path / NAMES[0]).write_text(passport)
    with pytest.raises(CheckpointError, match="not JSON|not a passport of mindpet"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_numbers_that_are_not_finite_are_an_error(value, tmp_path):
    fields = {"modules_to_save": ["classifier"]} if value == 1e30 else {}
    saved(tmp_path, 1, **fields)
    (tmp_path / NAMES[0]).unlink()
    tensors = TensorFile(tmp_path / NAMES[2]).read_all()
    key = next(key for key in tensors if ("classifier.weight" if fields else "lora_B") in key)
    tensors[key] = np.full_like(tensors[key], value)
    save_tensors(tmp_path / NAMES[2], tensors)
    network = base()
    if fields:  # finite in the file, and not in the type of the network
        network.classifier.to_float(ms.float16)
        for param in network.classifier.get_parameters():
            param.set_dtype(ms.float16)
    with pytest.raises(CheckpointError, match="(?s)NaN or infinite numbers.*query|classifier"):
        PeftModel.from_pretrained(network, tmp_path)
    assert PeftModel.from_pretrained(network, tmp_path, force=True).active_adapter == "default"

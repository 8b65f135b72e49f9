"""An adapter's files belong together: every state between two steps of a save is one of two saves, or an error."""

import json
import os
import shutil

import mindspore as ms
import numpy as np
import pytest
from faults import KILLED, REFUSED, faults
from small import Tiny, ids, numbers, same

from mindpet.errors import CheckpointError
from mindpet.files.convert import convert, read_delta
from mindpet.files.merge import merge
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.peft import LoraConfig, PeftModel, get_peft_model

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


def loaded(folder):
    """What loads: the values of the adapter; and what other readers go by: alpha and the tensors."""
    values = PeftModel.from_pretrained(base(), folder).adapters["default"].values
    alpha = json.loads((folder / NAMES[1]).read_text())["lora_alpha"]
    return {"alpha": np.array(alpha), **values, **TensorFile(folder / NAMES[2]).read_all()}


def equal(one, other):
    """Whether two dicts have the same arrays."""
    return set(one) == set(other) and all(np.array_equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    "alpha, beside", [(4, []), (128, []), (128, ["notes.txt"])], ids=["tensors", "both", "both beside other files"]
)
def test_a_save_that_ends_at_any_moment_is_whole_or_not_there(alpha, beside, tmp_path):
    folder = tmp_path / "adapter"
    saved(tmp_path / "before", 1)
    model = saved(tmp_path / "after", 2, alpha)
    before, after = loaded(tmp_path / "before"), loaded(tmp_path / "after")
    assert not equal(before, after)

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "before", folder)
        for name in beside:
            (folder / name).write_text("mine")
        return lambda: model.save_pretrained(folder)

    for fault, outcome in faults(tmp_path, prepare):
        if outcome == KILLED and beside and not (folder / NAMES[2]).exists():
            with pytest.raises(FileNotFoundError):  # the old files go before the new ones come
                PeftModel.from_pretrained(base(), folder)
        else:
            found = loaded(folder)
            assert equal(found, after) or equal(found, before) and outcome in (KILLED, REFUSED), fault
        model.save_pretrained(folder)
        assert sorted(os.listdir(folder)) == sorted([*NAMES, *beside]), fault
        assert sorted(os.listdir(tmp_path)) == ["adapter", "after", "before"], fault
    assert equal(loaded(folder), after)


def test_a_first_save_that_ends_at_any_moment_is_whole_or_not_there(tmp_path):
    folder = tmp_path / "adapter"
    model = saved(tmp_path / "after", 2)
    after = loaded(tmp_path / "after")

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        return lambda: model.save_pretrained(folder)

    for fault, outcome in faults(tmp_path, prepare):
        assert equal(loaded(folder), after) if folder.exists() else outcome in (KILLED, REFUSED), fault
        model.save_pretrained(folder)
        assert sorted(os.listdir(tmp_path)) == ["adapter", "after"], fault


def content(folder):
    """Every file below a folder, but those that are not whole yet."""
    paths = folder.rglob("*") if folder.is_dir() else [folder]
    names = {str(path.relative_to(folder.parent)): path for path in paths if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if ".incomplete" not in name}


@pytest.mark.parametrize("name", ["base", "base.safetensors"])
def test_a_merge_that_ends_at_any_moment_is_whole_or_not_there(name, tmp_path):
    saved(tmp_path / "adapter", 1)
    values = {param.name: param.asnumpy() for param in base().get_parameters()}
    if name == "base":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    save_tensors(tmp_path / name / "model.safetensors" if name == "base" else tmp_path / name, values)
    output = tmp_path / "out" / name
    output.parent.mkdir()

    def run():
        merge(tmp_path / name, tmp_path / "adapter", output, progressbar=False)

    def clear():
        for path in output.parent.iterdir():
            if not path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run

    run()
    merged = content(output)
    for fault, outcome in faults(output.parent, clear):
        assert content(output) == merged if output.exists() else outcome in (KILLED, REFUSED), fault
        clear()()
        assert os.listdir(output.parent) == [name] and content(output) == merged, fault


@pytest.mark.parametrize("name", ["adapter", "delta.ckpt"])
def test_a_conversion_that_ends_at_any_moment_is_whole_or_not_there(name, tmp_path):
    target = tmp_path / "out" / name
    target.parent.mkdir()
    sources = [tmp_path / "1.ckpt", tmp_path / "2.ckpt"] if name == "adapter" else [tmp_path / "1", tmp_path / "2"]
    configs = [LoraConfig(r=2, lora_alpha=alpha, target_modules=["query"]) for alpha in (4, 128)]
    for number in (1, 2):
        saved(tmp_path / str(number), number, 128 if number == 2 else 4)
        convert(tmp_path / str(number), tmp_path / f"{number}.ckpt")

    def run(number):
        convert(sources[number], target, configs[number] if name == "adapter" else None)

    def state():
        return read_delta(target) if target.suffix else loaded(target)

    def prepare():
        run(0)
        return lambda: run(1)

    run(1)
    new = state()
    run(0)
    old = state()
    assert not equal(old, new)
    for fault, outcome in faults(target.parent, prepare):
        found = state()
        assert equal(found, new) or equal(found, old) and outcome in (KILLED, REFUSED), fault
        run(1)
        assert os.listdir(target.parent) == [name] and equal(state(), new), fault


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

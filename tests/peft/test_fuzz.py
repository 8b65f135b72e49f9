"""Files that were damaged, or made to do damage: loaded as what they say, or one short error.

`pytest tests/peft/test_fuzz.py --fuzz-rounds 5000` runs the long form; the number of a round is its seed.
"""

import json
import pathlib
import resource
import shutil
import time
import warnings
from fnmatch import fnmatchcase

import mindspore as ms
import numpy as np
import pytest
import yaml
from damage import mutated, pick
from mindspore import Parameter, Tensor
from mindspore.train import CheckpointConfig
from mindspore.train.callback import RunContext
from mindspore.train.callback._callback import InternalCallbackParam
from models.llama import LlamaForCausalLM
from safetensors.numpy import load, save
from small import Tiny, contents, move
from toy import Toy

from mindpet.cli import main
from mindpet.errors import AdapterError, CheckpointError, MindPetError
from mindpet.files.merge import merge
from mindpet.graph import TrainableParamsCheckPoint, freeze_from_config, load_delta
from mindpet.peft import (
    AdapterConfig,
    LoraConfig,
    LowRankAdapterConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from mindpet.utils.quote import LONGEST_MESSAGE

LLAMA = pathlib.Path(__file__).parents[1] / "golden/llama"


def attempt(call, *arguments, **keywords):
    """What a call returns, and whether it did; an error must be one that can be shown."""
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = call(*arguments, **keywords), True
        except (MindPetError, OSError, TypeError, ValueError) as error:
            assert str(error)
            result = error, False
    texts = [str(warning.message) for warning in said] + [str(result[0])] * (not result[1])
    for text in texts:
        assert len(text) < LONGEST_MESSAGE + 100 and all(char.isprintable() or char == "\n" for char in text), text[
            :2000
        ]
    assert time.monotonic() - begin < 10
    return result


@pytest.fixture
def rounds(request):
    """A generator of random numbers for each round; afterwards no memory was taken that is worth the name."""

    def every():
        first = request.config.getoption("--fuzz-start")
        for number in range(first, first + request.config.getoption("--fuzz-rounds")):
            try:
                yield np.random.default_rng(number)
            except GeneratorExit:
                print(f"in round {number}")
                raise

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield every()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000  # KiB


def test_folders_of_adapters(rounds, tmp_path):
    ms.set_seed(3)
    model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    move(model, 1)
    good, folder = tmp_path / "good", tmp_path / "folder"
    model.save_pretrained(good)

    def state():
        configs = {name: config.to_dict() for name, config in model.peft_config.items()}
        values = {name: value.tobytes() for name, value in model.adapters["default"].values.items()}
        return contents(model.network), configs, values, model.active_adapter

    before = state()
    for rng in rounds:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        names = ["adapter_config.json", "adapter_model.safetensors", "mindpet_passport.json"]
        mutated(rng, folder / pick(rng, names))
        if rng.random() < 0.5:
            (folder / names[2]).unlink()
        force = bool(rng.random() < 0.5)
        _, loaded = attempt(model.load_adapter, folder, "other", force=force)
        assert ("other" in model.adapters) == loaded
        if loaded:
            found, config = load((folder / names[1]).read_bytes()), json.loads((folder / names[0]).read_bytes())
            tensors, adapter = model.adapter_tensors("other"), model.adapters["other"]
            with np.errstate(over="ignore"):
                found = {key: found[key].astype(value.dtype) for key, value in tensors.items()}
            assert tensors and all(tensors[key].tobytes() == found[key].tobytes() for key in tensors)
            sizes = adapter.config.delta_arguments("query")
            if config["peft_type"] == "LORA" and not (config.get("rank_pattern") or config.get("alpha_pattern")):
                assert (sizes["rank"], sizes["alpha"]) == (config.get("r", 8), config.get("lora_alpha", 8))
            model.delete_adapter("other")
        assert state() == before


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_delta_files(ending, rounds, tmp_path):
    network = Toy("lora")
    for param in network.get_parameters():
        param.requires_grad = "lora" in param.name
    good, path = tmp_path / f"good.{ending}", tmp_path / f"delta.{ending}"
    delta = [{"name": param.name, "data": param} for param in network.trainable_params()]
    ms.save_checkpoint(delta, str(good), format=ending)

    before = contents(network)
    for rng in rounds:
        shutil.copy(good, path)
        mutated(rng, path)
        _, loaded = attempt(load_delta, network, path)
        if loaded:
            found = load(path.read_bytes()) if ending == "safetensors" else ms.load_checkpoint(str(path))
            found = {
                name.replace("lora_A", "lora_a").replace("lora_B", "lora_b"): value for name, value in found.items()
            }
            for param in network.trainable_params():
                value = found[param.name]
                value = value.asnumpy() if isinstance(value, Parameter) else value
                with np.errstate(over="ignore"):
                    np.testing.assert_array_equal(param.asnumpy(), value.astype(np.float32))
            load_delta(network, good)
        assert contents(network) == before


def test_indexes_and_shards_of_a_base(rounds, tmp_path):
    weights = np.random.default_rng(1).normal(size=(2, 8, 8)).astype(np.float32)
    good, folder, adapter = tmp_path / "good", tmp_path / "base", tmp_path / "adapter"
    good.mkdir()
    adapter.mkdir()
    names = ["a-1.safetensors", "a-2.safetensors"]
    for name, key, weight in zip(names, ("query.weight", "key.weight"), weights):
        (good / name).write_bytes(save({key: weight, f"{key}.more": weight[:2]}))
    index = {f"{key}.weight{end}": name for key, name in zip(("query", "key"), names) for end in ("", ".more")}
    content = {"metadata": {"total_size": 640}, "weight_map": index}
    (good / "model.safetensors.index.json").write_text(json.dumps(content))
    (good / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 8}))
    lora = {"A": np.ones((2, 8), np.float32), "B": np.ones((8, 2), np.float32)}
    tensors = {f"base_model.model.query.lora_{name}.weight": value for name, value in lora.items()}
    (adapter / "adapter_model.safetensors").write_bytes(save(tensors))
    LoraConfig(r=2, lora_alpha=2, target_modules=["query"]).save_pretrained(adapter)
    for rng in rounds:
        for path in (folder, tmp_path / "out"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, folder)
        mutated(rng, folder / pick(rng, [*names, "model.safetensors.index.json", "config.json"]))
        before = sorted(tmp_path.iterdir())
        _, merged = attempt(merge, folder, adapter, tmp_path / "out", progressbar=False)
        assert sorted(tmp_path.iterdir()) == sorted(before + [tmp_path / "out"] * merged)
        if merged:
            base = {key: value for name in names for key, value in load((folder / name).read_bytes()).items()}
            out = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"]
            found = {key: value for path in out for key, value in load(path.read_bytes()).items()}
            assert set(found) <= set(base)
            for key, value in found.items():
                update = 2 if key == "query.weight" else 0
                with np.errstate(invalid="ignore"):
                    expected = (base[key].astype(np.float32) + update).astype(value.dtype)
                np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_lists_in_yaml(rounds, tmp_path):
    network = Toy("lora")
    good = "freeze:\n  include:\n  - 'fc.*'\n  - '*bias'\n  exclude:\n  - 'head.weight'\n  - '*lora_b'\n"
    path = tmp_path / "freeze.yaml"
    for rng in rounds:
        path.write_text(good)
        mutated(rng, path)
        before = contents(network)
        _, loaded = attempt(freeze_from_config, network, path)
        if loaded:
            lists = yaml.safe_load(path.read_bytes())["freeze"]
            for (name, value, was), param in zip(before, network.get_parameters()):
                hits = [any(fnmatchcase(name, one) for one in lists.get(which, ())) for which in ("include", "exclude")]
                expected = was if hits[0] == hits[1] else hits[1]
                assert param.requires_grad == expected and param.asnumpy().tobytes() == value
        else:
            assert contents(network) == before


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_the_command_line(ending, rounds, tmp_path, capsys):
    good, delta, config, out = (tmp_path / name for name in (f"good.{ending}", f"d.{ending}", "c.json", "out"))
    values = {"query.mindpet_delta_lora_a": np.ones((2, 8)), "query.mindpet_delta_lora_b": np.ones((8, 2))}
    content = [{"name": name, "data": Tensor(value.astype(np.float32))} for name, value in values.items()]
    ms.save_checkpoint(content, str(good), format=ending)
    for rng in rounds:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copy(good, delta)
        config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        mutated(rng, pick(rng, [delta, config]))
        for command in (["inspect", str(delta)], ["convert", str(delta), str(out), "--config", str(config)]):
            code = main(command)
            printed = capsys.readouterr()
            lines = printed.err.splitlines()
            assert code in (0, 2) and "Traceback" not in printed.err
            assert code == 0 or any(line.startswith("mindpet: ") for line in lines)
            for text in (printed.out, printed.err):
                assert len(text) < LONGEST_MESSAGE + 1000 and all(char.isprintable() or char == "\n" for char in text)
        assert out.exists() == (code == 0)


SIZES = [
    (LoraConfig(r=2, target_modules=["query"]), {"r": 2_000_000_000}),
    (LoraConfig(r=2, target_modules=["query"]), {"rank_pattern": {"query": 2_000_000_000}}),
    (AdapterConfig(bottleneck_size=2, target_modules=["query"]), {"bottleneck_size": 2_000_000_000}),
    (LowRankAdapterConfig(reduction_factor=2, target_modules=["query"]), {"low_rank_size": 2_000_000_000}),
    (PrefixTuningConfig(num_virtual_tokens=2), {"num_virtual_tokens": 2_000_000_000}),
]


@pytest.mark.parametrize("config, change", SIZES, ids=[next(iter(change)) for _, change in SIZES])
def test_sizes_are_compared_before_anything_is_made(config, change, tmp_path):
    path = tmp_path / "adapter_config.json"
    base = LlamaForCausalLM.from_pretrained(LLAMA) if config.is_prompt_learning else Tiny()
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before, memory = contents(model.network), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="2000000000, but no axis of a tensor is longer than"):
        model.load_adapter(tmp_path, "other", force=True)
    base = model.unload()
    with pytest.raises(CheckpointError, match="2000000000, but no axis of a tensor is longer than"):
        PeftModel.from_pretrained(base, tmp_path, force=True)
    model = get_peft_model(base, config)
    assert [entry[:1] for entry in contents(base)] == [entry[:1] for entry in before]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 100_000  # KiB


NAMES = ["../x", "a/b", "", ".", "..", "/tmp/x", "a\n", "\x1b[2J", "a\\b", "-x"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_adapters_stay_in_their_folder(name, tmp_path):
    model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    before = contents(model.network)
    for call in (
        lambda: model.add_adapter(name, LoraConfig(r=2, target_modules=["query"])),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.add_weighted_adapter(["default"], [1.0], name),
    ):
        with pytest.raises(AdapterError, match="'adapter_name' must be") as caught:
            call()
        assert str(caught.value).isprintable()
    assert contents(model.network) == before and list(model.adapters) == ["default"]


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "a/../../x"])
def test_names_of_checkpoints_stay_in_their_folder(prefix, tmp_path):
    with pytest.raises(ValueError, match="'prefix' must be"):
        TrainableParamsCheckPoint(str(tmp_path / "ckpt"), prefix=prefix)
    assert not list(tmp_path.iterdir())


def test_a_prefix_of_dots_is_a_name_as_any_other(tmp_path):
    callback = TrainableParamsCheckPoint(str(tmp_path / "ckpt"), "..", CheckpointConfig(save_checkpoint_steps=1))
    params = InternalCallbackParam()
    params.update(cur_step_num=1, cur_epoch_num=1, batch_num=1, train_network=Toy("lora"), network=None)
    callback.on_train_begin(RunContext(params))
    callback.on_train_step_end(RunContext(params))
    assert [path.parent for path in tmp_path.rglob("*.ckpt")] == [tmp_path / "ckpt"]

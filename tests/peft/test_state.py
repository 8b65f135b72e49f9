"""An adapter's files: their names and contents, what is refused, and other bases."""

import json
import os
import pathlib
import subprocess
import sys
import time

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import Small, config, contents, ids, move, numbers, same
from test_inject import METHODS

from mindpet.errors import AdapterError, CheckpointError, ConfigError
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import load_delta
from mindpet.peft import LoraConfig, LowRankAdapterConfig, NameMap, PeftConfig, PeftModel, get_peft_model

EVERY = {
    **METHODS,
    "low_rank_adapter": LowRankAdapterConfig(target_modules=["query"], reduction_factor=2),
    "head": config(modules_to_save=["classifier"], bias="lora_only", task_type="SEQ_CLS"),
}
BASE = "base_model.model."


def trained(peft_config, seed=1):
    ms.set_seed(3)
    model = get_peft_model(Small(), peft_config)
    move(model, seed)
    return model


def fresh():
    ms.set_seed(3)
    return Small()


@pytest.mark.parametrize("method", list(EVERY))
def test_round_trip(method, mode, rng, tmp_path):
    model, x = trained(EVERY[method]), ids(rng)
    expected = numbers(model, x)
    model.save_pretrained(tmp_path, step=7)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors", "mindpet_passport.json"]
    network = fresh()
    loaded = PeftModel.from_pretrained(network, tmp_path)
    same(numbers(loaded, x), expected)
    assert not loaded.trainable_params()
    assert PeftModel.from_pretrained(fresh(), tmp_path, is_trainable=True).trainable_params()
    loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    loaded.unload()
    assert contents(network) == contents(fresh())


def test_the_layout_is_that_of_hugging_face(tmp_path):
    model = trained(config(modules_to_save=["classifier"], bias="lora_only", target_modules=["embed", "query", "conv"]))
    model.add_adapter("second", config(target_modules=["query"], use_dora=True))
    model.save_pretrained(tmp_path)
    file = TensorFile(tmp_path / "adapter_model.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.shapes == {
        f"{BASE}embed.lora_embedding_A": (2, 10),
        f"{BASE}embed.lora_embedding_B": (8, 2),
        f"{BASE}query.lora_A.weight": (2, 8),
        f"{BASE}query.lora_B.weight": (8, 2),
        f"{BASE}conv.lora_A.weight": (2, 1, 3, 3),
        f"{BASE}conv.lora_B.weight": (4, 2, 1, 1),
        f"{BASE}classifier.weight": (3, 12),
        f"{BASE}classifier.bias": (3,),
        f"{BASE}query.base_layer.bias": (8,),
        f"{BASE}conv.base_layer.bias": (4,),
    }
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["inference_mode"] is True and content["peft_type"] == "LORA"
    assert set(content) > {"base_model_name_or_path", "task_type", "peft_version", "target_modules"}
    second = TensorFile(tmp_path / "second/adapter_model.safetensors")
    assert f"{BASE}query.lora_magnitude_vector" in second.shapes
    passport = json.loads((tmp_path / "mindpet_passport.json").read_text())
    assert passport["mindspore"] == ms.__version__ and passport["base"]["network"] == "Small"
    assert "query.weight" in passport["base"]["parameters"]
    assert not any(name.startswith("classifier") or "mindpet" in name for name in passport["base"]["parameters"])


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float32])
def test_types_are_kept(dtype, rng, tmp_path):
    model = trained(config(target_modules=["query", "embed"]))
    model.save_pretrained(tmp_path)
    tensors = TensorFile(tmp_path / "adapter_model.safetensors").read_all()
    ms_type = {np.float16: ms.float16, "bfloat16": ms.bfloat16, np.float32: ms.float32}[dtype]
    tensors = {name: Tensor(value).astype(ms_type).asnumpy() for name, value in tensors.items()}
    save_tensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "mindpet_passport.json").unlink()  # it is not the file that was saved
    loaded = PeftModel.from_pretrained(fresh(), tmp_path, is_trainable=True)
    assert {param.dtype for param in loaded.trainable_params()} == {ms_type}
    assert np.isfinite(numbers(loaded, ids(rng))).all()
    loaded.save_pretrained(tmp_path / "again")
    again = TensorFile(tmp_path / "again/adapter_model.safetensors").read_all()
    assert {name: value.tobytes() for name, value in again.items()} == {n: v.tobytes() for n, v in tensors.items()}


def test_several_adapters_in_one_directory(mode, rng, tmp_path):
    model, x = trained(config()), ids(rng)
    model.add_adapter("two", config(r=3, target_modules=["query"]))
    model.set_adapter("two")
    move(model, 2)
    second = numbers(model, x)
    model.set_adapter("default")
    first = numbers(model, x)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "only", selected_adapters=["two"])
    assert sorted(os.listdir(tmp_path / "only")) == ["two"]
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "two", "two")
    same(numbers(loaded, x), second)
    loaded.load_adapter(tmp_path, "default")
    same(numbers(loaded, x), second)
    loaded.set_adapter("default")
    same(numbers(loaded, x), first)
    with pytest.raises(AdapterError, match="no adapter 'nix'"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["default", "nix"])
    assert not (tmp_path / "none").exists()


def change(folder, **changes):
    """Change tensors of a file: None removes one."""
    path = folder / "adapter_model.safetensors"
    tensors = {**TensorFile(path).read_all(), **{BASE + name.replace("__", "."): v for name, v in changes.items()}}
    save_tensors(path, {name: value for name, value in tensors.items() if value is not None})


def test_all_tensors_that_do_not_fit_are_in_one_error(tmp_path):
    trained(config()).save_pretrained(tmp_path)
    change(
        tmp_path,
        query__lora_A__weight=None,
        turned__lora_B__weight=np.zeros((8, 5), np.float32),
        conv__lora_B__weight=np.zeros((4, 2, 1, 1), np.int32),
        nothing__lora_A__weight=np.zeros((2, 8), np.float32),
    )
    network = fresh()
    before = contents(network)
    with pytest.raises(CheckpointError) as raised:
        PeftModel.from_pretrained(network, tmp_path)
    for line in (
        "missing: base_model.model.query.lora_A.weight [2, 8]",
        "surplus: base_model.model.nothing.lora_A.weight [2, 8]",
        "base_model.model.turned.lora_B.weight: [8, 2] is needed, but it is [8, 5]",
        "base_model.model.conv.lora_B.weight: must hold floating-point numbers, but is int32",
    ):
        assert line in str(raised.value)
    assert contents(network) == before


@pytest.mark.parametrize("cut", [0, 4, 20, -1, "more"])
def test_damaged_files_are_refused(cut, tmp_path):
    trained(config()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(whole + b"x" if cut == "more" else whole[:cut])
    network = fresh()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        PeftModel.from_pretrained(network, tmp_path)
    assert contents(network) == contents(fresh())


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        PeftModel.from_pretrained(fresh(), tmp_path)
    trained(config()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only adapter_model.bin, a pickle of PyTorch"):
        PeftModel.from_pretrained(fresh(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        PeftModel.from_pretrained(fresh(), tmp_path)
    save_tensors(tmp_path / "adapter_model.safetensors", {})
    with pytest.raises(CheckpointError, match="holds no tensors"):
        PeftModel.from_pretrained(fresh(), tmp_path)


def test_another_base_is_refused_and_its_layers_named(rng, tmp_path):
    model, x = trained(config()), ids(rng)
    model.save_pretrained(tmp_path)
    trained(config(target_modules=["embed"])).save_pretrained(tmp_path / "one")
    network = fresh()
    network.mlp[2].weight.set_data(network.mlp[2].weight + 1)
    network.turned.shift.set_dtype(ms.float16)
    before = contents(network)
    with pytest.raises(CheckpointError) as raised:
        PeftModel.from_pretrained(network, tmp_path)
    text = str(raised.value)
    assert "mlp.2.weight: other values" in text and "turned.shift: [8] float32, here [8] float16" in text
    assert "query" not in text and contents(network) == before
    with pytest.raises(CheckpointError, match="query.weight: not in this base"):
        PeftModel(Other()).load_adapter(tmp_path / "one", "default")
    network.turned.shift.set_dtype(ms.float32)
    forced = PeftModel.from_pretrained(network, tmp_path, force=True)
    assert np.abs(numbers(forced, x) - numbers(model, x)).max() > 1e-4


class Other(nn.Cell):
    """A network with only one of the layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)


def test_the_passport_knows_the_base_whatever_is_in_place(tmp_path):
    """The weights that PiSSA takes a part of, and biases that train, count as the base has them."""
    model = trained(config(target_modules=["query"], init_lora_weights="pissa", bias="all"))
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    one, other = ((tmp_path / part / "mindpet_passport.json").read_text() for part in (".", "merged"))
    assert one == other
    PeftModel.from_pretrained(fresh(), tmp_path)


def test_slices_of_a_rank_are_refused(tmp_path):
    model = trained(config())
    model.network.query.weight.sliced = True
    with pytest.raises(CheckpointError, match="1 parameters are slices of this rank, query.weight among them"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    model = trained(config())
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    move(model, 5)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors", "mindpet_passport.json"]


def test_a_save_that_is_killed_leaves_a_whole_adapter(tmp_path):
    child = pathlib.Path(__file__).with_name("kill_child.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(child.parents[2]), str(child.parent)])}
    for delay in (0.0, 0.003, 0.011, 0.023):
        with subprocess.Popen(
            [sys.executable, str(child), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            for _ in range(3):
                process.stdout.readline()
            time.sleep(delay)
            process.kill()
        tensors = TensorFile(tmp_path / "adapter_model.safetensors").read_all()
        assert len(tensors) == 4 and len({float(v) for value in tensors.values() for v in np.unique(value)}) == 1
        assert PeftConfig.from_pretrained(tmp_path).r == 64
        json.loads((tmp_path / "mindpet_passport.json").read_text())


def test_names_of_another_model_and_fused_layers(rng, tmp_path):
    """`blocks` is `layers` there, and `query` is made of three layers."""
    names = NameMap(
        lambda name: name.replace("blocks", "layers").replace("query", "qkv"), fused={"qkv": {"q": 4, "k": 2, "v": 2}}
    )
    model = get_peft_model(fresh(), config(target_modules=["query", "shared"]), name_map=names)
    move(model, 1)
    model.save_pretrained(tmp_path)
    shapes = TensorFile(tmp_path / "adapter_model.safetensors").shapes
    assert f"{BASE}layers.0.shared.lora_A.weight" in shapes
    assert shapes[f"{BASE}q.lora_A.weight"] == (2, 8) and shapes[f"{BASE}v.lora_B.weight"] == (2, 2)
    assert PeftConfig.from_pretrained(tmp_path).target_modules == ["k", "layers.0.shared", "layers.1.shared", "q", "v"]
    again, x = PeftModel.from_pretrained(fresh(), tmp_path, name_map=names), ids(rng)
    np.testing.assert_allclose(numbers(again, x), numbers(model, x), atol=1e-6)


class Two(nn.Cell):
    """Two networks of one class, each with adapters of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Small(), Small()

    def construct(self, ids):
        return self.left(ids) + self.right(ids)


def test_a_network_inside_of_another_has_the_same_files(mode, rng, tmp_path):
    """The names of its parameters begin with the outer one's, its paths do not."""
    fields = {"bias": "lora_only", "modules_to_save": ["classifier"], "target_modules": ["query", "embed"]}
    saved = []
    for folder, make in (("one", lambda: Small()), ("two", lambda: Two().left)):
        ms.set_seed(3)
        model = get_peft_model(make(), config(**fields))
        for number, param in enumerate(model.trainable_params()):
            param.set_data(Tensor(np.full(param.shape, 0.1 * number, np.float32)))
        model.save_pretrained(tmp_path / folder)
        saved.append({file: (tmp_path / folder / file).read_bytes() for file in os.listdir(tmp_path / folder)})
    assert saved[0] == saved[1]
    assert {param.name.split(".")[0] for param in model.trainable_params()} == {"left"}
    ms.set_seed(3)
    outer, x = Two(), ids(rng)
    left = PeftModel.from_pretrained(outer.left, tmp_path / "one")
    right = get_peft_model(outer.right, config(init_lora_weights=False))
    np.testing.assert_allclose(numbers(outer, x), numbers(left, x) + numbers(right, x), atol=1e-5)
    with left.disable_adapter(), right.disable_adapter():
        base = numbers(outer, x)
    assert left.merge_and_unload() is outer.left and right.unload() is outer.right
    assert np.abs(numbers(outer, x) - base).max() > 1e-4


@pytest.mark.parametrize(
    "fields, scales",
    [({}, (5 / 3, 5 / 3)), ({"use_rslora": True}, (5 / 3**0.5,) * 2), ({"alpha_pattern": {"v": 2}}, (5 / 3, 2 / 3))],
)
def test_layers_that_are_apart_there_are_one_here(fields, scales, rng, tmp_path):
    names = NameMap(fused={"query": {"q": 4, "k": 2, "v": 2}})
    tensors, delta = {}, np.zeros((8, 8), np.float32)
    for part, rows, scale in (("q", slice(0, 4), scales[0]), ("v", slice(6, 8), scales[1])):
        size = rows.stop - rows.start
        a, b = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(size, 3)).astype(np.float32)
        tensors.update({f"{BASE}{part}.lora_A.weight": a, f"{BASE}{part}.lora_B.weight": b})
        delta[rows] = scale * b @ a
    save_tensors(tmp_path / "adapter_model.safetensors", tensors)
    LoraConfig(r=3, lora_alpha=5, target_modules=["q", "v"], **fields).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh(), tmp_path, name_map=names)
    weight = model.network.query.weight.asnumpy().copy()
    model.merge_adapter()
    np.testing.assert_allclose(model.network.query.weight.asnumpy() - weight, delta, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "again")
    again = TensorFile(tmp_path / "again/adapter_model.safetensors").read_all()
    assert set(again) >= set(tensors)
    saved = PeftConfig.from_pretrained(tmp_path / "again")
    for part, rows in (("q", slice(0, 4)), ("v", slice(6, 8))):
        a, b = again[f"{BASE}{part}.lora_A.weight"], again[f"{BASE}{part}.lora_B.weight"]
        assert a.shape == (3, 8)
        np.testing.assert_allclose(saved.scaling(part) * b @ a, delta[rows], atol=1e-5)


def test_delta_files_of_hand_made_networks_fit(rng, tmp_path):
    model, x = trained(config(target_modules=["query"])), ids(rng)
    values = {p.name: p for p in model.trainable_params()}
    ms.save_checkpoint([{"name": name, "data": param} for name, param in values.items()], str(tmp_path / "d.ckpt"))
    other = get_peft_model(fresh(), config(target_modules=["query"]))
    load_delta(other, str(tmp_path / "d.ckpt"))
    same(numbers(other, x), numbers(model, x))


def test_a_configuration_of_another_class_is_refused(tmp_path):
    trained(config()).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").chmod(0o600)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "layer_replication": [[0, 1]]}))
    with pytest.raises(ConfigError, match="not supported: .*layer_replication"):
        PeftModel.from_pretrained(fresh(), tmp_path)

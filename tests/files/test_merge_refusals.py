"""Merging and converting files: every tensor is used once and every number is given, or it is one line of error."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import mindspore as ms
import numpy as np
import pytest

from mindpet.cli import main
from mindpet.delta import PrefixEncoder
from mindpet.errors import CheckpointError, ConfigError, MergeError
from mindpet.files.adapter import save_adapter
from mindpet.files.convert import convert, load_config
from mindpet.files.merge import merge
from mindpet.files.passport import fingerprint
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.peft import LoraConfig, NameMap, PeftConfig

START = "base_model.model."
PATHS = ("encoder.query", "encoder.out")
INDEX = "model.safetensors.index.json"


def weights(dtype=np.float32):
    """A base: two linear layers with biases, an embedding and a norm."""
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (5, 4), "norm.weight": (4,), "norm.bias": (4,)}
    for path, out in zip(PATHS, (4, 6)):
        shapes.update({f"{path}.weight": (out, 4), f"{path}.bias": (out,)})
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def tensors(rank=2, paths=PATHS, outs=(4, 6), start=START):
    """A and B of LoRA."""
    rng, found = np.random.default_rng(1), {}
    for path, out in zip(paths, outs):
        found[f"{start}{path}.lora_A.weight"] = rng.normal(size=(rank, 4)).astype(np.float32)
        found[f"{start}{path}.lora_B.weight"] = rng.normal(size=(out, rank)).astype(np.float32)
    return found


def adapter(folder, content=None, passport=None, **fields):
    """A folder with a passport."""
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["query", "out"], **fields}
    save_adapter(folder, LoraConfig(**fields), tensors() if content is None else content, passport or {})
    return folder


def base(path, content=None):
    """A file, or a folder with a file for each tensor."""
    content = weights() if content is None else content
    if path.suffix == ".safetensors":
        save_tensors(path, content)
    else:
        ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in content.items()], str(path))
    return path


def refused(capsys, tmp_path, *arguments, lines=1):
    """The error of a command that writes nothing."""
    before = sorted(os.walk(tmp_path))
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mindpet: ") and error.count("\n") == lines, error
    assert sorted(os.walk(tmp_path)) == before
    return error


def refused_merge(capsys, tmp_path, *more, lines=1):
    files = ["--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter"]
    return refused(capsys, tmp_path, "merge", *files, "--out", tmp_path / "out.safetensors", *more, lines=lines)


def merged(tmp_path, **keywords):
    merge(
        tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", progressbar=False, **keywords
    )
    return TensorFile(tmp_path / "out.safetensors").read_all()


def key(name, path="encoder.query"):
    return f"{START}{path}.{name}"


def changed(**changes):
    """Tensors of an adapter with others in their place; None takes one out."""
    names = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector", "bias": "lora_B.bias"}
    found = {**tensors(), **{key(names[name]): value for name, value in changes.items()}}
    return {name: value for name, value in found.items() if value is not None}


A, B = tensors()[key("lora_A.weight")], tensors()[key("lora_B.weight")]
WRONG = {
    "another rank": (tensors(2), {"r": 8}, "encoder.query.lora_A.weight: [8, 4] is needed, but it is [2, 4]", 5),
    "a pattern's rank": (tensors(2), {"rank_pattern": {"query": 3}}, "[3, 4] is needed, but it is [2, 4]", 3),
    "no B": (changed(b=None), {}, "missing: base_model.model.encoder.query.lora_B.weight ['out', 2]", 1),
    "no A": (changed(a=None), {}, "missing: base_model.model.encoder.query.lora_A.weight [2, 'in']", 1),
    "A with one axis": (changed(a=A[0]), {}, "lora_A.weight: [2, 'in'] is needed, but it is [4]", 1),
    "ints": (changed(a=A.astype(np.int32)), {}, "must hold floating-point numbers, but is int32", 1),
    "NaN": (changed(a=np.full_like(A, np.nan)), {}, "NaN or infinite numbers", 1),
    "infinite": (changed(b=np.full_like(B, np.inf)), {}, "NaN or infinite numbers", 1),
    "a name with the adapter in it": (
        {name.replace(".weight", ".default.weight"): value for name, value in tensors().items()},
        {},
        "surplus: base_model.model.encoder.query.lora_A.default.weight [2, 4]",
        7,
    ),
    "another method": ({**tensors(), key("lokr_w1"): A, key("hada_w1_a"): A}, {}, "surplus", 3),
    "its own names": ({**tensors(), key("mindpet_delta_lora_a"): A}, {"modules_to_save": ["query"]}, "surplus", 1),
    "magnitude without DoRA": (changed(m=np.ones(4, np.float32)), {}, "surplus", 1),
    "DoRA without magnitude": (tensors(), {"use_dora": True}, "missing: ", 3),
    "a bias that nobody speaks of": ({**tensors(), key("base_layer.bias"): A[0]}, {}, "surplus", 1),
    "a head that nobody speaks of": ({**tensors(), f"{START}head.weight": A}, {}, "surplus", 1),
    "a whole tensor twice": (
        {**tensors(), key("base_layer.bias"): A[0], key("bias"): A[0]},
        {"bias": "all"},
        "encoder.query.base_layer.bias is for encoder.query.bias, too",
        1,
    ),
    "another beginning": (tensors(start="model."), {}, "missing: base_model.model.*.lora_A.weight", 7),
    "no LoRA": ({f"{START}head.weight": A}, {"modules_to_save": ["head"]}, "missing", 3),
}


@pytest.mark.parametrize("what", WRONG)
def test_tensors_that_are_not_those_of_the_configuration_are_refused(what, tmp_path, capsys):
    content, fields, message, lines = WRONG[what]
    adapter(tmp_path / "adapter", content, **fields)
    base(tmp_path / "base.safetensors")
    assert message in refused_merge(capsys, tmp_path, lines=lines)
    if what != "a whole tensor twice":
        refused(capsys, tmp_path, "convert", tmp_path / "adapter", tmp_path / "delta.safetensors", lines=lines)


@pytest.mark.parametrize(
    "paths, there, message",
    [
        (("encoder.query", "decoder.query"), ["query"], "decoder.query: no tensor of the base is called"),
        (("query",), ["encoder.query", "decoder.query"], "it cannot be told which tensor of the base query.weight is"),
        (("a.b.query",), ["b.query", "query"], "it cannot be told which tensor of the base a.b.query.weight is"),
        (("query", "out"), ["query", "net.out"], "out: no tensor of the base is called out.weight"),
    ],
)
def test_two_places_or_none_are_an_error(paths, there, message, tmp_path, capsys):
    adapter(tmp_path / "adapter", tensors(2, paths, (4, 4)))
    base(tmp_path / "base.safetensors", {f"{path}.weight": np.zeros((4, 4), np.float32) for path in there})
    assert message in refused_merge(capsys, tmp_path)


def test_two_tensors_of_the_base_with_one_name_there(tmp_path, capsys):
    adapter(tmp_path / "adapter", {**tensors(), f"{START}norm.weight": A[0]}, modules_to_save=["norm"])
    base(tmp_path / "base.safetensors", {**weights(), "norm.gamma": A[0]})
    assert "several tensors of the base are norm.weight: ['norm.weight', 'norm.gamma']" in refused_merge(
        capsys, tmp_path
    )


@pytest.mark.parametrize("put", ["", "net."])
@pytest.mark.parametrize("targets", [["query", "out"], r".*\.(query|out)"])
def test_a_layer_that_the_adapter_should_have_is_warned_of(targets, put, tmp_path, recwarn):
    """By its name, as far as that tells; norms have no such weight, and what is left out is left out."""
    more = {name.replace("encoder", "decoder"): value for name, value in weights().items()}
    base(tmp_path / "base.safetensors", {put + name: value for name, value in {**weights(), **more}.items()})
    adapter(tmp_path / "adapter", target_modules=targets, exclude_modules=["decoder.out"])
    merged(tmp_path)
    (warning,) = recwarn
    assert str(warning.message).endswith("but there is nothing for them: ['decoder.query'].")
    adapter(tmp_path / "adapter", target_modules="all-linear")
    (tmp_path / "out.safetensors").unlink()
    recwarn.clear()
    merged(tmp_path)
    assert not recwarn.list


@pytest.mark.parametrize("cut, put", [("", ""), ("encoder.", ""), ("", "net.")])
def test_all_names_begin_in_another_way(cut, put, tmp_path):
    """The weights are `W + (alpha / r) B A`, wherever they are; what is new gets the beginning of the others."""
    head = np.ones((2, 6), np.float32)
    adapter(tmp_path / "adapter", {**tensors(), f"{START}head.weight": head}, modules_to_save=["head"])
    content = {f"{put}{name[len(cut) :]}": value for name, value in weights().items() if name.startswith(cut)}
    base(tmp_path / "base.safetensors", content)
    found = merged(tmp_path)
    assert found.keys() == content.keys() | {f"{put}head.weight" if put else "head.weight"}
    for path in PATHS:
        delta = 6 / 2 * tensors()[key("lora_B.weight", path)] @ tensors()[key("lora_A.weight", path)]
        name = f"{put}{path[len(cut) :]}.weight"
        np.testing.assert_allclose(found[name], content[name] + delta, rtol=1e-5)


def test_the_base_s_own_weight_in_an_adapter_is_compared_and_left_out(tmp_path, capsys):
    content = {**tensors(), key("base_layer.weight"): weights()[f"{PATHS[0]}.weight"]}
    adapter(tmp_path / "adapter", content)
    base(tmp_path / "base.safetensors")
    delta = 6 / 2 * tensors()[key("lora_B.weight")] @ tensors()[key("lora_A.weight")]
    np.testing.assert_allclose(
        merged(tmp_path)[f"{PATHS[0]}.weight"], weights()[f"{PATHS[0]}.weight"] + delta, rtol=1e-5
    )
    (tmp_path / "out.safetensors").unlink()
    adapter(tmp_path / "adapter", {**content, key("base_layer.weight"): np.ones((4, 4), np.float32)})
    assert "trained on another base: the weight [4, 4] of encoder.query" in refused_merge(capsys, tmp_path)


def test_weights_that_are_not_floating_are_not_merged(tmp_path, capsys):
    adapter(tmp_path / "adapter")
    base(tmp_path / "base.safetensors", {**weights(), "encoder.out.weight": np.ones((6, 4), np.int8)})
    error = refused_merge(capsys, tmp_path)
    assert "encoder.out.weight: holds int8 in the base" in error


def test_a_whole_tensor_that_overflows_in_the_type_of_the_base(tmp_path, capsys):
    content = {**tensors(), f"{START}norm.weight": np.full(4, 1e30, np.float32)}
    adapter(tmp_path / "adapter", content, modules_to_save=["norm"])
    base(tmp_path / "base.safetensors", weights(np.float16))
    assert "NaN or infinite numbers (with force they are used all the same): norm.weight as float16" in refused_merge(
        capsys, tmp_path
    )


def passport_of(content):
    return {"base": {"network": "Net", "parameters": {name: fingerprint(value) for name, value in content.items()}}}


def test_another_base_is_refused_as_by_load_adapter(tmp_path, capsys):
    adapter(tmp_path / "adapter", passport=passport_of(weights()))
    base(tmp_path / "base.safetensors", {**weights(), "norm.bias": np.ones(4, np.float32)})
    error = refused_merge(capsys, tmp_path)
    assert "trained on another base" in error and "norm.bias: other values" in error
    content = weights()
    content.pop("norm.weight")
    base(tmp_path / "base.safetensors", content)
    assert "norm.weight: not in this base" in refused_merge(capsys, tmp_path)
    assert merged(tmp_path, force=True).keys() == content.keys()


@pytest.mark.parametrize("there, here", [("float32", "float16"), ("float16", "float32"), ("float32", "float32")])
def test_the_same_base_in_another_type_with_names_of_mindspore_is_the_same(there, here, tmp_path):
    """A file is cast when it is loaded; a linear layer of the network may have its weight the other way up."""
    stored = weights(here)
    loaded = {name.replace("norm.weight", "norm.gamma"): value.astype(there) for name, value in stored.items()}
    loaded["encoder.out.weight"] = loaded["encoder.out.weight"].T
    adapter(tmp_path / "adapter", passport=passport_of(loaded))
    base(tmp_path / "base.safetensors", {f"net.{name}": value for name, value in stored.items()})
    assert merged(tmp_path).keys() == {f"net.{name}" for name in stored}


def test_files_that_were_changed_since_are_refused(tmp_path, capsys):
    adapter(tmp_path / "adapter")
    base(tmp_path / "base.safetensors")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6', '"lora_alpha": 60'))
    assert "of two saves, damaged, or written by other software" in refused_merge(capsys, tmp_path)
    refused(capsys, tmp_path, "convert", tmp_path / "adapter", tmp_path / "delta.ckpt")
    files = ["merge", "--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter"]
    assert main([*map(str, files), "--out", str(tmp_path / "out.safetensors"), "--force"]) == 0


def test_a_folder_without_a_passport_is_warned_of_in_one_line(tmp_path, capsys):
    adapter(tmp_path / "adapter")
    (tmp_path / "adapter/mindpet_passport.json").unlink()

    def show(*arguments, file=None, line=None):  # as Python does it; pytest collects warnings instead
        sys.stderr.write(warnings.formatwarning(*arguments))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        before = warnings.formatwarning
        assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "delta.safetensors")]) == 0
        assert warnings.formatwarning is before
    error = capsys.readouterr().err
    assert error.startswith("mindpet: warning: ") and error.count("\n") == 1
    assert "no mindpet_passport.json" in error


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_configuration_of_a_folder_that_lacks_a_number_is_refused(name, tmp_path, capsys):
    """A word that is written wrong is a field that is not known, and not one with its default."""
    adapter(tmp_path / "adapter")
    (tmp_path / "adapter/mindpet_passport.json").unlink()
    base(tmp_path / "base.safetensors")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace(f'"{name}"', f'"{name}x"'))
    assert f"adapter_config.json: {name!r} is missing" in refused_merge(capsys, tmp_path)


def delta(path, content=None):
    """A delta file."""
    found = {f"{PATHS[0]}.mindpet_delta_lora_a": A, f"{PATHS[0]}.mindpet_delta_lora_b": B}
    save_tensors(path, {**found, **(content or {})})
    return path


GIVEN = {"peft_type": "LORA", "lora_alpha": 6}


@pytest.mark.parametrize(
    "fields, content, message",
    [
        ({"peft_type": "LORA"}, {}, "'lora_alpha' is missing"),
        ({"peft_type": "LORA", "lora_alhpa": 6}, {}, "'lora_alhpa' is not known; 'lora_alpha' is missing"),
        ({**GIVEN, "use_rslroa": True}, {}, "'use_rslroa' is not known"),
        ({**GIVEN, "r": 8}, {}, "encoder.query: 8 is given, but it is 2"),
        ({**GIVEN, "rank_pattern": {"query": 4}}, {}, "encoder.query: 4 is given, but it is 2"),
        ({**GIVEN, "alpha_pattern": {"qurey": 4}}, {}, "no layer matches 'qurey'; near: ['query'"),
        ({**GIVEN, "target_parameters": ["x"]}, {}, "'target_parameters' is not known"),
        ({"peft_type": "ADAPTER"}, {}, "'bottleneck_size' is missing"),
        ({"peft_type": "LOW_RANK_ADAPTER"}, {}, "'reduction_factor' is missing; 'low_rank_size' is missing"),
        ({"lora_alpha": 6}, {}, "'peft_type' must be one of"),
        ([GIVEN], {}, "must be a dict"),
        (GIVEN, {"head.weight": A}, "surplus: base_model.model.head.weight [2, 4]"),
        (GIVEN, {"encoder.out.mindpet_delta_adapter.x.weight": A}, "surplus"),
        (GIVEN, {"encoder.query.tk_delta_lora_a": A}, "several tensors of the file would be called the same"),
        (GIVEN, {"encoder.query.mindpet_delta_lora_A": A}, "several tensors of the file would be called the same"),
        (GIVEN, {"encoder.out.mindpet_delta_lora_a": A}, "missing: base_model.model.encoder.out.lora_B.weight"),
        (GIVEN, {"encoder.query.mindpet_delta_lora_b": B.astype(np.int64)}, "must hold floating-point numbers"),
    ],
)
def test_what_a_delta_file_and_its_configuration_do_not_say_is_refused(fields, content, message, tmp_path, capsys):
    delta(tmp_path / "delta.safetensors", content)
    base(tmp_path / "base.safetensors")
    (tmp_path / "c.json").write_text(json.dumps(fields))
    one, given = tmp_path / "delta.safetensors", ["--config", tmp_path / "c.json"]
    assert message in refused(capsys, tmp_path, "convert", one, tmp_path / "folder", *given)
    files = ["--base", tmp_path / "base.safetensors", "--adapter", one, "--out", tmp_path / "out.safetensors"]
    assert message in refused(capsys, tmp_path, "merge", *files, *given)


@pytest.mark.parametrize(
    "fields", [{}, {"r": 2}, {"r": 8, "rank_pattern": {"query": 2}}, {"rank_pattern": {"query": 2}}]
)
def test_a_delta_file_with_all_that_it_needs(fields, tmp_path):
    """A step that MindSpore writes beside the parameters is no tensor of the adapter."""
    delta(tmp_path / "delta.safetensors", {"epoch_num": np.array(3)})
    (tmp_path / "c.json").write_text(json.dumps({**GIVEN, **fields}))
    convert(tmp_path / "delta.safetensors", tmp_path / "folder", load_config(tmp_path / "c.json"))
    saved = PeftConfig.from_pretrained(tmp_path / "folder")
    assert saved.scaling(PATHS[0]) == 6 / 2 and saved.rank_pattern == {}
    assert TensorFile(tmp_path / "folder/adapter_model.safetensors").shapes == {
        key("lora_A.weight"): (2, 4),
        key("lora_B.weight"): (4, 2),
    }


def test_fields_of_newer_libraries_in_their_files_are_kept(tmp_path):
    adapter(tmp_path / "adapter")
    written = tmp_path / "adapter/adapter_config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), "new_field": 3, "target_modules": None}))
    delta(tmp_path / "delta.safetensors")
    convert(tmp_path / "delta.safetensors", tmp_path / "folder", load_config(written))
    assert PeftConfig.from_pretrained(tmp_path / "folder").unknown == {"new_field": 3}


def test_a_configuration_beside_one_that_the_folder_has_is_refused(tmp_path, capsys):
    adapter(tmp_path / "adapter")
    base(tmp_path / "base.safetensors")
    (tmp_path / "c.json").write_text(json.dumps(GIVEN))
    assert "has its own adapter_config.json" in refused_merge(capsys, tmp_path, "--config", tmp_path / "c.json")


def test_two_tensors_that_would_have_one_name_in_a_delta_file(tmp_path):
    adapter(tmp_path / "adapter")
    names = NameMap(to_mindspore=lambda name: name.replace("out", "query"))
    with pytest.raises(CheckpointError, match="several tensors of the file would be called the same"):
        convert(tmp_path / "adapter", tmp_path / "delta.safetensors", None, names)
    assert not (tmp_path / "delta.safetensors").exists()


def test_tables_of_another_size_than_the_configuration_says(tmp_path, capsys):
    fields = {"num_virtual_tokens": 3, "num_layers": 2, "token_dim": 8, "num_attention_heads": 2}
    params = PrefixEncoder(3, 2, 2, 4).trainable_params()
    save_tensors(tmp_path / "d.safetensors", {param.name: param.asnumpy() for param in params})
    (tmp_path / "c.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING", **fields}))
    arguments = ["convert", str(tmp_path / "d.safetensors"), str(tmp_path / "a"), "--config", str(tmp_path / "c.json")]
    assert main(arguments) == 0
    (tmp_path / "a/mindpet_passport.json").unlink()
    path = tmp_path / "a/adapter_config.json"
    path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.warns(UserWarning, match="no mindpet_passport.json"):
        error = refused(capsys, tmp_path, "convert", tmp_path / "a", tmp_path / "e.ckpt")
    assert "prompt_embeddings: [3, 48] is needed, but it is [3, 32]" in error


@pytest.mark.parametrize(
    "mine, out", [("base.safetensors", "out.ckpt"), ("base.ckpt", "out.safetensors"), ("base.ckpt", "out")]
)
def test_the_output_is_of_the_kind_of_the_base(mine, out, tmp_path, capsys):
    adapter(tmp_path / "adapter")
    base(tmp_path / mine)
    files = ["--base", tmp_path / mine, "--adapter", tmp_path / "adapter", "--out", tmp_path / out]
    error = refused(capsys, tmp_path, "merge", *files)
    assert f"must be a file that ends in {os.path.splitext(mine)[1]}, as the base is" in error


def folder_of_shards(folder, shards, **more):
    """A base of several files with an index; the names of the files are keys of `shards`."""
    where = {}
    for file, names in shards.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / file, {name: weights()[name] for name in names})
        where.update(dict.fromkeys(names, file))
    (folder / INDEX).write_text(json.dumps({"weight_map": where, **more}))
    (folder / "config.json").write_text("{}")
    return folder


def test_files_of_one_name_in_several_folders_stay_apart(tmp_path):
    names = list(weights())
    folder_of_shards(tmp_path / "base", {"0/m.safetensors": names[::2], "1/m.safetensors": names[1::2]})
    adapter(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progressbar=False)
    for number in range(2):
        found = TensorFile(tmp_path / f"out/{number}/m.safetensors").read_all()
        assert list(found) == names[number::2]
    delta_ = 6 / 2 * tensors()[key("lora_B.weight")] @ tensors()[key("lora_A.weight")]
    number = names.index(f"{PATHS[0]}.weight") % 2
    value = TensorFile(tmp_path / f"out/{number}/m.safetensors").read(f"{PATHS[0]}.weight")
    np.testing.assert_allclose(value, weights()[f"{PATHS[0]}.weight"] + delta_, rtol=1e-5)
    assert sorted(os.listdir(tmp_path / "out")) == ["0", "1", "config.json", INDEX]


def test_links_of_a_cache_are_followed(tmp_path):
    """Files of Hugging Face's cache are links out of the folder; what is written is not."""
    names = list(weights())
    folder_of_shards(tmp_path / "base", {"m.safetensors": names})
    (tmp_path / "blobs").mkdir()
    for name in ("m.safetensors", "config.json"):
        shutil.move(tmp_path / "base" / name, tmp_path / "blobs" / name)
        (tmp_path / "base" / name).symlink_to(tmp_path / "blobs" / name)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    before = (tmp_path / "blobs/m.safetensors").read_bytes()
    adapter(tmp_path / "adapter")
    merge(tmp_path / "link", tmp_path / "adapter", tmp_path / "out", progressbar=False)
    assert (tmp_path / "blobs/m.safetensors").read_bytes() == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert list(TensorFile(tmp_path / "out/m.safetensors").shapes) == names


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "in its folder or below, but names ['../x.safetensors']"),
        ({"weight_map": {"a": "/x.safetensors"}}, "in its folder or below"),
        ({"weight_map": {"a": "0/../../x.safetensors"}}, "in its folder or below"),
        ({"weight_map": {"a": "x.bin"}}, "in its folder or below"),
        ({"weight_map": {"a": "./m.safetensors"}}, "in its folder or below"),
        ({"weight_map": {"a": 5}}, "'weight_map' must be an object of names of files"),
        ({"weight_map": ["m.safetensors"]}, "'weight_map' must be an object of names of files"),
        ({"weight_map": {}}, "'weight_map' must be an object of names of files"),
        ({}, "'weight_map' must be an object of names of files"),
        ([], "'weight_map' must be an object of names of files"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
        ({"weight_map": {"a": "m.safetensors"}}, "the index has 'a', its files have not"),
    ],
)
def test_an_index_that_leaves_its_folder_or_is_none(content, message, tmp_path, capsys):
    folder_of_shards(tmp_path / "base", {"m.safetensors": list(weights())})
    save_tensors(tmp_path / "x.safetensors", weights())
    (tmp_path / "base" / INDEX).write_text(json.dumps(content))
    adapter(tmp_path / "adapter")
    files = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]
    assert message in refused(capsys, tmp_path, "merge", *files)


def test_a_tensor_in_two_files_of_the_base(tmp_path, capsys):
    folder_of_shards(tmp_path / "base", {"m.safetensors": list(weights()), "n.safetensors": ["norm.bias"]})
    adapter(tmp_path / "adapter")
    files = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]
    assert "in more than one of its files: ['norm.bias']" in refused(capsys, tmp_path, "merge", *files)


@pytest.mark.parametrize("kind", ["base", "base.ckpt"])
def test_what_a_killed_merge_left_is_removed_by_the_next(kind, tmp_path):
    code = (
        "import os, sys, mindspore\nfrom mindpet.files import merge as merge_files\n"
        "owner, name = (mindspore, 'save_checkpoint') if 'ckpt' in sys.argv[1] else (merge_files, '_fold')\n"
        "setattr(owner, name, lambda *a, **k: os.kill(os.getpid(), 9))\n"
        "merge_files.merge(*sys.argv[1:], progressbar=False)"
    )
    if kind == "base":
        folder_of_shards(tmp_path / kind, {"m.safetensors": list(weights())})
    else:
        base(tmp_path / kind)
    adapter(tmp_path / "adapter")
    files = [str(tmp_path / name) for name in (kind, "adapter", kind.replace("base", "out"))]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code, *files], env=environment, check=False)
    assert done.returncode == -9 and len(os.listdir(tmp_path)) == 3
    merge(*files, progressbar=False)
    assert sorted(os.listdir(tmp_path)) == sorted(["adapter", kind, kind.replace("base", "out")])


def test_inspect_reads_the_header_only(tmp_path, capsys):
    """40 GB that are not there on the disk."""
    entries = {key("lora_A.weight"): [2, 5_000_000_000], key("lora_B.weight"): [4, 2]}
    header, end = {}, 0
    for name, shape in entries.items():
        begin, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    adapter(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    for target in (path, path.parent):
        assert main(["inspect", str(target)]) == 0
        out = capsys.readouterr().out
        assert "encoder.query.lora_A.weight  float32   [2, 5000000000]" in out
        assert "method: LORA, rank 2, 1 layers" in out and "2 tensors, 10,000,000,008 numbers" in out


def test_inspect_tells_the_method_of_a_delta_file(tmp_path, capsys):
    delta(tmp_path / "delta.safetensors", {"x.mindpet_delta_adapter.y": A})
    assert main(["inspect", str(tmp_path / "delta.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "method: LORA, rank 2, 1 layers\nmethod: ADAPTER\n" in out


class Terminal(io.StringIO):
    """Takes what is shown on a terminal."""

    def isatty(self):
        return True


def test_an_error_begins_a_line_behind_the_progress_bar(tmp_path, monkeypatch):
    adapter(tmp_path / "adapter", changed(b=B * np.float32(1e30)))
    base(tmp_path / "base.safetensors", weights(np.float16))
    files = ["--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter"]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Terminal())
        assert main(["merge", *map(str, files), "--out", str(tmp_path / "out.safetensors")]) == 2
        *_, bar, last, end = sys.stderr.getvalue().split("\n")
    assert "merging:" in bar and end == ""
    assert last.startswith("mindpet: encoder.query.weight would hold NaN")


def test_several_problems_are_a_line_each(tmp_path, capsys):
    adapter(tmp_path / "adapter", {**tensors(), f"{START}x.weight": A, f"{START}y.weight": A})
    base(tmp_path / "base.safetensors")
    first, *problems = refused_merge(capsys, tmp_path, lines=3).splitlines()
    assert first.endswith("the adapter does not fit its configuration (r, target_modules, bias, modules_to_save, ...):")
    assert problems == [f"  surplus: base_model.model.{name}.weight [2, 4]" for name in "xy"]


def test_library_calls_raise_what_they_say(tmp_path):
    adapter(tmp_path / "adapter", changed(b=None))
    base(tmp_path / "base.ckpt")
    with pytest.raises(CheckpointError, match="missing: .*lora_B.weight"):
        merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt")
    with pytest.raises(MergeError, match="'output' must be a file that ends in .ckpt"):
        merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ConfigError, match="has its own adapter_config.json"):
        convert(tmp_path / "adapter", tmp_path / "delta.ckpt", LoraConfig())

"""Files of bases and adapters without a network: merged, converted and inspected."""

import json
import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import Small, config, ids, move, numbers, same

from mindpet.cli import main
from mindpet.delta import PrefixEncoder, PrefixLayer
from mindpet.errors import CheckpointError, ConfigError, MergeError
from mindpet.files.convert import convert
from mindpet.files.merge import merge
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.network.parameters import model_parameters
from mindpet.peft import (
    AdapterConfig,
    BitFitConfig,
    LoraConfig,
    NameMap,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)

VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"query": 3}, "alpha_pattern": {"conv": 1}},
    "lora_bias": {"lora_bias": True, "target_modules": ["query", "mlp.0", "conv"]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["query", "mlp.0"]},
    "bias and head": {"bias": "lora_only", "modules_to_save": ["classifier"]},
}


def trained(**fields):
    ms.set_seed(3)
    model = get_peft_model(
        Small(), config(**{"target_modules": ["embed", "query", "mlp.0", "shared", "conv"], **fields})
    )
    move(model, 1)
    return model


def save_base(path):
    """The base as a file, or as a folder of three files with an index."""
    ms.set_seed(3)
    network = Small()
    if path.suffix:
        ms.save_checkpoint(network, str(path), format=path.suffix[1:])
        return network
    path.mkdir()
    values = {param.name: param.asnumpy() for param in network.get_parameters()}
    names, where = list(values), {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        where.update(dict.fromkeys(names[number::3], file))
        save_tensors(path / file, {name: values[name] for name in names[number::3]})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    (path / "config.json").write_text("{}")
    return network


def test_other_copies_of_the_weights_are_neither_read_nor_copied(tmp_path):
    trained(target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    save_base(tmp_path / "base")
    (tmp_path / "base/consolidated.safetensors").write_bytes(b"damaged")
    (tmp_path / "base/pytorch_model.bin").write_bytes(b"old")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progressbar=False)
    names = ["config.json", *(f"model-{n}.safetensors" for n in range(3)), "model.safetensors.index.json"]
    assert sorted(os.listdir(tmp_path / "out")) == names


def read(path):
    if path.is_dir():
        return {
            name: value for file in path.glob("*.safetensors") for name, value in TensorFile(file).read_all().items()
        }
    return {name: param.asnumpy() for name, param in ms.load_checkpoint(str(path), format=path.suffix[1:]).items()}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("base", ["base.ckpt", "base.safetensors", "base"])
def test_merging_files_gives_the_merged_network(variant, base, rng, tmp_path, capsys):
    model, x = trained(**VARIANTS[variant]), ids(rng)
    model.save_pretrained(tmp_path / "adapter")
    save_base(tmp_path / base)
    out = tmp_path / base.replace("base", "merged")
    assert (
        main(["merge", "--base", str(tmp_path / base), "--adapter", str(tmp_path / "adapter"), "--out", str(out)]) == 0
    )
    assert "weights merged into" in capsys.readouterr().out
    expected, merged = numbers(model, x), read(out)
    network = model.merge_and_unload()
    for param in network.get_parameters():
        np.testing.assert_allclose(merged[param.name], param.asnumpy(), atol=1e-6, err_msg=param.name)
    ms.load_param_into_net(network, {n: ms.Parameter(Tensor(v), name=n) for n, v in merged.items()}, strict_load=True)
    np.testing.assert_allclose(numbers(network, x), expected, atol=1e-5)
    if out.is_dir():
        assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / base))
        assert out.stat().st_mode & 0o777 == 0o755
    assert not [name for name in os.listdir(tmp_path) if "incomplete" in name]


def test_names_that_lack_the_first_part_and_a_head_that_is_new(tmp_path):
    model = trained(target_modules=["query"], modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "adapter")
    base = tmp_path / "base"
    save_base(base)
    for file in base.glob("*.safetensors"):
        tensors = TensorFile(file).read_all()
        file.chmod(0o600)
        save_tensors(file, {f"net.{name}": value for name, value in tensors.items() if "classifier" not in name})
    content = json.loads((base / "model.safetensors.index.json").read_text())
    where = {f"net.{name}": file for name, file in content["weight_map"].items() if "classifier" not in name}
    (base / "model.safetensors.index.json").write_text(json.dumps({**content, "weight_map": where}))
    merge(base, tmp_path / "adapter", tmp_path / "out", progressbar=False)
    merged = read(tmp_path / "out")
    np.testing.assert_allclose(merged["net.query.weight"], model.merge_and_unload().query.weight.asnumpy(), atol=1e-6)
    np.testing.assert_array_equal(merged["net.classifier.weight"], model.network.classifier.weight.asnumpy())
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"]["net.classifier.weight"] == "model-2.safetensors"
    assert index["metadata"]["total_size"] == 4 * (3 * 12 + 3)


def test_delta_files_merge_with_a_configuration(tmp_path):
    model = trained(target_modules=["query", "shared"])
    save_base(tmp_path / "base.ckpt")
    params = [{"name": param.name, "data": param} for param in model.trainable_params()]
    ms.save_checkpoint(params, str(tmp_path / "delta.ckpt"))
    (tmp_path / "c.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}')
    arguments = ["merge", "--base", str(tmp_path / "base.ckpt"), "--adapter", str(tmp_path / "delta.ckpt")]
    arguments += ["--out", str(tmp_path / "out.ckpt"), "--verbose"]
    assert main(arguments) == 2
    assert main([*arguments, "--config", str(tmp_path / "c.json")]) == 0
    merged = read(tmp_path / "out.ckpt")
    for param in model.merge_and_unload().get_parameters():
        np.testing.assert_allclose(merged[param.name], param.asnumpy(), atol=1e-6)


def test_weights_of_a_network_that_has_them_the_other_way_up(tmp_path):
    """A weight that is not square tells which way up the square ones are."""
    weights = {"wide.weight": np.zeros((4, 6), np.float32), "square.weight": np.zeros((4, 4), np.float32)}
    rng = np.random.default_rng(0)
    tensors, deltas = {}, {}
    for name, out in (("wide", 6), ("square", 4)):
        a, b = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32)
        tensors.update({f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b})
        deltas[f"{name}.weight"] = (4 * b @ a).T
    (tmp_path / "adapter").mkdir()
    save_tensors(tmp_path / "adapter/adapter_model.safetensors", tensors)
    LoraConfig(r=2, lora_alpha=8, target_modules=["wide", "square"]).save_pretrained(tmp_path / "adapter")
    save_tensors(tmp_path / "base.safetensors", weights)
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", progressbar=False)
    for name, value in read(tmp_path / "out.safetensors").items():
        np.testing.assert_allclose(value, deltas[name], atol=1e-6)


@pytest.mark.parametrize(
    "fields, tied",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, True),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"architectures": ["BertModel"]}, False),
    ],
)
def test_an_embedding_that_is_tied_to_the_head_is_refused(fields, tied, tmp_path):
    trained(target_modules=["embed", "query"]).save_pretrained(tmp_path / "adapter")
    save_base(tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps({"vocab_size": 10, **fields}))
    if tied:
        with pytest.raises(
            MergeError, match="embed.embedding_table: the head has this embedding's table as its weight"
        ):
            merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progressbar=False)
        assert not (tmp_path / "out").exists()
    else:
        assert len(merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progressbar=False)) == 2


def test_an_embedding_in_a_file_that_does_not_tell_is_warned_of(tmp_path):
    trained(target_modules=["embed"]).save_pretrained(tmp_path / "adapter")
    save_base(tmp_path / "base.ckpt")
    with pytest.warns(UserWarning, match="embed.embedding_table: if the head has this embedding's table"):
        merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt", progressbar=False)


@pytest.mark.parametrize("base", ["base.ckpt", "base"])
def test_what_does_not_fit_writes_nothing(base, tmp_path):
    model = trained(target_modules=["query", "shared"])
    model.save_pretrained(tmp_path / "adapter")
    save_base(tmp_path / base)
    (tmp_path / "adapter/mindpet_passport.json").unlink()  # it is not the file that was saved
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = TensorFile(path).read_all()
    bad = {name.replace("query", "nothing"): value for name, value in tensors.items()}
    narrow = {name: value[:, :4] if "lora_A" in name else value for name, value in tensors.items()}
    large = {name: value * np.float32(1e30) for name, value in tensors.items()}
    for content, match in (
        (bad, "nothing: no tensor of the base is called nothing.weight"),
        (narrow, r"query.weight: \[8, 8\] in the base, but the adapter has mindpet_delta_lora_a \[2, 4\]"),
        (large, "would hold NaN .*; nothing was written"),
    ):
        save_tensors(path, content)
        with pytest.raises(MergeError, match=match):
            merge(tmp_path / base, tmp_path / "adapter", tmp_path / base.replace("base", "out"), progressbar=False)
        assert sorted(os.listdir(tmp_path)) == sorted(["adapter", base])


def test_what_cannot_be_merged_at_all(tmp_path):
    save_base(tmp_path / "base.ckpt")
    bottleneck = AdapterConfig(target_modules=["query"], bottleneck_size=3)
    get_peft_model(Small(), bottleneck).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match="ADAPTER cannot be folded into weights"):
        merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt")
    (tmp_path / "out.ckpt").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt")


@pytest.mark.parametrize("config", [BitFitConfig(), BitFitConfig(modules_to_save=["classifier"])])
def test_what_trains_the_base_alone_is_put_into_it(config, rng, tmp_path):
    save_base(tmp_path / "base.ckpt")
    network = Small()
    ms.load_checkpoint(str(tmp_path / "base.ckpt"), network)
    model, x = get_peft_model(network, config), ids(rng)
    move(model, 0)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt") == []
    merged = Small()
    ms.load_checkpoint(str(tmp_path / "out.ckpt"), merged)
    same(numbers(merged, x), tuned)


def test_memory_stays_below_the_largest_file_and_a_little(tmp_path):
    """Eight files of 64 MB: the peak grows by less than two of them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    tensors = {}
    for number in range(8):
        weights = {f"{number}.{part}.weight": np.ones((1024, 2048), np.float32) for part in range(8)}
        save_tensors(base / f"model-{number}.safetensors", weights)
        for name in weights:
            tensors[f"base_model.model.{name[:-7]}.lora_A.weight"] = np.ones((2, 2048), np.float32)
            tensors[f"base_model.model.{name[:-7]}.lora_B.weight"] = np.ones((1024, 2), np.float32)
    save_tensors(adapter / "adapter_model.safetensors", tensors)
    LoraConfig(r=2, target_modules="all-linear").save_pretrained(adapter)
    code = (
        "import resource, sys\nfrom mindpet.files.merge import merge\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "merge(*sys.argv[1:], progressbar=False)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    command = [sys.executable, "-c", code, str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    assert int(done.stdout.split()[-1]) < 64 + 32
    merged = TensorFile(tmp_path / "out/model-7.safetensors").read("7.3.weight")
    np.testing.assert_allclose(merged, 1 + 4 * 2, rtol=1e-6)


def test_an_adapter_goes_to_a_delta_file_and_back(tmp_path, capsys):
    model = trained(target_modules=["embed", "query", "conv"], modules_to_save=["classifier"], use_dora=True)
    model.save_pretrained(tmp_path / "adapter")
    for ending in ("ckpt", "safetensors"):
        delta = tmp_path / f"delta.{ending}"
        assert main(["convert", str(tmp_path / "adapter"), str(delta)]) == 0
        content = read(delta)
        assert set(content) == {param.name.replace("mindpet_trained_", "") for param in model.trainable_params()}
        back = tmp_path / f"back-{ending}"
        config_file = str(tmp_path / "adapter/adapter_config.json")
        assert main(["convert", str(delta), str(back), "--config", config_file]) == 0
        one, two = (
            TensorFile(folder / "adapter_model.safetensors").read_all() for folder in (tmp_path / "adapter", back)
        )
        assert set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)
    assert capsys.readouterr().out.startswith("wrote ")
    assert main(["convert", str(tmp_path / "delta.ckpt"), str(tmp_path / "x")]) == 2
    assert "a delta file does not hold its configuration" in capsys.readouterr().err


def test_a_converted_delta_loads_as_an_adapter(rng, tmp_path):
    model, x = trained(target_modules=["query"]), ids(rng)
    params = [{"name": param.name, "data": param} for param in model.trainable_params()]
    ms.save_checkpoint(params, str(tmp_path / "d.ckpt"))
    (tmp_path / "c.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}')
    assert main(["convert", str(tmp_path / "d.ckpt"), str(tmp_path / "a"), "--config", str(tmp_path / "c.json")]) == 0
    ms.set_seed(3)
    same(numbers(PeftModel.from_pretrained(Small(), tmp_path / "a"), x), numbers(model, x))


def test_tables_of_prefixes_convert(tmp_path):
    class Network(nn.Cell):
        def __init__(self):
            super().__init__()
            self.prefix_encoder = PrefixEncoder(3, 2, 2, 4)

    network = Network()
    params = [{"name": param.name, "data": param} for param in network.trainable_params()]
    ms.save_checkpoint(params, str(tmp_path / "d.ckpt"))
    fields = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_layers": 2, "token_dim": 8}
    (tmp_path / "c.json").write_text(json.dumps({**fields, "num_attention_heads": 2}))
    assert main(["convert", str(tmp_path / "d.ckpt"), str(tmp_path / "a"), "--config", str(tmp_path / "c.json")]) == 0
    table = TensorFile(tmp_path / "a/adapter_model.safetensors").read("prompt_embeddings")
    np.testing.assert_array_equal(table, network.trainable_params()[0].asnumpy())
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "e.ckpt")]) == 0
    assert read(tmp_path / "e.ckpt").keys() == read(tmp_path / "d.ckpt").keys()


PREFIXES = {"num_virtual_tokens": 3, "num_layers": 2, "token_dim": 8, "num_attention_heads": 2}


def save(path, params):
    ms.save_checkpoint([{"name": param.name, "data": param} for param in params], str(path))


def nonzero(params, rng):
    """Parameters with biases that are not zero."""
    for param in params:
        if param.dtype == ms.float32:
            param.set_data(Tensor(rng.normal(size=param.shape).astype(np.float32)))
    return params


@pytest.mark.parametrize("old", [False, True])
def test_projected_prefixes_of_a_delta_file_are_computed(old, rng, tmp_path):
    """P-Tuning v2: what the Cell computes, as the table of all layers; also by the names of old checkpoints."""
    encoder = PrefixEncoder(3, 2, 2, 4, prefix_projection=True, projection_dim=5, out_perm=(2, 0, 1, 3, 4))
    params = nonzero(list(encoder.get_parameters()), rng)
    content = {param.name.replace("mindpet", "tk") if old else param.name: param.asnumpy() for param in params}
    save_tensors(tmp_path / "d.safetensors", content)
    convert(tmp_path / "d.safetensors", tmp_path / "a", PrefixTuningConfig(**PREFIXES))
    tensors = TensorFile(tmp_path / "a/adapter_model.safetensors").read_all()
    # Of every layer (keys and values, batch, token, head, channel).
    past = [part.asnumpy()[:, 0].swapaxes(0, 1) for part in encoder.set_train(False)(1, ms.float32)]
    expected = np.concatenate([part.reshape(3, -1) for part in past], 1)
    assert list(tensors) == ["prompt_embeddings"]
    np.testing.assert_allclose(tensors["prompt_embeddings"], expected, atol=1e-3)  # its tanh


def test_prefix_layers_of_a_delta_file_are_computed(rng, tmp_path):
    """Ten layers, for their order is that of numbers; beside a head."""

    class Network(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layers = nn.CellList([PrefixLayer(3, 1, 2, 8, 4, 5) for _ in range(11)])
            self.head = nn.Dense(2, 2)

    network = Network().set_train(False)
    save(tmp_path / "d.ckpt", nonzero(network.trainable_params(), rng))
    fields = {**PREFIXES, "num_layers": 11, "peft_type": "PREFIX_TUNING", "prefix_projection": True}
    (tmp_path / "c.json").write_text(json.dumps({**fields, "modules_to_save": ["head"]}))
    assert main(["convert", str(tmp_path / "d.ckpt"), str(tmp_path / "a"), "--config", str(tmp_path / "c.json")]) == 0
    tensors = TensorFile(tmp_path / "a/adapter_model.safetensors").read_all()
    expected = np.concatenate([part.asnumpy() for layer in network.layers for part in layer()], 1)
    np.testing.assert_allclose(tensors.pop("prompt_embeddings"), expected, atol=1e-3)
    assert set(tensors) == {"base_model.head.weight", "base_model.head.bias"}


@pytest.mark.parametrize(
    "change, fields, error, match",
    [
        (
            lambda t: t.pop("mindpet_delta_ptuning2_dense_out.bias"),
            {},
            CheckpointError,
            "is projected, but .* lacks .*out.bias",
        ),
        (
            lambda t: t.pop("mindpet_delta_ptuning2_embedding.embedding_table"),
            {},
            CheckpointError,
            "no prefix in the file",
        ),
        (
            lambda t: None,
            {"num_virtual_tokens": 4},
            ConfigError,
            r"the prefixes are \[3, 32\]: .*'num_virtual_tokens': 4",
        ),
        (lambda t: None, {"num_attention_heads": None}, ConfigError, "must say .* and num_attention_heads"),
        (lambda t: None, {"token_dim": 16}, ConfigError, "must say .*token_dim"),
    ],
)
def test_prefixes_that_cannot_be_computed(change, fields, error, match, tmp_path):
    params = PrefixEncoder(3, 2, 2, 4, prefix_projection=True, projection_dim=5).get_parameters()
    tensors = {param.name: param.asnumpy() for param in params}
    change(tensors)
    save_tensors(tmp_path / "d.safetensors", tensors)
    with pytest.raises(error, match=match):
        convert(tmp_path / "d.safetensors", tmp_path / "a", PrefixTuningConfig(**{**PREFIXES, **fields}))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "lora_only", "modules_to_save": ["classifier"]},
        {"bias": "all", "target_modules": ["query", "mlp.0"]},
        {"init_lora_weights": "pissa", "target_modules": ["query", "mlp.0"]},
        {"init_lora_weights": "pissa_niter_4", "target_modules": ["query"]},
    ],
)
def test_a_checkpoint_of_all_that_an_adapter_has_is_its_folder(fields, rng, tmp_path):
    """The copies of the base's parameters go by the base's names, a bias of a target is inside; constants stay out."""
    model = trained(**fields)
    model.save_pretrained(tmp_path / "adapter")
    expected = TensorFile(tmp_path / "adapter/adapter_model.safetensors").read_all()
    own = {path: param for path, param in model_parameters(model.network).items() if "mindpet" in path}
    save_tensors(tmp_path / "d.safetensors", {path: param.asnumpy() for path, param in own.items()})
    said = {name: value for name, value in fields.items() if name != "target_modules"}
    given = LoraConfig(lora_alpha=3, **said)
    convert(tmp_path / "d.safetensors", tmp_path / "again", given)
    again = TensorFile(tmp_path / "again/adapter_model.safetensors").read_all()
    assert again.keys() == expected.keys()
    assert all(np.array_equal(again[name], value) for name, value in expected.items())
    assert str(PeftConfig.from_pretrained(tmp_path / "again").init_lora_weights) in ("True", "pissa")


def test_a_start_from_the_base_without_a_word_of_it(tmp_path):
    model = trained(init_lora_weights="pissa", target_modules=["query"])
    own = {path: param for path, param in model_parameters(model.network).items() if "mindpet" in path}
    save_tensors(tmp_path / "d.safetensors", {path: param.asnumpy() for path, param in own.items()})
    with pytest.raises(
        ConfigError, match="mindpet_lora_start_a is a part of the base .* 'init_lora_weights' must say how"
    ):
        convert(tmp_path / "d.safetensors", tmp_path / "a", LoraConfig(lora_alpha=3))


def test_a_delta_beside_a_layer_whose_path_ends_alike(rng, tmp_path):
    """'fc' has a delta of rank 1, 'block.attn' of rank 2, and 'block.fc' has none."""

    class Network(nn.Cell):
        def __init__(self):
            super().__init__()
            self.fc, self.block = nn.Dense(4, 4), nn.SequentialCell()
            for name in ("fc", "attn"):
                self.block.insert_child_to_cell(name, nn.Dense(4, 4))

        def construct(self, x):
            return self.fc(self.block.attn(self.block.fc(x)))

    tensors = {}
    for path, rank in (("fc", 1), ("block.attn", 2)):
        tensors[f"{path}.mindpet_delta_lora_a"] = rng.normal(size=(rank, 4)).astype(np.float32)
        tensors[f"{path}.mindpet_delta_lora_b"] = rng.normal(size=(4, rank)).astype(np.float32)
    save_tensors(tmp_path / "d.safetensors", tensors)
    convert(tmp_path / "d.safetensors", tmp_path / "a", LoraConfig(lora_alpha=2))
    network = Network()
    weights = {path: param.asnumpy() for path, param in network.parameters_and_names()}
    x = rng.normal(size=(3, 4)).astype(np.float32)
    hidden = x
    for path in ("block.fc", "block.attn", "fc"):
        lora = [tensors.get(f"{path}.mindpet_delta_lora_{which}", np.zeros((4, 4))) for which in "ba"]
        weight = weights[f"{path}.weight"] + 2 / lora[1].shape[0] * lora[0] @ lora[1]
        hidden = hidden @ weight.T + weights[f"{path}.bias"]
    model = PeftModel.from_pretrained(network, tmp_path / "a")
    np.testing.assert_allclose(numbers(model, Tensor(x)), hidden, rtol=1e-4, atol=1e-5)


def test_an_approximate_pissa_of_hugging_face_is_not_merged(tmp_path):
    trained(init_lora_weights="pissa", target_modules=["query"]).save_pretrained(tmp_path / "a")
    save_base(tmp_path / "base.ckpt")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(path.read_text().replace('"pissa"', '"pissa_niter_16"'))
    with pytest.raises(ConfigError, match="init_lora_weights='pissa_niter_16', which takes a part off the base"):
        merge(tmp_path / "base.ckpt", tmp_path / "a", tmp_path / "out.ckpt", progressbar=False)
    assert not (tmp_path / "out.ckpt").exists()


def test_names_from_a_function(tmp_path):
    model = trained(target_modules=["query"])
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "names.py").write_text(
        "from mindpet.peft import NameMap\n\ndef names():\n"
        "    return NameMap(lambda n: n.replace('q_proj', 'query'), lambda n: n.replace('query', 'q_proj'))\n"
    )
    assert (
        main(["convert", str(tmp_path / "a"), str(tmp_path / "d.ckpt"), "--names", f"{tmp_path}/names.py:names"]) == 0
    )
    assert set(read(tmp_path / "d.ckpt")) == {"q_proj.mindpet_delta_lora_a", "q_proj.mindpet_delta_lora_b"}


def test_a_fused_layer_of_a_delta_file_goes_apart_and_together_again(rng, tmp_path):
    """One layer of rank 4 here is three of the same rank there, beside another layer of rank 2."""
    tensors = {
        "layers.0.w_qkv.mindpet_delta_lora_a": rng.normal(size=(4, 8)).astype(np.float32),
        "layers.0.w_qkv.mindpet_delta_lora_b": rng.normal(size=(8, 4)).astype(np.float32),
        "layers.0.wo.mindpet_delta_lora_a": rng.normal(size=(2, 8)).astype(np.float32),
        "layers.0.wo.mindpet_delta_lora_b": rng.normal(size=(8, 2)).astype(np.float32),
        "layers.1.wo.mindpet_delta_lora_a": rng.normal(size=(2, 8)).astype(np.float32),
        "layers.1.wo.mindpet_delta_lora_b": rng.normal(size=(8, 2)).astype(np.float32),
    }
    save_tensors(tmp_path / "d.safetensors", tensors)
    names = NameMap(fused={"w_qkv": {"q": 4, "k": 2, "v": 2}})
    convert(tmp_path / "d.safetensors", tmp_path / "a", LoraConfig(lora_alpha=8), names)
    saved = PeftConfig.from_pretrained(tmp_path / "a")
    there = TensorFile(tmp_path / "a/adapter_model.safetensors").read_all()
    # These layers alone, for other paths of the network may end like theirs.
    assert saved.target_modules == r"(?:layers\.0\.k|layers\.0\.q|layers\.0\.v|layers\.0\.wo|layers\.1\.wo)"
    assert saved.r == 2 and set(saved.rank_pattern) == {rf"^layers\.0\.{part}$" for part in "qkv"}
    a, b = (there[f"base_model.model.layers.0.q.lora_{which}.weight"] for which in "AB")
    whole = tensors["layers.0.w_qkv.mindpet_delta_lora_b"] @ tensors["layers.0.w_qkv.mindpet_delta_lora_a"]
    np.testing.assert_allclose(saved.scaling("layers.0.q") * b @ a, 8 / 4 * whole[:4], atol=1e-5)
    convert(tmp_path / "a", tmp_path / "e.safetensors", None, names)
    again = read(tmp_path / "e.safetensors")
    together = again["layers.0.w_qkv.mindpet_delta_lora_b"] @ again["layers.0.w_qkv.mindpet_delta_lora_a"]
    np.testing.assert_allclose(together, whole, atol=1e-5)


def test_inspect(tmp_path, capsys):
    model = trained(target_modules=["query"])
    model.save_pretrained(tmp_path, step=12)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in (
        "peft_type: LORA",
        "lora_alpha: 3",
        "step 12, for a Small of",
        "query.lora_A.weight  float32   [2, 8]",
    ):
        assert text in out
    assert "2 tensors, 32 numbers, " in out
    assert main(["inspect", str(tmp_path / "adapter_model.safetensors")]) == 0
    assert "2 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nothing"],
        ["inspect", "."],
        ["merge", "--base", "nothing", "--adapter", "nothing", "--out", "out"],
        ["convert", "nothing", "out.ckpt"],
        ["convert", "nothing.ckpt", "out"],
        ["convert", "nothing", "out.ckpt", "--config", "nothing.json"],
        ["convert", "nothing", "out.ckpt", "--names", "nothing.py:f"],
        ["convert", "nothing", "out.ckpt", "--names", "nothing"],
    ],
)
def test_bad_arguments_exit_2_with_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mindpet: ") and error.count("\n") == 1


def test_damaged_files_exit_2_with_one_line(tmp_path, capsys):
    for name in ("a.ckpt", "a.safetensors", "c.json", "a.bin"):
        (tmp_path / name).write_bytes(b"damaged")
    (tmp_path / "list.json").write_text("[1]")
    for arguments in (
        ["inspect", str(tmp_path / "a.ckpt")],
        ["inspect", str(tmp_path / "a.safetensors")],
        ["inspect", str(tmp_path / "a.bin")],
        ["convert", str(tmp_path / "a.ckpt"), "out", "--config", str(tmp_path / "c.json")],
        ["convert", str(tmp_path / "a.ckpt"), "out", "--config", str(tmp_path / "list.json")],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("mindpet: ") and error.count("\n") == 1
    for arguments in (["merge"], ["inspect"], ["convert", "x"], ["nothing"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2

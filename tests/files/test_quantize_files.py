"""Files that are quantised without a network, and merging into them."""

import json
import tracemalloc

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.cli import main
from mindpet.errors import CheckpointError, ConfigError, NoMatchError
from mindpet.files.coded import CodedFile
from mindpet.files.merge import merge
from mindpet.files.quantize import quantize_files
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import QuantizationConfig, load_delta, quantize
from mindpet.network.quantize import QuantizationConfig as SameConfig
from mindpet.peft import LoraConfig, get_peft_model
from mindpet.utils.quantization import Format, dequantize_matrix, quantize_matrix

CONFIG = QuantizationConfig("nf4", 4)


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embed, self.query = nn.Embedding(10, 8), nn.Dense(8, 8, "normal")
        self.out, self.classifier = nn.Dense(8, 8, "normal", has_bias=False), nn.Dense(8, 3, "normal")

    def construct(self, ids):
        return self.classifier(self.out(self.query(self.embed(ids))))


@pytest.fixture
def base(tmp_path):
    """A file of `Network`."""
    file = str(tmp_path / "base.safetensors")
    ms.save_checkpoint(Network(), file, format="safetensors")
    return file


def outputs(network):
    return network(Tensor(np.array([[1, 2, 3]], np.int32))).asnumpy()


def test_a_file_is_what_a_quantised_network_saves(base, tmp_path):
    report = quantize_files(base, tmp_path / "coded.safetensors", CONFIG)
    network = Network()
    ms.load_checkpoint(base, network, format="safetensors")
    assert sorted(map(str, report)) == sorted(map(str, quantize(network, CONFIG)))
    other = Network()
    quantize(other, CONFIG)
    load_delta(other, str(tmp_path / "coded.safetensors"))
    np.testing.assert_array_equal(outputs(other), outputs(network))
    for name, param in network.parameters_dict().items():
        np.testing.assert_array_equal(param.asnumpy(), other.parameters_dict()[name].asnumpy())


def test_merging_dequantises(base, tmp_path):
    coded, folder, merged = (str(tmp_path / name) for name in ("coded.safetensors", "adapter", "merged.safetensors"))
    quantize_files(base, coded, CONFIG)
    network = Network()
    quantize(network, CONFIG)
    load_delta(network, coded)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["query", "out"], init_lora_weights=False))
    tuned = outputs(model)
    model.save_pretrained(folder)
    report = merge(coded, folder, merged)
    assert sorted((row.path, row.dtype, row.largest_error) for row in report) == [
        ("out.weight", "float32", 0.0),
        ("query.weight", "float32", 0.0),
    ]
    plain = Network()
    ms.load_checkpoint(merged, plain, format="safetensors")
    np.testing.assert_allclose(outputs(plain), tuned, atol=1e-6)
    assert not [name for name in TensorFile(merged).shapes if "scale" in name]
    with pytest.raises(CheckpointError, match="(?s)another base.*query.weight_scale: not in this base"):
        merge(base, folder, str(tmp_path / "other.safetensors"))
    values = TensorFile(coded).read_all()
    values["query.weight"][0, 0] ^= 1
    save_tensors(tmp_path / "changed.safetensors", values)
    with pytest.raises(CheckpointError, match="query.weight: other values"):
        merge(tmp_path / "changed.safetensors", folder, str(tmp_path / "other.safetensors"))


def test_a_folder_in_half_precision(rng, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "coded"
    folder.mkdir()
    parts = {
        "a.safetensors": {"model.embed_tokens.weight": (10, 8), "layers.0.q_proj.weight": (4, 8), "norm.weight": (8,)},
        "b.safetensors": {"layers.0.o_proj.weight": (8, 4), "layers.0.o_proj.bias": (8,), "lm_head.weight": (10, 8)},
    }
    values = {
        name: {key: rng.normal(size=shape).astype(np.float16) for key, shape in shapes.items()}
        for name, shapes in parts.items()
    }
    for name, tensors in values.items():
        save_tensors(folder / name, tensors)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name in values for key in values[name]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    assert (
        main(["quantize", str(folder), str(out), "--bits", "int4", "--group-size", "4", "--single", "--verbose"]) == 0
    )
    printed = capsys.readouterr().out
    assert "layers.0.q_proj: int4, 64 to 48 bytes, error up to" in printed and "2 weights quantised into" in printed
    content = json.loads((out / "model.safetensors.index.json").read_text())
    assert content["weight_map"]["layers.0.o_proj.weight_scale"] == "b.safetensors"
    files = [TensorFile(out / name) for name in parts]
    assert content["metadata"]["total_size"] == sum(
        value.nbytes for file in files for value in file.read_all().values()
    )
    assert (out / "config.json").read_text() == "{}"
    file = CodedFile(files[0])
    assert list(file.shapes) == list(parts["a.safetensors"]) and set(file.dtypes.values()) == {np.dtype(np.float16)}
    weight = values["a.safetensors"]["layers.0.q_proj.weight"]
    form = Format("int4", 4, False)
    np.testing.assert_array_equal(
        file.read("layers.0.q_proj.weight"),
        dequantize_matrix(quantize_matrix(weight, form), form).astype(np.float16),
    )
    np.testing.assert_array_equal(file.read("norm.weight"), values["a.safetensors"]["norm.weight"])


def test_memory(rng, tmp_path):
    """That of the largest tensor that stays; without one, of the largest weight's codes and some rows."""
    weight = rng.normal(size=(2048, 2048)).astype(np.float16)
    save_tensors(tmp_path / "base.safetensors", {"a.weight": weight, "b.weight": weight[:1024]})
    size = weight.nbytes
    del weight
    tracemalloc.start()
    try:
        quantize_files(tmp_path / "base.safetensors", tmp_path / "coded.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert Format("nf4").nbytes((2048, 2048)) < 0.27 * size
    assert peak < 0.3 * size + 40e6  # what a million numbers take while they are quantised


def test_what_cannot_be(base, rng, tmp_path, capsys):
    out = tmp_path / "coded.safetensors"
    assert SameConfig is QuantizationConfig
    with pytest.raises(ConfigError, match="query.weight has 8 input features, which is no multiple of group_size, 64"):
        quantize_files(base, out)
    with pytest.raises(NoMatchError, match="no weight of a matrix is called 'nope'.*'exclude_modules'.*'neither'"):
        quantize_files(base, out, QuantizationConfig("int8", target_modules=["nope"], exclude_modules="neither"))
    with pytest.raises(CheckpointError, match="must end in .safetensors"):
        quantize_files(base, tmp_path / "coded.ckpt", CONFIG)
    with pytest.raises(ConfigError, match="there is no weight of a linear layer"):
        quantize_files(base, out, QuantizationConfig("int8", exclude_modules=["query", "out"]))
    save_tensors(tmp_path / "nan.safetensors", {"a.weight": np.full((4, 4), np.nan, np.float32)})
    with pytest.raises(ConfigError, match="a.weight: it has NaN or infinite numbers; nothing was written"):
        quantize_files(tmp_path / "nan.safetensors", out, CONFIG)
    ms.save_checkpoint(Network(), str(tmp_path / "base.ckpt"))
    with pytest.raises(CheckpointError, match="must be a .safetensors file"):
        quantize_files(tmp_path / "base.ckpt", out, CONFIG)
    assert not out.exists()
    quantize_files(base, out, CONFIG)
    with pytest.raises(CheckpointError, match="has quantised weights already"):
        quantize_files(out, tmp_path / "twice.safetensors", CONFIG)
    with pytest.raises(FileExistsError, match="exists already"):
        quantize_files(base, out, CONFIG)
    assert main(["quantize", base, str(out)]) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["codes", "metadata"])
def test_damaged_files(damage, base, tmp_path):
    quantize_files(base, tmp_path / "coded.safetensors", CONFIG)
    values = TensorFile(tmp_path / "coded.safetensors").read_all()
    metadata = None
    if damage == "codes":
        values["query.weight_scale"] = values["query.weight_scale"][:3]
        text = "query.weight: not the arrays of a quantised weight"
    else:
        metadata, text = {"mindpet_quantized": '{"query.weight": "Q4"}'}, "must tell types of tensors"
    save_tensors(tmp_path / "damaged.safetensors", values, metadata)
    with pytest.raises(CheckpointError, match=text):
        CodedFile(TensorFile(tmp_path / "damaged.safetensors"))

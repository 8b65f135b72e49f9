"""P-tuning: the encoder and its formula, the adapter, and that a file has the prompt which is computed."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from test_prompt_tuning import CONFIG as PLAIN
from test_prompt_tuning import Network, Two, give, ids, normal, with_prompt

from mindpet.cli import main
from mindpet.delta import PromptEncoder
from mindpet.delta.p_tuning import computed
from mindpet.errors import CheckpointError, MergeError
from mindpet.files.convert import convert, inspect
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import load_delta
from mindpet.peft import PeftModel, PromptEncoderConfig, get_peft_model, set_peft_model_state_dict

TOKENS, WIDTH, INNER = 3, 4, 5
TENSORS = "adapter_model.safetensors"
TYPES = pytest.mark.parametrize("kind", ["MLP", "LSTM"])
TABLE, LSTM, MLP = (f"mindpet_delta_p_tuning_{name}" for name in ("table", "lstm", "mlp"))


def config(kind, **fields):
    fields = {"num_virtual_tokens": TOKENS, "encoder_hidden_size": INNER, **fields}
    return PromptEncoderConfig(encoder_reparameterization_type=kind, **fields)


def own_values(cell):
    return {name: param.asnumpy() for name, param in cell.parameters_and_names()}


SHAPES = {
    "weight_ih": (4 * INNER, WIDTH),
    "bias_ih": (1, 4 * INNER),
    "weight_hh": (4 * INNER, INNER),
    "bias_hh": (1, 4 * INNER),
}
WAYS = ("", "_reverse")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(rows, values, way):
    """One direction, step by step."""
    wx, bx, wh, bh = (values[f"{LSTM}.0.{name}{way}"] for name in SHAPES)
    hidden, memory, found = np.zeros((1, INNER)), np.zeros((1, INNER)), []
    for row in rows:
        i, f, g, o = np.split(row @ wx.T + bx + hidden @ wh.T + bh, 4, 1)
        memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(memory)
        found.append(hidden[0])
    return np.array(found)


@TYPES
def test_the_formula(kind, mode, rng):
    cell = PromptEncoder(TOKENS, WIDTH, kind, INNER, num_layers=1)
    for param in cell.trainable_params():
        param.set_data(Tensor(normal(rng, *param.shape)))
    values, embeddings = own_values(cell), normal(rng, 2, 5, WIDTH)
    rows, dense = values[TABLE], [(values[f"{MLP}.{i}.weight"], values[f"{MLP}.{i}.bias"]) for i in (0, 2)]
    if kind == "LSTM":
        rows = np.concatenate([lstm(rows, values, ""), lstm(rows[::-1], values, "_reverse")[::-1]], 1)
        (w1, b1), (w2, b2) = dense
        expected = np.maximum(rows @ w1.T + b1, 0) @ w2.T + b2
    else:
        (w1, b1), (w2, b2), w3, b3 = *dense, values[f"{MLP}.4.weight"], values[f"{MLP}.4.bias"]
        expected = np.maximum(np.maximum(rows @ w1.T + b1, 0) @ w2.T + b2, 0) @ w3.T + b3
    got = cell(Tensor(embeddings)).asnumpy()
    for row in range(2):
        np.testing.assert_allclose(got[row, :TOKENS], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got[row, TOKENS:], embeddings[row])
    np.testing.assert_allclose(computed(values), expected, rtol=1e-4, atol=1e-5)


def test_layers_and_sizes_are_those_of_hugging_face():
    cell = PromptEncoder(TOKENS, WIDTH, "LSTM", INNER, num_layers=2)
    shapes = {name: value.shape for name, value in own_values(cell).items()}
    second = {**SHAPES, "weight_ih": (4 * INNER, 2 * INNER)}
    assert shapes == {
        TABLE: (TOKENS, WIDTH),
        **{f"{LSTM}.0.{name}{way}": shape for name, shape in SHAPES.items() for way in WAYS},
        **{f"{LSTM}.1.{name}{way}": shape for name, shape in second.items() for way in WAYS},
        f"{MLP}.0.weight": (2 * INNER, 2 * INNER),
        f"{MLP}.0.bias": (2 * INNER,),
        f"{MLP}.2.weight": (WIDTH, 2 * INNER),
        f"{MLP}.2.bias": (WIDTH,),
    }
    assert "encoder_type=LSTM, hidden_size=5, num_layers=2, dropout=0.0" in repr(cell)
    assert PromptEncoder(TOKENS, WIDTH).mindpet_delta_p_tuning_mlp[2].weight.shape == (WIDTH, WIDTH)


@TYPES
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("stored", [ms.float16, ms.bfloat16])
def test_it_is_computed_in_float32_and_joins_in_the_type_of_the_embeddings(kind, dtype, stored, rng):
    cell = PromptEncoder(TOKENS, WIDTH, kind, INNER, param_init_type=stored)
    assert {param.dtype for param in cell.trainable_params()} == {stored}
    got = cell(Tensor(np.zeros((1, 2, WIDTH), dtype))).asnumpy()
    expected = computed({name: param.astype(ms.float32).asnumpy() for name, param in cell.parameters_and_names()})
    assert got.dtype == dtype
    np.testing.assert_allclose(got[0, :TOKENS], expected, atol=1e-5 if dtype is np.float32 else 1e-3)


def test_dropout_is_between_the_layers_of_the_lstm_while_training(mode):
    cell, x = PromptEncoder(TOKENS, WIDTH, "LSTM", INNER, dropout=0.5), Tensor(np.zeros((1, 1, WIDTH), np.float32))
    fixed = [cell.set_train(False)(x).asnumpy() for _ in range(2)]
    cell.set_train()
    moving = [cell(x).asnumpy() for _ in range(2)]
    np.testing.assert_array_equal(*fixed)
    assert (moving[0] != moving[1]).any()
    assert [layer.dropout.p for layer in cell.mindpet_delta_p_tuning_lstm] == [0.0, 0.5]


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"tokens": 0, "features": 1.5}, TypeError, "'tokens' must be a positive int, but got 0.*'features' must be a"),
        ({"hidden_size": 0, "num_layers": -1}, ValueError, "'hidden_size' must .* 0.*'num_layers' must .* -1"),
        ({"encoder_type": "GRU", "dropout": 1.0}, ValueError, "'encoder_type' must be one of .*'dropout' must be in"),
        ({"encoder_type": None}, TypeError, "'encoder_type' must be a str"),
        ({"param_init_type": ms.int32}, TypeError, "'param_init_type' must be mindspore.float16"),
    ],
)
def test_arguments_that_the_cell_refuses(changes, error, match):
    with pytest.raises(error, match=match):
        PromptEncoder(**{"tokens": TOKENS, "features": WIDTH, **changes})


@TYPES
def test_shard_reaches_every_operator(kind):
    cell = PromptEncoder(TOKENS, WIDTH, kind, INNER, dropout=0.5)
    assert cell.shard(2) is cell
    assert cell.tile.in_strategy == ((2, 1, 1),) and cell.concat.in_strategy == ((2, 1, 1), (2, 1, 1))
    inner = [one for _, own in cell.cells_and_names() for one in own._primitives.values()]
    inner = [one for one in inner if one.name not in ("Reshape", "Shape")]  # those of nn.Dense have none
    assert len(inner) > 6 and all(one.in_strategy for one in inner)


@TYPES
def test_training_then_a_file_then_a_plain_prompt(kind, mode, rng, tmp_path):
    network, x, labels = Network(), ids(rng), Tensor(np.array([0, 2], np.int32))
    base = network(x).asnumpy()
    model = get_peft_model(network, config(kind))
    assert model.peft_config["default"].encoder_hidden_size == INNER
    assert all(param.name.startswith("body.mindpet_delta_p_tuning_") for param in model.trainable_params())
    before = [param.asnumpy().copy() for param in model.trainable_params()]
    loss = nn.WithLossCell(model, nn.CrossEntropyLoss())
    step = nn.TrainOneStepCell(loss, nn.Adam(model.trainable_params(), 0.1)).set_train()
    losses = [float(step(x, labels).asnumpy()) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all((one != param.asnumpy()).any() for one, param in zip(before, model.trainable_params()))

    tuned = model.set_train(False)(x).asnumpy()
    prompt = computed(own_values(network.body.prompt_source))
    np.testing.assert_allclose(tuned, with_prompt(network, prompt, x), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        np.testing.assert_array_equal(model(x).asnumpy(), base)
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(TensorFile(tmp_path / TENSORS).read_all()["prompt_embeddings"], prompt)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (content["peft_type"], content["encoder_reparameterization_type"]) == ("P_TUNING", kind)
    assert model.unload() is network
    np.testing.assert_array_equal(network(x).asnumpy(), base)

    loaded = PeftModel.from_pretrained(network, tmp_path, is_trainable=True)
    assert [(one.name, one.shape) for one in loaded.trainable_params()] == [("body.mindpet_delta_prompt", (3, 4))]
    assert loaded.peft_config["default"].encoder_reparameterization_type == kind
    np.testing.assert_allclose(loaded(x).asnumpy(), tuned, atol=1e-4)  # MindSpore's tanh is less exact on a CPU
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()
    loaded.add_adapter("plain", PLAIN)
    loaded.add_adapter("computed", config(kind))
    for name in ("plain", "computed", "default"):
        loaded.set_adapter(name)
        assert np.isfinite(loaded(x).asnumpy()).all()
    np.testing.assert_allclose(loaded(x).asnumpy(), tuned, atol=1e-4)


def test_nan_in_the_encoder_does_not_reach_the_base(mode, rng):
    network, x = Network(), ids(rng)
    base = network(x).asnumpy()
    model = get_peft_model(network, config("MLP"))
    for param in model.trainable_params():
        param.set_data(Tensor(np.full(param.shape, np.nan, np.float32)))
    with model.disable_adapter():
        np.testing.assert_array_equal(model(x).asnumpy(), base)
    with pytest.raises(MergeError, match="P_TUNING, which cannot be folded"):
        model.merge_adapter()


def test_two_submodules_have_two_encoders_and_one_table(rng, tmp_path):
    network, x = Two(), ids(rng)
    model = get_peft_model(network, config("MLP"))
    give(model, rng)
    tuned = model(x).asnumpy()
    model.save_pretrained(tmp_path)
    prompts = [computed(own_values(cell.prompt_source)) for cell in (network.encoder, network.decoder)]
    np.testing.assert_array_equal(TensorFile(tmp_path / TENSORS).read("prompt_embeddings"), np.concatenate(prompts))
    np.testing.assert_allclose(PeftModel.from_pretrained(model.unload(), tmp_path)(x).asnumpy(), tuned, atol=1e-5)


@TYPES
def test_folders_and_delta_files(kind, rng, tmp_path):
    model, x = get_peft_model(Network(), config(kind, task_type="SEQ_CLS")), ids(rng)
    give(model, rng)
    model.save_pretrained(tmp_path / "a")
    own = {param.name.replace("mindpet_trained_", ""): param.asnumpy() for param in model.trainable_params()}
    save_tensors(tmp_path / "d.safetensors", own)
    convert(tmp_path / "d.safetensors", tmp_path / "b", PromptEncoderConfig(task_type="SEQ_CLS"))
    one, other = (TensorFile(tmp_path / name / TENSORS).read_all() for name in "ab")
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    assert "method: P_TUNING\n" in inspect(tmp_path / "a") and "method: P_TUNING\n" in inspect(
        tmp_path / "d.safetensors"
    )

    delta, again = str(tmp_path / "e.ckpt"), str(tmp_path / "c")
    assert main(["convert", str(tmp_path / "a"), delta, "--prefix-path", "body"]) == 0
    plain = get_peft_model(model.unload(), PLAIN)
    load_delta(plain, delta)
    np.testing.assert_array_equal(plain.trainable_params()[0].asnumpy(), one["prompt_embeddings"])
    convert(delta, again, PromptEncoderConfig(task_type="SEQ_CLS"))
    np.testing.assert_array_equal(TensorFile(f"{again}/{TENSORS}").read("prompt_embeddings"), one["prompt_embeddings"])
    assert plain(x).shape == (2, 3)


def test_files_that_do_not_fit(rng, tmp_path):
    model = get_peft_model(Network(), config("LSTM", encoder_num_layers=1))
    with pytest.raises(CheckpointError, match="holds what the adapter's projection computes, and not the projection"):
        set_peft_model_state_dict(model, {"prompt_embeddings": normal(rng, TOKENS, WIDTH)})
    values = {param.name: param.asnumpy() for param in model.trainable_params()}
    del values[f"body.{LSTM}.0.bias_hh"]
    save_tensors(tmp_path / "d.safetensors", values)
    with pytest.raises(CheckpointError, match="no prompt can be computed: the file must have .*bias_hh"):
        convert(tmp_path / "d.safetensors", tmp_path / "a", PromptEncoderConfig())
    save_tensors(tmp_path / "d.safetensors", {"body.weight": normal(rng, 2, 2)})
    with pytest.raises(CheckpointError, match="must have a delta of P_TUNING"):
        convert(tmp_path / "d.safetensors", tmp_path / "a", PromptEncoderConfig())


def test_fields_that_the_configuration_refuses():
    with pytest.raises(
        ValueError, match="'encoder_reparameterization_type' must be one of .*'encoder_num_layers' must"
    ):
        PromptEncoderConfig(encoder_reparameterization_type="GRU", encoder_num_layers=0)
    with pytest.raises(
        TypeError, match="'encoder_hidden_size' must be a positive int.*'encoder_dropout' must be a float"
    ):
        PromptEncoderConfig(encoder_hidden_size=1.5, encoder_dropout="0")
    assert (
        get_peft_model(Network(), config("MLP", encoder_hidden_size=None)).peft_config["default"].encoder_hidden_size
        == 4
    )

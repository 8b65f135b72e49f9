"""The example BERT against golden numbers and published parameter shares."""

import json
import pathlib
import shutil
import warnings

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from models.bert import METHODS, BertClassifier, BertConfig, BertModel, read_weights
from models.weights import load_weights
from safetensors.numpy import load_file, save_file

from mindpet.graph import freeze_delta, summary
from mindpet.peft import AutoPeftModel, LoraConfig, get_peft_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/bert"


def golden_model(**overrides):
    model = BertModel(BertConfig.from_folder(GOLDEN, **overrides))
    load_weights(model, read_weights(GOLDEN))
    return model.set_train(False)


@pytest.mark.parametrize("method", ["full", "lora", "adapter"])
def test_forward_gives_the_golden_numbers(method, mode):
    """A fresh delta that is the identity changes nothing."""
    expected = load_file(GOLDEN / "expected.safetensors")
    inputs = [Tensor(expected[name]) for name in ("input_ids", "attention_mask", "token_type_ids")]
    hidden, pooled = golden_model(method=method)(*inputs)
    np.testing.assert_allclose(hidden.asnumpy(), expected["hidden"], atol=1e-5)
    np.testing.assert_allclose(pooled.asnumpy(), expected["pooled"], atol=1e-4)  # tanh is approximate on a CPU


def test_names_are_those_of_hugging_face_but_for_three():
    names = {name for name, _ in BertModel(BertConfig.from_folder(GOLDEN)).parameters_and_names()}
    assert names == set(read_weights(GOLDEN))
    assert "encoder.layer.1.attention.self.query.weight" in names


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_names_of_the_base(method):
    base = {name for name, _ in BertModel(BertConfig.from_folder(GOLDEN)).parameters_and_names()}
    tuned = {name for name, _ in BertModel(BertConfig.from_folder(GOLDEN, method=method)).parameters_and_names()}
    assert base <= tuned and all("mindpet_delta" in name for name in tuned - base)


@pytest.mark.parametrize(
    "method, percent, tolerance",
    [("lora", 0.30, 0.005), ("adapter", 2.33, 0.01), ("low_rank_adapter", 0.067, 0.0005), ("bitfit", 0.09, 0.005)],
)
def test_published_parameter_shares_of_bert_base(method, percent, tolerance):
    """Trainable over base parameters, vocabulary 21128, 15 classes, the head trained."""
    base = summary(BertModel(BertConfig(vocab_size=21128))).total
    model = BertClassifier(BertConfig(vocab_size=21128, method=method), 15)
    freeze_delta(model, method, exclude=["classifier.*"])
    assert base == 102_267_648
    assert 100 * summary(model).trainable / base == pytest.approx(percent, abs=tolerance)


def test_lora_on_bert_base_in_half_precision_takes_an_eighth_of_full_fine_tuning():
    """Weights, gradients and two moments: 2 bytes a frozen number for 16, and float32 for what trains."""
    base = BertClassifier(BertConfig(), 2)
    full = summary(base)
    tuned = summary(
        get_peft_model(
            base, LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"), frozen_dtype=ms.float16
        )
    )
    sums = [cost.weight_bytes + cost.gradient_bytes + cost.optimizer_bytes for cost in (full, tuned)]
    assert sums[0] == 16 * full.total and sums[1] / sums[0] == pytest.approx(0.128, abs=0.001)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_does_not_change_the_logits(pooling, mode, rng):
    model = BertClassifier(BertConfig.from_folder(GOLDEN), 3, pooling)
    load_weights(model.bert, read_weights(GOLDEN))
    model.set_train(False)
    ids = rng.integers(0, 19, (2, 8)).astype(np.int32)
    mask = np.concatenate([np.ones((2, 5), np.int32), np.zeros((2, 3), np.int32)], 1)
    long = model(Tensor(ids), Tensor(mask)).asnumpy()
    short = model(Tensor(ids[:, :5]), Tensor(mask[:, :5])).asnumpy()
    np.testing.assert_allclose(long, short, atol=1e-4)


def test_weights_that_do_not_fit_are_all_listed():
    weights = read_weights(GOLDEN)
    model = golden_model()
    before = model.pooler.dense.weight.asnumpy()
    del weights["pooler.dense.bias"]
    weights["embeddings.word_embeddings.embedding_table"] = np.zeros((3, 32), np.float32)
    with pytest.raises(
        ValueError,
        match="(?s)missing: pooler.dense.bias .*embedding_table: \\(19, 32\\) in the model, \\(3, 32\\) in the file",
    ):
        load_weights(model, weights)
    np.testing.assert_array_equal(model.pooler.dense.weight.asnumpy(), before)


def test_a_pretraining_checkpoint_with_prefix_and_head(tmp_path):
    shutil.copy(GOLDEN / "config.json", tmp_path)
    save_file(
        {
            **{f"bert.{name}": value for name, value in load_file(GOLDEN / "model.safetensors").items()},
            "cls.predictions.bias": np.zeros(19, np.float32),
        },
        tmp_path / "model.safetensors",
    )
    model = BertModel(BertConfig.from_folder(tmp_path))
    load_weights(model, read_weights(tmp_path))
    np.testing.assert_array_equal(model.pooler.dense.weight.asnumpy(), golden_model().pooler.dense.weight.asnumpy())


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"method": "loraa"}, "'method' must be one of .* but got 'loraa'"),
        ({"hidden_act": "swish"}, "'hidden_act' must be one of"),
        ({"num_attention_heads": 5}, "'hidden_size', 768, must be a multiple of 'num_attention_heads', 5"),
    ],
)
def test_wrong_config(changes, match):
    with pytest.raises(ValueError, match=match):
        BertConfig(**changes)


@pytest.mark.parametrize(
    "content, match",
    [
        ('{"model_type": "gpt2"}', "'model_type' must be 'bert', but is 'gpt2'"),
        ('{"position_embedding_type": "relative_key"}', "'position_embedding_type' must be 'absolute'"),
        ('{"is_decoder": true}', "'is_decoder' must be False"),
        ("{", "not a JSON object: Expecting"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
    ],
)
def test_config_of_another_model(content, match, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json: {match}"):
        BertConfig.from_folder(tmp_path)


def test_unknown_pooling():
    with pytest.raises(ValueError, match="'pooling' must be 'cls' or 'mean', but got 'max'"):
        BertClassifier(BertConfig.from_folder(GOLDEN), 2, "max")


def test_gelu_of_the_config():
    exact, tanh = (golden_model(hidden_act=name) for name in ("gelu", "gelu_new"))
    ids = Tensor(np.array([[2, 5, 9, 3]]), ms.int32)
    difference = np.abs(exact(ids, ids * 0 + 1)[0].asnumpy() - tanh(ids, ids * 0 + 1)[0].asnumpy()).max()
    assert 0 < difference < 0.02


@pytest.fixture
def classifier_folder(rng, tmp_path):
    """A Hugging Face folder of a classifier with three labels."""
    config = json.loads((GOLDEN / "config.json").read_text())
    config.update(id2label={"0": "a", "1": "b", "2": "c"}, classifier_dropout=0.0)
    weights = {f"bert.{name}": value for name, value in load_file(GOLDEN / "model.safetensors").items()}
    weights["classifier.weight"] = rng.normal(size=(3, 32)).astype(np.float32)
    weights["classifier.bias"] = rng.normal(size=3).astype(np.float32)
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_classifier_comes_with_its_head(classifier_folder, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = BertClassifier.from_pretrained(classifier_folder).set_train(False)
    head = load_file(classifier_folder / "model.safetensors")
    expected = load_file(GOLDEN / "expected.safetensors")
    ids, mask = (Tensor(expected[name]) for name in ("input_ids", "attention_mask"))
    pooled = golden_model()(ids, mask)[1].asnumpy()
    logits = pooled @ head["classifier.weight"].T + head["classifier.bias"]
    np.testing.assert_allclose(model(ids, mask).asnumpy(), logits, atol=1e-5)
    assert model.dropout.p == 0.0 and model.bert.embeddings.dropout.p == 0.1
    mean = BertClassifier.from_pretrained(classifier_folder, pooling="mean", method="lora")
    assert mean.bert.pooler is None and "bert.encoder.layer.1.attention.self.query.mindpet_delta_lora_a" in {
        name for name, _ in mean.parameters_and_names()
    }


def test_a_classifier_of_a_folder_without_head():
    with pytest.warns(UserWarning, match="so not trained are: classifier.weight, classifier.bias$"):
        model = BertClassifier.from_pretrained(GOLDEN, 4)
    assert model.classifier.weight.shape == (4, 32)
    pooler = read_weights(GOLDEN)["pooler.dense.weight"]
    np.testing.assert_array_equal(model.bert.pooler.dense.weight.asnumpy(), pooler)


def test_a_classifier_without_pooler_and_with_another_number_of_labels(classifier_folder):
    weights = load_file(classifier_folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, classifier_folder / "model.safetensors")
    with pytest.warns(UserWarning, match="so not trained are: bert.pooler.dense.weight, bert.pooler.dense.bias$"):
        BertClassifier.from_pretrained(classifier_folder)
    with pytest.raises(ValueError, match=r"classifier.weight: \(5, 32\) in the model, \(3, 32\) in the file"):
        BertClassifier.from_pretrained(classifier_folder, 5)


def test_an_adapter_finds_its_classifier(classifier_folder, mode, rng, tmp_path):
    config = LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query"],
        base_model_name_or_path=str(classifier_folder),
        init_lora_weights=False,
    )
    model = get_peft_model(BertClassifier.from_pretrained(classifier_folder), config).set_train(False)
    ids = Tensor(rng.integers(0, 19, (2, 8)).astype(np.int32))
    expected = model(ids, ids * 0 + 1).asnumpy()
    model.save_pretrained(tmp_path / "adapter")
    content = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert content["auto_mapping"] == {"base_model_class": "BertClassifier", "parent_library": "models.bert"}
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").set_train(False)
    np.testing.assert_array_equal(loaded(ids, ids * 0 + 1).asnumpy(), expected)

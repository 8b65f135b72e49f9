"""The fine-tuning script, on a tiny BERT and a small file."""

import json
import pathlib
import shutil

import finetune_text
import numpy as np
import pytest
from methods import METHODS, PEFT_METHODS
from models.bert import BertClassifier, BertConfig

from mindpet.delta.registry import METHODS as REGISTERED
from mindpet.peft import plan_targets

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/bert"
WORDS = {"maths": ["matrix", "value", "random"], "sound": ["signal", "image", "train"]}


@pytest.fixture
def data(tmp_path, rng):
    """A TSV whose labels the words give away."""
    label = [list(WORDS)[i % 2] for i in range(160)]
    lines = [f"{name}\tthe {' '.join(rng.choice(WORDS[name], 4))} {'a ' * (i // 40)}of" for i, name in enumerate(label)]
    path = tmp_path / "data.tsv"
    path.write_text("\n".join(dict.fromkeys(lines)), encoding="utf-8")
    return str(path)


def run(tmp_path, *arguments):
    return finetune_text.main(
        [
            "--model",
            str(GOLDEN),
            "--epochs",
            "3",
            "--batch-size",
            "8",
            "--seq-length",
            "10",
            "--output",
            str(tmp_path / "out"),
            *arguments,
        ]
    )


@pytest.mark.parametrize(
    "arguments", [[], ["--rdrop"], ["--pooling", "cls", "--method", "adapter"], ["--peft", "--quantize", "int8"]]
)
def test_it_learns_and_the_saved_delta_predicts_the_same(arguments, data, tmp_path, capsys):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    if "--rdrop" not in arguments:  # dropout on a CPU differs from run to run
        config = json.loads((folder / "config.json").read_text())
        config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        (folder / "config.json").write_text(json.dumps(config))
    assert run(tmp_path, "--data", data, "--model", str(folder), "--epochs", "8", *arguments) == 0
    out = capsys.readouterr().out
    assert "with 2 labels" in out and "its predictions are the same" in out
    assert float(out.split("test accuracy ")[1].split()[0]) > 0.7  # chance is 0.5


@pytest.mark.parametrize("method", ["lora", "low_rank_adapter", "bitfit", "ptuning2"])
def test_peft_gives_the_curve_of_the_layers_made_by_hand(method, data, tmp_path, monkeypatch):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    results, run_method = [], finetune_text.run
    monkeypatch.setattr(finetune_text, "run", lambda *arguments: results.append(run_method(*arguments)))
    for arguments in ([], ["--peft"]):
        arguments += ["--data", data, "--model", str(folder), "--method", method, "--seq-length", "8", "--epochs", "2"]
        assert run(tmp_path, *arguments) == 0
    by_hand, peft = results
    assert len(by_hand.losses) == len(peft.losses) > 15
    if method == "ptuning2":  # there every layer has a prefix, and so start values, of its own
        assert np.mean(peft.losses[-5:]) < np.mean(peft.losses[:5])
        return
    np.testing.assert_allclose(peft.losses, by_hand.losses, atol=1e-5)
    assert peft.test_accuracy == by_hand.test_accuracy
    if method != "bitfit":  # an adapter has a head of its own beside the base's
        assert peft.trainable_percent == pytest.approx(by_hand.trainable_percent, rel=1e-2)


def test_peft_does_not_go_with_every_method(capsys):
    with pytest.raises(SystemExit) as exit_:
        finetune_text.main(["--peft", "--method", "full"])
    assert exit_.value.code == 2 and "--peft goes with --method lora|adalora" in capsys.readouterr().err


def test_every_method_of_mindpet_is_there_and_fits_the_model():
    assert set(PEFT_METHODS) == {*REGISTERED, "mam"}
    for name in PEFT_METHODS:
        model = BertClassifier(BertConfig.from_folder(GOLDEN), 2)
        assert plan_targets(model, METHODS[name].config).modules_to_save, name


def test_compare_runs_every_method_and_saves_a_table_and_a_picture(data, tmp_path, capsys):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    arguments = ["--data", data, "--model", str(folder), "--seq-length", "8", "--epochs", "1"]
    methods = ["lora", "adalora", "trainable_tokens", "bitfit", "adapter", "mam", "full", "head"]
    assert run(tmp_path, *arguments, "--compare", *methods) == 0
    table = (tmp_path / "out/compare.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line.split("|") for line in table.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == methods
    shares = {row[1].strip(): float(row[2]) for row in rows}
    assert shares["full"] == 100 and 0 < shares["head"] < shares["bitfit"] < shares["adapter"] < 100
    assert (tmp_path / "out/loss_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in this folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json in this folder"),
        (lambda folder: (folder / "vocab.txt").unlink(), "neither tokenizer.json nor vocab.txt in this folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "error: "),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "error: "),
    ],
)
def test_a_broken_model_folder_is_one_clear_line(change, message, data, tmp_path, capsys):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    change(folder)
    assert run(tmp_path, "--data", data, "--model", str(folder)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_bad_data_is_one_clear_line(tmp_path, capsys):
    path = tmp_path / "one.tsv"
    path.write_text("only\ttext\n")
    assert run(tmp_path, "--data", str(path)) == 2
    assert "two or more labels are needed" in capsys.readouterr().err
    assert run(tmp_path, "--data", str(tmp_path / "none.tsv")) == 2
    assert "none.tsv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_the_model_takes_is_one_clear_line(data, tmp_path, capsys):
    assert run(tmp_path, "--data", data, "--seq-length", "17") == 2
    assert capsys.readouterr().err == "error: --seq-length 17: the model takes at most 16 tokens\n"


def test_an_output_folder_that_cannot_be_written(data, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert run(tmp_path, "--data", data) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("arguments", [["--method", "lorra"], ["--epochs", "0"], ["--batch-size", "x"]])
def test_bad_arguments(arguments, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *arguments)
    assert stopped.value.code == 2


def test_without_the_model_package_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(finetune_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pass --model DIR"):
        finetune_text.find_model(None)


def test_the_model_is_checked_before_use(monkeypatch):
    folder = finetune_text.find_model(None)
    assert (folder / "model.safetensors").is_file()
    monkeypatch.setattr(finetune_text, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has sha256 53aa5117.*, but 0000"):
        finetune_text.find_model(None)


@pytest.mark.parametrize(
    "config, known", [(None, True), ('{"do_lower_case": true}', True), ('{"do_lower_case": false}', False)]
)
def test_a_vocabulary_without_tokenizer_json(config, known, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    if config:
        (folder / "tokenizer_config.json").write_text(config)
    encoding = finetune_text.make_tokenizer(folder, 6).encode("Signal of")
    assert encoding.tokens == ["[CLS]", "signal" if known else "[UNK]", "of", "[SEP]", "[PAD]", "[PAD]"]
    assert encoding.attention_mask == [1, 1, 1, 1, 0, 0]


def test_learning_rates():
    rates = finetune_text.warm_up_and_decay(20)
    assert len(rates) == 20 and rates.argmax() == 2 and rates[0] > 0 and rates.min() > 0
    np.testing.assert_allclose(rates[2], 1)

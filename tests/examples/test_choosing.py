"""The comparison of all methods: its search and runs, and that the docs have what its results say."""

import argparse
import math

import choosing
import numpy as np
import pytest
from choosing_pages import FIRST, HEAD_RATE, PICTURE, RESULTS, ROOT, SECOND, Results, draw, nearest_rate, pages, pair
from finetune_text import Encoded
from methods import METHODS
from mindspore import Tensor
from models.gpt2 import Gpt2Config

SEEDS = {1, 2, 3}


def test_the_docs_have_the_tables_of_the_results():
    for path, text in pages(Results(RESULTS)).items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path}: run examples/choosing.py --write"


def test_every_method_has_its_runs_and_the_defaults_are_what_held_on_the_second_task():
    results = Results(RESULTS)
    assert set(results.methods(FIRST)) == set(METHODS)
    for task in (FIRST, SECOND):
        for name in results.methods(task):
            assert {record["seed"] for record in results.best(task, name)} == SEEDS, name
            assert results.next_rate(task, name, METHODS[name].learning_rate) is None, name
    for name in results.methods(SECOND):
        if not METHODS[name].by_hand:  # the others were tried on more texts, see docs/examples.md
            assert METHODS[name].learning_rate == results.best_rate(SECOND, name), name


def test_the_picture_is_drawn(tmp_path):
    draw(Results(RESULTS), tmp_path / "picture.png")
    assert PICTURE.read_bytes()[:4] == (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def small(monkeypatch):
    """A base that is compiled quickly, and few texts."""
    monkeypatch.setattr(choosing, "Gpt2Config", lambda *_, **__: Gpt2Config(128, 80, 16, 1, 2))
    monkeypatch.setattr(choosing.Code, "sizes", {"validation": 1, "test": 2})


def record(task, rate, loss, seed=1, test=0.0, method="lora"):
    return {
        "task": task,
        "method": method,
        "rate": rate,
        "seed": seed,
        "validation": {"loss": loss},
        "test": {"loss": test},
    }


def test_the_search_ends_when_both_neighbours_of_the_best_rate_are_worse(tmp_path):
    path = tmp_path / "deep/results.jsonl"
    results, losses, tried = Results(path), {0.001: 3.0, 0.003: 2.0, 0.01: 1.0, 0.03: math.nan, 0.1: 0.5}, []
    while (rate := results.next_rate(FIRST, "lora", 0.004)) is not None:
        tried.append(rate)
        results.add(record(FIRST, rate, losses[rate]))
        results = Results(path)  # as after an interruption
    assert tried == [0.003, 0.01, 0.03]
    assert results.best_rate(FIRST, "lora") == 0.01


def test_the_second_task_takes_that_rate_or_a_smaller_one_if_the_head_alone_is_better(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add(record(FIRST, 0.1, 1.0))
    results.add(record(SECOND, HEAD_RATE, 2.0, method="head"))
    for rate, loss in ((0.1, math.nan), (0.03, 3.0), (0.01, 2.5), (0.003, 1.5)):
        assert results.next_rate(SECOND, "lora", 7.0) == rate
        results.add(record(SECOND, rate, loss))
    assert results.next_rate(SECOND, "lora", 7.0) is None
    assert results.next_rate(SECOND, "head", 7.0) is None

    for rate, loss in ((0.1, 4.0), (0.03, 5.0)):  # smaller ones are worse
        results.add(record(FIRST, 0.1, 1.0, method="ia3"))
        assert results.next_rate(SECOND, "ia3", 7.0) == rate
        results.add(record(SECOND, rate, loss, method="ia3"))
    assert results.next_rate(SECOND, "ia3", 7.0) is None


def test_means_with_their_standard_errors(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for seed, test in ((1, 1.0), (2, 2.0), (3, 6.0)):
        results.add(record(FIRST, 0.1, 0.0, seed, test))
    results.add(record(FIRST, 0.3, 9.0, 1, 100.0))  # not the best rate
    assert results.mean(FIRST, "lora") == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert pair((1.23456, 0.00123)) == "1.235 ± 0.001"
    assert [nearest_rate(rate) for rate in (2e-3, 5e-3, 8e-3, 1e-1, 7.0)] == [3e-3, 3e-3, 1e-2, 1e-1, 3.0]


def test_accuracy_and_cross_entropy_of_classes(rng, monkeypatch):
    logits, labels = rng.normal(size=(7, 3)), rng.integers(0, 3, 7)
    monkeypatch.setattr(choosing, "predict", lambda model, data, batch: logits)
    task = object.__new__(choosing.Classes)
    task.test = Encoded(None, None, labels)
    score = task.score(None, None, "test")
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert score["loss"] == pytest.approx(-np.log(softmax[np.arange(7), labels]).mean(), abs=1e-4)
    assert score["accuracy"] == pytest.approx(
        np.mean([row.argmax() == label for row, label in zip(logits, labels)]), abs=1e-4
    )


def test_runs_repeat_exactly_and_go_on_where_they_stopped(small, tmp_path, monkeypatch):
    arguments = ["--steps", "2", "--base-steps", "2", "--seeds", "2", "--output", str(tmp_path)]
    file = tmp_path / "results.jsonl"
    run = [*arguments, "--results", str(file), "--tasks", FIRST, "--methods", "adalora"]
    assert choosing.main(run) == 0
    results = Results(file)
    best = results.best(FIRST, "adalora")
    assert [record["seed"] for record in best] == [1, 2] and len(results.records) >= 4
    assert best[0]["curve"] != best[1]["curve"]

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:1] + lines[-1:]))  # as if it had been stopped
    assert choosing.main(run) == 0
    times = {"step_ms": None}
    again = sorted(({**r, **times} for r in Results(file).records), key=str)
    assert again == sorted(({**r, **times} for r in results.records), key=str)

    monkeypatch.setattr(choosing, "Trainer", None)  # nothing is run
    assert choosing.main(run) == 0


def test_the_loss_of_bytes(small, tmp_path):
    task = choosing.Code(argparse.Namespace(steps=1, base_steps=1, output=str(tmp_path)))
    model = task.network()
    text = task.data["test"]
    starts = [int(start) for start in np.linspace(0, len(text) - 65, 16)]
    pieces = np.stack([text[start : start + 65] for start in starts])
    logits = model(Tensor(pieces[:, :-1])).asnumpy().astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(softmax, pieces[:, 1:, None], -1)).mean()
    assert task.score(model, task.loss(model), "test")["loss"] == pytest.approx(expected, abs=1e-3)

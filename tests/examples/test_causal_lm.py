"""The notebook of a causal language model, and generation."""

import os
import pathlib
import subprocess
import sys

import numpy as np
from mindspore import Tensor
from models.generate import generate
from models.gpt2 import Gpt2Config, Gpt2ForCausalLM
from models.llama import LlamaForCausalLM

ROOT = pathlib.Path(__file__).parents[2]


def test_generation_takes_the_most_probable_token_each_time(mode):
    model = LlamaForCausalLM.from_pretrained(ROOT / "tests/golden/llama").set_train(False)
    got = generate(model, np.array([[1, 2, 3], [4, 5, 6]]), 4)
    assert got.shape == (2, 7)
    for position in range(3, 7):
        logits = model(Tensor(got[:, :position].astype(np.int32))).asnumpy()
        np.testing.assert_array_equal(got[:, position], logits[:, -1].argmax(-1))


def test_a_token_of_gpt2_does_not_see_what_comes_after_it(rng):
    model = Gpt2ForCausalLM(Gpt2Config(50, 16, 8, 2, 2)).set_train(False)
    ids = rng.integers(0, 50, (1, 8)).astype(np.int32)
    changed = ids.copy()
    changed[0, 5] = (ids[0, 5] + 1) % 50
    one, other = (model(Tensor(x)).asnumpy() for x in (ids, changed))
    np.testing.assert_allclose(one[:, :5], other[:, :5], atol=1e-6)
    assert np.abs(one[:, 5:] - other[:, 5:]).max() > 1e-6


def test_the_notebook_runs(tmp_path):
    command = [sys.executable, str(ROOT / "examples/causal_lm.py"), "--base-steps", "3", "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainable params: 78,336 || all params: 380,064 || trainable%: 20.6113" in done.stdout
    assert "saved output/causal_lm" in done.stdout
    assert (tmp_path / "output/causal_lm/licence/adapter_model.safetensors").is_file()

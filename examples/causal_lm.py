#!/usr/bin/env python3
# %% [markdown]
# # Two adapters for a small language model
#
# A LLaMA that fits on a laptop learns to spell from docstrings, byte by byte. LoRA then teaches it the Zen of Python,
# and a second adapter the licence of this project; the base stays what it is. At the end every row of one batch has an
# adapter of its own, and one adapter is merged. Run it as a script, or cell by cell: each `# %%` begins one.

# %% The texts
import argparse
import contextlib
import io
import pathlib

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from models.generate import generate, pad_left
from models.llama import LlamaConfig, LlamaForCausalLM
from models.loss import ChunkedLoss
from text_data import read_docstrings
from tqdm import trange

from mindpet.peft import LoraConfig, PeftModel, get_peft_model

parser = argparse.ArgumentParser(description="Two LoRA adapters for a small language model, with generation.")
parser.add_argument("--base-steps", type=int, default=400, help="steps that the base learns (default: %(default)s)")
parser.add_argument("--steps", type=int, default=250, help="steps of each adapter (default: %(default)s)")
parser.add_argument("--output", default="output/causal_lm", help="folder for the adapters (default: %(default)s)")
arguments = parser.parse_args()

with contextlib.redirect_stdout(io.StringIO()):
    import this
zen = "".join(this.d.get(letter, letter) for letter in this.s)
licence = (pathlib.Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")[:1500]
docstrings = " ".join(example.text for example in read_docstrings())

# %% The base, which learns from docstrings
LENGTH, BATCH = 64, 16
ms.set_context(mode=ms.GRAPH_MODE)
ms.set_seed(1)
rng = np.random.default_rng(1)
config = LlamaConfig(128, 96, 192, num_hidden_layers=3, num_attention_heads=4)
base = LlamaForCausalLM(config)


class Loss(nn.Cell):
    """The loss of the model on bytes: every byte but the first is to be told from those before it.

    It never has the logits of all bytes at once, which matters where there are as many words as in a real model.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.loss = ChunkedLoss(base.model, base.lm_head, chunk=64)

    def construct(self, ids):
        return self.loss(ids[:, :-1], ids[:, 1:])


def encode(text):
    """ASCII bytes; what is not ASCII is left out."""
    return np.frombuffer(text.encode("ascii", "ignore"), np.uint8).astype(np.int32)


def train(model, text, steps, learning_rate, name):
    """Train what is trainable in a model on random pieces of a text."""
    ids = encode(text)
    step = nn.TrainOneStepCell(Loss(), nn.Adam(model.trainable_params(), learning_rate)).set_train()
    bar = trange(steps, desc=name, unit="step", mininterval=0.5)
    for _ in bar:
        starts = rng.integers(0, len(ids) - LENGTH - 1, BATCH)
        loss = step(Tensor(np.stack([ids[start : start + LENGTH + 1] for start in starts])))
        bar.set_postfix(loss=f"{float(loss.asnumpy()):.3f}", refresh=False)
    model.set_train(False)


def write(model, start):
    """What a model makes of the beginning of a text."""
    return bytes(generate(model, encode(start)[None], 48)[0].astype(np.uint8)).decode()


train(base, docstrings, arguments.base_steps, 3e-3, "base")

# %% The first adapter. Only A and B of the linear layers train
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
model.print_trainable_parameters()
train(model, zen, arguments.steps, 5e-3, "zen")
print("zen:    ", repr(write(model, "Beautiful is ")))
with model.disable_adapter():
    print("base:   ", repr(write(model, "Beautiful is ")))

# %% A second one. It gets an optimizer of its own; switching compiles nothing
model.add_adapter("licence", LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
model.set_adapter("licence")
train(model, licence, arguments.steps, 5e-3, "licence")
print("licence:", repr(write(model, "Apache ")))
model.set_adapter("default")
print("zen:    ", repr(write(model, "Readability ")))

# %% One batch, an adapter for each row. What is shorter has padding on the left
rows, mask = pad_left([encode("Beautiful is "), encode("Apache "), encode("Beautiful is ")])
logits = model(Tensor(rows), Tensor(mask), adapter_names=["default", "licence", "__base__"])
print("next:   ", [chr(letter) for letter in logits.asnumpy()[:, -1].argmax(-1)])

# %% Saved as Hugging Face PEFT does, loaded into the same base, merged
model.save_pretrained(arguments.output, step=arguments.steps)
expected = write(model, "Beautiful is ")
base = model.unload()
model = PeftModel.from_pretrained(base, arguments.output)
assert write(model, "Beautiful is ") == expected
merged = model.merge_and_unload()
print("merged: ", repr(write(merged, "Beautiful is ")))
print(f"saved {arguments.output}")

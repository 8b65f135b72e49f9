#!/usr/bin/env python3
"""Compare every method on two tasks, and write the tables and pictures of docs/choosing.md: `--help`.

Each run is appended to a file of results as it ends; what is there is not run again.
"""

import argparse
import copy
import importlib
import inspect
import os
import platform
import sys
import time

import mindspore as ms
import numpy as np
from adamw import AdamW
from choosing_pages import FIRST, HEAD_RATE, RESULTS, SECOND, Results, write
from finetune_text import LossNetwork, by_rate, encode, find_model, make_tokenizer, predict, warm_up_and_decay
from methods import BERT, GPT2, METHODS, methods_for
from mindspore import Parameter, Tensor, nn
from mindspore.nn.learning_rate_schedule import LearningRateSchedule
from models.bert import BertClassifier, BertConfig, read_weights
from models.gpt2 import Gpt2Config, Gpt2ForCausalLM
from models.weights import load_weights
from text_data import read_docstrings, split

from mindpet.delta import AdaLoraOptimizer, OrthogonalLoss
from mindpet.graph import freeze_modules, summary
from mindpet.peft import AdaLoraConfig, TrainableTokensConfig, get_peft_model


class Classes:
    """Twelve classes of docstrings, for the pretrained MiniLM."""

    name, places, head = SECOND, BERT, "classifier.*"
    length, batch = 12, 16

    def __init__(self, arguments):
        folder = find_model(None)
        examples = read_docstrings(200)
        labels = sorted({example.label for example in examples})
        parts = split(examples, test_share=0.25, validation_share=0.15)
        tokenizer = make_tokenizer(folder, self.length)
        self.train, self.validation, self.test = (encode(part, tokenizer, labels) for part in parts)
        self.weights = read_weights(folder)
        # Without dropout, which on a CPU is another one in each run.
        self.config = BertConfig.from_folder(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.labels = len(labels)
        self.steps = arguments.steps or 48
        # those that every text has
        self.tokens = sorted(set.intersection(*(set(ids[mask > 0].tolist()) for ids, mask, _ in zip(*self.train))))
        self.about = {"train": len(parts[0]), "validation": len(parts[1]), "test": len(parts[2]), "steps": self.steps}

    def network(self):
        """The pretrained network with a fresh head."""
        model = BertClassifier(self.config, self.labels)
        load_weights(model.bert, self.weights)
        return model

    def loss(self, model):
        """The loss network of a model."""
        return LossNetwork(model, rdrop=False)

    def batches(self, rng):
        """The batches of a run: tuples of arrays."""
        count = self.steps * self.batch
        epochs = -(-count // len(self.train.labels))
        rows = np.concatenate([rng.permutation(len(self.train.labels)) for _ in range(epochs)])
        for part in rows[:count].reshape(-1, self.batch):
            yield tuple(array[part] for array in self.train)

    def score(self, model, loss, part):
        """Mean cross entropy and accuracy."""
        data = getattr(self, part)
        logits = predict(model, data, self.batch)
        shifted = logits - logits.max(1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        chosen = log_probabilities[np.arange(len(data.labels)), data.labels]
        right = float((logits.argmax(1) == data.labels).mean())
        return {"loss": round(-float(chosen.mean()), 4), "accuracy": round(right, 4)}


class ByteLoss(nn.Cell):
    """Mean cross entropy of all bytes of `(batch, seq)` but the first ones, from those before them."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        self.loss = nn.CrossEntropyLoss()

    def construct(self, ids):
        logits = self.model(ids[:, :-1])
        return self.loss(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


class Code:
    """Python code, for a GPT-2 that has learned from English docstrings, byte by byte."""

    name, places, head = FIRST, GPT2, "*wte*"  # what only the method `head` trains
    length, batch = 64, 8
    modules = {
        "train": [
            "argparse",
            "ast",
            "configparser",
            "difflib",
            "pathlib",
            "shutil",
            "statistics",
            "textwrap",
            "typing",
        ],
        "validation": ["fractions", "heapq", "json.decoder", "tokenize"],
        "test": ["csv", "zipfile", "random", "dis", "functools", "queue", "string"],
    }
    sizes = {"validation": 24, "test": 48}  # batches

    def __init__(self, arguments):
        self.config = Gpt2Config(128, self.length + 16, 128, n_layer=3, n_head=4)
        self.steps = arguments.steps or 80
        texts = {part: "\n".join(map(source, names)) for part, names in self.modules.items()}
        self.data = {part: to_bytes(text) for part, text in texts.items()}
        self.tokens = sorted(np.bincount(self.data["train"]).argsort()[-32:].tolist())  # the most frequent bytes
        self.about = {part: len(data) for part, data in self.data.items()}
        for part, count in self.sizes.items():
            self.about[part] = count * self.batch * self.length
        self.about.update(steps=self.steps, python=platform.python_version())
        self.base = os.path.join(arguments.output, f"base_{arguments.base_steps}.ckpt")
        if not os.path.exists(self.base):
            self.pretrain(arguments.base_steps)

    def pretrain(self, steps):
        """Train the base on docstrings, from nothing."""
        ms.set_seed(0)
        model, rng = Gpt2ForCausalLM(self.config), np.random.default_rng(0)
        text = to_bytes(" ".join(example.text for example in read_docstrings(10**6)))
        optimizer = AdamW(model.trainable_params(), (2e-3 * warm_up_and_decay(steps)).tolist())
        step = nn.TrainOneStepCell(ByteLoss(model), optimizer).set_train()
        for number in range(steps):
            loss = step(Tensor(self.pieces(text, rng, 16)))
            if number % 100 == 99:
                print(f"base: step {number + 1} of {steps}, loss {float(loss.asnumpy()):.3f}", flush=True)
        os.makedirs(os.path.dirname(self.base), exist_ok=True)
        ms.save_checkpoint(model, self.base)

    def pieces(self, text, rng, count):
        """A batch of random pieces of a text."""
        starts = rng.integers(0, len(text) - self.length - 1, count)
        return np.stack([text[start : start + self.length + 1] for start in starts])

    def network(self):
        """The base."""
        model = Gpt2ForCausalLM(self.config)
        ms.load_checkpoint(self.base, model)
        return model

    def loss(self, model):
        """The loss network of a model."""
        return ByteLoss(model)

    def batches(self, rng):
        """The batches of a run: tuples of arrays."""
        for _ in range(self.steps):
            yield (self.pieces(self.data["train"], rng, self.batch),)

    def score(self, model, loss, part):
        """Mean cross entropy of pieces that lie evenly in the text."""
        text, count = self.data[part], self.sizes[part] * self.batch
        starts = np.linspace(0, len(text) - self.length - 1, count).astype(int)
        pieces = np.stack([text[start : start + self.length + 1] for start in starts])
        loss.set_train(False)
        losses = [float(loss(Tensor(batch)).asnumpy()) for batch in pieces.reshape(-1, self.batch, self.length + 1)]
        return {"loss": round(float(np.mean(losses)), 4)}


def source(module):
    """The source of a module of Python's library."""
    return inspect.getsource(importlib.import_module(module))


def to_bytes(text):
    """ASCII bytes; what is not ASCII is left out."""
    return np.frombuffer(text.encode("ascii", "ignore"), np.uint8).astype(np.int32)


TASKS = {FIRST: Code, SECOND: Classes}


class Rate(LearningRateSchedule):
    """A peak, which may be set for each run, times factors for the steps."""

    def __init__(self, factors, peak=0.0):
        super().__init__()
        self.peak = Parameter(Tensor(peak, ms.float32), name="peak", requires_grad=False)
        self.factors = Tensor(factors, ms.float32)

    def construct(self, step):
        return self.peak * self.factors[step].reshape(())


class Trainer:
    """A method on a task, compiled once for all its runs."""

    def __init__(self, task, name, seeds):
        self.task, self.name, self.method = task, name, methods_for(task.places)[name]
        self.starts = {}  # made before anything is compiled: a new adapter drops all compiled graphs
        for seed in range(1, seeds + 1):
            ms.set_seed(seed)
            fresh, _ = self.build()
            self.starts[seed] = [param.asnumpy().copy() for param in fresh.get_parameters()]
        self.model, config = self.build()
        factors = warm_up_and_decay(task.steps)
        self.rate = Rate(factors)
        head_rate = self.rate if name == "head" else Rate(factors, HEAD_RATE)
        groups = by_rate(self.model.trainable_params(), self.rate, head_rate)
        self.loss = task.loss(self.model)
        loss, optimizer = self.loss, AdamW(groups)
        self.cost = summary(self.model, optimizer)
        if isinstance(config, AdaLoraConfig):
            optimizer = AdaLoraOptimizer(optimizer, self.model, config)
            loss = OrthogonalLoss(loss, config.orth_reg_weight)
        self.step = nn.TrainOneStepCell(loss, optimizer)
        model_parameters = {id(param) for param in self.model.get_parameters()}
        self.state = [
            (param, param.asnumpy().copy())
            for param in self.step.get_parameters()
            if id(param) not in model_parameters and param is not self.rate.peak
        ]

    def build(self):
        """A fresh network that trains by this method, and the method's configuration."""
        model, config = self.task.network(), copy.deepcopy(self.method.config)
        if self.name == "head":
            freeze_modules(model, include=["*"])
            freeze_modules(model, exclude=[self.task.head])
        if config is None:
            return model, config
        if isinstance(config, AdaLoraConfig):
            config.total_step = self.task.steps
        if isinstance(config, TrainableTokensConfig):
            config.token_indices = self.task.tokens
        return get_peft_model(model, config), config

    def run(self, rate, seed):
        """Train from the start that the seed gives; returns the record of the run."""
        for param, value in zip(self.model.get_parameters(), self.starts[seed]):
            param.set_data(Tensor(value))
        for param, value in self.state:
            param.set_data(Tensor(value))
        self.rate.peak.set_data(Tensor(rate, ms.float32))
        self.step.set_train()
        losses, seconds = [], []
        for batch in self.task.batches(np.random.default_rng(seed)):
            started = time.process_time()
            losses.append(float(self.step(*map(Tensor, batch)).asnumpy()))
            seconds.append(time.process_time() - started)
        groups = np.array_split(losses, min(12, len(losses)))
        return {
            "task": self.task.name,
            "method": self.name,
            "rate": rate,
            "seed": seed,
            "validation": self.task.score(self.model, self.loss, "validation"),
            "test": self.task.score(self.model, self.loss, "test"),
            "trained": self.cost.trainable,
            "bytes": self.cost.weight_bytes + self.cost.gradient_bytes + self.cost.optimizer_bytes,
            "step_ms": round(1000 * float(np.median(seconds)), 1),
            "curve": [round(float(group.mean()), 3) for group in groups],
        }


def compare(task, names, seeds, results):
    """Make the runs of a task that the results lack: the first seed with several rates, the others with the best."""
    print(task.name, task.about)
    for name in sorted(names, key=lambda name: name != "head"):  # with which the others are compared
        start = methods_for(task.places)[name].learning_rate
        trainer = None
        while True:
            rate, seed = results.next_rate(task.name, name, start), 1
            if rate is None:
                best = results.best(task.name, name)
                lacking = set(range(1, seeds + 1)) - {record["seed"] for record in best}
                if not lacking:
                    break
                rate, seed = best[0]["rate"], min(lacking)
            trainer = trainer or Trainer(task, name, seeds)
            record = trainer.run(rate, seed)
            results.add(record)
            print(*(record[key] for key in ("task", "method", "rate", "seed", "validation", "step_ms")), flush=True)


def main(argv=None):
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="default: every one"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of a run (default: depends on the task)")
    parser.add_argument(
        "--base-steps",
        type=int,
        default=1500,
        help="steps that the base of the first task learns (default: %(default)s)",
    )
    parser.add_argument("--results", default=RESULTS, help="file of results (default: docs/choosing.jsonl)")
    parser.add_argument("--output", default="output/choosing", help="folder of the base (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="run nothing; write tables and picture of the results")
    arguments = parser.parse_args(argv)
    if arguments.write:
        write(Results(arguments.results))
        return 0
    ms.set_context(mode=ms.GRAPH_MODE)
    results = Results(arguments.results)
    for name in arguments.tasks:
        compare(TASKS[name](arguments), arguments.methods, arguments.seeds, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

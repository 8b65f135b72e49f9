"""Files: their sizes, times to save and load them, and to merge an adapter into its base.

The bases have the shapes of a LLaMA, in float16, and zeros for weights, which take no room on the disk. `of a copy` is
the time of a merge in units of copying the base as it is.
"""

import json
import math
import os
import pathlib
import shutil
import statistics
import struct
import tempfile
import time

import mindspore as ms
import numpy as np
from models.bert import BertClassifier
from safetensors.numpy import load_file

from benchmarks.measure import in_child, peak_memory, report
from benchmarks.networks import bert
from mindpet.files.adapter import save_adapter
from mindpet.files.merge import merge
from mindpet.files.passport import WEIGHTS_NAME
from mindpet.graph import load_delta
from mindpet.graph.ckpt_util import saved_parameters
from mindpet.peft import LoraConfig, get_peft_model, set_peft_model_state_dict

SQUARE = ("q_proj", "k_proj", "v_proj", "o_proj")
WIDE = ("gate_proj", "up_proj", "down_proj")
RANK = 8


def shapes(layers: int, width: int) -> dict[str, tuple[int, int]]:
    """The weights of the linear layers, by path."""
    inner = width * 43 // 16
    wide = zip(WIDE, ((inner, width), (inner, width), (width, inner)))
    one = {
        **{f"self_attn.{name}": (width, width) for name in SQUARE},
        **{f"mlp.{name}": shape for name, shape in wide},
    }
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in one.items()}


def write_base(path: pathlib.Path, layers: int, width: int) -> int:
    """Write a base; returns its bytes."""
    header, end = {}, 0
    for name, shape in shapes(layers, width).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


def write_adapter(folder: pathlib.Path, layers: int, width: int) -> None:
    """Write LoRA for all layers of the base."""
    rng, tensors = np.random.default_rng(0), {}
    for name, (outputs, inputs) in shapes(layers, width).items():
        for factor, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = rng.normal(size=shape).astype(np.float32)
    save_adapter(folder, LoraConfig(r=RANK, target_modules=[*SQUARE, *WIDE]), tensors, {})


def merging(folder: pathlib.Path) -> tuple[float, int]:
    """Seconds of a merge, and how far it raised the most memory that its process had."""
    before, started = peak_memory(), time.perf_counter()
    merge(folder / "base.safetensors", folder / "adapter", folder / "merged.safetensors", progressbar=False)
    seconds = time.perf_counter() - started
    (folder / "merged.safetensors").unlink()
    return seconds, peak_memory() - before


def copying(folder: pathlib.Path) -> float:
    """Seconds of a copy of the base, written as safely."""
    started = time.perf_counter()
    with open(folder / "base.safetensors", "rb") as source, open(folder / "copy.safetensors", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)
        target.flush()
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    (folder / "copy.safetensors").unlink()
    return seconds


def merges(short: bool, turns: int) -> None:
    """Print the table of merges."""
    rows = []
    for layers, width, repeats in ((2, 64, 1),) if short else ((8, 2048, turns), (25, 4096, 1)):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            size = write_base(folder / "base.safetensors", layers, width)
            write_adapter(folder / "adapter", layers, width)
            done = [(*in_child(merging, folder), in_child(copying, folder)) for _ in range(repeats)]
        rows.append(
            {
                "base GB": size / 1e9,
                "merge s": statistics.median(seconds for seconds, _, _ in done),
                "of a copy": statistics.median(seconds / copy for seconds, _, copy in done),
                "memory GB": max(memory for _, memory, _ in done) / 1e9,
            }
        )
    report("merge", rows)


def checkpoints(short: bool, turns: int) -> None:
    """Print what the whole of a BERT with LoRA takes as a file, and what was trained."""
    config = bert(2, 64) if short else bert(12, 768)
    model = get_peft_model(BertClassifier(config), LoraConfig(r=RANK, target_modules=["query", "value"]))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        whole, delta, adapter = (os.path.join(name, file) for file in ("whole.ckpt", "delta.ckpt", "adapter"))
        ways = {
            whole: (lambda: ms.save_checkpoint(model, whole), lambda: ms.load_checkpoint(whole, model)),
            delta: (
                lambda: ms.save_checkpoint(
                    [{"name": key, "data": p} for key, p in saved_parameters(model).items()], delta
                ),
                lambda: load_delta(model, delta),
            ),
            adapter: (
                lambda: model.save_pretrained(adapter),
                lambda: set_peft_model_state_dict(model, load_file(os.path.join(adapter, WEIGHTS_NAME))),
            ),
        }
        times = {path: [(_seconds(save), _seconds(load)) for _ in range(turns)] for path, (save, load) in ways.items()}
        for path, done in times.items():
            files = [path] if os.path.isfile(path) else [entry.path for entry in os.scandir(path)]
            rows.append(
                {
                    "file": os.path.basename(path),
                    "MB": sum(os.path.getsize(file) for file in files) / 1e6,
                    "save s": statistics.median(save for save, _ in done),
                    "load s": statistics.median(load for _, load in done),
                }
            )
    report("checkpoints", rows)


def _seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def run(short: bool = False, turns: int = 5) -> None:
    """Print both tables."""
    checkpoints(short, 1 if short else turns)
    merges(short, turns)

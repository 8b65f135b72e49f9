#!/usr/bin/env python3
"""Shard plans of LLaMA 7B: LoRA next to full fine-tuning, on 8 to 8192 ranks, without an accelerator.

One of them in full: `mindpet plan examples/parallel/plan_llama.py:build --device-num 8`.
"""

import argparse
import functools
import pathlib
import sys
import time

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.parallel.auto_parallel import AutoParallel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `models`
from models.llama import CausalLoss, LlamaConfig  # noqa: E402

from mindpet.graph import freeze_delta  # noqa: E402
from mindpet.parallel import dry_run  # noqa: E402

MODEL_PARALLEL = 8
HALF = {"param_dtype": ms.float16, "compute_dtype": ms.float16}


def make(
    data_parallel=1, model_parallel=MODEL_PARALLEL, lora_rank=8, batch=None, seq_length=2048, micro_batches=1, **config
):
    """A loss network, frozen but for LoRA if there is any, and token ids: one sample a slice of the batch."""
    config = LlamaConfig(data_parallel=data_parallel, model_parallel=model_parallel, lora_rank=lora_rank, **config)
    network = CausalLoss(config)
    if lora_rank:
        freeze_delta(network, "lora")
    ids = Tensor(np.zeros(((batch or data_parallel) * micro_batches, seq_length)), ms.int32)
    return (nn.PipelineCell(network, micro_batches) if config.pipeline_stages > 1 else network), (ids, ids)


def build(**config):
    """The same in AutoParallel, which has the settings of the run; every rank gets the whole batch."""
    network, inputs = make(**config)
    parallel = AutoParallel(network, parallel_mode="semi_auto")
    parallel.dataset_strategy("full_batch")
    parallel.pipeline(config.get("pipeline_stages", 1))
    return parallel, inputs


def case(ranks, lora_rank=8):
    """A `build` of the 7B shape in half precision for a number of ranks."""
    return functools.partial(build, data_parallel=ranks // MODEL_PARALLEL, lora_rank=lora_rank, **HALF)


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024, 8192], help="default: %(default)s")
    arguments = parser.parse_args(argv)
    print(f"LLaMA 7B in float16, tensor parallel {MODEL_PARALLEL}, one sample of 2048 tokens a slice; MB on one rank")
    print("| ranks | fine-tuning | weights | gradients | optimizer | communicated a step | seconds to compile |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for ranks in arguments.ranks:
        for name, lora_rank in (("LoRA, rank 8", 8), ("full", 0)):
            start = time.perf_counter()
            report = dry_run(case(ranks, lora_rank), ranks)
            seconds = time.perf_counter() - start
            sizes = (report.weight_bytes, report.gradient_bytes, report.optimizer_bytes, report.communication_bytes)
            columns = [f"{size / 1e6:,.0f}" for size in sizes]
            print(f"| {ranks} | {name} | {' | '.join(columns)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()

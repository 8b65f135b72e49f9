"""The methods for linear layers: by configuration, by hand, and the multiply-adds that they cannot do without."""

from typing import Any, Callable, NamedTuple

import mindspore as ms
from mindspore import nn

from mindpet.delta import (
    AdaLoRADense,
    AdapterDense,
    CompacterDense,
    HiraDense,
    IA3Dense,
    LoHaDense,
    LoKrDense,
    LoRADense,
    LowRankAdapterDense,
    MissDense,
    OFTDense,
    VeraDense,
)
from mindpet.delta.lokr import split
from mindpet.peft import (
    AdaLoraConfig,
    BottleneckConfig,
    CompacterConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LowRankAdapterConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
)

COMPUTE = {"compute_dtype": ms.float32}


class Method(NamedTuple):
    """A method for linear layers.

    Attributes:
        config: target modules -> its configuration.
        dense: its hand-made layer, called with the inputs, the outputs and `compute_dtype`.
        work: rows, inputs and outputs -> multiply-adds of a training step that the formula cannot do without, beyond
            those of the frozen layer (2 rows inputs outputs: the output and the gradient of the input).
    """

    config: Callable[[Any], PeftConfig]
    dense: Callable[..., nn.Cell]
    work: Callable[[int, int, int], float]


def _low_rank(rank):
    # x A and (x A) B, and for each the gradients of both factors
    return lambda rows, inputs, outputs: 3 * rows * rank * (inputs + outputs)


def _full_rank(rank):
    # x times a matrix of full rank and both gradients, and the matrix from its factors
    return lambda rows, inputs, outputs: 3 * (rows + rank) * inputs * outputs


def _bottleneck(width):
    # of an adapter behind the layer, which has as many inputs as the layer outputs
    return lambda rows, inputs, outputs: 6 * rows * width * outputs


def _kronecker(rank):
    # a row is a matrix: times the larger factor, through its rank, and the smaller one
    def work(rows, inputs, outputs):
        (few_out, many_out), (few_in, many_in) = split(outputs, -1), split(inputs, -1)
        return 3 * rows * (few_in * rank * (many_in + many_out) + few_in * few_out * many_out)

    return work


METHODS = {
    "lora": Method(
        lambda targets: LoraConfig(r=8, lora_alpha=16, target_modules=targets),
        lambda *shape, **dense: LoRADense(*shape, lora_rank=8, lora_alpha=16, **dense),
        _low_rank(8),
    ),
    "adalora": Method(
        lambda targets: AdaLoraConfig(init_r=8, target_r=4, lora_alpha=16, total_step=100, target_modules=targets),
        lambda *shape, **dense: AdaLoRADense(*shape, init_r=8, lora_alpha=16, **dense),
        _low_rank(8),
    ),
    "vera": Method(
        lambda targets: VeraConfig(r=64, target_modules=targets),
        lambda *shape, **dense: VeraDense(*shape, vera_rank=64, **dense),
        lambda rows, inputs, outputs: 2 * rows * 64 * (inputs + outputs),  # A and B do not train
    ),
    "ia3": Method(
        lambda targets: IA3Config(target_modules=targets, feedforward_modules=[]),
        lambda *shape, **dense: IA3Dense(*shape, **dense),
        lambda rows, inputs, outputs: 3 * rows * outputs,
    ),
    "miss": Method(
        lambda targets: MissConfig(r=8, target_modules=targets),
        lambda *shape, **dense: MissDense(*shape, miss_rank=8, **dense),
        lambda rows, inputs, outputs: 3 * rows * 8 * outputs,
    ),
    "oft": Method(
        lambda targets: OFTConfig(oft_block_size=32, target_modules=targets),
        lambda *shape, **dense: OFTDense(*shape, oft_block_size=32, **dense),
        lambda rows, inputs, outputs: 3 * rows * 32 * inputs,
    ),
    "lokr": Method(
        lambda targets: LoKrConfig(r=8, alpha=16, target_modules=targets),
        lambda *shape, **dense: LoKrDense(*shape, lokr_rank=8, lokr_alpha=16, **dense),
        _kronecker(8),
    ),
    "loha": Method(
        lambda targets: LoHaConfig(r=8, alpha=16, target_modules=targets),
        lambda *shape, **dense: LoHaDense(*shape, loha_rank=8, loha_alpha=16, **dense),
        _full_rank(16),
    ),
    "hira": Method(
        lambda targets: HiraConfig(r=8, target_modules=targets),
        lambda *shape, **dense: HiraDense(*shape, hira_rank=8, **dense),
        _full_rank(8),
    ),
    "adapter": Method(
        lambda targets: BottleneckConfig(bottleneck_size=64, target_modules=targets),
        lambda *shape, **dense: AdapterDense(*shape, bottleneck_size=64, **dense),
        _bottleneck(64),
    ),
    "low_rank_adapter": Method(
        lambda targets: LowRankAdapterConfig(reduction_factor=16, target_modules=targets),
        lambda *shape, **dense: LowRankAdapterDense(*shape, reduction_factor=16, **dense),
        # each of the two products goes through rank 1
        lambda rows, inputs, outputs: 6 * rows * (outputs + outputs // 16),
    ),
    "compacter": Method(
        lambda targets: CompacterConfig(reduction_factor=16, phm_dim=4, target_modules=targets),
        lambda *shape, **dense: CompacterDense(*shape, reduction_factor=16, phm_dim=4, **dense),
        lambda rows, inputs, outputs: 6 * rows * outputs * outputs // 16,
    ),
}

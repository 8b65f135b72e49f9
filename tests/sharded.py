"""Networks for dry runs, and what their plans must be, worked out by hand."""

import functools
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet.delta import (
    AdapterDense,
    AdapterLayer,
    IA3Dense,
    LoRADense,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    VeraDense,
)
from mindpet.graph import freeze_delta
from mindpet.parallel import shard_like

# n rows, i inputs, o outputs, r rank or bottleneck, f and k the axes of a factor (of as many features as o or r).
SIZES = {"n": 128, "i": 64, "o": 128, "r": 4, "k": 2}
FLOAT = {"compute_dtype": ms.float32}
LOW_RANK = {"reduction_factor": 32, "low_rank_size": 2, **FLOAT}
CELLS = {
    "lora": lambda **kw: LoRADense(64, 128, 4, 8, **{"activation": "relu", **FLOAT, **kw}),
    "adapter": lambda **kw: AdapterDense(64, 128, bottleneck_size=4, **{"activation": "gelu", **FLOAT, **kw}),
    "adapter_parallel": lambda **kw: AdapterDense(
        64, 128, bottleneck_size=4, form="parallel", scale="learned", **{"activation": "gelu", **FLOAT, **kw}
    ),
    "low_rank_adapter": lambda **kw: LowRankAdapterDense(64, 128, **{"activation": "silu", **LOW_RANK, **kw}),
    "adapter_layer": lambda **kw: AdapterLayer(128, 4, **{**FLOAT, **kw}),
    "low_rank_adapter_layer": lambda **kw: LowRankAdapterLayer(128, **{**LOW_RANK, **kw}),
    "ia3": lambda **kw: IA3Dense(64, 128, **{"activation": "relu", **FLOAT, **kw}),
    "ia3_feedforward": lambda **kw: IA3Dense(64, 128, True, **{"activation": "relu", **FLOAT, **kw}),
    "vera": lambda **kw: VeraDense(64, 128, 4, **{"activation": "relu", **FLOAT, **kw}),
}
DENSE = ("lora", "ia3", "ia3_feedforward", "vera", "adapter", "adapter_parallel", "low_rank_adapter")
# Of what is no method of its own, the method.
MODES = {
    "ia3_feedforward": "ia3",
    "adapter_parallel": "adapter",
    "adapter_layer": "adapter",
    "low_rank_adapter_layer": "low_rank_adapter",
}
# The cut axes of every parameter, and the size of what is not a size of SIZES.
BASE = {"weight": "oi", "bias": "o"}
ADAPTER = {
    "down_sampler.weight": "ro",
    "down_sampler.bias": "r",
    "up_sampler.weight": "or",
    "up_sampler.bias": "o",
}
LOW_RANK_ADAPTER = {
    "down_sampler.mindpet_delta_low_rank_adapter_weight_left": "fk",
    "down_sampler.mindpet_delta_low_rank_adapter_weight_right": "kr",
    "down_sampler.bias": "r",
    "up_sampler.mindpet_delta_low_rank_adapter_weight_left": "rk",
    "up_sampler.mindpet_delta_low_rank_adapter_weight_right": "kf",
    "up_sampler.bias": "o",
}
PARAMETERS = {
    "lora": {**BASE, "mindpet_delta_lora_a": "ri", "mindpet_delta_lora_b": "or"},
    "ia3": {**BASE, "mindpet_delta_ia3": "of"},
    "ia3_feedforward": {**BASE, "mindpet_delta_ia3": "fi"},
    "vera": {
        **BASE,
        "mindpet_vera_a": "rf",
        "mindpet_vera_b": "fr",
        "mindpet_delta_vera_lambda_b": "o",
        "mindpet_delta_vera_lambda_d": "r",
    },
    "adapter": {**BASE, **ADAPTER},
    "adapter_parallel": {**BASE, **ADAPTER, "down_sampler.weight": "ri", "mindpet_delta_adapter_scale": "f"},
    "low_rank_adapter": {**BASE, **LOW_RANK_ADAPTER},
    "adapter_layer": ADAPTER,
    "low_rank_adapter_layer": LOW_RANK_ADAPTER,
}


def splits(ranks):
    """Name -> counts of the axes that are cut."""
    part = math.isqrt(ranks) if math.isqrt(ranks) ** 2 == ranks else 2
    return {
        "data": {"n": ranks},
        "column": {"o": ranks},
        "row": {"i": ranks},
        "data and column": {"n": part, "o": ranks // part},
        "data and row": {"n": part, "i": ranks // part},
    }


def strategy(n=1, i=1, o=1):
    """The strategy of the base matmul."""
    return ((n, i), (o, i))


class Network(nn.Cell):
    """A Cell and a sum, the loss."""

    def __init__(self, cell, n=1, i=1, o=1, leading=()):
        super().__init__()
        self.cell = cell
        self.sum = ops.ReduceSum().shard(((n, *leading, o),))

    def construct(self, x):
        return self.sum(self.cell(x))


def build(name, counts, three_axes=False, **arguments):
    """A network whose Cell is cut by `shard_like`, and its input."""
    cell = shard_like(CELLS[name](**arguments), strategy(**counts))
    network = Network(cell, **counts, leading=(1,) if three_axes else ())
    freeze_delta(network, MODES.get(name, name))
    features = SIZES["i"] if name in DENSE else SIZES["o"]
    shape = (SIZES["n"], 2, features) if three_axes else (SIZES["n"], features)
    return network, Tensor(np.ones(shape, np.float32))


def build_with(name, strategies, **arguments):
    """A network whose Cell has the given strategies, one for each slot, and its input."""
    network = Network(CELLS[name](**arguments).shard(**strategies))
    freeze_delta(network, MODES.get(name, name))
    return network, Tensor(np.ones((SIZES["n"], SIZES["i"] if name in DENSE else SIZES["o"]), np.float32))


def case(*arguments, **keywords):
    """A `build` that can be pickled."""
    return functools.partial(build, *arguments, **keywords)


def cut(shape, counts):
    """The slice of rank 0 of a tensor, each axis cut by NumPy into so many parts."""
    part = np.empty(shape, bool)
    for axis, count in enumerate(counts):
        part = np.split(part, count, axis)[0]
    return part.shape


def key_of(name, parameter):
    """The key in PARAMETERS of a parameter in a report."""
    (key,) = [
        key for key in PARAMETERS[name] if parameter == f"cell.{key}" or (key not in BASE and parameter.endswith(key))
    ]
    return key


def expected_slices(name, report, counts):
    """Parameter -> slice, of the weights in a report."""
    weights = [plan for plan in report.parameters if plan.role != "optimizer"]
    axes = {plan.name: PARAMETERS[name][key_of(name, plan.name)] for plan in weights}
    return {plan.name: cut(plan.shape, [counts.get(axis, 1) for axis in axes[plan.name]]) for plan in weights}


def expected_collectives(name, report, counts, ranks, rows=1):
    """What must be communicated: sorted (phase, kind, size of the group, bytes); `rows` is a factor of the rows.

    A product over a cut axis is summed up. In training so is the gradient of a sum that the delta made, and the
    gradient of every parameter that several ranks hold.
    """
    n, i, o = (counts.get(axis, 1) for axis in "nio")
    rows = rows * SIZES["n"] // n
    delta_sum = {"lora": i, "vera": i, "adapter_parallel": i, "ia3": 1, "ia3_feedforward": 1}.get(name, o)
    inner = ("AllReduce", delta_sum, 4 * rows * SIZES["r"])
    found = [("forward", "AllReduce", i, 4 * rows * SIZES["o"] // o)] if name in DENSE and i > 1 else []
    found += [("forward", *inner)] if delta_sum > 1 else []
    found += [("forward", "AllReduce", n * o, 4)] if n * o > 1 else []
    if report.train:
        if name == "ia3_feedforward" and i > 1:  # what trains is in front of the base's sum
            found.append(("backward", "AllReduce", i, 4 * rows * SIZES["o"] // o))
        if name != "vera" and delta_sum > 1:  # there nothing in front of the delta's sum trains
            found.append(("backward", *inner))
        for plan in report.parameters:
            holders = ranks * math.prod(plan.slice) // math.prod(plan.shape)
            if plan.role == "trainable" and holders > 1:
                found.append(("backward", "AllReduce", holders, 4 * math.prod(plan.slice)))
    return sorted(found)


def collectives(report):
    """What is communicated, as `expected_collectives` tells it."""
    return sorted((plan.phase, plan.kind, plan.group_size, plan.bytes) for plan in report.collectives)

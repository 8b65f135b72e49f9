"""Networks for dry runs, and what their plans must be, worked out by hand."""

import functools
import math

import mindspore as ms
import numpy as np
from mindspore import Layout, Tensor, nn, ops

from mindpet.delta import (
    AdaLoRADense,
    AdapterDense,
    AdapterLayer,
    CompacterDense,
    CompacterLayer,
    HiraDense,
    IA3Dense,
    LoHaDense,
    LoKrDense,
    LoRADense,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    MissDense,
    OFTDense,
    TrainableTokensEmbedding,
    VeraDense,
)
from mindpet.graph import freeze_delta
from mindpet.parallel import shard_like

MINI = {"init_weights": "mini"}
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
    "hira": lambda **kw: HiraDense(64, 128, 4, **{"activation": "relu", **FLOAT, **kw}),
    "miss": lambda **kw: MissDense(64, 128, 4, **{"activation": "relu", **FLOAT, **kw}),
    "miss_mini": lambda **kw: MissDense(64, 128, 4, mini_r=2, **{**MINI, "activation": "relu", **FLOAT, **kw}),
    "adalora": lambda **kw: AdaLoRADense(64, 128, 4, 8, **{"activation": "relu", **FLOAT, **kw}),
    "oft": lambda **kw: OFTDense(64, 128, 2, **{"activation": "relu", **FLOAT, **kw}),
    "loha": lambda **kw: LoHaDense(64, 128, 2, 4, **{"activation": "relu", **FLOAT, **kw}),
    "lokr": lambda **kw: LoKrDense(64, 128, 2, 4, **{"activation": "relu", **FLOAT, **kw}),
    "trainable_tokens": lambda **kw: TrainableTokensEmbedding(64, 128, [7, 1, 2, 9], **kw),
    "compacter": lambda **kw: CompacterDense(64, 128, phm_dim=2, **{"activation": "silu", **FLOAT, **kw}),
    "compacter_layer": lambda **kw: CompacterLayer(128, phm_dim=2, **{**FLOAT, **kw}),
}
DENSE = tuple(name for name in CELLS if not name.endswith(("_layer", "_tokens")))
MOST = {"oft": 32, "miss": 16, "miss_mini": 16}  # slices of the inputs: no block, and no shard of four, is cut
# Of what is no method of its own, the method.
MODES = {
    "ia3_feedforward": "ia3",
    "miss_mini": "miss",
    "adapter_parallel": "adapter",
    "adapter_layer": "adapter",
    "compacter_layer": "compacter",
    "low_rank_adapter_layer": "low_rank_adapter",
}
# Whose delta sums over the inputs; those of adapters do over the outputs.
SUM_OF_INPUTS = (
    "lora",
    "adalora",
    "vera",
    "loha",
    "hira",
    "miss",
    "miss_mini",
    "adapter_parallel",
)
NO_SUM = ("ia3", "ia3_feedforward", "oft", "lokr", "trainable_tokens")
STILL = ("vera", "miss", "miss_mini")  # where nothing in front of the delta's sum trains
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
COMPACTER = {
    "compacter_rule": "fkl",
    "down.left": "fkl",
    "down.right": "fkl",
    "down.bias": "r",
    "up.left": "fkl",
    "up.right": "fkl",
    "up.bias": "o",
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
    "hira": {**BASE, "mindpet_delta_hira_a": "ri", "mindpet_delta_hira_b": "or"},
    "miss": {**BASE, "mindpet_delta_miss": "ro"},
    "miss_mini": {**BASE, "mindpet_delta_miss": "rk"},
    "adalora": {
        **BASE,
        "mindpet_delta_adalora_a": "ri",
        "mindpet_delta_adalora_b": "or",
        "mindpet_delta_adalora_e": "rf",
    },
    "oft": {**BASE, "mindpet_delta_oft": "if"},
    "loha": {
        **BASE,
        "mindpet_delta_loha_w1_a": "fr",
        "mindpet_delta_loha_w1_b": "rf",
        "mindpet_delta_loha_w2_a": "fr",
        "mindpet_delta_loha_w2_b": "rf",
    },
    "lokr": {
        **BASE,
        "mindpet_delta_lokr_w1": "fk",
        "mindpet_delta_lokr_w2_a": "fr",
        "mindpet_delta_lokr_w2_b": "rf",
    },
    "adapter": {**BASE, **ADAPTER},
    "adapter_parallel": {**BASE, **ADAPTER, "down_sampler.weight": "ri", "mindpet_delta_adapter_scale": "f"},
    "low_rank_adapter": {**BASE, **LOW_RANK_ADAPTER},
    "trainable_tokens": {
        "embedding_table": "fo",
        "mindpet_delta_trainable_tokens": "rf",
        "mindpet_trainable_tokens_slots": "f",
    },
    "adapter_layer": ADAPTER,
    "compacter": {**BASE, **COMPACTER},
    "compacter_layer": COMPACTER,
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


def is_refused(name, counts):
    """Whether MindSpore refuses a split by tuples: HiRA's product of elements lays out the weight in another way than a
    matmul does that is cut along more axes than one."""
    return name == "hira" and sum(count > 1 for count in counts.values()) > 1


# Layouts for 8 ranks, and the counts that they mean. Rows and outputs come first, as MindSpore arranges tuples.
MESH = Layout((2, 2, 2), ("dp", "cp", "mp"))
LAYOUTS = {
    "data and column": ((MESH(("dp", "cp"), "None"), MESH("mp", "None")), {"n": 4, "o": 2}),
    "data and row": ((MESH("dp", ("cp", "mp")), MESH("None", ("cp", "mp"))), {"n": 2, "i": 4}),
}


def build(name, counts, three_axes=False, layout=None, **arguments):
    """A network whose Cell is cut by `shard_like`, as the counts say or by the Layout of a name; and its input."""
    in_strategy, counts = LAYOUTS[layout] if layout else (strategy(**counts), counts)
    cell = shard_like(CELLS[name](**arguments), in_strategy)
    network = Network(cell, **counts, leading=(1,) if three_axes else ())
    freeze_delta(network, MODES.get(name, name))
    return network, example(name, (SIZES["n"], 2) if three_axes else (SIZES["n"],))


def example(name, shape):
    """An input of a Cell: ids, or features."""
    if name == "trainable_tokens":
        return Tensor(np.ones(shape, np.int32))
    return Tensor(np.ones((*shape, SIZES["i"] if name in DENSE else SIZES["o"]), np.float32))


def build_with(name, strategies, **arguments):
    """A network whose Cell has the given strategies, one for each slot, and its input."""
    network = Network(CELLS[name](**arguments).shard(**strategies))
    freeze_delta(network, MODES.get(name, name))
    return network, example(name, (SIZES["n"],))


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
    delta_sum = {**dict.fromkeys(SUM_OF_INPUTS, i), **dict.fromkeys(NO_SUM, 1)}.get(name, o)
    # HiRA's is of the outputs, and the others' of the rank or bottleneck.
    inner = ("AllReduce", delta_sum, 4 * rows * (SIZES["o"] // o if name == "hira" else SIZES["r"]))
    found = [("forward", "AllReduce", i, 4 * rows * SIZES["o"] // o)] if name in DENSE and i > 1 else []
    found += [("forward", *inner)] if delta_sum > 1 else []
    found += [("forward", "AllReduce", n * o, 4)] if n * o > 1 else []
    if report.train:
        if name in ("ia3_feedforward", "oft") and i > 1:  # what trains is in front of the base's sum
            found.append(("backward", "AllReduce", i, 4 * rows * SIZES["o"] // o))
        if name not in STILL and delta_sum > 1:
            found.append(("backward", *inner))
        for plan in report.parameters:
            holders = ranks * math.prod(plan.slice) // math.prod(plan.shape)
            if plan.role == "trainable" and holders > 1:
                found.append(("backward", "AllReduce", holders, 4 * math.prod(plan.slice)))
    return sorted(found)


def collectives(report):
    """What is communicated, as `expected_collectives` tells it."""
    return sorted((plan.phase, plan.kind, plan.group_size, plan.bytes) for plan in report.collectives)

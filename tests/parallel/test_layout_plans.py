"""Cells that are cut by Layouts, in MindSpore's parallel front end: the plans are those of the tuples they mean."""

import functools

import numpy as np
from mindspore import Layout, Tensor, nn, ops
from sharded import CELLS, LAYOUTS, case
from test_plans import check

from mindpet.errors import ShardError
from mindpet.parallel import dry_run_many
from mindpet.peft import HiraConfig, LoraConfig, get_peft_model

RANKS = 8
MESH = Layout((4, 2), ("mp", "dp"))  # not as MindSpore arranges tuples
INTERLEAVED = Layout((2, 4, 2), ("dp", "mp", "interleaved_parallel"))
BY_ROWS = ("lora", "hira", "miss", "oft", "adapter", "adapter_parallel")


def test_every_cell_by_layouts():
    cases = [("data and column", name) for name in CELLS if name != "trainable_tokens"]  # whose Gather takes none
    cases += [("data and row", name) for name in BY_ROWS]
    reports = dry_run_many([case(name, {}, layout=layout) for layout, name in cases], RANKS)
    for (layout, name), report in zip(cases, reports):
        check(name, LAYOUTS[layout][1], report, RANKS, layout=layout)


class Network(nn.Cell):
    """A layer that is cut by Layouts, and a sum."""

    def __init__(self, layout, rows="dp"):
        super().__init__()
        self.fc, self.sum = nn.Dense(64, 128, has_bias=False), ops.ReduceSum()
        self.fc.matmul.shard((layout(rows, "None"), layout("mp", "None")))

    def construct(self, x):
        return self.sum(self.fc(x))


def by_peft(config, *arguments):
    network = Network(*arguments)
    get_peft_model(network, config)
    return network, Tensor(np.ones((128, 64), np.float32))


def test_deltas_of_get_peft_model_follow_layouts():
    lora, hira = LoraConfig(r=4, target_modules=["fc"]), HiraConfig(r=4, target_modules=["fc"])
    cases = [
        (lora, MESH),
        (hira, MESH),
        (lora, INTERLEAVED, ("dp", "interleaved_parallel")),
        (lora, Layout((2, 2), ("dp", "mp"))),
    ]
    *reports, refused = dry_run_many([functools.partial(by_peft, *arguments) for arguments in cases], RANKS)
    for report in reports:
        slices = {plan.name.split("_")[-1]: plan.slice for plan in report.parameters if plan.role == "trainable"}
        assert slices == {"a": (4, 64), "b": (32, 4)}  # of B its outputs, in four
        assert not [plan for plan in report.collectives if "layout in fc" in plan.cause]
        assert all(plan.is_set for plan in report.operators if "mindpet" in plan.cell)
    assert isinstance(refused, ShardError) and (refused.cell, refused.slot) == ("fc", "matmul")
    assert "Layout((2, 2), ('dp', 'mp'))('dp', 'None')" in str(refused)
    assert "value 4 dose not equal to the device number in one stage 8" in refused.reason

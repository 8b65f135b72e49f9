"""Cells that are cut by Layouts, in MindSpore's parallel front end: the plans are those of the tuples they mean."""

from sharded import CELLS, LAYOUTS, case
from test_plans import check

from mindpet.parallel import dry_run_many

RANKS = 8
BY_ROWS = ("lora", "hira", "miss", "oft", "adapter", "adapter_parallel")


def test_every_cell_by_layouts():
    cases = [("data and column", name) for name in CELLS if name != "trainable_tokens"]  # whose Gather takes none
    cases += [("data and row", name) for name in BY_ROWS]
    reports = dry_run_many([case(name, {}, layout=layout) for layout, name in cases], RANKS)
    for (layout, name), report in zip(cases, reports):
        check(name, LAYOUTS[layout][1], report, RANKS, layout=layout)

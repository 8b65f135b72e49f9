"""The report: totals, tables, JSON; and reading MindSpore's graphs."""

import json

import pytest
from sharded import case

from mindpet.parallel import Report, dry_run
from mindpet.parallel.graph_dump import count_runs, parse_layouts, read_header, read_nodes
from mindpet.parallel.report import CollectivePlan, OperatorPlan, ParameterPlan

PARAMETERS = [
    ParameterPlan(f"blocks.{layer}.weight", "frozen", "Float16", (8, 8), (4, 8), (2,), (0, -1), 1, 64)
    for layer in (0, 1)
] + [
    ParameterPlan("delta", "trainable", "Float32", (2, 8), (2, 8), (2,), (-1, -1), 1, 64),
    ParameterPlan("moment1.delta", "optimizer", "Float32", (2, 8), (2, 8), (2,), (-1, -1), 1, 64),
]
REPORT = Report(
    2,
    1,
    True,
    "2.10.0",
    "GPU",
    PARAMETERS,
    [OperatorPlan("blocks.0", "matmul", "MatMul", ((1, 1), (2, 1)), True, 2)],
    [CollectivePlan("AllReduce", "backward", "gradient of delta", "", (0, 1), "Float32", (2, 8), 64, 3)],
)
TEXT = """\
Rank 1 of 2, training step, MindSpore 2.10.0

parameter                   dtype    shape   slice   device matrix  count  bytes
blocks.*.weight  frozen     Float16  (8, 8)  (4, 8)  (2,)               2    128
delta            trainable  Float32  (2, 8)  (2, 8)  (2,)               1     64

cell      slot    operator  strategy               runs a step
blocks.0  matmul  MatMul    ((1, 1), (2, 1))  set            2

phase     collective  cause              ranks  dtype    runs a step  bytes a step
backward  AllReduce   gradient of delta  2      Float32            3           192

weights 192 bytes, gradients 64, optimizer 64, communicated in a step 192"""


def test_text_and_totals():
    assert str(REPORT) == TEXT


def test_a_forward_pass_has_no_gradients():
    assert Report(2, 1, False, "2.10.0", "GPU", PARAMETERS, [], []).gradient_bytes == 0


def test_json_round_trip_and_totals():
    report = dry_run(case("lora", {"n": 2, "o": 4}), 8)
    assert Report.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["totals"] == {
        "weight_bytes": report.weight_bytes,
        "gradient_bytes": report.gradient_bytes,
        "optimizer_bytes": report.optimizer_bytes,
        "communication_bytes": report.communication_bytes,
    }
    # weight 32 x 64, bias 32, A 4 x 64, B 32 x 4; four bytes each
    assert (report.weight_bytes, report.gradient_bytes) == (4 * (2048 + 32 + 256 + 128), 4 * (256 + 128))


@pytest.mark.parametrize(
    "ranks, text",
    [((0, 1), "0:2:1"), (tuple(range(3, 8192, 8)), "3:8188:8"), ((5,), "5:6:1"), ((0, 1, 4), [0, 1, 4]), ((), [])],
)
def test_groups_of_ranks_in_json(ranks, text):
    collective = CollectivePlan("AllReduce", "forward", "", "", ranks, "Float32", (), 4, 1)
    report = Report(2, 0, True, "2.10.0", "GPU", [], [], [collective])
    assert json.loads(report.to_json())["collectives"][0]["ranks"] == text
    assert Report.from_json(report.to_json()) == report


def test_an_unknown_parameter():
    assert REPORT.parameter("delta").role == "trainable"
    with pytest.raises(KeyError):
        REPORT.parameter("nothing")


DUMP = """\
# IR entry: @main_1
# Params:
%para1_x: <Tensor[Float32], (4, 8)> : [4, 8]
%para2_fc.weight: <Ref[Tensor[BFloat16]], (2, 8), ref_key=fc.weight, is_parameter>  :  has_default
%para3_step: <Ref[Tensor[Int32]], (), ref_key=step, is_parameter>  :  has_default

subgraph @main_1() {
  %0(CNode_1) = call @block_2(%para1_x)
      : (<Tensor[Float32], (4, 8)>) -> (<Tensor[Float32], (4, 8)>)
  %1(CNode_2) = call @block_2(%0)
  %2(CNode_3) = %9[@@back_3](%1)
  %3(CNode_4) = %10[@Partial(@back_4)](%2)
  Return(%2)
}

subgraph @block_2(%para9_x) {
  %4(out) = PrimFunc_MatMul(%para9_x, %3, Bool(0)) {instance name: matmul} ATTRIBUTES {in_strategy: ((2, 1), (4, 1))}
      : (<Tensor[Float32], (2, 8)>, <Ref[Tensor[BFloat16]], (2, 8), ref_key=fc.weight>) -> (<Tensor[Float32], (2, 2)>)
      # Fullname with scope: (Default/network-Net/fc-Dense/MatMul-op0)
      # In file a.py:1, 2~3/    x/<~~This line of code can be shared by multiple nodes/
  %5(out) = PrimFunc_GeLU(%4) primitive_attrs: {gen_strategy: ((8, 1))} {in_strategy: ((8, 1))}
}
"""
ATTRIBUTES = (
    'primitive_attrs: {in_strategy: ((2, 1), (4, 1)), mindpet_name: "matmul"} cnode_attrs: {checkpoint: Bool(1)}'
)


def test_reading_a_graph(tmp_path):
    file = tmp_path / "graph.ir"
    file.write_text(DUMP.replace("ATTRIBUTES", ATTRIBUTES), encoding="utf-8")
    assert read_header(file) == ("main_1", {"fc.weight": (2, 8), "step": ()})
    nodes = list(read_nodes(file))
    assert [(node.graph, node.number) for node in nodes] == [
        ("main_1", "0"),
        ("main_1", "1"),
        ("main_1", "2"),
        ("main_1", "3"),
        ("block_2", "4"),
        ("block_2", "5"),
    ]
    assert count_runs(nodes, "main_1") == {"main_1": 1, "block_2": 2, "back_3": 1, "back_4": 1}
    matmul, gelu = nodes[4:]
    assert (matmul.operator, matmul.instance, matmul.operands) == ("MatMul", "matmul", ["3"])
    assert matmul.strategy == matmul.asked_strategy == ((2, 1), (4, 1))
    assert (matmul.attribute("mindpet_name"), matmul.attribute("nothing")) == ("matmul", None)
    assert matmul.largest == ("Float32", (2, 8), 64)
    assert matmul.code == ["a.py:1, 2~3/    x/"]
    assert (gelu.strategy, gelu.asked_strategy) == (((8, 1),), None)


def test_layouts():
    assert parse_layouts("(2, 4), (4)") == ((2, 4), (4,)) and parse_layouts("(2), ()") == ((2,), ())

"""The command line."""

import json
import subprocess
import sys

import pytest

from mindpet.cli import main

NETWORK = """
import mindspore as ms
import numpy as np
from mindspore import nn
from mindpet.delta import LoRADense
from mindpet.graph import freeze_delta
from mindpet.parallel import shard_like

class Network(nn.Cell):
    def __init__(self, strategy):
        super().__init__()
        self.fc = shard_like(LoRADense(8, 8, 2, 4), strategy)

    def construct(self, x):
        return self.fc(x)

def build(strategy=((2, 1), (4, 1))):
    network = Network(strategy)
    freeze_delta(network, "lora")
    return network, ms.Tensor(np.ones((8, 8), np.float32))

def refused():
    return build(((3, 1), (4, 1)))

def broken():
    raise RuntimeError("boom")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    return path


def test_plan(file, tmp_path, capsys):
    assert (
        main(["plan", f"{file}:build", "--device-num", "8", "--rank", "3", "--json", str(tmp_path / "plan.json")]) == 0
    )
    out = capsys.readouterr().out
    assert "Rank 3 of 8, training step" in out and "strategy_lora_b_matmul" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    (b,) = [entry for entry in plan["parameters"] if entry["name"] == "fc.mindpet_delta_lora_b"]
    assert (b["shape"], b["slice"]) == ([8, 2], [2, 2])


def test_a_forward_pass(file, capsys):
    assert main(["plan", f"{file}:build", "--device-num", "8", "--eval"]) == 0
    assert "forward pass" in capsys.readouterr().out


def test_a_refused_plan(file, capsys):
    assert main(["plan", f"{file}:refused", "--device-num", "8"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mindpet: dry_run: the parallel front end refuses 'strategy_org_dense_matmul' of 'fc'")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.py:build", "--device-num", "8"], "'build' must be a function or 'FILE.py:name' of a file"),
        (["{file}", "--device-num", "8"], "'build' must be a function or 'FILE.py:name' of a file"),
        (["{file}:build", "--device-num", "0"], "'device_num' must be 1, 2, 4 or a multiple of 8"),
        (
            ["{file}:build", "--device-num", "3"],
            "'device_num' must be 1, 2, 4 or a multiple of 8 up to 262144, but got 3",
        ),
        (["{file}:build", "--device-num", "1000000000000"], "'device_num' must be 1, 2, 4 or a multiple of 8"),
        (["{file}:build", "--device-num", "8", "--rank", "-1"], "'rank' must be an int from 0 to"),
        (["{file}:build", "--device-num", "8", "--pipeline-stages", "0"], "'pipeline_stages' must be a positive int"),
        (["{file}:build", "--device-num", "8", "--timeout", "nan"], "'timeout' must be a number of seconds above 0"),
        (["{file}:build", "--device-num", "8", "--rank", "8"], "'rank' must be an int from 0 to"),
        (["{file}:nothing", "--device-num", "8"], "has no function 'nothing'"),
        (["{file}:build", "--device-num", "8", "--timeout", "-1"], "'timeout' must be a number of seconds above 0"),
    ],
)
def test_a_wrong_argument_is_one_line(file, arguments, message, capsys):
    assert main(["plan", *(argument.format(file=file) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_error_of_the_build_tells_where(file, capsys):
    assert main(["plan", f"{file}:broken", "--device-num", "8"]) == 2
    assert "RuntimeError: boom" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["plan"], ["plan", "a.py:b"], ["plan", "a.py:b", "--device-num", "x"], ["nix"]]
)
def test_usage_errors(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_installed_command():
    done = subprocess.run([sys.executable, "-m", "mindpet", "plan", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--device-num" in done.stdout

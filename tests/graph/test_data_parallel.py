"""Real data-parallel training, on two CPU processes that msrun starts."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from toy import DELTA

ROOT = pathlib.Path(__file__).parents[2]
CHILD = ROOT / "tests/graph/data_parallel_child.py"


def environment():
    """That of the children; msrun and `python` are those of this interpreter."""
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def msrun(tmp_path, *command):
    """Run a script on two processes."""
    options = ["--worker_num=2", "--local_worker_num=2", "--join=True", f"--log_dir={tmp_path / 'log'}"]
    return subprocess.run(
        ["msrun", *options, f"--master_port={free_port()}", *map(str, command)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_layers_that_two_processes_share_train_like_whole_ones(tmp_path):
    done = msrun(tmp_path, ROOT / "examples/parallel/pynative_tensor_parallel.py")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("log/worker_*.log")))
    assert sorted(re.findall("rank (.) of 2: losses .* differ by", logs)) == ["0", "1"]


def numbers(file):
    return {name: value.asnumpy() for name, value in ms.load_checkpoint(str(file)).items()}


def alone(folder):
    """Train in one process; returns what it prints."""
    return subprocess.check_output([sys.executable, CHILD, folder], env=environment(), text=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two processes that trained to the end."""
    folder = tmp_path_factory.mktemp("two")
    done = msrun(folder, CHILD, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_two_processes_train_like_one_with_the_joint_batch(two, tmp_path):
    alone(tmp_path / "one")
    one = numbers(tmp_path / "one/end_1_0.ckpt")
    ranks = [numbers(two / f"end_2_{rank}.ckpt") for rank in (0, 1)]
    for name, value in one.items():
        np.testing.assert_array_equal(ranks[0][name], ranks[1][name])
        np.testing.assert_allclose(ranks[0][name], value, atol=1e-5)
    assert np.abs(one["fc.mindpet_delta_lora_b"]).max() > 0.01
    saved = numbers(two / "DELTA_CKP-1_12.ckpt")  # by rank 0 alone
    assert set(saved) == DELTA
    for name, value in saved.items():
        np.testing.assert_array_equal(value, ranks[0][name])


def test_the_guard_sees_that_ranks_differ(tmp_path):
    done = msrun(tmp_path, ROOT / "tests/graph/rank_differences_child.py", tmp_path / "said")
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((tmp_path / f"said.{rank}").read_text()) for rank in (0, 1)]
    # Another seed gives other weights of both layers, another bias of the head, and another A.
    differ = "DeltaGuard: the ranks of data parallel differ: rank_0 / rank_1 have other "
    for mode in ("graph", "pynative"):
        for rank, said in enumerate(ranks):
            (seed,), (delta,), (frozen,), warned = (
                said.pop(f"{mode} {case}") for case in ("seed", "delta", "frozen", "warned")
            )
            assert seed.startswith(f"{differ}values of 4 of 6 parameters, the first of them 'fc.weight' (another seed")
            assert delta.startswith(f"{differ}values of 1 of 6 parameters, the first of them 'fc.mindpet_delta_lora_a'")
            assert "trainable ones, from number 3 on, which here is 'fc.mindpet_delta_lora_a'" in frozen
            assert ("nothing is trainable; the ranks" in frozen) == (rank == 1)
            assert warned[0] == delta  # and it trains on, though rank 1 then trains more
            assert any("trainable parameters changed" in message for message in warned) == (rank == 1)
    for said in ranks:  # what is broadcast is the same at the first look, which is after the first step
        (broadcast,) = said.pop("graph broadcast")
        assert broadcast.startswith(f"{differ}values of 1 of 6 parameters, the first of them 'fc.bias'")
        assert said == {"pynative layerwise": []}


def test_a_job_whose_worker_was_killed_is_resumed_on_as_many_ranks_and_on_fewer(two, tmp_path):
    done = msrun(tmp_path, CHILD, tmp_path / "two", 5)
    assert done.returncode != 0 and "exited with exception" in done.stderr
    files = sorted((tmp_path / "two").glob("*.ckpt"))
    assert [file.name for file in files] == ["DELTA_CKP-1_3.ckpt"]
    assert set(numbers(files[0])) == DELTA
    assert not list((tmp_path / "two").glob(".*"))  # nothing half written
    state = tmp_path / "two/resume/run_0/step_3"
    assert sorted(path.stem for path in state.glob("*.json")) == ["rank_0_of_2", "rank_1_of_2"]
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    done = msrun(tmp_path, CHILD, tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "it began after step 3" in done.stdout
    whole = numbers(two / "end_2_0.ckpt")
    for rank in (0, 1):
        resumed = numbers(tmp_path / f"two/end_2_{rank}.ckpt")
        assert all(value.tobytes() == resumed[name].tobytes() for name, value in whole.items())

    assert "it began after step 3" in alone(tmp_path / "one")
    for name, value in numbers(tmp_path / "one/end_1_0.ckpt").items():
        np.testing.assert_allclose(value, whole[name], atol=1e-5)


def test_the_example(tmp_path):
    golden = ROOT / "tests/golden/bert"
    data = tmp_path / "data.tsv"
    words = {"maths": "matrix value random", "sound": "signal image train"}
    texts = [f"{label}\tthe {text} {'a ' * count}of" for count in range(40) for label, text in words.items()]
    data.write_text("\n".join(texts), encoding="utf-8")
    options = ["--epochs=2", "--batch-size=8", "--seq-length=10", f"--output={tmp_path / 'out'}"]
    script = ROOT / "examples/finetune_text.py"
    done = msrun(tmp_path, script, "--distributed", f"--model={golden}", f"--data={data}", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("its predictions are the same") == 1  # rank 0 reports
    assert len(list((tmp_path / "out/lora").glob("*.ckpt"))) == 1

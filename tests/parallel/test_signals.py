"""A dry run leaves no process and no file, whichever signal ends its caller, and whenever.

The callers are forks of this process, which has imported everything. `--fuzz-rounds 400` sends ten times as many
signals at random moments as a short run.
"""

import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mindpet.cli import main
from mindpet.errors import DryRunError
from mindpet.parallel import dry_run
from mindpet.parallel.stubs import stub_folder

ROOT = pathlib.Path(__file__).parents[2]
SIGNALS = [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP]
SCRIPT = """
import os, pathlib, subprocess, time

def build():
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    middle = os.fork()
    if middle == 0:
        subprocess.Popen(["sleep", "600"])
        os._exit(0)
    os.waitpid(middle, 0)  # the second one has lost its parent
    pathlib.Path(os.environ["TMPDIR"], "hangs").write_text("")
    time.sleep(600)
"""


def library(build, timeout=60):
    try:
        dry_run(build, 8, timeout=timeout)
    except DryRunError:
        return 2


def command_line(build, timeout=60):
    return main(["plan", build, "--device-num", "8", "--timeout", str(timeout)])


@contextlib.contextmanager
def fork(call, folder):
    """A process that calls a function and writes to `output`; its temporary files are in the folder."""
    pid = os.fork()
    if pid == 0:
        code = 99
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not that of MindSpore, once it has compiled a graph
        try:
            output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            code = call()
        except KeyboardInterrupt:
            code = 98
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    try:
        yield pid
    finally:
        for left in processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def ended(pid):
    """The exit code of a forked process; minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def processes(folder):
    """The processes that were started to have their temporary files in the folder, and have not ended."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={folder}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of temporary files, beside files of the test."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr("tempfile.tempdir", None)
    stub_folder()
    return path


def is_clean(folder):
    return not processes(folder) and not list(folder.glob("mindpet*"))


CODES = {library: lambda number: 98 if number == signal.SIGINT else -number, command_line: lambda number: 128 + number}


def test_all_that_a_build_has_started_ends_with_the_caller(folder, tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(SCRIPT)
    calls = list(zip([library, library, command_line, command_line], SIGNALS))
    with contextlib.ExitStack() as stack:
        callers = []
        for call, number in calls:
            own = folder / number.name
            own.mkdir()
            monkeypatch.setenv("TMPDIR", str(own))
            callers.append(stack.enter_context(fork(functools.partial(call, f"{tmp_path}/hangs.py:build"), own)))
        for pid, (call, number) in zip(callers, calls):
            own = folder / number.name
            assert wait_until((own / "hangs").exists), (own / "output").read_text()
            assert len(processes(own)) == 4 and len(list(own.glob("mindpet*"))) == 1  # keeper, child, two sleepers
            os.kill(pid, number)
            code = -number if number == signal.SIGKILL else CODES[call](number)
            assert ended(pid) == code
            assert wait_until(functools.partial(is_clean, own), 0 if code > 0 else 60), processes(own)
            if code > 128:
                assert (own / "output").read_text() == f"mindpet: stopped by {number.name}\n"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_at_any_moment(number, folder, tmp_path, request):
    rounds = request.config.getoption("--fuzz-rounds") // 40
    rng = np.random.default_rng([number, request.config.getoption("--fuzz-start")])
    (tmp_path / "hangs.py").write_text(SCRIPT)
    for call in [command_line] * rounds + [library] * rounds:
        moment = rng.choice([0.1, 1.5]) * rng.random()  # seconds; much happens in the beginning
        with fork(functools.partial(call, f"{tmp_path}/hangs.py:build", timeout=1), folder) as pid:
            time.sleep(moment)
            os.kill(pid, number)
            code = ended(pid)
            assert code in (2, CODES[call](number), -number), (moment, (folder / "output").read_text())
            assert wait_until(functools.partial(is_clean, folder)), (moment, code, processes(folder))
            assert code < 100 or (folder / "output").read_text() == f"mindpet: stopped by {number.name}\n", moment
        (folder / "output").unlink(missing_ok=True)


def test_what_was_killed_with_its_keeper_is_removed_by_the_next_run(folder):
    left = folder / "mindpet-plan-0123456789abcdef"
    left.mkdir()
    (left / "log").write_text("")
    assert library(f"{ROOT}/tests/sharded.py:build", 0.1) == 2
    assert not list(folder.iterdir())


def test_handlers_of_the_program_stay(folder, capsys):
    """Those of the caller, and the signals that it ignores, as `nohup` does."""
    handlers = {signal.SIGTERM: lambda *_: None, signal.SIGHUP: signal.SIG_IGN, signal.SIGINT: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        assert main(["plan", "nowhere.py:build", "--device-num", "8"]) == 2
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert main(["plan", "nowhere.py:build", "--device-num", "8"]) == 2
    assert {number: signal.getsignal(number) for number in handlers} == before


IMPORTS = """
import signal, sys, time

class Slow:  # takes its time for the import, and catches what comes meanwhile
    def find_spec(self, name, path=None, target=None):
        if name == "mindpet.cli":
            print("importing", flush=True)
            try:
                time.sleep(60)
            except BaseException:
                pass

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
import mindpet.__main__
sys.meta_path.insert(0, Slow())
mindpet.__main__.main()
"""


def test_ctrl_c_during_the_imports_is_one_line():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout.readline() == "importing\n"
    done.send_signal(signal.SIGINT)
    assert done.communicate()[1] == "mindpet: stopped by SIGINT\n" and done.returncode == 130

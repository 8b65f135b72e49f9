"""Fixtures and options of all tests."""

import gc
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("MS_OM_PATH", tempfile.gettempdir())  # MindSpore's notes on graphs that do not compile

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# One operator after the other: MindSpore's threads would otherwise wait for one another in loops, four times the work.
ms.set_context(pynative_synchronize=True)


def pytest_addoption(parser):
    parser.addoption("--fail-on-skip", action="store_true", help="a skipped test fails the run")
    parser.addoption("--fuzz-rounds", type=int, default=40, help="damaged files for each kind of file (default: 40)")
    parser.addoption("--kills", type=int, default=50, help="of trainings that are resumed (default: 50)")
    parser.addoption("--fuzz-start", type=int, default=0, help="number of the first round, which is its seed")


def pytest_collection_finish():
    """Take the thousands of tests out of what MindSpore's compile has collected for garbage, a third of their time.

    Its `_CellGraphExecutor.compile` calls `gc.collect` (2.7, 2.10).
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # a worker of pytest-xdist has none
    if reporter and session.config.getoption("--fail-on-skip") and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(params=[ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def mode(request):
    """Runs a test in both execution modes."""
    ms.set_context(mode=request.param)
    return request.param


@pytest.fixture
def rng():
    """A seeded NumPy generator."""
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts with the same seed, in PyNative mode, and with the usual mask of files' modes.

    MindSpore sets another mask for the whole process where it makes a folder (2.7, `mindspore.log._make_directory`).
    """
    os.umask(0o022)
    ms.set_seed(7)
    ms.set_context(mode=ms.PYNATIVE_MODE)

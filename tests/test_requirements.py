"""What is installed with mindpet is bounded from both sides; a skipped test fails the run, with and without workers."""

import pathlib
import runpy

import pytest
import setuptools
from packaging.requirements import Requirement

pytest_plugins = ["pytester"]
ROOT = pathlib.Path(__file__).parents[1]


def test_every_requirement_has_a_lowest_and_a_highest_version(monkeypatch):
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: arguments.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    lists = [arguments["install_requires"], *arguments["extras_require"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    assert {"mindspore", "transformers", "hypothesis", "pytest-xdist"} <= {each.name for each in requirements}
    unbounded = [str(each) for each in requirements if {part.operator for part in each.specifier} != {">=", "<"}]
    assert not unbounded


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "workers"])
def test_a_skipped_test_fails_the_run(workers, pytester):
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("import pytest\n\ndef test_one():\n    pass\n\ndef test_two():\n    pytest.skip('why')\n")
    result = pytester.runpytest_subprocess("--fail-on-skip", *workers)
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "INTERNALERROR" not in result.stdout.str()

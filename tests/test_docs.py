"""The docs: every Python block runs, links lead somewhere, method pages have one shape and every argument."""

import inspect
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import mindspore as ms
import pytest

from mindpet.delta import RDropLoss
from mindpet.delta.registry import METHODS
from mindpet.parallel import dry_run

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
METHOD_PAGES = sorted(ROOT.glob("docs/methods/*.md"))
HEADINGS = ["Paper", "Formula", "Use", "Arguments", "Shapes", "Errors", "Shard slots"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path):
    return str(path.relative_to(ROOT))


def run(code, folder):
    """Run code as a script; returns what it prints."""
    (folder / "page.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))], ids=name)
def test_blocks_run_as_they_stand_and_print_what_the_page_says(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    printed = run("\n".join(BLOCK.findall(text)), tmp_path)
    for output in OUTPUT.findall(text):
        assert output.replace("MindSpore 2.10.0", f"MindSpore {ms.__version__}") in printed


@pytest.mark.parametrize("page", ["lora", "adapter", "low_rank_adapter"])
def test_the_shard_example_of_a_method_compiles_on_8_ranks(page, tmp_path):
    example = BLOCK.findall((ROOT / f"docs/methods/{page}.md").read_text(encoding="utf-8"))[-1]
    assert "dense.shard(" in example
    (tmp_path / "example.py").write_text(
        "import mindspore as ms\nimport numpy as np\nfrom mindpet.delta import *\n\ndef build():\n"
        + textwrap.indent(example, "    ")
        + "    return dense, ms.Tensor(np.ones((16, 784), np.float32))\n"
    )
    report = dry_run(f"{tmp_path}/example.py:build", 8, train=False)
    slots = set(re.findall(r"^    (strategy_\w+)=", example, re.MULTILINE)) - {"strategy_lora_dropout"}
    assert {plan.slot for plan in report.operators} == slots and all(plan.is_set for plan in report.operators)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", METHOD_PAGES, ids=name)
def test_method_pages_have_the_same_headings(page):
    assert re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE) == HEADINGS


def test_every_method_has_a_page():
    assert {page.stem for page in METHOD_PAGES} == {*METHODS, "r_drop"}


CELLS = [(method.name, cell) for method in METHODS.values() for cell in method.cells]


@pytest.mark.parametrize("page, cell", [*CELLS, ("r_drop", RDropLoss)])
def test_pages_and_docstrings_name_every_argument_and_default(page, cell):
    text = (ROOT / f"docs/methods/{page}.md").read_text(encoding="utf-8")
    function = RDropLoss.construct if cell is RDropLoss else cell.__init__
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        assert f"`{parameter.name}`" in text
        assert parameter.name in cell.__doc__
        if isinstance(parameter.default, (int, float, bool, tuple)):
            assert f"`{parameter.default}`" in text
    if "operators" in vars(cell):
        for slot in list(inspect.signature(cell.shard).parameters)[1:]:
            assert f"`{slot}`" in text


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text

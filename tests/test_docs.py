"""The docs: every Python block runs, links lead somewhere, method pages have one shape and every argument."""

import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import mindspore as ms
import pytest
from test_package import ORDER

from mindpet.delta import RDropLoss
from mindpet.delta._base import Delta, DeltaDense
from mindpet.delta.registry import METHODS
from mindpet.parallel import Report, dry_run_many

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
ALL_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
METHOD_PAGES = sorted(ROOT.glob("docs/methods/*.md"))
HEADINGS = ["Paper", "Formula", "Use", "Arguments", "Shapes", "Errors", "Shard slots"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path):
    return str(path.relative_to(ROOT))


# Imports once, and runs each script whose folder it reads in a fork of itself.
RUNNER = """
import os, runpy, sys
import mindspore, mindpet.delta, mindpet.graph, mindpet.parallel, mindpet.peft
for folder in map(str.rstrip, sys.stdin):
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.path.insert(0, folder)
        runpy.run_path("page.py", run_name="__main__")
        sys.exit()
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def runner():
    """A process that runs scripts."""
    command, pipe = [sys.executable, "-c", RUNNER], subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True) as process:
        yield process
        process.stdin.close()


def run(code, folder, runner):
    """Run code as a script; returns what it prints."""
    (folder / "page.py").write_text(code, encoding="utf-8")
    print(folder, file=runner.stdin, flush=True)
    status = runner.stdout.readline()
    output = (folder / "output").read_text(encoding="utf-8")
    assert status == "0\n", output
    return output


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))], ids=name)
def test_blocks_run_as_they_stand_and_print_what_the_page_says(page, tmp_path, runner):
    text = page.read_text(encoding="utf-8")
    printed = run("\n".join(BLOCK.findall(text)), tmp_path, runner)
    for output in OUTPUT.findall(text):
        assert output.replace("MindSpore 2.10.0", f"MindSpore {ms.__version__}") in printed


def test_the_shard_examples_of_the_methods_compile_on_8_ranks(tmp_path):
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/methods").glob("*.md"))}
    examples = {page: BLOCK.findall(text)[-1] for page, text in texts.items() if "dense.shard(" in text}
    assert {name for name, method in METHODS.items() if any(issubclass(c, DeltaDense) for c in method.cells)} == {
        *examples
    }
    for page, example in examples.items():
        (tmp_path / f"{page}_example.py").write_text(
            "import mindspore as ms\nimport numpy as np\nfrom mindpet.delta import *\n\ndef build():\n"
            + textwrap.indent(example, "    ")
            + "    return dense, ms.Tensor(np.ones((16, 784), np.float32))\n"
        )
    builds = [f"{tmp_path}/{page}_example.py:build" for page in examples]
    for (page, example), report in zip(examples.items(), dry_run_many(builds, 8, train=False)):
        assert isinstance(report, Report), (page, report)
        slots = re.findall(r"^    (strategy_\w+)=", example, re.MULTILINE)
        slots = {slot for slot in slots if not slot.endswith("_dropout")}  # there is none where nothing is dropped
        assert {plan.slot for plan in report.operators} == slots, page
        assert all(plan.is_set for plan in report.operators), page


def anchor(heading):
    """What a link to a heading ends with."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert target.startswith("https://") or linked.exists(), target
        if heading and linked.suffix == ".md":
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_paths_and_modules_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    made = re.findall(r"^`([\w/]+\.\w+)`:$", text, re.MULTILINE)  # files that the page has the content of
    paths = set(re.findall(r"(?<![\w./])(?:mindpet|tests|examples|docs)/[\w./]*\w", text)) - set(made)
    assert not [path for path in paths if not (ROOT / path).exists()]
    for module in set(re.findall(r"(?<![\w./@])mindpet(?:\.[a-z_]\w*)+(?!/)\b", prose(page))):
        parent, _, last = module.rpartition(".")
        assert hasattr(importlib.import_module(parent), last) or importlib.import_module(module), module


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_architecture_has_every_file_once_and_the_order_of_the_layers():
    rows = re.findall(r"^\| `(mindpet/[\w/]+\.py)` \| (.*) \|$", ARCHITECTURE.partition("## The life")[0], re.MULTILINE)
    assert sorted(path for path, _ in rows) == sorted(map(name, (ROOT / "mindpet").rglob("*.py")))
    layers = re.search(r"^    (utils  <.*)$", ARCHITECTURE, re.MULTILINE)[1].split("  <  ")
    order = {module.partition(".")[0]: place for place, module in enumerate(ORDER)}  # of its last module
    assert layers == [
        "utils",
        *(layer for layer in sorted(order, key=order.get) if layer not in ("utils", "errors", "__main__")),
    ]


def test_the_architecture_names_all_that_delta_asks_and_nothing_else():
    rows = re.findall(
        r"^\| (`.*?) \|", ARCHITECTURE.partition("## What Delta asks")[2].partition("###")[0], re.MULTILINE
    )
    members = {member for member in vars(Delta) if not member.startswith("_")}
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted({*members, "kind"})


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

"""The docs: every Python block runs, links lead somewhere, method pages have one shape and every argument."""

import inspect
import pathlib
import re

import pytest

from mindpet.delta import RDropLoss
from mindpet.delta.registry import METHODS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
METHOD_PAGES = sorted(ROOT.glob("docs/methods/*.md"))
HEADINGS = ["Paper", "Formula", "Use", "Arguments", "Shapes", "Errors", "Shard slots"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))], ids=name)
def test_blocks_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    file = tmp_path / "page.py"  # graph mode reads the source
    file.write_text(code, encoding="utf-8")
    exec(compile(code, str(file), "exec"), {"__name__": "page"})


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

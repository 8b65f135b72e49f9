"""What CONTRIBUTING.md says of a new method, done in a copy of the project; and which files know a method."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tokenize

import pytest

from mindpet.delta.registry import METHODS

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What of the project the tests of a method need.
NEEDED = (
    "mindpet",
    "docs",
    "examples",
    "tests/delta",
    "tests/peft/small.py",
    "tests/conftest.py",
    "tests/toy.py",
    "tests/sharded.py",
)
NEEDED += ("tests/test_docs.py", "tests/test_package.py", "pyproject.toml")
NEEDED += ("README.md", "SECURITY.md", "CONTRIBUTING.md", "LICENSE")


def apply_diff(folder, diff):
    """Put each line that begins with '+' behind the first line of its file that equals the context above it."""
    path, place = None, None
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path, place = folder / line[4:], None
            continue
        content = path.read_text(encoding="utf-8").splitlines()
        if line.startswith(" "):
            assert line[1:] in content, f"{path.relative_to(folder)} has no line {line[1:]!r}"
            place = content.index(line[1:])
        else:
            place += 1
            content.insert(place, line[1:])
            path.write_text("\n".join(content) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the method of CONTRIBUTING.md in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in NEEDED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)
    for diff in DIFF.findall(PAGE):
        apply_diff(folder, diff)
    for name, content in FILE.findall(PAGE):
        assert not (folder / name).exists()
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_the_page_has_a_file_a_test_and_a_page():
    assert [name for name, _ in FILE.findall(PAGE)] == [
        "mindpet/delta/gain.py",
        "tests/delta/test_gain.py",
        "docs/methods/gain.md",
    ]


def test_the_example_passes_its_own_tests_and_those_of_every_method(project):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    chosen = ["-k", "gain or Gain or knows_every or architecture_has or type_hints"]
    done = subprocess.run([*command, *chosen], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40, done.stdout


def test_the_example_has_the_style_of_the_project(project):
    for arguments in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "mindpet", "tests"]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# Where a method may stand besides its own file.
EVERYWHERE = {"delta/registry.py", "delta/__init__.py", "peft/__init__.py"}
# The methods that came in by one file: not even a comment or a docstring elsewhere knows them.
PROBES = ("ia3", "vera", "loha", "lokr", "p_tuning")
# What else knows a method, and why; what is about all methods asks the registry.
KNOWN = {
    "lora": {
        "files/names.py": "puts A and B of query, key and value together where the network has one layer for them",
        "files/convert.py": "old names of the hand-made layer; ranks that `inspect` shows; `r`, that tensors tell, too",
        "peft/combine.py": "sums of LoRA adapters",
        "graph/lora_plus.py": "LoRA+, which has a learning rate for A and one for B",
        "peft/state.py": "pissa_niter_N, which is computed exactly, is saved as pissa",
    },
    "adalora": {"delta/lora.py": "A and B have the same names in a file of Hugging Face PEFT"},
    "low_rank_adapter": {"delta/adapter.py": "a historical import path"},
    "prompt_tuning": {"delta/p_tuning.py": "a prompt that is not computed is the same in both, and so are their files"},
    "adapter": {"delta/mam.py": "MAM is made of it and of a prefix"},
    "prefixtuning": {"delta/mam.py": "MAM is made of it and of an adapter"},
    "ptuning2": {"delta/prefix_layer.py": "a prefix that is not computed is the same in both, and so are their files"},
}
METHODS_BY_FILE = [name for name, method in METHODS.items() if method.config.__module__ == f"mindpet.delta.{name}"]


def words_of(method):
    """A pattern for what tells that code knows a method: its names, its classes, its parameters and its tensors."""
    classes = {method.config, *method.deltas.values(), *method.cells}
    words = {method.name, *method.aliases, method.config.peft_type.value, *(cls.__name__ for cls in classes)}
    words -= {"adapter", "ADAPTER"}  # a word for all of them
    words |= {file for delta in method.deltas.values() for file in delta.shared_names.values()}
    words |= {file for delta in method.deltas.values() for file in (delta.file_names or {}).values()}
    patterns = (*method.trainable, *method.saved, *method.constants)
    parts = {pattern.strip("*").partition("[")[0] for pattern in patterns if "mindpet_" in pattern}
    return re.compile("|".join([rf"(?<!\w){re.escape(word)}(?!\w)" for word in words] + [*map(re.escape, parts)]))


def code_of(path):
    """A file's text without comments and docstrings."""
    found, before = [], tokenize.NEWLINE
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            starts_statement = before in (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            if not (token.type == tokenize.STRING and starts_statement):
                found.append(token.string)
            before = token.type
    return " ".join(found)


def knowing(method, read):
    """The files of `mindpet/` that know a method, but for those that may."""
    words, own = words_of(method), method.config.__module__.rpartition(".")[2]
    paths = {str(path.relative_to(ROOT / "mindpet")): path for path in (ROOT / "mindpet").rglob("*.py")}
    others = {name: path for name, path in paths.items() if name not in EVERYWHERE | {f"delta/{own}.py"}}
    found = {name: set(words.findall(read(path))) for name, path in others.items()}
    return {name: sorted(words) for name, words in found.items() if words}


@pytest.mark.parametrize("name", METHODS_BY_FILE)
def test_only_its_own_file_and_the_registry_know_a_method(name):
    assert {*PROBES, "lora", "adapter"} <= set(METHODS_BY_FILE)
    found = knowing(METHODS[name], code_of)
    assert set(found) == set(KNOWN.get(name, ())), f"{name}: {found}"


@pytest.mark.parametrize("name", PROBES)
def test_not_even_a_comment_elsewhere_knows_a_method_that_came_in_by_one_file(name):
    assert not knowing(METHODS[name], lambda path: path.read_text(encoding="utf-8"))

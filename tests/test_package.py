"""Import paths that other software relies on, the direction of imports, and imports without side effects."""

import ast
import dis
import importlib
import inspect
import os
import pathlib
import subprocess
import sys
import typing

import pytest
from mindspore import nn

import mindpet
from mindpet.network import precision
from mindpet.peft import patch

ROOT = pathlib.Path(mindpet.__file__).parent
# A module may import from what stands before it.
ORDER = [
    "utils.hints",
    "utils.layouts",
    "utils.quote",
    "utils.parse",
    "errors",
    "utils.exceptions",
    "utils.validate",
    "utils.files",
    "utils.quantization",
    "layers.activation",
    "layers.linear",
    "layers.convolution",
    "layers",
    "utils.version_control",
    "utils.sharding",
    "layers.quantized",
    "network.values",
    "network.construct",
    "network.libraries",
    "network.kinds",
    "network.match",
    "network.recompute",
    "network.parameters",
    "network.precision",
    "network.quantize",
    "network",
    "delta._config",
    "delta._base",
    "delta._matrix",
    "delta._method",
    "delta.METHOD",
    "delta.registry",
    "delta",
    "utils.constants",
    "utils",
    "files.tensors",
    "files.coded",
    "files.checkpoints",
    "files.passport",
    "files.keys",
    "files.names",
    "files.adapter",
    "files.convert",
    "files.merge",
    "files.quantize",
    "files",
    "graph.callback",
    "graph.FILE",
    "graph",
    "parallel.graph_dump",
    "parallel.report",
    "parallel.stubs",
    "parallel.FILE",
    "parallel",
    "peft.strategies",
    "peft.plan",
    "peft.patch",
    "peft.slot",
    "peft.batch",
    "peft.probe",
    "peft.merge",
    "peft.combine",
    "peft.start",
    "peft.placement",
    "peft.state",
    "peft.turns",
    "peft.checks",
    "peft.knowing",
    "peft.merging",
    "peft.saving",
    "peft.model",
    "peft.state_dict",
    "peft.drop",
    "peft.words",
    "peft.status",
    "peft.auto",
    "peft",
    "cli",
    "__main__",
]
PATCHES = (patch.leave, patch.activated, precision.to_half, precision.as_before)
METHOD_FILES = {path.stem for path in (ROOT / "delta").glob("*.py")} - {
    "__init__",
    "_base",
    "_config",
    "_matrix",
    "_method",
    "registry",
}


def place(module):
    """Where a module of mindpet stands in ORDER."""
    parts = module.split(".")[1:]
    if parts[0] == "delta" and parts[1:2] and parts[1] in METHOD_FILES:
        parts = ["delta", "METHOD"]
    if parts[1:2] and ".".join(parts) not in ORDER and parts[0] in ("graph", "parallel"):
        parts = [parts[0], "FILE"]
    return ORDER.index(".".join(parts))


def imports(path):
    """The modules of mindpet that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        yield from (name for name in names if name and name.startswith("mindpet."))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    if module == "mindpet":
        assert not list(imports(path))
        return
    for name in imports(path):
        same_level = place(name) == place(module) and name != module
        assert place(name) < place(module) or same_level, f"{module} imports {name}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_method_file_knows_no_registry(path):
    if path.parent.name == "delta" and path.stem in METHOD_FILES:
        assert not [name for name in imports(path) if name.startswith(("mindpet.delta.registry", "mindpet.graph"))]


@pytest.mark.parametrize(
    "module, names",
    [
        (
            "mindpet.delta",
            "LoRADense AdapterDense AdapterLayer LowRankAdapterDense LowRankAdapterLayer PrefixLayer "
            "PrefixEncoder RDropLoss rdrop_repeat",
        ),
        ("mindpet.delta.lora", "LoRADense"),
        ("mindpet.delta.adapter", "AdapterDense AdapterLayer LowRankAdapterDense LowRankAdapterLayer"),
        ("mindpet.delta.low_rank_adapter", "LowRankAdapterDense LowRankAdapterLayer"),
        ("mindpet.delta.prefix_layer", "PrefixLayer"),
        ("mindpet.delta.ptuning2", "PrefixEncoder"),
        ("mindpet.delta.r_drop", "RDropLoss rdrop_repeat"),
        (
            "mindpet.graph",
            "freeze_modules freeze_delta freeze_from_config TrainableParamsCheckPoint load_delta DeltaGuard "
            "summary gather_delta slice_delta lora_plus_groups",
        ),
        ("mindpet.graph.freeze_utils", "freeze_modules freeze_delta freeze_from_config"),
        ("mindpet.graph.ckpt_util", "TrainableParamsCheckPoint"),
        ("mindpet.parallel", "dry_run dry_run_many Report shard_like"),
        (
            "mindpet.peft",
            "get_peft_model inject_adapter_in_model plan_targets register_layer PeftModel PeftConfig LoraConfig "
            "PrefixTuningConfig get_peft_config TaskType PeftType NameMap",
        ),
        ("mindpet.layers.activation", "get_activation"),
        ("mindpet.utils.version_control", "get_dropout get_activation"),
        ("mindpet.utils.constants", "DELTA_LIST DEFAULT_FLAGS DEFAULT_MODES"),
    ],
)
def test_import_paths(module, names):
    assert all(hasattr(importlib.import_module(module), name) for name in names.split())


def modules():
    """The modules of mindpet, imported, by name."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, importlib.import_module(name)


def defined():
    """All functions and classes of mindpet, where they are defined."""
    for name, module in modules():
        yield from (thing for thing in vars(module).values() if getattr(thing, "__module__", None) == name)


def function_of(member):
    """The function behind a member of a class or module, or None."""
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return inspect.unwrap(member) if inspect.isfunction(member) else None


def names_in(code):
    """(whether it is a global, name) of all globals and attributes that a function uses, also in comprehensions."""
    steps = [(step.opname == "LOAD_GLOBAL", step.argval) for step in dis.get_instructions(code)]
    inner = [pair for const in code.co_consts if inspect.iscode(const) for pair in names_in(const)]
    return {*(pair for pair in steps if pair[1] in code.co_names), *inner}


def parsed_functions():
    """What MindSpore parses in graph mode: `construct` of all Cells, and what it calls."""
    cells = [thing for thing in defined() if inspect.isclass(thing) and issubclass(thing, nn.Cell)]
    # The source of a patched `construct` calls these, and `before`, and a user's `construct` properties.
    starts = ("construct", "bprop", "before", "past_key_reparam", "past_value_reparam")
    todo, functions = [(cell, name) for cell in cells for name in starts], {*PATCHES}
    while todo:
        cell, name = todo.pop()
        function = function_of(inspect.getattr_static(cell, name, None))
        if function and function.__module__.startswith("mindpet.") and (cell, function) not in functions:
            functions |= {function, (cell, function)}
            for is_global, name in names_in(function.__code__):
                todo += [] if is_global else [(cell, name)]
                functions |= {function_of(function.__globals__.get(name))} if is_global else set()
    return {function for function in functions if inspect.isfunction(function)}


def public_functions():
    """The public functions of mindpet, and the methods of its public classes, with whether they have a `self`."""
    for thing in defined():
        if inspect.isfunction(thing) and not thing.__name__.startswith("_"):
            yield thing, False
        if inspect.isclass(thing) and not thing.__name__.startswith("_"):
            for name, member in vars(thing).items():
                function = function_of(member)
                is_public = name == "__init__" or not name.startswith("_")
                if function and is_public and function.__module__.startswith("mindpet."):
                    yield function, not isinstance(member, staticmethod)


def test_public_functions_have_type_hints():
    parsed, lacking = parsed_functions(), []
    for function, is_method in public_functions():
        if function in parsed or function.__name__ == "setup":
            continue
        signature = inspect.signature(function)
        arguments = list(signature.parameters.values())[is_method:]
        names = [argument.name for argument in arguments if argument.annotation is argument.empty]
        if function.__name__ != "__init__" and signature.return_annotation is signature.empty:
            names.append("return")
        lacking += [f"{function.__module__}.{function.__qualname__}: {', '.join(names)}"] if names else []
        typing.get_type_hints(function)  # all names in it are known
    assert not lacking, "\n".join(lacking)


def test_what_construct_calls_has_no_type_hints():
    assert not [function.__qualname__ for function in parsed_functions() if function.__annotations__]


def test_fields_say_what_they_hold():
    classes = [thing for thing in defined() if inspect.isclass(thing)]
    fields = [(cls, name, hint) for cls in classes for name, hint in cls.__dict__.get("__annotations__", {}).items()]
    assert len(fields) > 100
    assert not [(cls, name) for cls, name, hint in fields if hint in (list, dict, tuple, set, object)]


def test_the_package_itself():
    assert mindpet.delta.LoRADense and mindpet.graph.summary and mindpet.peft.get_peft_model
    assert mindpet.__version__.count(".") == 2


def test_exceptions_and_their_base():
    for module in ("mindpet.utils.exceptions", "mindpet.errors"):
        errors = importlib.import_module(module)
        for name in (
            "UnexpectedError",
            "ReadYamlFileError",
            "LinkPathError",
            "AbsolutePathError",
            "ModelConfigFreezeInfoError",
        ):
            assert issubclass(getattr(errors, name), errors.MindPetError)
    assert importlib.import_module("mindpet.utils.exceptions").LinkPathError is mindpet.errors.LinkPathError


def test_constants():
    from mindpet.utils.constants import DEFAULT_FLAGS, DEFAULT_MODES, DELTA_LIST

    assert DELTA_LIST[:6] == ["lora", "prefixtuning", "adapter", "low_rank_adapter", "bitfit", "ptuning2"]
    assert DEFAULT_FLAGS == os.O_RDWR | os.O_CREAT and DEFAULT_MODES == 0o600


def test_importing_everything_writes_nothing_and_loads_no_other_framework(tmp_path):
    modules = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")]
    code = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name.replace('.__init__', ''))\n"
        "assert not {'torch', 'transformers', 'mindformers', 'peft'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.iterdir())

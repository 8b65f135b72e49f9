"""Names, order and defaults of arguments: as in Hugging Face PEFT, in the docstrings and in docs/peft.md."""

import ast
import dataclasses
import inspect
import pathlib
import re

import numpy as np
import pytest
from mindspore import Tensor, nn
from small import WIDTH, Tiny, ids, numbers, same

import mindpet.peft
from mindpet.peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

# What the documentation of Hugging Face PEFT says (0.18 to 0.21), without what torch alone has. The bar: what is before
# it stands here in the same place, so that it can be given by position; the rest by name, in the same order.
SIGNATURES = {
    "get_peft_model": "model peft_config adapter_name mixed autocast_adapter_dtype | revision low_cpu_mem_usage",
    "inject_adapter_in_model": "peft_config model adapter_name | low_cpu_mem_usage state_dict",
    "get_peft_model_state_dict": "model state_dict adapter_name | unwrap_compiled save_embedding_layers",
    "set_peft_model_state_dict": "model peft_model_state_dict adapter_name | ignore_mismatched_sizes low_cpu_mem_usage",
    "get_peft_config": "config_dict",
    "get_layer_status": "model",
    "get_model_status": "model",
    "PeftModel": "model peft_config adapter_name autocast_adapter_dtype | low_cpu_mem_usage",
    "PeftModel.from_pretrained": "model model_id adapter_name is_trainable config autocast_adapter_dtype | "
    "ephemeral_gpu_offload low_cpu_mem_usage key_mapping",
    "PeftModel.save_pretrained": "save_directory safe_serialization selected_adapters | save_embedding_layers "
    "is_main_process path_initial_model_for_weight_conversion",
    "PeftModel.load_adapter": "model_id adapter_name is_trainable | torch_device autocast_adapter_dtype "
    "ephemeral_gpu_offload low_cpu_mem_usage key_mapping",
    "PeftModel.set_adapter": "adapter_name | inference_mode",
    "PeftModel.add_adapter": "adapter_name peft_config | low_cpu_mem_usage autocast_adapter_dtype",
    "PeftModel.delete_adapter": "adapter_name",
    "PeftModel.disable_adapter": "",
    "PeftModel.get_base_model": "",
    "PeftModel.get_nb_trainable_parameters": "",
    "PeftModel.print_trainable_parameters": "",
    "PeftModel.add_weighted_adapter": "adapters weights adapter_name combination_type svd_rank svd_clamp "
    "svd_full_matrices svd_driver density majority_sign_method",
    "PeftModel.merge_and_unload": "progressbar safe_merge adapter_names",
    "PeftModel.merge_adapter": "adapter_names safe_merge",
    "PeftModel.unmerge_adapter": "",
    "PeftModel.unload": "",
    "PeftConfig": "task_type | peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode",
    "PeftConfig.from_pretrained": "pretrained_model_name_or_path | subfolder",
    "PeftConfig.save_pretrained": "save_directory",
    "PromptLearningConfig": "task_type | peft_type auto_mapping peft_version base_model_name_or_path revision "
    "inference_mode num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers",
    "PrefixTuningConfig": "task_type | peft_type auto_mapping peft_version base_model_name_or_path revision "
    "inference_mode num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
    "encoder_hidden_size prefix_projection",
    **{
        f"{name}.from_pretrained": "pretrained_model_name_or_path adapter_name is_trainable config | revision"
        for name in mindpet.peft.__all__
        if name.startswith("AutoPeftModel")
    },
}
DEFAULTS = {
    "adapter_name": "default",
    "adapter_names": None,
    "autocast_adapter_dtype": True,
    "combination_type": "svd",
    "config": None,
    "density": None,
    "is_trainable": False,
    "majority_sign_method": "total",
    "mixed": False,
    "progressbar": False,
    "safe_serialization": True,
    "selected_adapters": None,
    "state_dict": None,
    "svd_clamp": None,
    "svd_driver": None,
    "svd_full_matrices": True,
    "svd_rank": None,
}
LORA_DEFAULTS = {
    "r": 8,
    "target_modules": None,
    "exclude_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "lora_bias": False,
}


def find(name):
    """What a dotted name of `mindpet.peft` stands for."""
    found = mindpet.peft
    for part in name.split("."):
        found = getattr(found, part)
    return found


def parameters(function):
    """name -> inspect.Parameter, without `self`, `*args` and `**keywords`."""
    found = inspect.signature(function).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: one for name, one in found.items() if one.kind in named and name != "self"}


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_arguments_stand_where_hugging_face_has_them(name):
    by_place, _, by_name = SIGNATURES[name].partition("|")
    own = list(parameters(find(name)))
    expected = by_place.split()
    assert own[: len(expected)] == expected
    shared = [argument for argument in by_name.split() if argument in own]
    assert [argument for argument in own if argument in shared] == shared


@pytest.mark.parametrize("name", [name for name in SIGNATURES if not name.endswith("Config")])
def test_defaults_are_those_of_hugging_face(name):
    for argument, one in parameters(find(name)).items():
        if argument in DEFAULTS and one.default is not one.empty and name != "PeftConfig.from_pretrained":
            assert one.default == DEFAULTS[argument], argument


def test_the_defaults_of_lora_are_those_of_hugging_face():
    assert {name: getattr(LoraConfig(), name) for name in LORA_DEFAULTS} == LORA_DEFAULTS


# What is documented


def public():
    """(name, callable, docstring) of what users call."""
    for name in mindpet.peft.__all__:
        found = getattr(mindpet.peft, name)
        if inspect.isfunction(found):
            yield name, found, found.__doc__
        elif inspect.isclass(found) and not issubclass(found, str):
            yield name, found, found.__doc__
            for method, function in inspect.getmembers(found, callable):
                own = any(method in vars(cls) and cls.__module__.startswith("mindpet") for cls in found.__mro__)
                if own and not method.startswith("_") and "." not in method:
                    yield f"{name}.{method}", function, function.__doc__


PUBLIC = list(public())
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*)(?: \(.*?\))?: ", re.MULTILINE)


def documented(docstring):
    """Argument -> what is said of it."""
    docstring = inspect.cleandoc(docstring or "")
    sections = re.findall(r"^Args[^\n]*:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    parts = ENTRY.split("".join(sections))
    return {name: text for names, text in zip(parts[1::2], parts[2::2]) for name in names.split(", ")}


@pytest.mark.parametrize("name, function, docstring", PUBLIC, ids=[name for name, _, _ in PUBLIC])
def test_documented_arguments_are_accepted_with_the_defaults_that_are_documented(name, function, docstring):
    own = inspect.signature(function).parameters
    for argument, text in documented(docstring).items():
        if argument not in own and isinstance(function, type) and not dataclasses.is_dataclass(function):
            continue  # of `construct`
        assert argument in own, argument
        default = re.search(r"Default:\s+('[^']*'|\{\}|None|True|False|-?[\d.]*\d)", text)
        if own[argument].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and default and " see " not in text:
            said = ast.literal_eval(default[1])
            factory = getattr(function, "__dataclass_fields__", {}).get(argument)
            known = own[argument].default
            if factory is not None and factory.default_factory is not dataclasses.MISSING:
                known = factory.default_factory()
            assert known == said or known is inspect.Parameter.empty, f"{argument}: {known!r}, but {said!r} is said"


def calls_in(code):
    """(name, keywords) of the calls in Python code."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            yield name, [keyword.arg for keyword in node.keywords if keyword.arg]


def calls_in_docs():
    """(name, keywords) of the calls in docs/peft.md, in blocks and between backquotes."""
    text = (pathlib.Path(__file__).parents[2] / "docs/peft.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(\w[\w.]*\([^`]*\))`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for code in [*blocks, *inline]:
        try:
            found += calls_in(code.replace(", ...)", ")").replace("...", "None"))
        except SyntaxError:
            continue
    return found


def test_arguments_in_the_docs_are_accepted():
    checked = 0
    for name, keywords in calls_in_docs():
        function = getattr(mindpet.peft if name in mindpet.peft.__all__ else PeftModel, name, None)
        if function is None:
            continue
        own = inspect.signature(function).parameters
        any_other = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in own.values())
        assert [keyword for keyword in keywords if keyword not in own and not any_other] == [], name
        checked += 1
    assert checked > 15


# Calls as in code for Hugging Face PEFT, by position


def test_calls_by_position(rng, tmp_path):
    x, config = ids(rng), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(Tiny(), config, "default", False, True)
    tuned = numbers(model, x)
    model.add_adapter("two", config)
    model.add_weighted_adapter(["default", "two"], [1.0, 0.0], "sum", "svd", 2, None, True, None, None, "total")
    model.set_adapter("sum")
    np.testing.assert_allclose(numbers(model, x), tuned, atol=1e-5)
    model.set_adapter(["default"])
    model.save_pretrained(str(tmp_path), True, ["default"])
    model.delete_adapter("two")
    values = get_peft_model_state_dict(model, None, "default")
    model.merge_adapter(["default"], True)
    model.unmerge_adapter()
    network = model.unload()
    model = PeftModel.from_pretrained(network, str(tmp_path), "default", False, None, True)
    same(numbers(model, x), tuned)
    model.load_adapter(str(tmp_path), "again", True)
    model.set_adapter("again")
    set_peft_model_state_dict(model, {key: Tensor(value.asnumpy() * 0) for key, value in values.items()}, "again")
    model.set_adapter("default")
    same(numbers(model, x), tuned)
    merged = model.merge_and_unload(False, True, ["default"])
    np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-5)
    inject_adapter_in_model(config, merged, "default")
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type == "LORA"


def test_an_auto_model_by_position(rng, tmp_path):
    network = nn.SequentialCell(nn.Dense(WIDTH, WIDTH))
    model = get_peft_model(network, LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = Tensor(rng.normal(size=(2, WIDTH)).astype(np.float32))
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path)
    base = model.unload()
    model = AutoPeftModel.from_pretrained(tmp_path, "other", True, None, loader=lambda path: base)
    assert model.active_adapter == "other" and len(model.trainable_params()) == 2
    same(numbers(model, x), tuned)

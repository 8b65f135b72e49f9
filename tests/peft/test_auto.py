"""A base and its adapter from the adapter's folder alone."""

import json
import pathlib
import sys

import numpy as np
import pytest
from mindspore import Tensor
from models.llama import LlamaForCausalLM
from small import Tiny, same

from mindpet.errors import ConfigError
from mindpet.peft import AutoPeftModel, LoraConfig, get_peft_model, register_base_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/llama"


def test_the_base_is_found(mode, rng, tmp_path):
    config = LoraConfig(base_model_name_or_path=str(GOLDEN), init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(GOLDEN), config)
    assert model.peft_config["default"].target_modules == ["q_proj", "v_proj"]
    model.save_pretrained(tmp_path)
    x = Tensor(rng.integers(0, 48, (2, 6)).astype(np.int32))
    expected = model(x).asnumpy()
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["auto_mapping"] == {"base_model_class": "LlamaForCausalLM", "parent_library": "models.llama"}
    loaded = AutoPeftModel.from_pretrained(tmp_path, is_trainable=True)
    same(loaded(x).asnumpy(), expected)
    assert loaded.trainable_params()
    loaded = AutoPeftModel.from_pretrained(tmp_path, loader=LlamaForCausalLM.from_pretrained)
    same(loaded(x).asnumpy(), expected)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({}, "'base_model_name_or_path' must name the base"),
        ({"base_model_name_or_path": "x"}, "'auto_mapping' must name the base's class .*, but is {}"),
        (
            {"base_model_name_or_path": "x", "auto_mapping": {"parent_library": ["a"]}},
            r"but is {'parent_library': \['a",
        ),
        (
            {
                "base_model_name_or_path": "x",
                "auto_mapping": {"base_model_class": "Nothing", "parent_library": "models.llama"},
            },
            "'auto_mapping' must name the base's class",
        ),
    ],
)
def test_a_base_that_cannot_be_found(fields, match, tmp_path):
    LoraConfig(**fields).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=match):
        AutoPeftModel.from_pretrained(tmp_path)


def test_what_a_file_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "named_by_a_file.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module, name in (("named_by_a_file", "Base"), ("os", "system"), ("models.llama", "LlamaModel")):
        mapping = {"base_model_class": name, "parent_library": module}
        LoraConfig(base_model_name_or_path="x", auto_mapping=mapping).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"one of \[.*'models.llama.LlamaForCausalLM'.*call register_base_model"):
            AutoPeftModel.from_pretrained(tmp_path)
    assert "named_by_a_file" not in sys.modules


def test_a_registered_class_makes_the_base(tmp_path):
    @register_base_model
    class Base(Tiny):
        @classmethod
        def from_pretrained(cls, path):
            network = cls()
            network.made_from = path
            return network

    config = LoraConfig(base_model_name_or_path="weights", target_modules=["query"])
    get_peft_model(Base(), config).save_pretrained(tmp_path)
    assert AutoPeftModel.from_pretrained(tmp_path, force=True).network.made_from == "weights"


@pytest.mark.parametrize("cls", [Tiny, Tiny(), "models.llama.LlamaForCausalLM"], ids=["class", "object", "name"])
def test_a_class_that_cannot_be_registered(cls):
    with pytest.raises(TypeError, match="'cls' must be a class with a method 'from_pretrained'"):
        register_base_model(cls)

"""The values of an adapter as a dict, and what there is to know of the adapters of a model."""

import numpy as np
import pytest
from mindspore import Tensor, nn
from small import LAYERS, Small, Tied, Tiny, config, ids, move, numbers, same

from mindpet.errors import AdapterError, CheckpointError, ConfigError
from mindpet.files.tensors import TensorFile
from mindpet.peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

QUERY = {"r": 2, "target_modules": ["query"]}


@pytest.mark.parametrize(
    "fields", [{}, {"modules_to_save": ["classifier"]}, {"init_lora_weights": "pissa", "target_modules": ["query"]}]
)
def test_a_state_dict_is_what_a_file_has(fields, mode, rng, tmp_path):
    model, x = get_peft_model(Tiny(), LoraConfig(**{**QUERY, **fields})), ids(rng)
    move(model, 1)
    expected = numbers(model, x)
    model.save_pretrained(tmp_path)
    found = get_peft_model_state_dict(model)
    in_file = TensorFile(tmp_path / "adapter_model.safetensors").read_all()
    assert found.keys() == in_file.keys() and all(np.array_equal(found[key].asnumpy(), in_file[key]) for key in found)
    move(model, 2)
    assert set_peft_model_state_dict(model, found) == ([], [])
    same(numbers(model, x), expected)
    model.add_adapter("two", LoraConfig(**{**QUERY, **fields}))
    set_peft_model_state_dict(model, found, "two")  # it is not active
    model.set_adapter("two")
    same(numbers(model, x), expected)


def test_state_dicts_that_do_not_fit(rng):
    model, x = get_peft_model(Tiny(), LoraConfig(**QUERY)), ids(rng)
    before, found = numbers(model, x), get_peft_model_state_dict(model)
    bad = {**dict(list(found.items())[1:]), "surplus": Tensor(np.ones(2, np.float32))}
    with pytest.raises(CheckpointError, match="(?s)missing: .*lora_A.weight.*surplus: surplus"):
        set_peft_model_state_dict(model, bad)
    with pytest.raises(AdapterError, match="there is no adapter 'two'"):
        get_peft_model_state_dict(model, adapter_name="two")
    for call in (get_peft_model_state_dict, get_layer_status, get_model_status):
        with pytest.raises(TypeError, match="'model' must be a PeftModel"):
            call(Tiny())
    with pytest.raises(KeyError):
        get_peft_model_state_dict(model, {})
    same(numbers(model, x), before)


def test_status():
    model = get_peft_model(Small(), config())
    model.add_adapter("two", LoraConfig(**QUERY, inference_mode=True))
    layers = {layer.name: layer for layer in get_layer_status(model)}
    assert list(layers) == LAYERS and layers["turned"].available_adapters == ["default"]
    query = layers["query"]
    assert (query.module_type, query.enabled, query.active_adapters) == ("Dense", True, ["default"])
    assert query.available_adapters == ["default", "two"] and query.requires_grad == {"default": True, "two": False}
    model.set_adapter("two")
    with model.disable_adapter():
        assert not get_model_status(model).enabled
    model.merge_adapter()
    status = get_model_status(model)
    assert (status.base_model_type, status.num_adapter_layers, status.enabled) == ("Small", len(LAYERS), True)
    assert status.merged_adapters == ["two"] and status.requires_grad == {"default": False, "two": False}
    assert status.peft_types == {"default": "LORA", "two": "LORA"} and status.trainable_params == 0
    assert {layer.name for layer in get_layer_status(model) if layer.merged_adapters} == {"query"}


def test_bases_that_a_loader_makes(tmp_path):
    model = get_peft_model(nn.SequentialCell(nn.Dense(8, 3)), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert isinstance(AutoPeftModel.from_pretrained(tmp_path, loader=lambda name: base), PeftModel)


def test_models_for_a_task(tmp_path):
    model = get_peft_model(Tiny(), LoraConfig(**QUERY, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    base = model.unload()
    with pytest.raises(ConfigError, match="'task_type' must be CAUSAL_LM for AutoPeftModelForCausalLM, but is SEQ_CLS"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path, loader=lambda name: base)
    AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, loader=lambda name: base)


@pytest.mark.parametrize("name", ["org/adapter", "no-such-folder"])
def test_a_name_of_a_hub_is_told_apart(name):
    for call in (
        PeftConfig.from_pretrained,
        AutoPeftModel.from_pretrained,
        lambda n: PeftModel.from_pretrained(Tiny(), n),
    ):
        with pytest.raises(FileNotFoundError, match="read from local folders only"):
            call(name)


def test_status_of_a_tied_layer_and_of_a_merged_delta(rng):
    """The head that has the table of an embedding has its delta, too; a merged one does not train, its head does."""
    tied = get_peft_model(Tied(), TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 3]))
    assert [layer.name for layer in get_layer_status(tied)] == ["embed", "head"]
    assert get_model_status(tied).num_adapter_layers == 2
    model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    assert get_layer_status(model)[0].requires_grad == {"default": True}
    model.merge_adapter()
    assert get_layer_status(model)[0].requires_grad == {"default": False}
    assert get_model_status(model).requires_grad == {"default": True}

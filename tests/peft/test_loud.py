"""What users of Hugging Face PEFT complain of most, as it is here: loud, or impossible."""

import json
import os

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import Small, Tied, config, contents, ids, move, numbers, same

from mindpet.errors import AdapterError, CheckpointError, ConfigError, MergeError, NoMatchError
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import DeltaGuard
from mindpet.peft import LoraConfig, PeftModel, get_peft_config, get_peft_model


def saved(folder, **fields):
    """A trained model, saved."""
    ms.set_seed(3)
    model = get_peft_model(Small(), config(**fields))
    move(model, 1)
    model.save_pretrained(folder)
    return model


def fresh(seed=3):
    ms.set_seed(seed)
    return Small()


def test_partly_wrong_targets():
    with pytest.raises(NoMatchError, match="no layer matches 'vlaue'"):
        get_peft_model(Small(), config(target_modules=["query", "vlaue"]))


def test_a_pattern_is_matched_on_the_whole_path_not_on_the_name_of_the_child():
    model = get_peft_model(Small(), config(target_modules=r"blocks\.\d\.shared"))
    assert [layer.path for layer in model.adapters["default"].plan.targets] == ["blocks.0.shared"]
    with pytest.raises(NoMatchError, match="no layer matches 'shared'"):
        get_peft_model(Small(), config(target_modules="shared"))


def test_a_head_that_is_random_after_reloading(rng, tmp_path):
    model, x = saved(tmp_path, task_type="SEQ_CLS"), ids(rng)
    network = fresh()
    network.classifier.weight.set_data(Tensor(rng.normal(size=(3, 12)).astype(np.float32)))
    same(numbers(PeftModel.from_pretrained(network, tmp_path), x), numbers(model, x))


def test_a_head_that_is_missing_in_the_file(tmp_path):
    saved(tmp_path, task_type="SEQ_CLS")
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: value for name, value in TensorFile(path).read_all().items() if "classifier" not in name}
    path.chmod(0o600)
    save_tensors(path, tensors)
    with pytest.raises(CheckpointError, match="(?s)missing: .*classifier.weight.*missing: .*classifier.bias"):
        PeftModel.from_pretrained(fresh(), tmp_path)


@pytest.mark.parametrize("name", ["query", "embed", "lora_A", "base_model", "weight", "classifier"])
def test_names_of_adapters_that_are_names_of_layers(name, rng, tmp_path):
    ms.set_seed(3)
    model, x = get_peft_model(Small(), config(), adapter_name=name), ids(rng)
    move(model, 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / name, name)
    same(numbers(loaded, x), numbers(model, x))


def test_the_wrong_adapter_trains_after_a_second_one_is_added():
    model = get_peft_model(Small(), config())
    before = [param.name for param in model.trainable_params()]
    model.add_adapter("two", config(target_modules=["query"]))
    assert [param.name for param in model.trainable_params()] == before and model.active_adapter == "default"
    model.set_adapter("two")
    assert {param.name.split(".")[0] for param in model.trainable_params()} == {"query"}


def test_empty_files_when_weights_are_sharded(tmp_path):
    model = get_peft_model(Small(), config())
    model.network.query.mindpet_delta.mindpet_delta_lora_a.sliced = True
    with pytest.raises(CheckpointError, match="slices of this rank"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nan_is_found_halfway_through_a_merge():
    model = get_peft_model(Small(), config())
    before = contents(model.network)
    weight = model.network.conv.mindpet_delta.mindpet_delta_lora_b  # the last layer
    weight.set_data(Tensor(np.full(weight.shape, np.nan, np.float32)))
    with pytest.raises(MergeError, match="conv would hold NaN"):
        model.merge_and_unload()
    same = [one == other for one, other in zip(before, contents(model.network)) if "lora_b" not in one[0]]
    assert all(same)


def test_tied_embeddings_that_break_in_a_merge():
    with pytest.raises(MergeError, match="embed has its weight in common with"):
        get_peft_model(Tied(), LoraConfig(target_modules=["embed"])).merge_and_unload()


def test_wrapping_again_on_resume_discards_the_weights(tmp_path):
    saved(tmp_path)
    model = PeftModel.from_pretrained(fresh(), tmp_path)
    with pytest.raises(ConfigError, match="has adapters already"):
        get_peft_model(model, config())


def test_huge_files_after_the_vocabulary_has_grown(tmp_path):
    saved(tmp_path, target_modules=["query"], base_model_name_or_path="somewhere")
    assert os.path.getsize(tmp_path / "adapter_model.safetensors") < 1000


def test_half_precision_comes_back_as_float32(tmp_path):
    saved(tmp_path, target_modules=["query"])
    path = tmp_path / "adapter_model.safetensors"
    halves = {name: value.astype(np.float16) for name, value in TensorFile(path).read_all().items()}
    path.chmod(0o600)
    save_tensors(path, halves)
    (tmp_path / "mindpet_passport.json").unlink()
    model = PeftModel.from_pretrained(fresh(), tmp_path, is_trainable=True)
    assert {param.dtype for param in model.trainable_params()} == {ms.float16}


def test_lora_without_effect_in_a_reference_that_nobody_knows_of(rng):
    """`Small` calls its query through a tuple."""
    network, x = Small(), ids(rng)
    before = numbers(network, x)
    move(get_peft_model(network, config(target_modules=["query"])), 0)
    assert np.abs(numbers(network, x) - before).max() > 1e-5


def test_lora_that_never_trains(rng, tmp_path):
    """An optimizer that was made before the adapter: the guard of training says so."""
    import mindspore.dataset as ds
    from mindspore.train import Model

    from mindpet.errors import NotLearningError

    network = Small()
    optimizer = nn.SGD(network.trainable_params(), 0.1)
    model = get_peft_model(network, config())
    data = ds.NumpySlicesDataset({"x": ids(rng, 8).asnumpy(), "label": np.zeros(8, np.int32)}).batch(4)
    with pytest.raises(NotLearningError):
        Model(model, nn.CrossEntropyLoss(), optimizer).train(3, data, callbacks=[DeltaGuard()], dataset_sink_mode=False)


def test_an_unsupported_method_gives_the_base_and_a_line_in_the_log(tmp_path):
    with pytest.raises(ConfigError, match="'peft_type' must be one of .* but got 'XLORA'"):
        get_peft_config({"peft_type": "XLORA"})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "XLORA"}))
    with pytest.raises(ConfigError, match="'XLORA'"):
        PeftModel.from_pretrained(fresh(), tmp_path)


def test_initial_values_that_are_never_forwarded():
    model = get_peft_model(Small(), config(target_modules=["query"], init_lora_weights="gaussian", r=64))
    delta = model.network.query.mindpet_delta
    assert (
        0.5 < delta.mindpet_delta_lora_a.asnumpy().std() * 64 < 1.5 and not delta.mindpet_delta_lora_b.asnumpy().any()
    )
    model = get_peft_model(Small(), config(target_modules=["query"], init_lora_weights=False))
    assert model.network.query.mindpet_delta.mindpet_delta_lora_b.asnumpy().any()


def test_a_merge_that_takes_the_scale_for_one():
    model = get_peft_model(Small(), config(target_modules=["query"], lora_alpha=7, init_lora_weights=False))
    delta, weight = model.network.query.mindpet_delta, model.network.query.weight.asnumpy().copy()
    a, b = delta.mindpet_delta_lora_a.asnumpy().copy(), delta.mindpet_delta_lora_b.asnumpy().copy()
    merged = model.merge_and_unload().query.weight.asnumpy()
    np.testing.assert_allclose(merged, weight + 7 / 2 * b @ a, atol=1e-6)


def test_unknown_adapters_are_named():
    model = get_peft_model(Small(), config())
    with pytest.raises(AdapterError, match=r"no adapter 'two'; there are \['default'\]"):
        model.set_adapter("two")

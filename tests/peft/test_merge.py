"""Merging: in float32, checked as a whole before anything is set, exact to undo."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import LAYERS, Small, Tied, config, contents, ids, move, numbers, same

from mindpet.errors import AdapterError, ConfigError, MergeError
from mindpet.peft import AdapterConfig, LoraConfig, PeftModel, get_peft_model

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "all", "modules_to_save": ["classifier"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["query", "turned", "mlp.0", "conv"]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["query", "turned"]},
}


def trained(seed=1, **fields):
    model = get_peft_model(Small(), config(**fields))
    move(model, seed)
    return model


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_merged_computes_what_unmerged_does_and_undoes_exactly(variant, mode, rng):
    model, x = trained(**VARIANTS[variant]), ids(rng)
    expected, before = numbers(model, x), contents(model.network)
    model.merge_adapter()
    np.testing.assert_allclose(numbers(model, x), expected, atol=2e-6)
    assert all(layer.largest_change > 0 and layer.largest_error == 0 for layer in model.merge_report)
    model.unmerge_adapter()
    assert contents(model.network) == before
    same(numbers(model, x), expected)
    model.merge_adapter()
    network = model.merge_and_unload()
    np.testing.assert_allclose(numbers(network, x), expected, atol=2e-6)


def test_the_merged_network_is_the_base_again(mode, rng):
    network, x = Small(), ids(rng)
    names, text = [name for name, _, _ in contents(network)], str(network)
    model = get_peft_model(network, config())
    move(model, 1)
    expected = numbers(model, x)
    assert model.merge_and_unload(progressbar=True) is network
    assert [name for name, _, _ in contents(network)] == names and str(network) == text
    assert all(requires_grad for _, _, requires_grad in contents(network))
    assert not any(
        "mindpet" in key or key == "construct" for _, cell in network.cells_and_names() for key in vars(cell)
    )
    np.testing.assert_allclose(numbers(network, x), expected, atol=2e-6)


def test_an_adapter_that_is_not_in_place_merges_without_what_is(mode, rng):
    """The head and the biases of the adapter in place are not merged along."""
    model, x = trained(bias="all", modules_to_save=["classifier"]), ids(rng)
    model.add_adapter("two", config(init_lora_weights=False))
    model.set_adapter("two")
    expected = numbers(model, x)
    model.set_adapter("default")
    first = numbers(model, x)
    model.merge_adapter(["two"])
    np.testing.assert_allclose(numbers(model, x), expected, atol=2e-6)
    model.unmerge_adapter()
    same(numbers(model, x), first)
    np.testing.assert_allclose(numbers(model.merge_and_unload(adapter_names=["two"]), x), expected, atol=2e-6)


def test_a_model_takes_a_new_adapter_after_a_merge(rng):
    model, x = trained(bias="all"), ids(rng)
    model.merge_and_unload()
    merged = numbers(model, x)
    model.add_adapter("default", config(bias="all"))
    model.set_adapter("default")
    np.testing.assert_allclose(numbers(model, x), merged, atol=2e-6)
    move(model, 3)
    same(numbers(model.unload(), x), merged)


def test_several_adapters_merge_at_once(mode, rng):
    model, x = trained(), ids(rng)
    model.add_adapter("two", config(r=3, target_modules=["query"], use_dora=True))
    model.set_adapter("two")
    move(model, 2)
    model.merge_adapter(["default", "two"])
    assert [layer.path for layer in model.merge_report] == LAYERS
    merged = numbers(model, x)
    model.unmerge_adapter()
    model.merge_and_unload(adapter_names=["default"])
    assert np.abs(numbers(model, x) - merged).max() > 1e-4


@pytest.mark.parametrize("dtype, digits", [(np.float16, 11), ("bfloat16", 8)])
def test_half_precision_is_merged_in_float32_and_rounded_once(dtype, digits):
    ms_type = ms.float16 if dtype is np.float16 else ms.bfloat16
    network = nn.SequentialCell(nn.Dense(16, 16, dtype=ms_type))
    network[0].weight.set_data(Tensor(np.random.normal(size=(16, 16)).astype(np.float32)).astype(ms_type))
    weight = network[0].weight.asnumpy().copy()
    model = get_peft_model(network, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    move(model, 0)
    delta = network[0].mindpet_delta
    expected = (
        weight.astype(np.float32) + 1.5 * delta.mindpet_delta_lora_b.asnumpy() @ delta.mindpet_delta_lora_a.asnumpy()
    )
    model.merge_adapter()
    merged = network[0].weight.asnumpy()
    assert merged.dtype == weight.dtype
    rounded = Tensor(expected).astype(ms_type).asnumpy()
    assert (merged.astype(np.float32) == rounded.astype(np.float32)).mean() > 0.99
    (row,) = model.merge_report
    assert row.path == "0" and row.dtype == weight.dtype.name and row.dtype in str(row)
    assert (
        row.largest_error == np.abs(merged.astype(np.float32) - expected).max() <= np.abs(expected).max() * 2.0**-digits
    )
    np.testing.assert_allclose(row.largest_change, np.abs(expected - weight.astype(np.float32)).max(), rtol=1e-6)
    model.unmerge_adapter()
    assert network[0].weight.asnumpy().tobytes() == weight.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_a_merge_that_would_not_be_finite_changes_nothing(bad):
    model = trained()
    weight = model.network.turned.mindpet_delta.mindpet_delta_lora_b
    value = weight.asnumpy().copy()
    value[0, 0] = bad
    weight.set_data(Tensor(value))
    model.network.turned.mindpet_delta.mindpet_delta_lora_a.set_data(Tensor(np.full((2, 8), 100, np.float32)))
    before = contents(model.network)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="nothing was changed: turned would hold NaN or infinite"):
            merge()
        assert contents(model.network) == before


def test_all_problems_are_in_one_error():
    model = trained(lora_bias=True, target_modules=["query", "shared"])
    for cell in (model.network.query, model.network.blocks[0].shared):
        cell.mindpet_delta.mindpet_delta_lora_b.set_data(Tensor(np.full((8, 2), np.nan, np.float32)))
    with pytest.raises(MergeError, match="(?s)query would hold NaN.*shared has no bias.*shared would hold NaN"):
        model.merge_adapter()


@pytest.mark.parametrize("target, new", [("embed", "head.weight"), ("head", "head.weight")])
def test_tied_weights_are_refused_or_untied(target, new, mode, rng):
    network, x = Tied(), ids(rng)
    names = [param.name for param in network.get_parameters()]
    model = get_peft_model(network, LoraConfig(r=2, target_modules=[target]))
    move(model, 1)
    expected, before = numbers(model, x), contents(network)
    other = "head" if target == "embed" else "embed"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=rf"{target} has its weight in common with \['{other}'\]"):
            merge()
        assert contents(network) == before
    model.merge_and_unload(untie_weights=True)
    np.testing.assert_allclose(numbers(network, x), expected, atol=2e-6)
    assert sorted(param.name for param in network.get_parameters()) == sorted([*names, new])


def test_what_cannot_be_merged():
    model = get_peft_model(Small(), AdapterConfig(target_modules=["query"]))
    with pytest.raises(MergeError, match="'default' is of ADAPTER, which cannot be folded"):
        model.merge_adapter()
    model.add_adapter("saved", config(modules_to_save=["classifier"]))
    with pytest.raises(MergeError, match="'saved' changes the base's own parameters; only the active adapter may"):
        model.merge_adapter(["saved"])
    with pytest.raises(AdapterError, match="there is no adapter 'nix'"):
        model.merge_and_unload(adapter_names=["nix"])


def test_a_delta_that_is_loaded_while_it_is_merged_is_refused(mode, rng):
    model, x = trained(target_modules=["query"]), ids(rng)
    saved = {param.name: ms.Parameter(param.asnumpy(), name=param.name) for param in model.trainable_params()}
    before = numbers(model, x)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="was loaded while 'default' is merged, and would count twice"):
        ms.load_param_into_net(model, saved)
    np.testing.assert_allclose(numbers(model, x), before, atol=2e-6)
    model.unmerge_adapter()
    same(numbers(model, x), before)
    ms.load_param_into_net(model, saved)
    same(numbers(model, x), before)
    with model.disable_adapter():
        base = numbers(model, x)
        with pytest.raises(AdapterError, match="was loaded while 'default' is disabled"):
            ms.load_param_into_net(model, saved)
        same(numbers(model, x), base)
    same(numbers(model, x), before)


def test_an_adapter_from_a_file_is_merged_onto_another_base_with_a_warning(tmp_path, recwarn):
    model = trained(target_modules=["query"])
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(model.unload(), tmp_path)
    recwarn.clear()
    model.merge_adapter()
    model.unmerge_adapter()
    assert not [one for one in recwarn if issubclass(one.category, UserWarning)]
    weight = model.network.query.weight
    weight.set_data(Tensor(weight.asnumpy() + 1))
    with pytest.warns(UserWarning, match="(?s)merge: 'default': trained on another base.*query.weight: other values"):
        model.merge_adapter()


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_a_model_without_adapters_has_none_to_save_or_merge(end, tmp_path):
    model = trained(target_modules=["query"])
    getattr(model, end)()
    for call in (
        lambda: model.save_pretrained(tmp_path),
        lambda: model.save_pretrained(tmp_path, selected_adapters=["default"]),
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("default"),
        lambda: model.prepare_for_training(),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: model.merge_and_unload(),
        lambda: model.add_weighted_adapter(["default"], [1.0], "sum"),
        lambda: model.adapter_tensors("default"),
    ):
        with pytest.raises(AdapterError, match="there is no adapter|no adapter is merged"):
            call()
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_named_twice_is_not_merged_twice():
    model = trained(target_modules=["query"])
    before = contents(model.network)
    with pytest.raises(AdapterError, match="one is named twice"):
        model.merge_adapter(["default", "default"])
    assert contents(model.network) == before


def test_dora_on_a_row_of_zeros_is_finite_and_trains(mode, rng):
    network, x = Small(), ids(rng)
    weight = network.query.weight.asnumpy()
    weight[3] = 0
    network.query.weight.set_data(Tensor(weight))
    base = numbers(network, x)
    model = get_peft_model(network, config(target_modules=["query"], use_dora=True))
    same(numbers(model, x), base)

    def loss():
        return model(x).square().sum()

    lora_b = model.network.query.mindpet_delta.mindpet_delta_lora_b
    (gradient,) = ms.grad(loss, None, ms.ParameterTuple([lora_b]))()
    assert np.isfinite(gradient.asnumpy()).all() and np.abs(gradient.asnumpy()[3]).max() > 0
    np.testing.assert_allclose(numbers(model.merge_and_unload(), x), base, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_a_weight_with_nan_names_the_layer(init):
    network = Small()
    weight = network.query.weight.asnumpy()
    weight[0, 0] = np.nan
    network.query.weight.set_data(Tensor(weight))
    before = contents(network)
    with pytest.raises(ConfigError, match=f"query: init_lora_weights='{init}', but the weight has NaN"):
        get_peft_model(network, config(target_modules=["query"], init_lora_weights=init))
    assert contents(network) == before


def test_a_start_with_a_wrong_name_is_refused_of_a_frozen_adapter_too():
    typo = config(target_modules=["query"], init_lora_weights="gausian", inference_mode=True)
    with pytest.raises(ValueError, match="'init_lora_weights' must be .* but got 'gausian'"):
        get_peft_model(Small(), typo)

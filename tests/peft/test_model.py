"""A network with adapters: which one computes, which one trains, and that no compiled graph is stale."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from small import Compiles, Small, Tiny, config, contents, graph_mode, ids, move, numbers, same

from mindpet.errors import AdapterError, ConfigError
from mindpet.graph import TrainableParamsCheckPoint, freeze_delta, load_delta
from mindpet.peft import AdapterConfig, BitFitConfig, LoraConfig, PeftModel, get_peft_model


def two(network=Small, **fields):
    """A model with the adapters 'default' and 'two'."""
    model = get_peft_model(network(), config(**fields))
    move(model, 1)
    model.add_adapter("two", config(lora_alpha=7, **fields))
    model.set_adapter("two")
    move(model, 2)
    model.set_adapter("default")
    return model


def loaded(model, folder):
    """A model with the same adapters, which do not train."""
    model.save_pretrained(folder)
    network = model.unload()
    model = PeftModel.from_pretrained(network, folder)
    model.load_adapter(folder / "two", "two")
    return model


def test_switching_copies_values_and_compiles_nothing(mode, rng, tmp_path):
    model, x = two(modules_to_save=["classifier"], bias="all"), ids(rng)
    first = numbers(model, x)
    model = loaded(model, tmp_path)
    model.set_adapter("two")
    numbers(model, x)
    with Compiles() as compiles:
        second = numbers(model, x)
        model.set_adapter("default")
        same(numbers(model, x), first)
        with model.disable_adapter():
            base = numbers(model, x)
        model.set_adapter("two")
        same(numbers(model, x), second)
    assert compiles.count == 0
    assert np.abs(first - second).max() > 1e-3 and np.abs(base - first).max() > 1e-3
    model.unload()
    same(numbers(model, x), base)


def test_adapters_of_other_shapes_and_methods_switch_too(mode, rng):
    model, x = get_peft_model(Small(), config()), ids(rng)
    model.add_adapter("wide", config(r=3, target_modules=["query"]))
    model.add_adapter("adapter", AdapterConfig(target_modules=["query"], bottleneck_size=3))
    model.add_adapter("bitfit", BitFitConfig())
    base = numbers(model, x)
    outputs = {}
    for seed, name in enumerate(model.adapters):
        model.set_adapter(name)
        move(model, seed)
        outputs[name] = numbers(model, x)
    for name, expected in outputs.items():
        model.set_adapter(name)
        same(numbers(model, x), expected)
        assert np.abs(expected - base).max() > 1e-3
        with model.disable_adapter():
            same(numbers(model, x), base)
        same(numbers(model, x), expected)


def roots(model):
    """Everything that people call a network through: itself, a Cell around it, a jit function, and a gradient."""
    around = nn.WithLossCell(model, nn.CrossEntropyLoss())
    labels = Tensor(np.zeros(4, np.int32))

    @ms.jit
    def jitted(x):
        return model(x)

    @ms.jit
    def inner(x):
        return model.network(x)

    def forward(x):
        return model(x).sum()

    gradient = ms.value_and_grad(forward, None, model.trainable_params())
    return [model, model.network, lambda x: around(x, labels), jitted, inner, lambda x: gradient(x)[0]]


CALLS = {
    "set_adapter": lambda model: model.set_adapter("two"),
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "merge_adapter": lambda model: model.merge_adapter(["two"]),
    "merge_and_unload": lambda model: model.merge_and_unload(adapter_names=["two"]),
    "unload": lambda model: model.unload(),
    "other shape": lambda model: (
        model.add_adapter("wide", config(r=4, target_modules=["query"])),
        model.set_adapter("wide"),
        move(model, 5),
    ),
    "other method": lambda model: (
        model.add_adapter("bitfit", BitFitConfig()),
        model.set_adapter("bitfit"),
        move(model, 5),
    ),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_the_next_forward_gives_the_new_answer(call, mode, rng):
    model, x = two(Tiny, target_modules=["embed", "query"]), ids(rng)
    gone = "other" in call or call in ("delete_adapter", "set_adapter", "merge_adapter")
    ways = roots(model)[: -1 if gone else None]  # the gradient is by what is gone
    before = [way(x).asnumpy() for way in ways]
    CALLS[call](model)
    after = [way(x).asnumpy() for way in ways]
    fresh = Tiny()
    ms.load_param_into_net(fresh, {p.name: p for p in model.network.get_parameters() if "mindpet" not in p.name})
    for one, other in zip(before, after):
        assert np.abs(one - other).max() > 1e-4
    for way in after[1:2] + after[3:5]:
        np.testing.assert_allclose(way, after[0], atol=1e-6)
    if call in ("merge_and_unload", "unload"):
        np.testing.assert_allclose(after[0], numbers(fresh, x), atol=1e-6)


@pytest.mark.parametrize("call", ["disable_adapter", "adapter_names"])
def test_contexts_and_batches_leave_no_trace(call, mode, rng):
    model, x = two(Tiny, target_modules=["embed", "query"]), ids(rng)
    ways = roots(model)
    before = [way(x).asnumpy() for way in ways]
    if call == "disable_adapter":
        with model.disable_adapter():
            for one, way in zip(before, ways):
                assert np.abs(one - way(x).asnumpy()).max() > 1e-4
    else:
        model(x, adapter_names=["two", "default", "__base__", "two"])
    for one, way in zip(before, ways):
        same(way(x).asnumpy(), one)


def test_each_row_of_a_batch_can_have_its_own_adapter(mode, rng):
    model, x = two(), ids(rng)
    model.add_adapter("behind", AdapterConfig(target_modules=["mlp.0", "turned"], bottleneck_size=3))
    model.set_adapter("behind")
    move(model, 3)
    expected = {}
    for name in ("default", "two", "behind"):
        model.set_adapter(name)
        expected[name] = numbers(model, x)
    with model.disable_adapter():
        expected["__base__"] = numbers(model, x)
    for names in (["two", "default", "__base__", "behind"], ["behind", "two", "two", "default"]):
        with Compiles() as compiles:
            got = model(x, adapter_names=names).asnumpy()
        np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)
    assert compiles.count == 0  # the second time
    same(numbers(model, x), expected["behind"])
    with pytest.raises(ValueError, match="another number of rows than there are names"):
        model(x, adapter_names=["two"] * 3).asnumpy()
    same(numbers(model, x), expected["behind"])


def test_inputs_can_have_names(mode, rng):
    model, x = two(), ids(rng)
    same(model(ids=x).asnumpy(), numbers(model, x))
    names = ["two", "default", "two", "__base__"]
    got, expected = model(ids=x, adapter_names=names), model(x, adapter_names=names)
    same(got.asnumpy(), expected.asnumpy())


def test_rows_follow_what_is_trained(mode, rng):
    model, x = two(), ids(rng)
    model(x, adapter_names=["two"] * 4)
    model.set_adapter("two")
    move(model, 9)
    np.testing.assert_allclose(model(x, adapter_names=["two"] * 4).asnumpy(), numbers(model, x), atol=1e-5)


def test_adapters_that_cannot_share_a_batch():
    model = two(modules_to_save=["classifier"])
    with pytest.raises(AdapterError, match="'two' cannot share a batch"):
        model(ids(np.random.default_rng(0)), adapter_names=["two"] * 4)
    with pytest.raises(AdapterError, match="there is no adapter 'three'; there are"):
        model(ids(np.random.default_rng(0)), adapter_names=["three"] * 4)


def train(model, x, steps=3):
    labels = Tensor(np.arange(4).astype(np.int32) % 3)
    optimizer = nn.Adam(model.trainable_params(), 0.05)
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), optimizer).set_train()
    return [float(step(x, labels).asnumpy()) for _ in range(steps)]


def test_only_the_adapter_in_place_trains(mode, rng):
    model, x = two(), ids(rng)
    base = {name: value for name, value, _ in contents(model.network) if "mindpet" not in name}
    model.set_adapter("two")
    before = {
        name: {key: value.copy() for key, value in model.adapters[name].values.items()} for name in model.adapters
    }
    losses = train(model, x)
    assert losses[-1] < losses[0]
    model.set_adapter("default")
    assert {name: value for name, value, _ in contents(model.network) if "mindpet" not in name} == base
    for name, moved in (("default", False), ("two", True)):
        same = [np.array_equal(value, before[name][key]) for key, value in model.adapters[name].values.items()]
        assert all(same) != moved
    assert {p.name.rsplit(".", 1)[-1] for p in model.trainable_params()} == {
        "mindpet_delta_lora_a",
        "mindpet_delta_lora_b",
    }


def test_a_frozen_adapter_trains_only_after_prepare_for_training():
    model = get_peft_model(Small(), config(inference_mode=True))
    assert not model.trainable_params()
    params = model.prepare_for_training()
    assert params and model.training and model.network.query.training
    assert {id(param) for param in params} == {id(param) for param in model.trainable_params()}


def test_a_training_that_goes_on_after_switching_there_and_back_is_the_same(mode, rng):
    x, ends = ids(rng), []
    for there_and_back in (False, True):
        ms.set_seed(3)
        model = two()
        labels = Tensor(np.arange(4).astype(np.int32) % 3)
        optimizer = nn.Momentum(model.trainable_params(), 0.05, 0.9)
        step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), optimizer).set_train()
        for number in range(4):
            step(x, labels)
            if there_and_back and number == 1:
                model.set_adapter("two")
                model.set_adapter("default")
        ends.append(numbers(model.set_train(False), x))
    same(*ends)


def test_print_trainable_parameters(capsys):
    model = get_peft_model(nn.SequentialCell(nn.Dense(8, 8), nn.Dense(8, 3)), LoraConfig(r=2, target_modules=["0"]))
    assert model.get_nb_trainable_parameters() == (32, 99 + 32)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 32 || all params: 131 || trainable%: 24.4275\n"
    model.add_adapter("two", LoraConfig(r=4, target_modules=["0"], modules_to_save=["1"]))
    model.set_adapter("two")
    assert model.get_nb_trainable_parameters() == (64 + 27, 99 + 32 + 64 + 27)


def test_what_there_is():
    model = two()
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default", "two"] and model.peft_config["two"].lora_alpha == 7
    assert model.get_base_model() is model.network and model.by_hand is model.network.by_hand
    with pytest.raises(AttributeError):
        _ = model.nothing


def test_delete_adapter(mode, rng):
    model, x = two(), ids(rng)
    model.set_adapter("two")
    expected = numbers(model, x)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapter == "two"
    same(numbers(model, x), expected)
    with pytest.raises(AdapterError, match="'two' is the only adapter"):
        model.delete_adapter("two")


@pytest.mark.parametrize("name", ["", "a/b", "..", "__base__", "a b", "default", "adapter_model.safetensors"])
def test_names_that_cannot_be(name):
    model = get_peft_model(Small(), config())
    with pytest.raises(AdapterError, match="'adapter_name'"):
        model.add_adapter(name, config())
    with pytest.raises(TypeError, match="'adapter_name' must be a str"):
        model.add_adapter(3, config())


def test_a_second_wrap_is_refused():
    model = get_peft_model(Small(), config())
    for network in (model.network, model):
        with pytest.raises(ConfigError, match="has adapters already; use add_adapter"):
            get_peft_model(network, config())


def test_calls_that_do_not_fit_the_state():
    model = two()
    with pytest.raises(AdapterError, match="there is no adapter 'three'"):
        model.set_adapter("three")
    with model.disable_adapter():
        with pytest.raises(AdapterError, match="set_adapter: not inside of disable_adapter"):
            model.set_adapter("two")
        with pytest.raises(AdapterError, match="unload: not inside of disable_adapter"):
            model.unload()
        with model.disable_adapter():
            pass
    model.merge_adapter()
    for call in (
        lambda: model.set_adapter("two"),
        lambda: model.add_adapter("three", config()),
        lambda: model.delete_adapter("two"),
        lambda: model.merge_adapter(),
        lambda: model.disable_adapter().__enter__(),
    ):
        with pytest.raises(AdapterError, match="an adapter is merged; call unmerge_adapter"):
            call()
    model.unmerge_adapter()
    with pytest.raises(AdapterError, match="no adapter is merged"):
        model.unmerge_adapter()


def product(model, path):
    layer = dict(model.network.cells_and_names())[path].mindpet_delta
    a, b, scaling = layer.mindpet_delta_lora_a, layer.mindpet_delta_lora_b, layer.mindpet_lora_scaling
    return float(scaling.asnumpy()) * b.asnumpy() @ a.asnumpy()


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_add_weighted_adapter(combination):
    targets = ["embed", "query", "turned"]
    model = get_peft_model(Small(), config(target_modules=targets))
    move(model, 1)
    model.add_adapter("two", config(target_modules=targets[:2]))
    model.set_adapter("two")
    move(model, 2)
    parts = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        parts[name] = {path: product(model, path) for path in (targets if name == "default" else targets[:2])}
    rank = 4 if combination == "svd" else None
    model.add_weighted_adapter(["default", "two"], [0.5, -2.0], "sum", combination, rank)
    assert model.active_adapter == "two"
    model.set_adapter("sum")
    assert not model.trainable_params() and model.peft_config["sum"].r == (2 if combination == "linear" else 4)
    for path in targets:
        expected = 0.5 * parts["default"][path] - 2.0 * parts["two"].get(path, 0)
        if combination == "linear" and path != "turned":
            continue  # sums A and B by themselves, which is compared with PEFT
        np.testing.assert_allclose(product(model, path), expected, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((["default"], [1.0, 2.0], "sum"), ValueError, "'weights' must be a list of finite numbers, one for each of 1"),
        ((["default"], [1.0], "sum", "mean"), ValueError, "'combination_type' must be one of"),
        ((["nix"], [1.0], "sum"), AdapterError, "no adapter 'nix'"),
        ((["default"], [1.0], "default"), AdapterError, "there is an adapter 'default' already"),
        ((["default", "wide"], [1.0, 1.0], "sum", "linear"), AdapterError, r"'linear' needs equal ranks, .* \[2, 5\]"),
        ((["dora"], [1.0], "sum"), AdapterError, "has more than A and B"),
        ((["adapter"], [1.0], "sum"), AdapterError, "an adapter is of ADAPTER"),
        ((["conv"], [1.0], "sum"), AdapterError, "an adapter is beside convolutions"),
    ],
)
def test_sums_that_cannot_be(arguments, error, match):
    model = get_peft_model(Small(), config(target_modules=["query"]))
    model.add_adapter("wide", config(target_modules=["query"], r=5))
    model.add_adapter("dora", config(target_modules=["query"], use_dora=True))
    model.add_adapter("conv", config(target_modules=["conv"]))
    model.add_adapter("adapter", AdapterConfig(target_modules=["query"]))
    with pytest.raises(error, match=match):
        model.add_weighted_adapter(*arguments)


def test_works_with_model_train_freeze_delta_and_the_checkpoint_callback(mode, rng, tmp_path):
    import mindspore.dataset as ds
    from mindspore.train import CheckpointConfig, Model

    ms.set_seed(3)
    network = Small()
    model = get_peft_model(network, config(modules_to_save=["classifier"]))
    freeze_delta(model, "lora", exclude=["classifier.*"])
    x, labels = rng.integers(0, 10, (16, 5)).astype(np.int32), (np.arange(16) % 3).astype(np.int32)
    data = ds.NumpySlicesDataset({"x": x, "labels": labels}, shuffle=False).batch(4)
    checkpoint = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(save_checkpoint_steps=4))
    optimizer = nn.Adam(model.trainable_params(), 0.01)
    Model(model, nn.CrossEntropyLoss(), optimizer).train(1, data, callbacks=[checkpoint], dataset_sink_mode=False)
    expected = numbers(model.set_train(False), Tensor(x))
    model.set_adapter("default")
    values = {name: value.copy() for name, value in model.adapters["default"].values.items()}
    move(model, 1)
    load_delta(model, checkpoint.latest_ckpt_file_name)
    same(numbers(model, Tensor(x)), expected)
    after = model.adapters["default"].values
    assert all(np.array_equal(value, after[name]) for name, value in values.items())


def test_gradients_reach_the_adapter_and_nothing_else(mode, rng):
    model, x = two(), ids(rng)

    def forward(x):
        return ops.square(model(x)).sum()

    _, gradients = ms.value_and_grad(forward, None, model.trainable_params())(x)
    assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)
    assert len(gradients) == 12


def test_references_outside_of_the_network_see_the_delta(rng):
    network, x = Small(), ids(rng)
    layer = network.by_hand[0]
    before = numbers(layer, network.embed(x))
    move(get_peft_model(network, config(target_modules=["query"])), 0)
    assert np.abs(numbers(layer, network.embed(x)) - before).max() > 1e-3


def test_a_model_without_adapters_is_the_network(rng):
    network, x = Small(), ids(rng)
    model = PeftModel(network)
    same(numbers(model, x), numbers(network, x))
    assert model.active_adapters == []
    with model.disable_adapter():
        same(numbers(model, x), numbers(network, x))
    with pytest.raises(AdapterError, match="merge: there is no adapter"):
        model.merge_adapter()
    assert model.unload() is network
    assert graph_mode() is False

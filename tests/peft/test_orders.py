"""Calls in other orders than the usual one: no adapter, and no base, gets values that are not its own."""

import copy
import os

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from small import LABELS, VOCAB, WIDTH, Compiles, Small, Tied, Tiny, graph_mode, ids, move, numbers, same

from mindpet.errors import AdapterError, ConfigError, MergeError
from mindpet.graph import freeze_delta
from mindpet.network.values import forget_graphs
from mindpet.peft import (
    AdaLoraConfig,
    AdapterConfig,
    BitFitConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)

KINDS = {
    "lora": LoraConfig(r=2, lora_alpha=3, target_modules=["query"]),
    "head": LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
    "bias": LoraConfig(r=2, target_modules=["query"], bias="all"),
    "pissa": LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"),
    "olora": LoraConfig(r=2, target_modules=["query"], init_lora_weights="olora"),
    "dora": LoraConfig(r=2, target_modules=["query", "embed"], use_dora=True),
    "dora of pissa": LoraConfig(r=2, target_modules=["query"], use_dora=True, init_lora_weights="pissa"),
    "bitfit": BitFitConfig(),
    "tokens": TrainableTokensConfig(token_indices=[3, 1], target_modules=["embed"]),
    "copies": LNTuningConfig(target_modules=["query"]),
    "adapter": AdapterConfig(target_modules=["query"], bottleneck_size=3),
    "ia3": IA3Config(target_modules=["query"]),
    "vera": VeraConfig(r=2, target_modules=["query"], bias="vera_only"),
    "hira": HiraConfig(r=2, target_modules=["query", "embed"]),
    "miss": MissConfig(r=2, target_modules=["query"], bias="miss_only"),
    "bat": MissConfig(r=2, target_modules=["query"], init_weights="bat"),
    "adalora": AdaLoraConfig(init_r=2, target_r=1, total_step=3, target_modules=["query"], bias="lora_only"),
    "oft": OFTConfig(oft_block_size=4, target_modules=["query"]),
    "loha": LoHaConfig(r=2, target_modules=["query"]),
    "lokr": LoKrConfig(r=1, target_modules=["query"]),
}
# All kinds, and in graph mode, where each is some compiles of a second, those that are handled in different ways.
IN_MODES = pytest.mark.parametrize(
    "mode, kind",
    [
        *((ms.PYNATIVE_MODE, kind) for kind in KINDS),
        *((ms.GRAPH_MODE, kind) for kind in ("lora", "head", "dora of pissa", "tokens", "vera")),
    ],
    indirect=["mode"],
)


def state(network):
    """The base's own parameters, by name."""
    return {
        param.name: param.asnumpy().copy()
        for _, cell in network.cells_and_names()
        for param in cell._params.values()
        if "mindpet" not in param.name
    }


def values(model):
    """What every adapter holds."""
    return {name: {k: v.copy() for k, v in adapter.values.items()} for name, adapter in model.adapters.items()}


def equal(one, other):
    """Whether two dicts of arrays are equal bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)


def step_of(model, optimizer=None, rate=0.1):
    """A training step for the active adapter."""
    optimizer = optimizer or nn.Momentum(model.trainable_params(), rate, 0.9)
    return nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), optimizer).set_train()


def labels(rows=4):
    return Tensor((np.arange(rows) % LABELS).astype(np.int32))


def another_base(network, seed=5):
    """Values for every parameter of a network."""
    rng = np.random.default_rng(seed)
    return {
        name: Parameter(Tensor(rng.normal(size=value.shape).astype(np.float32)), name=name)
        for name, value in state(network).items()
    }


# One adapter's step and another adapter


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kind", ["lora", "head"])
def test_a_step_never_reaches_an_adapter_that_it_was_not_made_for(kind, trains, mode, rng):
    model, x = get_peft_model(Tiny(), KINDS[kind]), ids(rng)
    other = LoraConfig(**{**vars(KINDS[kind]), "inference_mode": not trains})
    model.add_adapter("two", other)
    step = step_of(model)
    step(x, labels())
    model.set_adapter("two")
    before, base = values(model)["two"], state(model.network)
    try:
        step(x, labels())
    except (RuntimeError, ValueError):
        assert graph_mode()  # refused: the step's parameters are not in the network
    assert equal(values(model)["two"], before) and equal(state(model.network), base)
    model.set_adapter("default")
    model.set_adapter("two")
    assert equal(values(model)["two"], before)


def test_switching_among_inference_adapters_compiles_nothing(rng, tmp_path):
    with_mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        model, x = PeftModel(Tiny()), ids(rng)
        for name, alpha in (("one", 2), ("two", 9), ("three", 1)):
            model.add_adapter(name, LoraConfig(r=2, lora_alpha=alpha, target_modules=["query"], inference_mode=True))
        model.set_adapter("one")
        numbers(model, x)
        with Compiles() as compiles:
            for name in ("two", "three", "one"):
                model.set_adapter(name)
                numbers(model, x)
        assert compiles.count == 0
    finally:
        ms.set_context(mode=with_mode)


def test_an_adapter_that_comes_to_train_leaves_those_of_its_shapes_alone(mode, rng):
    model, x = PeftModel(Tiny()), ids(rng)
    for name in ("one", "two"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["query"], inference_mode=True, init_lora_weights=False))
    model.set_adapter("one")
    before = values(model)
    model.prepare_for_training("one")
    assert equal(values(model)["one"], before["one"]) and model.trainable_params()
    step_of(model)(x, labels())
    assert not equal(values(model)["one"], before["one"]) and equal(values(model)["two"], before["two"])


def test_an_adapter_that_somebody_lets_train_shares_nothing_any_more(mode, rng):
    model, x = PeftModel(Tiny()), ids(rng)
    for name in ("one", "two"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["query"], inference_mode=True, init_lora_weights=False))
    model.set_adapter("one")
    freeze_delta(model, "lora")
    step, before = step_of(model), values(model)
    step(x, labels())
    model.set_adapter("two")
    try:
        step(x, labels())
    except (RuntimeError, ValueError):
        assert graph_mode()
    assert equal(values(model)["two"], before["two"]) and not equal(values(model)["one"], before["one"])


# The base is loaded after the adapter came


@IN_MODES
def test_a_fresh_adapter_follows_a_base_that_is_loaded_later(kind, mode, rng):
    network, plain, x = Tiny(), Tiny(), ids(rng)
    model = get_peft_model(network, KINDS[kind])
    model.add_adapter("other", KINDS["dora"])
    loaded = another_base(plain)
    ms.load_param_into_net(plain, loaded)
    ms.load_param_into_net(network, loaded)
    expected = numbers(plain, x)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        np.testing.assert_allclose(numbers(model, x), expected, atol=2e-5)
    with model.disable_adapter():
        np.testing.assert_allclose(numbers(model, x), expected, atol=1e-6)
    move(model, 3)
    assert np.abs(numbers(model, x) - expected).max() > 1e-3
    assert equal(state(model.unload()), state(plain))
    same(numbers(network, x), expected)


@pytest.mark.parametrize("kind", ["head", "bias", "bitfit"])
def test_what_was_trained_stays_when_the_base_is_loaded(kind, mode, rng):
    network, x = Tiny(), ids(rng)
    model = get_peft_model(network, KINDS[kind])
    move(model, 1)
    before = values(model)
    ms.load_param_into_net(network, another_base(network))
    assert equal(values(model)["default"], before["default"])
    with model.disable_adapter():
        ms.load_param_into_net(network, another_base(network, 8))
        plain = Tiny()
        ms.load_param_into_net(plain, another_base(plain, 8))
        same(numbers(model, x), numbers(plain, x))
    assert equal(values(model)["default"], before["default"])
    assert equal(state(model.unload()), state(plain))


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_a_base_loaded_while_merged_is_merged_too(kind, mode, rng):
    network, x = Tiny(), ids(rng)
    model = get_peft_model(network, LoraConfig(**{**vars(KINDS[kind]), "target_modules": ["query"]}))
    move(model, 1)
    model.merge_adapter()
    numbers(model, x)
    ms.load_param_into_net(network, another_base(network))
    merged = numbers(model, x)
    model.unmerge_adapter()
    np.testing.assert_allclose(merged, numbers(model, x), atol=2e-5)
    plain = Tiny()
    ms.load_param_into_net(plain, another_base(plain))
    assert equal(state(model.unload()), state(plain))


# Flags of training


def dropouts(model):
    """Whether the Dropout of each delta is at work."""
    return [cell.training for name, cell in model.cells_and_names() if name.endswith("lora_dropout")]


def test_deltas_train_when_their_layers_do():
    drop = {"target_modules": ["query"], "lora_dropout": 0.5}
    network = Tiny().set_train()
    model = get_peft_model(network, LoraConfig(r=2, **drop))
    assert model.training and dropouts(model) == [True]
    model.add_adapter("wide", LoraConfig(r=3, **drop))
    model.set_adapter("wide")
    assert dropouts(model) == [True]
    model.set_train(False)
    model.set_adapter("default")
    assert dropouts(model) == [False]
    model.set_train(True)
    with model.disable_adapter():
        model.set_train(False)
    model.set_adapter("wide")
    assert dropouts(model) == [False]


# Tied weights


@pytest.mark.parametrize("module", ["head", "embed"])
def test_a_module_to_save_with_a_tied_weight_has_its_own(module, mode, rng, tmp_path):
    network, x = Tied(), ids(rng)
    other = "embed" if module == "head" else "head"
    table = network.embed.embedding_table.asnumpy()
    model = get_peft_model(network, LoraConfig(r=2, target_modules=[other], modules_to_save=[module]))
    move(model, 1)
    copy = getattr(getattr(network, module), "weight" if module == "head" else "embedding_table").asnumpy()
    tuned = {module: copy, other: None}
    delta = getattr(network, other).mindpet_delta
    a, b = delta.mindpet_delta_lora_a.asnumpy(), delta.mindpet_delta_lora_b.asnumpy()
    tuned[other] = table + delta.scaling * (b @ a if other == "head" else (b @ a).T)
    expected = tuned["embed"][x.asnumpy()] @ tuned["head"].T
    np.testing.assert_allclose(numbers(model, x), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        np.testing.assert_allclose(numbers(model, x), table[x.asnumpy()] @ table.T, atol=1e-5)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    np.testing.assert_allclose(numbers(again, x), expected, atol=1e-5)
    with pytest.raises(MergeError, match="has its weight in common with"):
        again.merge_and_unload()
    np.testing.assert_allclose(numbers(again, x), expected, atol=1e-5)
    merged = again.merge_and_unload(untie_weights=True)
    np.testing.assert_allclose(numbers(merged, x), expected, atol=1e-5)


# Merging


def test_merging_another_adapter_takes_the_active_one_out(mode, rng):
    model, x = get_peft_model(Tiny(), KINDS["lora"]), ids(rng)
    move(model, 1)
    expected = numbers(model, x)
    for kind in ("head", "pissa", "bitfit", "adapter", "dora"):
        model.add_adapter(kind, KINDS[kind])
        model.set_adapter(kind)
        move(model, 2)
        own, base = numbers(model, x), state(model.network)
        model.merge_adapter(["default"])
        np.testing.assert_allclose(numbers(model, x), expected, atol=1e-5)
        model.unmerge_adapter()
        same(numbers(model, x), own)
        assert equal(state(model.network), base)


@pytest.mark.parametrize("active", ["head", "pissa", "dora", "bias"])
def test_a_merge_that_fails_changes_nothing(active, mode, rng):
    model, x = get_peft_model(Tiny(), KINDS[active]), ids(rng)
    move(model, 1)
    model.add_adapter("two", KINDS["lora"])
    model.adapters["two"].write(
        {key: np.full_like(value, np.nan) for key, value in values(model)["two"].items() if key.endswith("_b")}
    )
    before, base, out = values(model), state(model.network), numbers(model, x)
    for names in (["two"], ["two", "two"], ["default", "two"], ["nix"], []):
        with pytest.raises((MergeError, AdapterError)):
            model.merge_adapter(names)
        same(numbers(model, x), out)
        assert equal(values(model)["default"], before["default"]) and equal(state(model.network), base)
    model.unmerge_adapter() if model.merged_adapters else model.set_adapter("default")
    same(numbers(model, x), out)


def test_an_adapter_merges_where_none_is_active(mode, rng):
    network, x = Tiny(), ids(rng)
    expected, base = numbers(network, x), state(network)
    model = PeftModel(network)
    model.add_adapter("one", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    same(numbers(model, x), expected)
    same(model(x, adapter_names=["__base__"] * 4).asnumpy(), expected)
    model.merge_adapter(["one"])
    merged = numbers(model, x)
    assert np.abs(merged - expected).max() > 1e-3
    model.unmerge_adapter()
    assert equal(state(network), base) and model.active_adapter is None
    same(numbers(model, x), expected)
    same(numbers(model.merge_and_unload(adapter_names=["one"]), x), merged)


def test_a_head_goes_on_training_while_its_adapter_is_merged(mode, rng, tmp_path):
    model, x = get_peft_model(Tiny(), KINDS["head"]), ids(rng)
    move(model, 1)
    base = state(model.network)
    model.merge_adapter()
    assert {param.name for param in model.trainable_params()} == {
        "classifier.mindpet_trained_weight",
        "classifier.mindpet_trained_bias",
    }
    before = values(model)["default"]
    step_of(model)(x, labels())
    model.set_train(False)
    merged, after = numbers(model, x), values(model)["default"]
    changed = {key for key in after if not np.array_equal(after[key], before[key])}
    assert changed == {"classifier.mindpet_trained_weight", "classifier.mindpet_trained_bias"}
    model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    np.testing.assert_allclose(numbers(model, x), merged, atol=1e-5)
    assert equal(state(model.unload()), base)
    again = PeftModel.from_pretrained(model.network, tmp_path)
    np.testing.assert_allclose(numbers(again, x), merged, atol=1e-5)


@pytest.mark.parametrize("context", ["disable", "merge"])
def test_a_delta_that_is_trained_while_it_is_out_is_an_error(context, mode, rng):
    model, x = get_peft_model(Tiny(), KINDS["bitfit" if context == "disable" else "lora"]), ids(rng)
    move(model, 1)
    step = step_of(model)
    step(x, labels())  # with momentum, so that even a gradient of zero moves
    before, base = values(model), state(model.network)
    with pytest.raises(AdapterError, match="were written to meanwhile"):
        if context == "disable":
            with model.disable_adapter():
                step(x, labels())
        else:
            model.merge_adapter()
            step(x, labels())
            model.unmerge_adapter()
    assert equal(values(model)["default"], before["default"]) and equal(state(model.network), base)
    assert not model.merged_adapters
    step(x, labels())


# Values that are not numbers


@IN_MODES
def test_a_diverged_adapter_leaves_the_base_alone(kind, mode, rng):
    network, x = Tiny(), ids(rng)
    expected, base = numbers(network, x), state(network)
    model = get_peft_model(network, KINDS[kind])
    for param in model.trainable_params():
        param.set_data(Tensor(np.full(param.shape, np.nan, np.float32)))
    assert np.isnan(numbers(model, x)).any()
    with model.disable_adapter():
        np.testing.assert_allclose(numbers(model, x), expected, atol=1e-6)
    assert np.isnan(numbers(model, x)).any()
    model.add_adapter("two", KINDS["lora"])
    model.set_adapter("two")
    np.testing.assert_allclose(numbers(model, x), expected, atol=1e-6)
    assert equal(state(model.unload()), base)
    same(numbers(network, x), expected)


# Fresh adapters beside others


@pytest.mark.parametrize("active", ["head", "pissa", "bias", "bitfit", "dora of pissa"])
def test_a_fresh_adapter_is_the_identity_whatever_is_active(active, mode, rng):
    network, x = Tiny(), ids(rng)
    expected = numbers(network, x)
    model = get_peft_model(network, KINDS[active])
    move(model, 1)
    dora = LoraConfig(r=2, target_modules=["query", "classifier"], use_dora=True)
    for name, peft_config in (("wide dora", dora), *KINDS.items()):
        name = name.replace(" ", "-")
        model.add_adapter(name, peft_config)
        model.set_adapter(name)
        np.testing.assert_allclose(numbers(model, x), expected, atol=2e-6)
        model.set_adapter("default")


# Recompute


@pytest.mark.parametrize("where", ["network", "query"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_recompute_goes_with_adapters_in_both_orders(where, order, mode, rng):
    x, ends = ids(rng), []
    for recompute in (False, True):
        ms.set_seed(3)
        np.random.seed(3)
        network = Block()
        cell = network.inner if where == "network" else network.inner.query
        if recompute and order == "before":
            cell.recompute()
        model = get_peft_model(network, LoraConfig(r=2, target_modules=["query"], init_lora_weights="gaussian"))
        if recompute and order == "after":
            cell.recompute()
        step = step_of(model)
        for _ in range(3):
            step(x, labels())
        ends.append(values(model)["default"])
        forget_graphs()
        network = model.unload()
        optimizer = nn.SGD(network.trainable_params(), 0.1)
        before = state(network)
        nn.TrainOneStepCell(nn.WithLossCell(network, nn.CrossEntropyLoss()), optimizer).set_train()(x, labels())
        if graph_mode() or not ms.__version__.startswith("2.7."):  # which has no gradient there of what was frozen
            assert not equal(state(network), before)
    assert all(np.allclose(ends[0][key], ends[1][key], atol=1e-5) for key in ends[0])
    assert np.abs(ends[0]["inner.query.mindpet_delta_lora_b"]).max() > 1e-4


class Inner(nn.Cell):
    def __init__(self):
        super().__init__()
        self.query = nn.Dense(WIDTH, WIDTH)

    def construct(self, x):
        return ops.tanh(self.query(x))


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.classifier = nn.Embedding(VOCAB, WIDTH), Inner(), nn.Dense(WIDTH, LABELS)

    def construct(self, ids):
        return self.classifier(self.inner(self.embed(ids)).mean(1))


# Wraps, and what would be lost


@pytest.mark.parametrize("kind", ["lora", "bitfit", "head"])
def test_a_network_with_adapters_takes_no_second_wrap(kind):
    network = Tiny()
    model = get_peft_model(network, KINDS[kind])
    around = nn.SequentialCell(model)
    for second in (network, model, around):
        for wrap in (
            lambda second=second: PeftModel(second),
            lambda second=second: get_peft_model(second, KINDS[kind]),
        ):
            with pytest.raises(ConfigError, match="has adapters already"):
                wrap()
    assert PeftModel(model.unload()).active_adapters == []
    injected = inject_adapter_in_model(KINDS[kind], Tiny())
    with pytest.raises(ConfigError, match="has adapters already"):
        get_peft_model(injected, KINDS[kind])


def test_what_trains_but_is_in_no_adapter_is_not_lost_in_silence(tmp_path):
    model = get_peft_model(Tiny(), KINDS["lora"])
    freeze_delta(model, "lora", exclude=["classifier.*"])
    with pytest.raises(
        AdapterError, match=r"\['classifier.weight', 'classifier.bias'\] are trainable, but belong to no"
    ):
        model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert model.network.classifier.weight.requires_grad  # it is not frozen again behind one's back
    model = get_peft_model(Tiny(), KINDS["head"])
    freeze_delta(model, "lora", exclude=["classifier.*"])
    model.save_pretrained(tmp_path)
    assert {param.name.split(".")[-1] for param in model.trainable_params()} == {
        "mindpet_delta_lora_a",
        "mindpet_delta_lora_b",
        "mindpet_trained_weight",
        "mindpet_trained_bias",
    }


# Errors and where they leave the model


def test_an_error_inside_of_disable_adapter_leaves_no_trace(mode, rng):
    model, x = get_peft_model(Tiny(), KINDS["head"]), ids(rng)
    move(model, 1)
    expected, before = numbers(model, x), values(model)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            with model.disable_adapter():
                raise ZeroDivisionError
        same(numbers(model, x), expected)
        assert equal(values(model)["default"], before["default"]) and model.trainable_params()


def test_an_error_before_disable_adapter_leaves_no_trace(monkeypatch, rng):
    model, x = get_peft_model(Tiny(), KINDS["lora"]), ids(rng)
    move(model, 1)
    expected = numbers(model, x)
    delta = model.network.query.mindpet_delta

    def broken():
        raise OSError("no device")

    object.__setattr__(delta, "reset", broken)
    with pytest.raises(OSError, match="no device"):
        with model.disable_adapter():
            pass
    object.__delattr__(delta, "reset")
    same(numbers(model, x), expected)
    with model.disable_adapter():
        assert np.abs(numbers(model, x) - expected).max() > 1e-4


@pytest.mark.parametrize("alpha, dtype", [(2e5, ms.float16), (1e-12, ms.float16)])
def test_a_scale_that_the_layer_cannot_hold_is_refused(alpha, dtype):
    network = nn.SequentialCell(nn.Dense(8, 8, dtype=dtype))
    with pytest.raises(ConfigError, match="0: the scale, .* must be a number of Float16"):
        get_peft_model(network, LoraConfig(r=1, lora_alpha=alpha, target_modules=["0"]))


def test_a_mixed_batch_that_is_refused_leaves_those_that_are_not_as_they_were(mode, rng):
    model, x = get_peft_model(Small(), LoraConfig(r=2, target_modules=["query"]), "lora"), ids(rng)
    move(model, 1)
    lora = numbers(model, x)
    with model.disable_adapter():
        base = numbers(model, x)
    model.add_adapter("behind", AdapterConfig(target_modules=["query"], bottleneck_size=3))
    for first, rows in (("lora", [lora, base]), ("__base__", [base, lora])):
        names = [first, {"lora": "__base__", "__base__": "lora"}[first]] * 2
        expected = np.stack([rows[index % 2][index] for index in range(4)])
        same(model(x, adapter_names=names).asnumpy(), expected)
        with pytest.raises(ConfigError, match="query has deltas before and behind its activation"):
            model(x, adapter_names=["lora", "behind"] * 2)
        same(model(x, adapter_names=names).asnumpy(), expected)


@pytest.mark.parametrize("names", [[], ["two"] * 3, ["two"] * 5, ["nix"] * 4])
def test_adapter_names_that_do_not_fit_are_one_error(names, mode, rng):
    model, x = get_peft_model(Tiny(), KINDS["lora"]), ids(rng)
    model.add_adapter("two", KINDS["lora"])
    before = numbers(model, x)
    with pytest.raises(AdapterError, match="adapter_names: "):
        model(x, adapter_names=names)
    same(numbers(model, x), before)


def test_mixed_batches_have_one_graph_for_all_adapters(rng):
    with_mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        model, x = get_peft_model(Tiny(), KINDS["lora"]), ids(rng)
        expected = {"__base__": numbers(model, x)}
        for seed, name in enumerate(("two", "three", "pissa")):
            model.add_adapter(name, KINDS["pissa" if name == "pissa" else "lora"])
            model.set_adapter(name)
            move(model, seed)
            expected[name] = numbers(model, x)
        batches = (["two", "three"] * 2, ["three"] * 4, ["__base__", "two", "pissa", "two"], ["pissa"] * 4)
        with Compiles() as compiles:
            for names in batches:
                got = model(x, adapter_names=names).asnumpy()
                np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)
        assert compiles.count == 1
    finally:
        ms.set_context(mode=with_mode)


def test_a_batch_of_the_base_alone_where_no_adapter_can_be_mixed(mode, rng):
    network, x = Tiny(), ids(rng)
    expected = numbers(network, x)
    model = get_peft_model(network, KINDS["bitfit"])
    move(model, 1)
    same(model(x, adapter_names=["__base__"] * 4).asnumpy(), expected)


@pytest.mark.parametrize("kind", ["cat", "linear", "svd", "ties"])
def test_a_sum_on_a_layer_that_stands_in_two_places(kind, rng, tmp_path):
    ms.set_seed(3)
    model, x = get_peft_model(Small(), LoraConfig(r=2, target_modules=["shared"])), ids(rng)
    move(model, 1)
    expected = numbers(model, x)
    density = 1.0 if kind == "ties" else None
    model.add_weighted_adapter(["default"], [1.0], "sum", kind, density=density)
    model.set_adapter("sum")
    np.testing.assert_allclose(numbers(model, x), expected, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "sum")
    np.testing.assert_allclose(numbers(again, x), expected, atol=1e-5)


def test_mixed_precision_by_amp_after_wrapping(rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MindSpore writes the source of the network that it rewrites
    model, x = get_peft_model(Tiny(), KINDS["lora"]), ids(rng)
    move(model, 1)
    expected = numbers(model, x)
    for level in ("O1", "O2", "O3"):
        np.testing.assert_allclose(numbers(ms.amp.auto_mixed_precision(model, level), x), expected, atol=2e-2)


# What reviewers of the rules above found


def test_mixed_batches_and_compiled_functions_inside_of_the_network(rng):
    class Jitted(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.classifier = nn.Embedding(VOCAB, WIDTH), Compiled(), nn.Dense(WIDTH, LABELS)

        def construct(self, ids):
            return self.classifier(self.inner(self.embed(ids)).mean(1))

    class Compiled(nn.Cell):
        def __init__(self):
            super().__init__()
            self.query = nn.Dense(WIDTH, WIDTH)

        @ms.jit
        def construct(self, x):
            return self.query(x)

    model, x = get_peft_model(Jitted(), KINDS["lora"]), ids(rng)
    move(model, 1)
    model.add_adapter("two", KINDS["lora"])
    model.set_adapter("two")
    move(model, 2)
    expected = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        expected[name] = numbers(model, x)
    names = ["default", "two", "two", "default"]
    for _ in range(2):
        got = model(x, adapter_names=names).asnumpy()
        np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)
        same(numbers(model, x), expected["two"])


@pytest.mark.parametrize("first", [True, False])
def test_mixed_batches_have_the_dropout_of_the_mode_that_the_network_is_in(first, mode, rng):
    model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["query"], lora_dropout=0.5))
    move(model, 1)
    x = ids(rng)
    for training in (first, not first):
        model.set_train(training)
        outputs = [model(x, adapter_names=["default"] * 4).asnumpy() for _ in range(4)]
        assert any(np.abs(out - outputs[0]).max() > 1e-5 for out in outputs) == training


def test_adapters_of_one_shape_start_from_the_base_each_in_its_way():
    network = Tiny()
    model = PeftModel(network)
    for init in ("pissa", "olora"):
        fields = {"r": 2, "target_modules": ["query"], "init_lora_weights": init, "inference_mode": True}
        model.add_adapter(init, LoraConfig(**fields))
    ms.load_param_into_net(network, another_base(network))
    expected = PeftModel(Tiny())
    ms.load_param_into_net(expected.network, another_base(network))
    for init in ("pissa", "olora"):
        expected.add_adapter(init, LoraConfig(r=2, target_modules=["query"], init_lora_weights=init))
        assert equal(values(model)[init], values(expected)[init])


def test_untied_weights_have_the_flags_that_they_had(rng):
    for modules in (["head"], ["embed", "head"]):
        network, x = Tied(), ids(rng)
        table = network.embed.embedding_table
        model = get_peft_model(network, LoraConfig(r=2, target_modules=modules))
        move(model, 1)
        expected = numbers(model, x)
        merged = model.merge_and_unload(untie_weights=True)
        np.testing.assert_allclose(numbers(merged, x), expected, atol=1e-5)
        assert network.embed.embedding_table is table and network.head.weight is not table
        assert all(param.requires_grad for param in network.get_parameters())


def test_a_bias_that_two_layers_have_in_common_is_not_merged():
    network = nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 4))
    network[1].bias = network[0].bias
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    with pytest.raises(MergeError, match="0.bias has its weight in common with"):
        model.merge_adapter()


class SharedBias(nn.Cell):
    def __init__(self):
        super().__init__()
        self.query, self.b, self.head = (
            nn.Dense(4, 4),
            nn.Dense(4, 4),
            nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 4)),
        )
        self.b.bias = self.query.bias

    def construct(self, x):
        return self.head(self.b(self.query(x)))


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "all", "modules_to_save": ["b"]},
        {"modules_to_save": ["head", "head.0"]},
        {"modules_to_save": ["b"], "use_dora": True},
    ],
)
def test_a_parameter_that_is_meant_twice_has_one_copy_in_each_place(fields, rng, tmp_path):
    ms.set_seed(3)
    network, x = SharedBias(), Tensor(rng.normal(size=(3, 4)).astype(np.float32))
    before = numbers(network, x)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["query"], **fields))
    np.testing.assert_allclose(numbers(model, x), before, atol=2e-6)
    if fields.get("use_dora"):  # the bias of b is not that of query any more
        shift = np.ones(4, np.float32)
        out = numbers(network.query, x)
        network.b.bias.set_data(Tensor(network.b.bias.asnumpy() + shift))
        np.testing.assert_allclose(numbers(network.query, x), out, atol=1e-6)
    move(model, 1)
    expected = numbers(model, x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    np.testing.assert_allclose(numbers(again, x), expected, atol=1e-5)
    same(numbers(again.unload(), x), before)


@pytest.mark.parametrize("kind", ["head", "dora", "pissa"])
def test_a_base_that_is_loaded_as_a_state_dict_is_followed(kind, mode, rng):
    network, plain, x = Tiny(), Tiny(), ids(rng)
    model = get_peft_model(network, KINDS[kind])
    network.load_state_dict(plain.state_dict(), strict=False)
    np.testing.assert_allclose(numbers(model, x), numbers(plain, x), atol=2e-5)


def test_a_deep_copy_follows_its_own_base(mode, rng):
    model, x = get_peft_model(Tiny(), KINDS["head"]), ids(rng)
    before = numbers(model, x)
    twin, plain = copy.deepcopy(model), Tiny()
    same(numbers(twin, x), before)
    ms.load_param_into_net(twin.network, {param.name: param for param in plain.get_parameters()})
    np.testing.assert_allclose(numbers(twin, x), numbers(plain, x), atol=1e-6)
    same(numbers(model, x), before)
    twin.unload()
    same(numbers(model, x), before)
    again = get_peft_model(twin.network, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    assert np.abs(numbers(again, x) - numbers(plain, x)).max() > 1e-3  # no graph of the copy is stale
    same(numbers(again.network, x), numbers(again, x))


def test_networks_that_share_a_cell_are_not_wrapped_both():
    one, other = Tiny(), Tiny()
    other.embed = one.embed
    model = get_peft_model(one, KINDS["lora"])
    with pytest.raises(ConfigError, match="shares .*embed.embedding_table.* with another one that has adapters"):
        get_peft_model(other, KINDS["lora"])
    assert all(param.requires_grad for param in other.classifier.get_parameters())
    model.unload()
    get_peft_model(other, KINDS["lora"])


def test_two_models_in_one_network_have_names_of_their_own():
    class Outer(nn.Cell):
        def __init__(self, one, two):
            super().__init__()
            self.one, self.two = one, two

    models = [get_peft_model(Tiny(), KINDS["lora"]) for _ in range(2)]
    for model in models:
        model.add_adapter("wide", LoraConfig(r=3, target_modules=["query"]))
    outer = Outer(*models)
    for model in models:
        model.set_adapter("wide")
    names = [param.name for param in outer.trainable_params()]
    assert len(set(names)) == len(names) == 4
    nn.Adam(outer.trainable_params())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.merge_adapter("default"),
        lambda model: model.merge_adapter([["default"]]),
        lambda model: model.set_adapter(None),
        lambda model: model.save_pretrained("x", selected_adapters="default"),
        lambda model: model.add_weighted_adapter("default", [1.0], "sum"),
    ],
)
def test_what_is_no_list_of_names(call):
    with pytest.raises(TypeError, match="must be a list of str"):
        call(get_peft_model(Tiny(), KINDS["lora"]))


def test_adapters_whose_copies_go_to_other_places_share_nothing(rng):
    network, x = SharedBias(), Tensor(rng.normal(size=(3, 4)).astype(np.float32))
    model, expected = PeftModel(network), {}
    for name, fields in (("one", {"modules_to_save": ["b"]}), ("all", {"bias": "all"})):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["query"], **fields, inference_mode=True))
        adapter = model.adapters[name]
        adapter.write(
            {path: rng.normal(size=value.shape).astype(value.dtype) for path, value in adapter.values.items()}
        )
        model.set_adapter(name)
        expected[name] = numbers(model, x)
    for name in ("one", "all"):
        model.set_adapter(name)
        same(numbers(model, x), expected[name])


def test_names_are_counted_where_tensors_are_in_a_tuple(mode, rng):
    class Pair(nn.Cell):
        def __init__(self):
            super().__init__()
            self.inner = Tiny()

        def construct(self, pair):
            return self.inner(pair[0])

    model, x = get_peft_model(Pair(), KINDS["lora"]), ids(rng)
    same(model((x, x), adapter_names=["default"] * 4).asnumpy(), numbers(model, (x, x)))
    with pytest.raises(AdapterError, match="another number of rows than there are names"):
        model((x, x), adapter_names=["default"] * 2)


def test_a_save_into_the_folder_that_the_process_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(Tiny(), KINDS["lora"])
    for alpha in (4, 5):
        model.peft_config["default"].lora_alpha = alpha
        model.save_pretrained(".")
        assert len(os.listdir(".")) == 3 and os.getcwd() == str(tmp_path)
    PeftModel.from_pretrained(model.unload(), ".")


def test_tensors_of_an_adapter_are_copies():
    model = get_peft_model(Tiny(), KINDS["lora"])
    model.add_adapter("two", KINDS["lora"])
    before = values(model)["two"]
    for value in model.adapter_tensors("two").values():
        value[:] = 7
    assert equal(values(model)["two"], before)

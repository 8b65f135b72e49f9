"""Deltas in a network: their formulas, and that the base stays what it is."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn
from small import LAYERS, Small, config, contents, ids, move, numbers, same

from mindpet.errors import ConfigError, NoMatchError
from mindpet.network.kinds import layer_kind
from mindpet.peft import (
    AdapterConfig,
    BitFitConfig,
    LoraConfig,
    LowRankAdapterConfig,
    get_peft_model,
    inject_adapter_in_model,
    plan_targets,
    register_layer,
)

METHODS = {
    "lora": config(),
    "rslora": config(use_rslora=True),
    "dora": config(use_dora=True),
    "bias": config(bias="all"),
    "pissa": config(init_lora_weights="pissa", target_modules=["query", "turned", "shared"]),
    "olora": config(init_lora_weights="olora", target_modules=["query", "turned", "shared"]),
    "adapter": AdapterConfig(target_modules=["embed", "query", "mlp.0", "turned", "shared"], bottleneck_size=3),
    "bitfit": BitFitConfig(),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_fresh_adapter_is_the_identity(method, mode, rng):
    network, x = Small(), ids(rng)
    before = numbers(network, x)
    model = get_peft_model(network, METHODS[method])
    np.testing.assert_allclose(numbers(model, x), before, atol=2e-6)
    np.testing.assert_allclose(numbers(network, x), before, atol=2e-6)
    move(model, 0)
    assert np.abs(numbers(model, x) - before).max() > 1e-3
    same(numbers(model, x), numbers(network, x))


@pytest.mark.parametrize("method", [*METHODS, "low_rank_adapter"])
def test_unload_gives_the_base_bit_for_bit(method, mode, rng):
    network, x = Small(), ids(rng)
    network.classifier.weight.requires_grad = False
    before, parameters, text = numbers(network, x), contents(network), str(network)
    own = [sorted(vars(cell)) for _, cell in network.cells_and_names()]
    low_rank = LowRankAdapterConfig(target_modules=["query"], reduction_factor=2)
    model = get_peft_model(network, METHODS.get(method, low_rank))
    move(model, 0)
    assert model.unload() is network
    same(numbers(network, x), before)
    assert contents(network) == parameters and str(network) == text
    ignored = {"parameter_layout_dict", "_param_prefix"}
    assert [sorted(set(vars(cell)) - ignored) for _, cell in network.cells_and_names()] == [
        sorted(set(names) - ignored) for names in own
    ]


def test_names_order_and_places_of_the_base_stay(tmp_path):
    network = Small()
    names = [param.name for param in network.get_parameters()]
    path = str(tmp_path / "base.ckpt")
    ms.save_checkpoint(network, path)
    cells = dict(network.cells_and_names())
    get_peft_model(network, config())
    after = [param.name for param in network.get_parameters()]
    assert [name for name in after if name in names] == names
    assert {name for name in after if name not in names} == {
        f"{layer}.{name}"
        for layer in LAYERS
        for name in ("mindpet_delta_lora_a", "mindpet_delta_lora_b", "mindpet_lora_scaling")
    }
    assert all(dict(network.cells_and_names())[name] is cell for name, cell in cells.items())
    other, x = Small(), ids(np.random.default_rng(0))
    model = get_peft_model(other, config())
    missing, _ = ms.load_param_into_net(other, ms.load_checkpoint(path))
    assert all("mindpet" in name for name in missing)
    np.testing.assert_allclose(numbers(model, x), numbers(network, x), atol=1e-6)


def lora_of(model, path):
    values = {param.name: param.asnumpy() for param in model.get_parameters()}
    return (values.get(f"{path}.mindpet_delta_lora_{name}") for name in ("a", "b", "magnitude", "bias"))


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("path", ["query", "turned", "blocks.0.shared"])
def test_linear_layers_compute_the_formula(fields, path, mode, rng):
    network = Small()
    model = get_peft_model(network, config(target_modules=[path.split(".")[-1]], lora_alpha=5, **fields))
    move(model, 1)
    cell = dict(network.cells_and_names())[path]
    kind = layer_kind(cell)
    weight = kind.to_matrix(kind.weight_of(cell).asnumpy())
    bias = 0 if kind.bias_of(cell) is None else kind.bias_of(cell).asnumpy()
    a, b, magnitude, shift = lora_of(model, path)
    scaling = 5 / np.sqrt(2) if "use_rslora" in fields else 5 / 2
    x = rng.normal(size=(3, 4, 8)).astype(np.float32)
    tuned = weight + scaling * b @ a
    if magnitude is not None:
        tuned = tuned * (magnitude / np.linalg.norm(tuned, axis=1))[:, None]
    expected = x @ tuned.T + bias + (0 if shift is None else scaling * shift)
    expected = np.tanh(expected) if path == "query" else expected
    np.testing.assert_allclose(numbers(cell, Tensor(x)), expected, atol=2e-4 if path == "query" else 1e-5)
    assert cell(Tensor(x[0, 0])).shape == (8,) and cell(Tensor(x[0])).shape == (4, 8)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_embedding_computes_the_formula(use_dora, mode, rng):
    network = Small()
    model = get_peft_model(network, config(target_modules=["embed"], use_dora=use_dora))
    move(model, 1)
    a, b, magnitude, _ = lora_of(model, "embed")
    x = ids(rng)
    tuned = network.embed.embedding_table.asnumpy().T + 1.5 * b @ a
    if use_dora:
        tuned = tuned * (magnitude / np.linalg.norm(tuned, axis=1))[:, None]
    np.testing.assert_allclose(numbers(network.embed, x), tuned.T[x.asnumpy()], atol=1e-5)


@pytest.mark.parametrize("use_dora, group", [(False, 1), (True, 1), (False, 2)])
def test_a_convolution_computes_with_its_merged_weight(use_dora, group, mode, rng):
    network = nn.SequentialCell(nn.Conv2d(4, 6, 3, stride=2, pad_mode="pad", padding=1, group=group, has_bias=True))
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["0"], use_dora=use_dora))
    move(model, 1)
    a, b, magnitude, _ = lora_of(model, "0")
    x = Tensor(rng.normal(size=(2, 4, 7, 7)).astype(np.float32))
    got = numbers(model, x)
    weight = network[0].weight.asnumpy()
    parts = [
        (b[:, :, 0, 0].reshape(group, 6 // group, -1)[g] @ a.reshape(group, 4 // group, -1)[g]) for g in range(group)
    ]
    tuned = weight + 2 * np.concatenate(parts).reshape(weight.shape)
    if use_dora:
        tuned = tuned * magnitude.reshape(-1, 1, 1, 1) / np.sqrt((tuned**2).sum((1, 2, 3), keepdims=True))
    model.unload()
    network[0].weight.set_data(Tensor(tuned.astype(np.float32)))
    np.testing.assert_allclose(numbers(network, x), got, atol=1e-5)


def test_pissa_and_olora_take_off_the_weight_what_they_start_with(rng):
    x = rng.normal(size=(5, 8)).astype(np.float32)
    for init in ("pissa", "pissa_niter_4", "olora"):
        network = nn.SequentialCell(nn.Dense(8, 6))
        weight, bias = network[0].weight.asnumpy(), network[0].bias.asnumpy()
        model = get_peft_model(network, LoraConfig(target_modules=["0"], r=2, lora_alpha=3, init_lora_weights=init))
        a, b, _, _ = lora_of(model, "0")
        np.testing.assert_array_equal(network[0].weight.asnumpy(), weight)
        move(model, 1)
        moved_a, moved_b, _, _ = lora_of(model, "0")
        expected = x @ (weight - 1.5 * b @ a + 1.5 * moved_b @ moved_a).T + bias
        np.testing.assert_allclose(numbers(model, Tensor(x)), expected, atol=1e-5)
        if init != "olora":
            best = np.linalg.svd(weight)[1][:2]
            np.testing.assert_allclose(np.linalg.svd(1.5 * b @ a)[1][:2], best, atol=1e-5)


def test_half_precision_bases_compute_and_keep_their_types(mode, rng):
    for autocast, dtype in ((True, ms.float32), (False, ms.float16)):
        network = nn.SequentialCell(nn.Dense(8, 8, dtype=ms.float16))
        model = get_peft_model(network, LoraConfig(target_modules=["0"]), autocast_adapter_dtype=autocast)
        assert {param.dtype for param in model.trainable_params()} == {dtype}
        move(model, 0)
        out = model(Tensor(rng.normal(size=(2, 8)).astype(np.float16)))
        assert out.dtype == ms.float16 and np.isfinite(out.asnumpy()).all()


def test_linear_layers_of_mint(mode, rng):
    network = nn.SequentialCell(mint.nn.Linear(8, 3))
    x = Tensor(rng.normal(size=(2, 8)).astype(np.float32))
    base = numbers(network, x)
    model = get_peft_model(network, LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False))
    a, b, _, _ = lora_of(model, "0")
    np.testing.assert_allclose(numbers(model, x), base + 2 * x.asnumpy() @ a.T @ b.T, atol=1e-5)


def test_rank_and_alpha_patterns():
    network = Small()
    model = get_peft_model(network, config(rank_pattern={"query": 4}, alpha_pattern={"turned": 8, "query": 2}))
    assert network.query.mindpet_delta.rank == 4 and network.query.mindpet_delta.scaling == 0.5
    assert network.turned.mindpet_delta.rank == 2 and network.turned.mindpet_delta.scaling == 4
    assert model.trainable_params()


def test_plan_targets_shows_and_changes_nothing():
    network = Small()
    before = contents(network)
    plan = plan_targets(network, config(modules_to_save=["classifier"], bias="lora_only"))
    text = str(plan)
    for line in ("embed  ", "Turned", "LORA", "trained as a whole", "query.bias", "turned.shift"):
        assert line in text
    assert [layer.path for layer in plan.targets] == LAYERS
    assert contents(network) == before and not any("mindpet" in key for key in vars(network.query))


def test_all_linear_takes_linear_layers_only():
    plan = plan_targets(Small(), LoraConfig(target_modules="all-linear"))
    assert [layer.path for layer in plan.targets] == ["query", "mlp.0", "mlp.2", "turned", "blocks.0.shared"]


@pytest.mark.parametrize(
    "fields, error, match",
    [
        ({"target_modules": ["qeury"]}, NoMatchError, "no layer matches 'qeury'; near: \\['query'"),
        ({"modules_to_save": ["clasifier"]}, NoMatchError, "'modules_to_save': no layer matches 'clasifier'; near"),
        ({"modules_to_save": ["query"]}, ConfigError, "query is to be trained as a whole, but carries"),
        ({"target_modules": ["norm"]}, ConfigError, "of a type that cannot carry it"),
        ({"rank_pattern": {"nix": 2}}, NoMatchError, "'rank_pattern': no layer matches 'nix'"),
        ({"init_lora_weights": "pissa"}, ConfigError, "conv: init_lora_weights='pissa' is for linear layers"),
        ({"lora_bias": True}, ConfigError, "embed: an embedding has no lora_bias"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(fields, error, match):
    network = Small()
    before = contents(network)
    with pytest.raises(error, match=match):
        get_peft_model(network, config(**fields))
    assert contents(network) == before and not any("mindpet" in key for key in vars(network.query))


def test_all_problems_are_in_one_error():
    with pytest.raises(NoMatchError, match="(?s)'qeury'.*'clasifier'"):
        get_peft_model(Small(), config(target_modules=["qeury"], modules_to_save=["clasifier"]))


def test_convolutions_in_groups_need_a_fitting_rank():
    network = nn.SequentialCell(nn.Conv2d(4, 8, 3, group=4))
    with pytest.raises(ConfigError, match="the rank, 2, must be a multiple of its 4 groups.*no DoRA beside a conv"):
        get_peft_model(network, LoraConfig(r=2, target_modules=["0"], use_dora=True))


@pytest.mark.parametrize("network, match", [(3, "'network' must be a Cell"), (None, "'network' must be a Cell")])
def test_wrong_types(network, match):
    with pytest.raises(TypeError, match=match):
        get_peft_model(network, LoraConfig())
    with pytest.raises(TypeError, match="'config' must be the configuration of a method"):
        get_peft_model(Small(), {"r": 8})


def test_inject_adapter_in_model(rng):
    network = Small()
    assert inject_adapter_in_model(config(), network) is network
    assert {name.split(".")[-1] for name in (p.name for p in network.trainable_params())} == {
        "mindpet_delta_lora_a",
        "mindpet_delta_lora_b",
    }


def test_register_layer_checks_its_arguments():
    for arguments, error in (((3,), TypeError), ((Small, "dense"), ValueError), ((Small, "linear", 3), TypeError)):
        with pytest.raises(error, match="register_layer: "):
            register_layer(*arguments)

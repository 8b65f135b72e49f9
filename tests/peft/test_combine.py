"""Weighted sums of adapters: the numbers of Hugging Face PEFT, see `tests/golden/make_peft.py`, and what is refused."""

import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import nn

from mindpet.delta.lora import LoraDelta
from mindpet.errors import AdapterError
from mindpet.network.kinds import layer_kind
from mindpet.network.match import list_layers, pattern_value
from mindpet.peft import AdapterConfig, LoraConfig, TaskType, plan_targets
from mindpet.peft.combine import COMBINATIONS, combine
from mindpet.peft.plan import Target

WEIGHTS = [0.7, -0.4, 0.3]
PRUNED = {"density": 0.4}
SUMS = {
    "linear": ("abc", {"combination_type": "linear"}),
    "cat": ("abc", {"combination_type": "cat"}),
    "svd": ("abw", {}),
    "svd of rank 1": ("abw", {"combination_type": "svd", "svd_rank": 1}),
    "ties": ("abc", {"combination_type": "ties", **PRUNED}),
    "ties by frequency": ("abc", {"combination_type": "ties", "majority_sign_method": "frequency", "density": 0.7}),
    "ties_svd": ("abw", {"combination_type": "ties_svd", **PRUNED}),
    "magnitude_prune": ("abc", {"combination_type": "magnitude_prune", **PRUNED}),
    "magnitude_prune_svd": ("abw", {"combination_type": "magnitude_prune_svd", "svd_rank": 2, **PRUNED}),
}
FIELDS = {"a": {"r": 2}, "b": {"r": 2}, "c": {"r": 2}, "w": {"r": 1, "rank_pattern": {"block.fc": 3}}}
GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/sums.npz")


class Colliding(nn.Cell):
    """Linear layers whose paths are ends of others, and an embedding."""

    def __init__(self):
        super().__init__()
        self.fc, self.embed = nn.Dense(6, 5), nn.Embedding(7, 6)
        self.block = nn.SequentialCell()
        self.block.insert_child_to_cell("fc", nn.Dense(6, 6))
        self.block.insert_child_to_cell("attn", nn.Dense(5, 6))


def part(factors, trained=(), **fields):
    """An adapter, given dict of path -> (scaling, A, B)."""
    values = {}
    for path, (scaling, lora_a, lora_b) in factors.items():
        values[f"{path}.mindpet_lora_scaling"] = np.float32(scaling)
        values[f"{path}.mindpet_delta_lora_a"], values[f"{path}.mindpet_delta_lora_b"] = lora_a, lora_b
    targets = [
        Target(layer.cell, layer.paths, layer_kind(layer.cell), LoraDelta, {}, None)
        for layer in list_layers(Colliding())
        if layer.path in factors
    ]
    plan = SimpleNamespace(targets=targets, trained=dict.fromkeys(trained))
    slot = SimpleNamespace(values_of=values_of)
    return SimpleNamespace(config=LoraConfig(**fields), plan=plan, slot=slot, values=values)


def values_of(path, values):
    return {name.rpartition(".")[2]: value for name, value in values.items() if name.rpartition(".")[0] == path}


def golden(names):
    """Adapters that Hugging Face PEFT made."""
    found = []
    for name in names:
        start = "wide" if name == "w" else name
        paths = [key.split("/")[1] for key in GOLDEN.files if key.startswith(f"{start}/") and key.endswith("/A")]
        factors = {path: [GOLDEN[f"{start}/{path}/{key}"] for key in ("scaling", "A", "B")] for path in paths}
        found.append(part(factors, **FIELDS[name]))
    return found


def deltas(config, values):
    """dict of path -> `s B A` of a sum, with the scale that the configuration says."""
    return {
        key[: -len(".mindpet_delta_lora_a")]: config.scaling(key[: -len(".mindpet_delta_lora_a")])
        * (values[key[:-1] + "b"] @ values[key])
        for key in values
        if key.endswith("_a")
    }


@pytest.mark.parametrize("name", list(SUMS))
def test_sums_are_those_of_hugging_face(name):
    names, keywords = SUMS[name]
    found = deltas(*combine(golden(names), WEIGHTS, **keywords))
    expected = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.rsplit("/", 1)[0] == name}
    assert found.keys() == expected.keys() and len(found) == 4
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=2e-5, err_msg=path)


def test_the_types_that_are_random_are_right_on_average(rng):
    """The mean over many draws of what 'dare' keeps is what is there without dropping."""
    parts = golden("abc")
    for kind, like in (("dare_linear", {"combination_type": "linear"}), ("dare_linear_svd", {"svd_rank": 6})):
        expected = deltas(*combine(parts, WEIGHTS, **like))
        draws = [
            deltas(*combine(parts, WEIGHTS, kind, 6 if "svd" in kind else None, density=0.8, seed=rng))
            for _ in range(400)
        ]
        for path, value in expected.items():
            own = np.stack([draw[path] for draw in draws])
            error = own.std(0) / np.sqrt(len(draws)) + 1e-6
            assert (np.abs(own.mean(0) - value) < 5 * error).all(), (kind, path)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_a_seed_makes_chance_repeatable(kind):
    def total(seed):
        return combine(golden("abc"), WEIGHTS, kind, density=0.5, seed=seed)[1]

    first, again, other = total(3), total(np.random.default_rng(3)), total(4)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    np.random.seed(5)
    global_state = total(None)
    np.random.seed(5)
    assert all(np.array_equal(value, global_state[name]) for name, value in total(None).items())


@pytest.mark.parametrize(
    "kind, like",
    [("dare_linear", "linear"), ("dare_ties", "ties"), ("dare_linear_svd", "svd"), ("dare_ties_svd", "ties_svd")],
)
def test_with_density_1_nothing_is_dropped(kind, like):
    found, expected = (deltas(*combine(golden("abc"), WEIGHTS, name, density=1)) for name in (kind, like))
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=2e-5)


@pytest.mark.parametrize(
    "kind, lora_a, lora_b",
    [
        (
            "linear",
            [2 * 1 - 3 * 4 + 1, 2 * 2 + 3 * 3 + 1, 0.2 - 0.3 + 5],
            [2 + 3 * 4 + 1, 2 * 2 - 3 * 3 + 1, 0.2 + 0.3 + 5],
        ),
        ("magnitude_prune", [2 * 1 - 3 * 4, 2 * 2 + 3 * 3, 5], [2 + 3 * 4, 2 * 2 - 3 * 3, 5]),
        ("ties", [(2 * 1 - 3 * 4) / 2, 3 * 3, 5], [(2 + 3 * 4) / 2, -3 * 3, 5]),
    ],
)
def test_the_rules_by_hand(kind, lora_a, lora_b):
    """Weights times scales are 4, -9 and 1, so their roots are 2, -3 and 1 with A, and 2, 3 and 1 with B."""
    rows = [[1, 2, 0.1, 0, 0, 0], [4, -3, 0.1, 0, 0, 0], [1, 1, 5, 1.1, 1.2, 1.3]]
    parts = []
    for scaling, row in zip([2, 3, 1], np.array(rows, np.float32)):
        parts.append(part({"fc": (scaling, row[None], row[:5, None])}, r=1))
    config, values = combine(parts, [2, -3, 1], kind, density=0.4)
    np.testing.assert_allclose(values["fc.mindpet_delta_lora_a"][0, :3], lora_a, rtol=1e-6)
    np.testing.assert_allclose(values["fc.mindpet_delta_lora_b"][:3, 0], lora_b, rtol=1e-6)
    assert config.scaling("fc") == 1


@pytest.mark.parametrize("quantile", [0.9, 0.3])
def test_clamping(quantile):
    """Of A and B together; a negative quantile is every element's lot, as in torch.clamp(minimum, maximum)."""
    plain, clamped = (combine(golden("abc"), WEIGHTS, "svd", svd_clamp=clamp)[1] for clamp in (None, quantile))
    for path in ("fc", "embed"):
        names = [f"{path}.mindpet_delta_lora_{which}" for which in "ab"]
        limit = np.quantile(np.concatenate([plain[name].ravel() for name in names]), quantile)
        for name in names:
            expected = np.minimum(np.maximum(plain[name], -limit), limit)
            np.testing.assert_allclose(clamped[name], expected, atol=1e-6)
        assert np.abs(clamped[names[1]] - plain[names[1]]).max() > 0.1


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd"])
def test_a_sum_has_the_layers_and_ranks_of_its_adapters_only(kind):
    """'fc' is the end of 'block.fc', which has another rank, and has no delta in the first case."""
    rng = np.random.default_rng(0)

    def factors(path, rank):
        out, inside = {"fc": (5, 6), "block.fc": (6, 6), "block.attn": (6, 5)}[path]
        return 1.0, rng.normal(size=(rank, inside)).astype(np.float32), rng.normal(size=(out, rank)).astype(np.float32)

    parts = [part({"fc": factors("fc", 2)}, r=2), part({"block.attn": factors("block.attn", 2)}, r=2)]
    config, values = combine(parts, [1.0, 1.0], kind, density=0.5)
    assert [layer.path for layer in plan_targets(Colliding(), config).targets] == ["fc", "block.attn"]
    parts = [part({"fc": factors("fc", 1), "block.fc": factors("block.fc", 3)}, r=3, rank_pattern={"^fc": 1})]
    config, values = combine(parts, [1.0], "cat", density=0.5)
    plan = plan_targets(Colliding(), config)
    sizes = {layer.path: config.delta_arguments(layer.path)["rank"] for layer in plan.targets}
    assert sizes == {"fc": 1, "block.fc": 3} and config.scaling("fc") == config.scaling("block.fc") == 1
    assert {path: len(values[f"{path}.mindpet_delta_lora_a"]) for path in sizes} == sizes


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (4, 1), (8, 8)])
def test_svd_is_the_best_approximation(ranks, rng):
    """Whatever the ranks are beside the `(5, 6)` of the weight."""
    own = [
        (2.0, rng.normal(size=(rank, 6)).astype(np.float32), rng.normal(size=(5, rank)).astype(np.float32))
        for rank in ranks
    ]
    whole = sum(weight * 2 * lora_b @ lora_a for weight, (_, lora_a, lora_b) in zip((0.7, -0.4), own))
    parts = [part({"fc": factors}, r=rank) for rank, factors in zip(ranks, own)]
    left, roots, right = np.linalg.svd(whole)
    for rank in (None, 1, 2, 5, 9):
        kept = min(rank or max(ranks), 5)
        found = deltas(*combine(parts, [0.7, -0.4], "svd", rank))["fc"]
        np.testing.assert_allclose(found, (left[:, :kept] * roots[:kept]) @ right[:kept], atol=1e-4)


def test_a_sum_has_the_task_and_the_base_of_the_first():
    parts = golden("ab")
    parts[0].config.task_type, parts[0].config.base_model_name_or_path = TaskType.CAUSAL_LM, "here"
    config, _ = combine(parts, [1, 2])
    assert (config.task_type, config.base_model_name_or_path) == (TaskType.CAUSAL_LM, "here")


def test_every_type_of_hugging_face_is_known():
    names = ["cat", "linear", "svd"]
    names += [
        f"{name}{end}" for name in ("dare_linear", "dare_ties", "magnitude_prune", "ties") for end in ("", "_svd")
    ]
    assert sorted(COMBINATIONS) == sorted(names)
    for name in names:
        _, values = combine(golden("abc"), WEIGHTS, name, density=0.5, svd_full_matrices=False, svd_driver="gesvd")
        assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "weights, keywords, error, match",
    [
        ([1], {}, ValueError, "'weights' must be a list of finite numbers, one for each of 2 adapters"),
        ([1, float("nan")], {}, ValueError, "'weights' must be a list of finite numbers"),
        ([1, float("inf")], {}, ValueError, "'weights' must be a list of finite numbers"),
        ([1, True], {}, ValueError, "'weights' must be a list of finite numbers"),
        ([1, "2"], {}, ValueError, "'weights' must be a list of finite numbers"),
        (0.5, {}, TypeError, "'weights' must be a list of finite numbers"),
        ([1, 1], {"combination_type": "sum"}, ValueError, r"'combination_type' must be one of \['cat', 'dare_linear'"),
        ([1, 1], {"combination_type": None}, TypeError, "'combination_type' must be a str"),
        ([1, 1], {"svd_rank": -1}, ValueError, "'svd_rank' must be a positive int"),
        ([1, 1], {"svd_rank": 0}, ValueError, "'svd_rank' must be a positive int"),
        ([1, 1], {"svd_rank": 2.0}, TypeError, "'svd_rank' must be a positive int"),
        ([1, 1], {"svd_clamp": 1.5}, ValueError, r"'svd_clamp' must be in \(0, 1\] or None"),
        ([1, 1], {"svd_driver": "magic"}, ValueError, "'svd_driver' must be one of"),
        ([1, 1], {"svd_full_matrices": 1}, TypeError, "'svd_full_matrices' must be a bool"),
        ([1, 1], {"combination_type": "ties"}, ValueError, r"'density' must be in \(0, 1\] for 'ties', but got None"),
        ([1, 1], {"combination_type": "dare_ties_svd", "density": 0}, ValueError, "'density' must be in"),
        ([1, 1], {"combination_type": "ties", "density": float("nan")}, ValueError, "'density' must be in"),
        ([1, 1], {"majority_sign_method": "most"}, ValueError, "'majority_sign_method' must be one of"),
        ([1, 1], {"seed": "x"}, ValueError, "'seed' must be an int from 0 on"),
    ],
)
def test_wrong_arguments(weights, keywords, error, match):
    with pytest.raises(error, match="add_weighted_adapter: " + match):
        combine(golden("ab"), weights, **keywords)


def test_all_wrong_arguments_are_in_one_error():
    with pytest.raises(ValueError, match="(?s)'adapters' must.*'weights' must.*'svd_rank' must.*'density' must"):
        combine([], [float("nan")], "ties", svd_rank=-1)


def changed(**fields):
    (adapter,) = golden("b")
    adapter.config = LoraConfig(r=2, **fields)
    return adapter


def with_nan():
    (adapter,) = golden("b")
    adapter.values["fc.mindpet_delta_lora_a"] = np.full((2, 6), np.nan, np.float32)
    return adapter


def of_another_method():
    (adapter,) = golden("b")
    adapter.config, adapter.values = AdapterConfig(target_modules=["fc"]), {}
    return adapter


def with_head():
    factors = {"fc": (1.0, np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))}
    return part(factors, trained=["block.fc.weight"], r=2)


@pytest.mark.parametrize(
    "other, keywords, match",
    [
        (of_another_method, {}, "an adapter is of ADAPTER"),
        (lambda: changed(use_dora=True), {}, "an adapter has more than A and B"),
        (lambda: changed(lora_bias=True), {}, "an adapter has more than A and B"),
        (with_head, {}, "an adapter has more than A and B"),
        (lambda: changed(init_lora_weights="pissa"), {}, "an adapter starts from the base's weights: 'pissa'"),
        (lambda: changed(init_lora_weights="olora"), {}, "an adapter starts from the base's weights: 'olora'"),
        (with_nan, {}, "fc holds NaN or infinite numbers"),
        (
            lambda: golden("w")[0],
            {"combination_type": "linear"},
            r"'linear' needs equal ranks, but block.fc has \[2, 3\]",
        ),
        (lambda: golden("w")[0], {"combination_type": "ties", "density": 0.5}, "'ties' needs equal ranks"),
    ],
)
def test_adapters_that_cannot_be_summed(other, keywords, match):
    adapters = [*golden("a"), other()]
    before = [{name: value.copy() for name, value in adapter.values.items()} for adapter in adapters]
    with pytest.raises(AdapterError, match="add_weighted_adapter: .*" + match):
        combine(adapters, [1, 1], **keywords)
    for adapter, values in zip(adapters, before):
        assert all(np.array_equal(value, values[name], equal_nan=True) for name, value in adapter.values.items())


def test_ranks_of_layers_that_the_first_adapter_does_not_have_are_compared():
    first = part({"embed": (1.0, np.ones((2, 7), np.float32), np.ones((6, 2), np.float32))}, r=2)
    with pytest.raises(AdapterError, match="'linear' needs equal ranks, but block.fc has"):
        combine([first, *golden("b"), *golden("w")], WEIGHTS, "linear")


def test_the_rank_of_svd_is_the_largest_of_all_adapters():
    """Also of those without a delta in the layer, and of patterns."""
    config, values = combine(golden("bw"), [1, 1], "svd")
    assert config.r == 3 and len(values["block.attn.mindpet_delta_lora_a"]) == 3
    assert pattern_value(config.rank_pattern, "block.attn", config.r) == 3

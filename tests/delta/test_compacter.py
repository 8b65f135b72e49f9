"""Compacter: the formula, its count of parameters, deltas in a network, and files."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from small import Small, check_turns, contents, ids, move, numbers, same

from mindpet.delta import CompacterDense, CompacterLayer
from mindpet.errors import CheckpointError, ConfigError, MergeError
from mindpet.files.adapter import save_adapter
from mindpet.files.convert import convert
from mindpet.files.tensors import TensorFile
from mindpet.graph import freeze_delta, load_delta
from mindpet.graph.ckpt_util import saved_parameters
from mindpet.parallel import dry_run
from mindpet.peft import CompacterConfig, LoraConfig, PeftModel, get_peft_model

FLOAT = {"compute_dtype": ms.float32}
TARGETS = ["embed", "query", "mlp", "turned", "shared"]  # an embedding, layers, a block
KEYS = {f"{end}.{leaf}" for end in ("down", "up") for leaf in ("left", "right", "bias")}


def config(**fields):
    return CompacterConfig(**{"reduction_factor": 2, "phm_dim": 2, "target_modules": TARGETS, **fields})


def randomise(cell, rng):
    """Give every parameter a random value."""
    for param in cell.get_parameters():
        param.set_data(Tensor(rng.normal(0, 0.5, param.shape).astype(np.float32), param.dtype))


def weight(rule, linear):
    """`sum_i A_i kron (s_i t_i^T)`."""
    return sum(np.kron(a, s.T @ t) for a, s, t in zip(rule, linear.left.asnumpy(), linear.right.asnumpy()))


def adapted(h, layer):
    """`h + tanh(h W_down + b_down) W_up + b_up`."""
    rule = layer.mindpet_delta_compacter_rule.asnumpy()
    down, up = layer.mindpet_delta_compacter_down, layer.mindpet_delta_compacter_up
    inner = np.tanh(h @ weight(rule, down) + down.bias.asnumpy())
    return h + inner @ weight(rule, up) + up.bias.asnumpy()


@pytest.mark.parametrize(
    "shape, factor, dim, rank", [((12,), 1, 4, 1), ((5, 12), 2, 3, 2), ((2, 3, 12), 3, 4, 3), ((0, 12), 4, 1, 1)]
)
def test_layer_formula(shape, factor, dim, rank, mode, rng):
    cell = CompacterLayer(12, factor, dim, rank, "tanh", **FLOAT)
    randomise(cell, rng)
    h = rng.normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(numbers(cell, Tensor(h)), adapted(h, cell), atol=1e-4)


def test_dense_formula(mode, rng):
    cell = CompacterDense(4, 6, 3, 2, non_linearity="tanh", activation="relu", bias_init="ones", **FLOAT)
    randomise(cell, rng)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    hidden = np.maximum(x @ cell.weight.asnumpy().T + cell.bias.asnumpy(), 0)
    np.testing.assert_allclose(numbers(cell, Tensor(x)), adapted(hidden, cell.mindpet_delta_compacter), atol=1e-5)


def test_the_count_of_parameters_is_that_of_the_paper():
    """Section 4: `k + d` of rank 1 for each product with a weight of `k d`, and `n^3` once. Biases count besides."""
    d, k, n, layers = 768, 24, 4, 3
    first = CompacterLayer(d)
    cells = nn.CellList([first, *(CompacterLayer(d, shared=first) for _ in range(layers - 1))])
    sizes = {param.name: param.size for param in cells.get_parameters()}
    assert sum(size for name, size in sizes.items() if "bias" not in name) == layers * 2 * (k + d) + n**3
    assert sum(size for name, size in sizes.items() if "bias" in name) == layers * (k + d)
    assert sum(param.size for param in CompacterLayer(d, phm_rank=2).get_parameters()) == 2 * 2 * (k + d) + n**3 + k + d


def test_a_fresh_layer_is_the_identity_and_its_weights_are_of_the_size_of_glorot(rng):
    cell = CompacterLayer(768, 8, phm_rank=2, **FLOAT)
    h = rng.normal(size=(4, 768)).astype(np.float32)
    np.testing.assert_array_equal(numbers(cell, Tensor(h)), h)
    rule = cell.mindpet_delta_compacter_rule.asnumpy()
    found = [np.std(weight(rng.normal(0, 0.5, rule.shape), cell.mindpet_delta_compacter_down)) for _ in range(20)]
    np.testing.assert_allclose(np.mean(found), np.sqrt(2 / (768 + 96)), rtol=0.2)
    assert 0.25 < rule.std() < 0.75
    zeros = [param.name for param in cell.get_parameters() if not param.asnumpy().any()]
    up, down = "mindpet_delta_compacter_up", "mindpet_delta_compacter_down"
    assert zeros == [f"{down}.bias", f"{up}.right", f"{up}.bias"]


@pytest.mark.parametrize("non_linearity", ["gelu", "softmax", "prelu"])
def test_reset_is_the_identity_whatever_the_parameters_hold(non_linearity, rng):
    cell = CompacterLayer(6, 3, 2, non_linearity=non_linearity, **FLOAT)
    h = rng.normal(size=(2, 6)).astype(np.float32)
    for param in cell.get_parameters():
        param.set_data(Tensor(np.full(param.shape, np.nan, np.float32)))
    cell.reset()
    np.testing.assert_array_equal(numbers(cell, Tensor(h)), h)


def test_wrong_arguments_are_all_told():
    with pytest.raises(ValueError, match="'reduction_factor' .* got 0.*'phm_dim' .*'phm_rank' .*'non_linearity' must"):
        CompacterLayer(8, 0, -1, 1.5, "nonsense")
    with pytest.raises(ValueError, match="'phm_dim' must be a divisor of the 8 features and of the inner size, 2, but"):
        CompacterDense(8, 8, 4)
    for size, factor, inner in ((9, 1, 9), (8, 32, 0)):
        with pytest.raises(ValueError, match=f"'phm_dim' must be a divisor of the {size} .* size, {inner}, but got 4"):
            CompacterLayer(size, factor)
    with pytest.raises(TypeError, match="'shared' must be a CompacterLayer, a CompacterDense or None"):
        CompacterDense(8, 8, 2, shared=nn.Dense(8, 8))
    with pytest.raises(ValueError, match="'shared' must be of 'phm_dim' 2, but got 4"):
        CompacterLayer(8, 2, 2, shared=CompacterDense(8, 8, 2))
    with pytest.raises(ValueError, match="'reduction_factor' .* got 0.*'phm_rank' .* got 0"):
        CompacterConfig(reduction_factor=0, phm_rank=0)
    with pytest.raises(ConfigError, match="query.*'phm_dim' must be a divisor of the 8 features .* size, 0, but got 4"):
        get_peft_model(Small(), CompacterConfig(target_modules=["query"]))
    with pytest.raises(ConfigError, match="of a type that cannot carry it: .'conv .Conv2d"):
        get_peft_model(Small(), config(target_modules=["conv"]))


class Pair(nn.Cell):
    """Two layers that share the first factors."""

    def __init__(self):
        super().__init__()
        self.first = CompacterDense(4, 6, 3, 2, **FLOAT)
        self.second = CompacterDense(6, 8, 2, 2, shared=self.first, **FLOAT)

    def construct(self, x):
        return self.second(self.first(x))


class Plain(nn.Cell):
    """The same without deltas."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Dense(4, 6), nn.Dense(6, 8)

    def construct(self, x):
        return self.second(self.first(x))


def test_hand_made_layers_share_the_first_factors_and_become_an_adapter(rng, tmp_path):
    network, x = Pair(), Tensor(rng.normal(size=(5, 4)).astype(np.float32))
    freeze_delta(network, "compacter")
    assert len(network.trainable_params()) == 2 * 6 + 1
    randomise(network, rng)
    expected = numbers(network, x)
    saved = saved_parameters(network)
    ms.save_checkpoint([{"name": name, "data": param} for name, param in saved.items()], f"{tmp_path}/d.ckpt")
    again, plain = Pair(), Plain()
    base = {name: param for name, param in network.parameters_dict().items() if "compacter" not in name}
    for other in (again, plain):
        ms.load_param_into_net(other, base)
    load_delta(again, tmp_path / "d.ckpt")
    np.testing.assert_array_equal(numbers(again, x), expected)

    wrong = CompacterConfig(reduction_factor=2, phm_dim=2)  # the first layer has another factor
    with pytest.raises(CheckpointError, match=r"first.compacter_down.right: \[2, 1, 1\]|first"):
        convert(tmp_path / "d.ckpt", tmp_path / "wrong", wrong)


def test_a_network_with_places_of_every_kind(mode, rng, tmp_path):
    network, x = Small(), ids(rng)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, config())
    same(numbers(model, x), base)
    rules = [name for name in network.parameters_dict() if name.endswith("_rule")]
    assert rules == ["embed.mindpet_delta_compacter.mindpet_delta_compacter_rule"]
    assert len(model.trainable_params()) == 6 * len(TARGETS) + 1

    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), nn.Adam(model.trainable_params(), 0.1))
    labels = Tensor(np.arange(4, dtype=np.int32) % 3)
    fresh = {param.name: param.asnumpy().copy() for param in model.trainable_params()}
    losses = [float(step.set_train()(x, labels).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(np.abs(param.asnumpy() - fresh[param.name]).max() > 0 for param in model.trainable_params())
    tuned = numbers(model.set_train(False), x)
    kept = model.query.mindpet_delta.mindpet_delta_compacter.mindpet_delta_compacter_rule.asnumpy().copy()
    with model.disable_adapter():
        same(numbers(model, x), base)
    layer = model.turned.mindpet_delta.mindpet_delta_compacter
    np.testing.assert_array_equal(layer.mindpet_delta_compacter_rule.asnumpy(), kept)
    hidden = rng.normal(size=(3, 8)).astype(np.float32)
    layer.mindpet_delta_compacter_non_linear = nn.Tanh()
    np.testing.assert_allclose(numbers(layer, Tensor(hidden)), adapted(hidden, layer), atol=1e-5)
    model.save_pretrained(tmp_path)
    shapes = TensorFile(tmp_path / "adapter_model.safetensors").shapes
    assert len(shapes) == 6 * len(TARGETS) + 1 and shapes["base_model.compacter_rule"] == (2, 2, 2)
    assert {key.rpartition("compacter_")[2] for key in shapes} == {"rule", *KEYS}
    assert contents(model.unload()) == before

    loaded = PeftModel.from_pretrained(network, tmp_path)
    same(numbers(loaded, x), tuned)
    with pytest.raises(MergeError, match="cannot be folded"):
        loaded.merge_adapter()
    loaded.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "turned"], init_lora_weights=False))
    loaded.set_adapter("lora")
    lora = numbers(loaded, x)
    names = ["lora", "default", "__base__", "default"]
    mixed = loaded(x, adapter_names=names).asnumpy()
    expected = np.stack([{"lora": lora, "default": tuned, "__base__": base}[name][i] for i, name in enumerate(names)])
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_adapters_of_one_shape_take_turns_without_a_new_graph(mode, rng, tmp_path):
    check_turns(config(target_modules=["query"]), config(target_modules=["query"]), ids(rng), tmp_path)


def test_files_without_a_network(rng, tmp_path):
    network, x = Small(), ids(rng)
    model = get_peft_model(network, config(target_modules=["query", "turned"], non_linearity="prelu"))
    move(model, 1)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "delta.safetensors")
    convert(
        tmp_path / "delta.safetensors",
        tmp_path / "again",
        CompacterConfig(reduction_factor=2, phm_dim=2, non_linearity="prelu"),
    )
    same(numbers(PeftModel.from_pretrained(model.unload(), tmp_path / "again"), x), tuned)


class Cut(nn.Cell):
    """Two layers that are cut over rows and outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Dense(8, 8, has_bias=False), nn.Dense(8, 8, has_bias=False)
        for layer in (self.first, self.second):
            layer.matmul.shard(((2, 1), (4, 1)))
        self.sum = ops.ReduceSum().shard(((2, 4),))

    def construct(self, x):
        return self.sum(self.second(self.first(x)))


def cut():
    """A network with strategies and an adapter, and its input."""
    network = Cut()
    get_peft_model(network, config(target_modules=["first", "second"]))
    return network, Tensor(np.ones((4, 8), np.float32))


def test_the_gradients_of_the_first_factors_are_summed_over_the_ranks_once():
    report = dry_run(cut, 8)
    found = [plan for plan in report.collectives if plan.cause.endswith("_rule")]
    assert [(plan.kind, plan.group_size, plan.bytes, plan.count) for plan in found] == [("AllReduce", 8, 4 * 2**3, 1)]


DAMAGES = {
    "missing": (lambda tensors: tensors.pop("base_model.compacter_rule"), r"compacter_rule"),
    "rule": (lambda tensors: tensors.update({"base_model.compacter_rule": np.zeros((4, 4, 4), np.float32)}), "_rule"),
    "bias": (
        lambda tensors: tensors.update({"base_model.model.query.compacter_up.bias": np.zeros(6, np.float32)}),
        r"query.compacter_up",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_tensors_that_do_not_fit_are_refused(damage, tmp_path):
    change, message = DAMAGES[damage]
    network = Small()
    tensors = get_peft_model(network, config(target_modules=["query"])).adapter_tensors("default")
    change(tensors)
    save_adapter(tmp_path / "adapter", config(target_modules=["query"]), tensors, {})
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "adapter", tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(Small(), tmp_path / "adapter")


@pytest.mark.parametrize("dtype, compute_dtype", [(ms.float16, ms.float16), (ms.bfloat16, ms.float32)])
def test_half_precision(dtype, compute_dtype, rng):
    cell = CompacterDense(8, 8, 2, compute_dtype=compute_dtype, param_init_type=dtype, non_linearity="tanh")
    randomise(cell, rng)
    x = rng.normal(size=(3, 8)).astype(np.float32)
    full = CompacterDense(8, 8, 2, non_linearity="tanh", **FLOAT)
    for param, own in zip(full.get_parameters(), cell.get_parameters()):
        param.set_data(own.astype(ms.float32))
    np.testing.assert_allclose(numbers(cell, Tensor(x)), numbers(full, Tensor(x)), atol=0.05)

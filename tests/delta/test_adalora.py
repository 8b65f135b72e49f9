"""AdaLoRA: the delta, the term of the loss, the budget of ranks, and files that lack ranks."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.dataset import NumpySlicesDataset
from small import Small, Tiny, check_tied, check_turns, contents, ids, move, numbers, same

from mindpet.delta import AdaLoRADense, AdaLoraOptimizer, OrthogonalLoss
from mindpet.errors import CheckpointError, ConfigError
from mindpet.files.adapter import save_adapter
from mindpet.files.convert import convert, inspect
from mindpet.files.merge import merge
from mindpet.files.names import NameMap, to_torch
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import freeze_delta, load_delta
from mindpet.graph.ckpt_util import saved_parameters
from mindpet.peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    UnionConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from mindpet.peft import get_peft_model_state_dict as state_dict

TARGETS = ["query", "mlp.0", "turned", "shared"]  # mlp.0 has 6 outputs of 8 inputs, the others 8 of 8
A, B, E = (f"mindpet_delta_adalora_{name}" for name in "abe")
TENSORS = "adapter_model.safetensors"


def config(**fields):
    return AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 9, "target_modules": TARGETS, **fields}
    )


def values(delta, *names):
    return [getattr(delta, name).asnumpy().copy() for name in names or (A, B, E)]


def randomize(rng, *deltas):
    for delta in deltas:
        for name in (A, B, E):
            param = getattr(delta, name)
            param.set_data(Tensor(rng.normal(size=param.shape, scale=0.5).astype(np.float32)))


class Pair(nn.Cell):
    """Two hand-made layers, of other numbers of ranks."""

    def __init__(self):
        super().__init__()
        self.one = AdaLoRADense(5, 6, 3, 6, compute_dtype=ms.float32)
        self.two = AdaLoRADense(6, 4, 2, 6, compute_dtype=ms.float32)

    def construct(self, x):
        return self.two(ops.tanh(self.one(x)))


class Square(nn.Cell):
    """The mean square of a network's output."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, x):
        return ops.square(self.network(x)).mean()


def pair(rng):
    """A Pair whose deltas train, and inputs."""
    network = Pair()
    freeze_delta(network, "adalora")
    randomize(rng, network.one, network.two)
    return network, [Tensor(rng.normal(size=(7, 5)).astype(np.float32)) for _ in range(8)]


def test_the_layer_is_that_of_the_formula(mode, rng):
    cell = AdaLoRADense(4, 6, 3, 12, activation="relu", compute_dtype=ms.float32, bias_init="ones")
    randomize(rng, cell)
    a, b, e = values(cell)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    weight, bias = cell.weight.asnumpy(), cell.bias.asnumpy()
    inner = x @ weight.T + bias + 12 / (3 + 1e-5) * (x @ (a * e).T) @ b.T
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), np.maximum(inner, 0), atol=1e-5)
    np.testing.assert_allclose(cell.merged_weight().asnumpy(), weight + 4 * b @ (e * a), atol=1e-4)
    getattr(cell, A).set_data(Tensor(np.full((3, 4), np.nan, np.float32)))
    cell.reset()
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), np.maximum(x @ weight.T + bias, 0), atol=1e-6)


def test_names_shapes_and_values_of_a_fresh_layer():
    cell = AdaLoRADense(200, 300, 50, 4)
    shapes = [(param.name, param.shape) for param in cell.get_parameters()][2:]
    assert shapes == [(A, (50, 200)), (B, (300, 50)), (E, (50, 1))]
    a, b, e = values(cell)
    assert not e.any() and all(abs(value.std() / 0.02 - 1) < 0.05 for value in (a, b))


def test_dropout_acts_on_the_delta_while_training(rng):
    cell = AdaLoRADense(64, 4, 8, 8, lora_dropout=0.5, compute_dtype=ms.float32, weight_init="zeros")
    randomize(rng, cell)
    x = Tensor(np.ones((1, 64), np.float32))
    still = cell.set_train(False)(x).asnumpy()
    np.testing.assert_array_equal(cell(x).asnumpy(), still)
    assert np.abs(cell.set_train()(x).asnumpy() - still).max() > 1e-3


def test_wrong_arguments_are_all_told():
    with pytest.raises(ValueError, match="'init_r' .* got 0.*'lora_dropout' .* got 1.0"):
        AdaLoRADense(4, 6, 0, 8, lora_dropout=1.0)
    with pytest.raises(ValueError, match="'lora_alpha' must be above 0, but got -1"):
        AdaLoRADense(4, 6, 2, -1)
    for fields, message in {
        "total_step": ({"total_step": None}, "'total_step' must be a positive int, but got None"),
        "tinit": ({"tinit": 4, "tfinal": 5}, "'tinit' must be below total_step - tfinal, 4, but got 4"),
        "tfinal": ({"tfinal": -1}, "'tfinal' must be at least 0, but got -1"),
        "target_r": ({"target_r": 5}, "'target_r' must be at most init_r, 4, but got 5"),
        "beta1": ({"beta1": 1.0}, r"'beta1' must be in \[0, 1\), but got 1.0"),
        "weight": ({"orth_reg_weight": -0.5}, "'orth_reg_weight' must be finite and at least 0, but got -0.5"),
        "init": ({"init_lora_weights": "pissa"}, "'init_lora_weights' must be a bool, but got 'pissa'"),
        "pattern": ({"rank_pattern": {"q.lora_E": [True, 1]}}, "must be a list of 4 bools, one for each of init_r"),
    }.values():
        with pytest.raises((TypeError, ValueError), match=message):
            config(**fields)


def gap(gram):
    return np.sqrt(np.square(gram - np.eye(len(gram))).sum())


def term(deltas):
    own = [values(delta, A, B) for delta in deltas]
    return np.mean([[gap(a @ a.T), gap(b.T @ b)] for a, b in own])


def test_the_term_reaches_the_loss_and_the_gradients(mode, rng):
    network, (x, *_) = pair(rng)
    loss, names = OrthogonalLoss(Square(network), 0.3), [param.name for param in network.get_parameters()]
    deltas = (network.one, network.two)
    expected = np.square(network(x).asnumpy()).mean() + 0.3 * term(deltas)
    np.testing.assert_allclose(float(loss(x).asnumpy()), expected, rtol=1e-5)
    assert [param.name for param in network.get_parameters()] == names

    step = nn.TrainOneStepCell(OrthogonalLoss(Zero(network), 0.3), nn.SGD(network.trainable_params(), 0.5)).set_train()
    a, before = values(network.one, A)[0], 0.3 * term(deltas)
    np.testing.assert_allclose(float(step(x).asnumpy()), before, rtol=1e-5)
    # d ||G - I|| / dA = 2 (G - I) A / ||G - I||, of which a mean of four is taken.
    moved = a - 0.5 * 0.3 / 4 * 2 * (a @ a.T - np.eye(3)) @ a / gap(a @ a.T)
    np.testing.assert_allclose(values(network.one, A)[0], moved, atol=1e-5)
    assert float(step(x).asnumpy()) < before


class Zero(Square):
    """A loss of zero."""

    def construct(self, x):
        return 0 * self.network(x).sum()


def test_the_term_is_zero_and_smooth_where_all_is_orthogonal(rng):
    network, (x, *_) = pair(rng)
    for cell in (network.one, network.two):
        for name, transposed in ((A, False), (B, True)):
            param = getattr(cell, name)
            rows = np.linalg.qr(rng.normal(size=param.shape[:: 1 if transposed else -1]))[0].astype(np.float32)
            param.set_data(Tensor(rows if transposed else rows.T.copy()))
    loss = OrthogonalLoss(Zero(network))
    value, gradients = ms.value_and_grad(loss, None, ms.ParameterTuple(network.trainable_params()))(x)
    assert float(value.asnumpy()) < 1e-5 and all(np.isfinite(gradient.asnumpy()).all() for gradient in gradients)


def test_the_term_is_of_the_adapter_that_is_active(mode, rng):
    network, x = Tiny(), ids(rng)
    model = get_peft_model(network, config(target_modules=["query", "classifier"]), "one")
    move(model, 0)
    model.add_adapter("two", config(target_modules=["classifier"], init_r=3))
    loss = OrthogonalLoss(Square(model))
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        cells = [network.query, network.classifier][name == "two" :]
        expected = np.square(numbers(model, x)).mean() + 0.5 * term([cell.mindpet_delta for cell in cells])
        np.testing.assert_allclose(float(loss(x).asnumpy()), expected, rtol=1e-5)
        step = nn.TrainOneStepCell(loss, nn.SGD(model.trainable_params(), 1e-9)).set_train(False)
        np.testing.assert_allclose(float(step(x).asnumpy()), expected, rtol=1e-5)
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("lora")
    np.testing.assert_allclose(float(loss(x).asnumpy()), np.square(numbers(model, x)).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="'network' must be a network with AdaLoRA deltas that train, but got 'Tiny'"):
        OrthogonalLoss(network)


class Budget:
    """What the paper says, equations 8 to 12, in NumPy."""

    def __init__(self, own, ranks):
        self.own, self.ranks, self.means, self.spreads = own, ranks, 0, 0
        self.kept = np.ones(sum(ranks), bool)

    def update(self, step, params, gradients):
        """The values of the parameters after a step, [A, B, E] of each layer."""
        own, final, total = self.own, self.own.total_step - self.own.tfinal, sum(self.ranks)
        params = [value.copy() for value in params]
        if step < final:
            now = np.array([np.abs(w * g) for w, g in zip(params, gradients)], object)
            self.means = own.beta1 * self.means + (1 - own.beta1) * now
            self.spreads = own.beta2 * self.spreads + (1 - own.beta2) * np.abs(now - self.means)
        left = own.target_r * len(self.ranks)
        part = 1 - (step - own.tinit) / (final - own.tinit)
        if own.tinit < step <= final and (step % own.deltaT == 0 or step == final):
            scores = [mean * spread for mean, spread in zip(self.means, self.spreads)]
            scores = [e[:, 0] + a.mean(1) + b.mean(0) for a, b, e in zip(scores[0::3], scores[1::3], scores[2::3])]
            order = np.argsort(np.concatenate(scores))
            self.kept = np.isin(np.arange(total), order[total - int((total - left) * part**3 + left) :])
        elif step <= final:
            return params
        for e, kept in zip(params[2::3], np.split(self.kept, np.cumsum(self.ranks)[:-1])):
            e[~kept] = 0
        return params


SCHEDULES = {"each": {}, "second": {"tinit": 1, "tfinal": 4, "deltaT": 2, "beta1": 0.5, "beta2": 0.7}}


def check_budget(network, xs, own, optimize, ranks=(3, 2)):
    """Train with `optimize(x) -> gradients before the step` and compare with `Budget`."""
    params = [getattr(cell, name) for cell in (network.one, network.two) for name in (A, B, E)]
    budget, counts = Budget(own, ranks), []
    for step, x in enumerate(xs):
        before, gradients = [param.asnumpy().copy() for param in params], optimize(x)
        expected = budget.update(step, [w - 0.05 * g for w, g in zip(before, gradients)], gradients)
        for param, value in zip(params, expected):
            np.testing.assert_allclose(param.asnumpy(), value, atol=1e-5)
        counts.append(sum(np.count_nonzero(param.asnumpy()) for param in params[2::3]))
    return counts, budget


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_ranks_are_cut_to_the_budget(schedule, mode, rng):
    network, xs = pair(rng)
    own = config(target_r=1, total_step=6, **SCHEDULES[schedule])
    order = ms.ParameterTuple([network.two.trainable_params()[-1], *network.trainable_params()[:-1]])
    optimizer = AdaLoraOptimizer(nn.SGD(order, 0.05), network, own)
    loss = Square(network)
    step, gradient = nn.TrainOneStepCell(loss, optimizer).set_train(), ms.grad(loss, None, ordered(network))

    def optimize(x):
        gradients = [value.asnumpy().copy() for value in gradient(x)]
        step(x)
        return gradients

    counts, budget = check_budget(network, xs, own, optimize)
    # 2 + 3 (1 - (t - tinit) / (T - tinit))^3, of 5; T is 6, or 2.
    assert counts == ([5, 3, 2, 2, 2, 2, 2, 2] if schedule == "each" else [5, 5, 2, 2, 2, 2, 2, 2])
    assert [len(mask) for mask in optimizer.rank_pattern.values()] == [3, 2]
    assert np.concatenate(list(optimizer.rank_pattern.values())).tolist() == budget.kept.tolist()
    assert list(optimizer.rank_pattern) == ["one.lora_E", "two.lora_E"]


def ordered(network):
    """The parameters, [A, B, E] of each layer."""
    return ms.ParameterTuple([getattr(cell, name) for cell in (network.one, network.two) for name in (A, B, E)])


def test_a_loop_of_ones_own_and_gradients_that_are_summed(mode, rng):
    network, xs = pair(rng)
    own = config(target_r=1, total_step=6)
    optimizer = AdaLoraOptimizer(nn.SGD(ordered(network), 0.05), network, own)
    gradient = ms.value_and_grad(Square(network), None, optimizer.parameters)

    def optimize(x):
        halves = [gradient(part)[1] for part in (x[:3], x[3:])]
        gradients = tuple(first + second for first, second in zip(*halves))
        optimizer(gradients)
        return [value.asnumpy() for value in gradients]

    counts, _ = check_budget(network, xs, own, optimize)
    assert counts[-1] == 2


def optimizer_of(network, own=None):
    """Adam within a budget of one rank for each layer."""
    own = own or config(target_r=1, total_step=6)
    return AdaLoraOptimizer(nn.Adam(network.trainable_params(), 0.01), network, own)


def test_model_train(mode, rng):
    network, xs = pair(rng)
    optimizer = optimizer_of(network)
    data = NumpySlicesDataset(np.concatenate([x.asnumpy() for x in xs]), ["x"], shuffle=False).batch(7)
    ms.train.Model(OrthogonalLoss(Square(network)), optimizer=optimizer).train(1, data, dataset_sink_mode=False)
    assert int(optimizer.mindpet_adalora_step.asnumpy()) == 8
    assert sum(np.count_nonzero(values(cell, E)) for cell in (network.one, network.two)) == 2
    assert float(optimizer.learning_rate.asnumpy()) == pytest.approx(0.01)
    assert type(optimizer.optimizer) is nn.Adam and len(optimizer.parameters) == 6


def test_a_loss_scale_changes_nothing(rng):
    found = []
    for scale in (1, 1024):
        ms.set_seed(2)
        network, xs = pair(np.random.default_rng(3))
        inner = nn.Momentum(network.trainable_params(), 0.01, 0.9, loss_scale=scale)
        optimizer = AdaLoraOptimizer(inner, network, config(target_r=1, total_step=6))
        cell = nn.TrainOneStepCell(Square(network), optimizer, sens=scale).set_train()
        [cell(x) for x in xs[:4]]
        found.append([param.asnumpy() for param in optimizer.sensitivity] + values(network.one))
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_training_goes_on_where_it_was_saved(mode, rng, tmp_path):
    network, xs = pair(rng)
    optimizer = optimizer_of(network)
    step = nn.TrainOneStepCell(Square(network), optimizer).set_train()
    [step(x) for x in xs[:3]]
    ms.save_checkpoint(step, f"{tmp_path}/step.ckpt")
    ms.save_checkpoint(optimizer, f"{tmp_path}/optimizer.ckpt")
    ms.save_checkpoint(network, f"{tmp_path}/network.ckpt")
    [step(x) for x in xs[3:]]
    for files in (["step"], ["network", "optimizer"]):
        again, _ = pair(np.random.default_rng(1))
        other = optimizer_of(again)
        second = nn.TrainOneStepCell(Square(again), other).set_train()
        for file in files:
            missing, _ = ms.load_param_into_net(second, ms.load_checkpoint(f"{tmp_path}/{file}.ckpt"))
            assert not missing or len(files) > 1
        [second(x) for x in xs[3:]]
        assert optimizer.rank_pattern == other.rank_pattern
        for one, two in zip(network.get_parameters(), again.get_parameters()):
            same(two.asnumpy(), one.asnumpy())


def test_an_adapter_in_a_network(rng, tmp_path):
    """Training within a budget, and a file that lacks the ranks that were cut."""
    network, x = Small(), ids(rng)
    base = numbers(network, x)
    model = get_peft_model(network, config())
    same(numbers(model, x), base)
    optimizer = optimizer_of(model, config())
    step = nn.TrainOneStepCell(OrthogonalLoss(Square(model)), optimizer).set_train()
    [step(x) for _ in range(9)]
    with pytest.raises(ValueError, match="prune: the ranks are chosen after 10 steps, but there were 9"):
        optimizer.prune()
    step(x)
    tuned = numbers(model.set_train(False), x)
    model.save_pretrained(tmp_path / "whole")
    assert PeftConfig.from_pretrained(tmp_path / "whole").rank_pattern is None
    optimizer.prune()
    same(numbers(model, x), tuned)
    model.save_pretrained(tmp_path / "cut")
    shapes = TensorFile(tmp_path / "cut" / TENSORS).shapes
    masks = PeftConfig.from_pretrained(tmp_path / "cut").rank_pattern
    assert {key.replace("blocks.0.shared", "shared"): mask for key, mask in masks.items()}.keys() == {
        f"{name}.lora_E" for name in TARGETS
    }
    assert sum(map(sum, masks.values())) == 8 and masks == optimizer.rank_pattern
    for key, mask in masks.items():
        assert shapes[f"base_model.model.{key}"] == (sum(mask), 1)
    with model.disable_adapter():
        same(numbers(model, x), base)
    twin = copy.deepcopy(model)
    model.unload()
    for folder in ("whole", "cut"):
        again = PeftModel.from_pretrained(network, tmp_path / folder)
        assert again.peft_config["default"].rank_pattern is None
        same(numbers(again, x), tuned)
        again.save_pretrained(tmp_path / "again")
        assert PeftConfig.from_pretrained(tmp_path / "again").rank_pattern == (masks if folder == "cut" else None)
        other = Small()
        ms.load_param_into_net(other, network.parameters_dict())
        moved = get_peft_model(other, config())
        set_peft_model_state_dict(moved, state_dict(again))
        same(numbers(moved, x), tuned)
        again.unload()
    again = PeftModel.from_pretrained(network, tmp_path / "cut")
    again.merge_adapter()
    np.testing.assert_allclose(numbers(again, x), tuned, atol=1e-5)
    again.unmerge_adapter()
    same(numbers(again, x), tuned)
    np.testing.assert_allclose(numbers(again.merge_and_unload(), x), tuned, atol=1e-5)
    same(numbers(twin, x), tuned)


def test_what_the_optimizer_refuses(rng):
    network, _ = pair(rng)
    own = config(target_r=1)
    with pytest.raises(
        TypeError, match="'config' must be an AdaLoraConfig, but got .*'optimizer' must be an optimizer"
    ):
        AdaLoraOptimizer(nn.Dense(2, 2), network, LoraConfig())
    with pytest.raises(ValueError, match="'optimizer' must be over all parameters .*without .*two.mindpet_delta_ad"):
        AdaLoraOptimizer(nn.SGD(network.one.trainable_params(), 0.1), network, own)
    AdaLoraOptimizer(nn.SGD(network.one.trainable_params(), 0.1), network.one, own)
    with pytest.raises(ValueError, match="'target_r' must be at most 2.5, but got 3"):
        AdaLoraOptimizer(nn.SGD(network.trainable_params(), 0.1), network, config(target_r=3))
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    try:
        with pytest.raises(ValueError, match="'parallel_mode' must be one without cut parameters, but got 'semi_auto_"):
            AdaLoraOptimizer(nn.SGD(network.trainable_params(), 0.1), network, own)
    finally:
        ms.reset_auto_parallel_context()
    for param in network.get_parameters():
        param.requires_grad = False
    with pytest.raises(ValueError, match="'network' must be a network with AdaLoRA deltas that train, but got 'Pair'"):
        AdaLoraOptimizer(nn.SGD(nn.Dense(2, 2).trainable_params(), 0.1), network, own)


def test_hand_made_layers_and_files(mode, rng, tmp_path):
    class Plain(nn.Cell):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Dense(5, 6), nn.Dense(6, 4)

        def construct(self, x):
            return self.two(ops.tanh(self.one(x)))

    class Alike(Plain):
        def __init__(self):
            super().__init__()
            self.one = AdaLoRADense(5, 6, 3, 6, compute_dtype=ms.float32)
            self.two = AdaLoRADense(6, 4, 3, 6, compute_dtype=ms.float32)

    network, x = Alike(), Tensor(rng.normal(size=(3, 5)).astype(np.float32))
    freeze_delta(network, "adalora")
    randomize(rng, network.one, network.two)
    for name in (A, B, E):  # the last rank of `two` is cut, and all of `one`
        for cell, kept in ((network.two, [1, 1, 0]), (network.one, [0, 0, 0])):
            param, mask = getattr(cell, name), np.array(kept, np.float32)
            param.set_data(Tensor(param.asnumpy() * (mask if name == B else mask[:, None])))
    saved = saved_parameters(network)
    ms.save_checkpoint([{"name": name, "data": param} for name, param in saved.items()], f"{tmp_path}/d.ckpt")
    own = config(init_r=3, target_r=2, lora_alpha=6, target_modules=None)
    convert(tmp_path / "d.ckpt", tmp_path / "adapter", own)
    shapes = TensorFile(tmp_path / "adapter" / TENSORS).shapes
    assert shapes["base_model.model.two.lora_A"] == (2, 6) and shapes["base_model.model.one.lora_B"] == (6, 0)
    assert PeftConfig.from_pretrained(tmp_path / "adapter").rank_pattern == {
        "one.lora_E": [False] * 3,
        "two.lora_E": [True, True, False],
    }
    plain = Plain()
    base = {name: param for name, param in network.parameters_dict().items() if "mindpet" not in name}
    ms.load_param_into_net(plain, base)
    same(numbers(PeftModel.from_pretrained(plain, tmp_path / "adapter"), x), numbers(network, x))
    convert(tmp_path / "adapter", tmp_path / "back.safetensors")
    again = Alike()
    freeze_delta(again, "adalora")
    ms.load_param_into_net(again, base)
    load_delta(again, tmp_path / "back.safetensors")
    same(numbers(again, x), numbers(network, x))
    text = inspect(tmp_path / "adapter")
    assert "ADALORA" in text and "LORA, rank" not in text and "method: ADALORA" in inspect(tmp_path / "d.ckpt")
    assert "LORA, rank" not in inspect(tmp_path / "d.ckpt")
    with pytest.raises(CheckpointError, match=r"one.lora_A: \[4, 5\] is needed, but it is \[3, 5\]"):
        convert(tmp_path / "d.ckpt", tmp_path / "adapter", config(target_modules=None))


def test_merging_files_gives_the_merged_network(rng, tmp_path):
    network = Small()
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    model = get_peft_model(network, config(target_modules=["query", "mlp.0", "shared"], bias="lora_only"))
    move(model, 1)
    delta = network.query.mindpet_delta
    for name in (A, B, E):
        param = getattr(delta, name)
        param.set_data(Tensor(param.asnumpy() * (np.eye(4)[0] if name == B else np.eye(4)[:1].T).astype(np.float32)))
    model.save_pretrained(tmp_path / "adapter")
    assert TensorFile(tmp_path / "adapter" / TENSORS).shapes["base_model.model.query.lora_A"] == (1, 8)
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = TensorFile(tmp_path / "merged.safetensors").read_all()
    for path, param in model.merge_and_unload().parameters_and_names():
        np.testing.assert_allclose(merged[path], param.asnumpy(), atol=1e-6, err_msg=path)


DAMAGES = {
    "count": ({"query.lora_E": [True, False, False, False]}, "query.lora_E keeps 1 of 4, but .*query.lora_A has 2"),
    "layer": ({"other.lora_E": [True, False, False, False]}, "other.lora_E: there is no such layer"),
    "none": (None, r"query.lora_A: \[4, 8\] is needed, but it is \[2, 8\]"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_masks_that_do_not_fit_are_refused(damage, rng, tmp_path):
    pattern, message = DAMAGES[damage]
    network = Small()
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    own = config(target_modules=["query"])
    tensors = get_peft_model(network, own).adapter_tensors("default")
    save_adapter(tmp_path / "adapter", own, tensors, {})
    own = config(target_modules=["query"], inference_mode=True, rank_pattern=pattern)
    own.save_pretrained(tmp_path / "adapter")
    tensors = {key: value[:, :2] if "lora_B" in key else value[:2] for key, value in tensors.items()}
    save_tensors(tmp_path / "adapter" / TENSORS, {key: value.copy() for key, value in tensors.items()})
    (tmp_path / "adapter/mindpet_passport.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    network = Small()
    before = contents(network)
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(network, tmp_path / "adapter")
    assert contents(network) == before


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    own = config(inference_mode=True, rank_pattern={"q.lora_E": [False] * 4})
    shapes = {"lora_A": (0, 2**60), "lora_B": (4, 0), "lora_E": (0, 1)}
    tensors = {f"base_model.model.q.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match="rank_pattern: of 4,611,686,018,427,387,924 numbers the file has only 0"):
        own.unpack(tensors)
    assert own.unpack({**tensors, "base_model.model.q.lora_A": np.zeros((0, 5), np.float32)})[0].rank_pattern is None


def test_a_part_of_a_union_lacks_ranks_too(rng, tmp_path):
    network, x = Small(), ids(rng)
    parts = [config(target_modules=["query"]), IA3Config(target_modules=["mlp.0"])]
    model = get_peft_model(network, UnionConfig(configs=parts))
    move(model, 1)
    for name in (A, B, E):
        param = getattr(network.query.mindpet_delta, name)
        param.set_data(Tensor(np.zeros(param.shape, np.float32)))
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).parts[0].rank_pattern == {"query.lora_E": [False] * 4}
    model.unload()
    same(numbers(PeftModel.from_pretrained(network, tmp_path), x), tuned)


def test_a_fresh_adapter_has_all_ranks():
    with pytest.raises(ConfigError, match="'rank_pattern' is of a file that lacks ranks; a fresh adapter has all"):
        get_peft_model(Small(), config(rank_pattern={"query.lora_E": [True] * 4}))


def test_other_names_for_the_layers(rng, tmp_path):
    def there(name):
        return to_torch(name.replace("mlp.0", "ffn.wi").replace("query", "mha.q"))

    def here(name):
        return name.replace("ffn.wi", "mlp.0").replace("mha.q", "query")

    names, x = NameMap(there, here), ids(rng)
    ms.set_seed(1)
    network = Small()
    model = get_peft_model(network, config(target_modules=["query", "mlp.0"]), name_map=names)
    move(model, 1)
    for name in (A, B, E):
        param = getattr(network.query.mindpet_delta, name)
        param.set_data(Tensor(np.zeros(param.shape, np.float32)))
    model.save_pretrained(tmp_path / "adapter")
    written = AdaLoraConfig.from_pretrained(tmp_path / "adapter")
    assert written.target_modules == ["ffn.wi", "mha.q"]
    assert written.rank_pattern == {"ffn.wi.lora_E": [True] * 4, "mha.q.lora_E": [False] * 4}
    ms.set_seed(1)
    again = PeftModel.from_pretrained(Small(), tmp_path / "adapter", name_map=names)
    same(numbers(again, x), numbers(model, x))


def test_adapters_in_one_batch(mode, rng):
    network, x = Small(), ids(rng, 4)
    base = numbers(network, x)
    model = get_peft_model(network, config(), "one")
    move(model, 1)
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "turned", "embed"]))
    expected = {"__base__": base, "one": numbers(model, x)}
    model.set_adapter("lora")
    move(model, 2)
    expected["lora"] = numbers(model, x)
    names = ["one", "lora", "__base__", "one"]
    got = model(x, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)


def test_adapters_of_one_shape_take_turns_without_a_new_graph(mode, rng, tmp_path):
    check_turns(config(), config(target_r=1, total_step=30), ids(rng), tmp_path)


def test_another_scale_is_another_slot(rng):
    model, x = get_peft_model(Small(), config(), "one"), ids(rng)
    move(model, 1)
    one = numbers(model, x)
    model.add_adapter("two", config(lora_alpha=1))
    model.set_adapter("two")
    move(model, 1)
    assert np.abs(numbers(model, x) - one).max() > 1e-3
    model.set_adapter("one")
    same(numbers(model, x), one)


def test_a_weight_in_common_with_another_layer(mode, rng):
    check_tied(config(target_modules=["head"]), ids(rng))


@pytest.mark.parametrize("dtype", [ms.float16])
def test_layers_of_half_precision(dtype, mode, rng):
    network = nn.SequentialCell(nn.Dense(4, 6, dtype=dtype))
    model = get_peft_model(network, config(target_modules=["0"]))
    move(model, 1)
    x = rng.normal(size=(3, 4)).astype(np.float16)
    a, b, e = values(network[0].mindpet_delta)
    weight, bias = network[0].weight.asnumpy(), network[0].bias.asnumpy()
    expected = x @ (weight + 2 * b @ (e * a)).T + bias
    assert model(Tensor(x)).dtype == dtype
    np.testing.assert_allclose(model(Tensor(x)).asnumpy(), expected, atol=2e-2)
    step = nn.TrainOneStepCell(OrthogonalLoss(Square(model)), optimizer_of(model, config())).set_train()
    assert step(Tensor(x)).dtype == dtype

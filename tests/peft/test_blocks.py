"""Deltas of a whole block: a Cell that has linear layers, and is none itself."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import WIDTH, Small, ids, move, numbers, same

from mindpet.errors import ConfigError, MergeError
from mindpet.peft import BottleneckConfig, LoraConfig, PeftModel, get_peft_model, plan_targets

FORMS = [{"form": "sequential"}, {"form": "parallel", "scale": 4.0}, {"form": "parallel", "scale": "learned"}]


class Split(nn.Cell):
    """A block that returns a tuple, and takes what is no hidden state behind its input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Dense(4, 12), nn.Dense(12, 6)

    def construct(self, hidden, factor, shift=None):
        inner = self.up(hidden) * factor
        return self.down(inner if shift is None else inner + shift), inner


class Splits(nn.Cell):
    """Two of them."""

    def __init__(self):
        super().__init__()
        self.first, self.head = Split(), nn.Dense(6, 2)

    def construct(self, x):
        out, inner = self.first(x, 2.0, shift=x.sum())
        return self.head(out), inner


def config(**fields):
    return BottleneckConfig(**{"bottleneck_size": 3, "non_linearity": "tanh", "target_modules": ["mlp"], **fields})


def added(delta, x):
    """`s (W_up tanh(W_down x + b_down) + b_up)`."""
    down, _, up = delta.mindpet_delta_adapter.mindpet_delta_adapter_block
    scale = delta.mindpet_delta_adapter.scale
    scale = delta.mindpet_delta_adapter.mindpet_delta_adapter_scale.asnumpy() if scale == "learned" else scale
    inner = np.tanh(x @ down.weight.asnumpy().T + down.bias.asnumpy())
    return scale * (inner @ up.weight.asnumpy().T + up.bias.asnumpy())


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_the_formula(fields, mode, rng):
    network = Small()
    x = rng.normal(size=(2, 3, WIDTH)).astype(np.float32)
    base = numbers(network.mlp, Tensor(x))
    model = get_peft_model(network, config(**fields))
    same(numbers(network.mlp, Tensor(x)), base)
    move(model, 1)
    expected = base + added(network.mlp.mindpet_delta, x if fields["form"] == "parallel" else base)
    np.testing.assert_allclose(numbers(network.mlp, Tensor(x)), expected, atol=1e-5)


def test_a_tuple_and_further_arguments(mode, rng):
    network = Splits()
    x = rng.normal(size=(5, 4)).astype(np.float32)
    out, inner = (value.asnumpy() for value in network.first(Tensor(x), 2.0, shift=Tensor(x.sum())))
    model = get_peft_model(network, config(target_modules=["first"], form="parallel", scale=0.5))
    move(model, 1)
    new, same_inner = (value.asnumpy() for value in network.first(Tensor(x), 2.0, shift=Tensor(x.sum())))
    np.testing.assert_allclose(new, out + added(network.first.mindpet_delta, x), atol=1e-5)
    same(same_inner, inner)
    assert [param.shape for param in model.trainable_params()] == [(3, 4), (3,), (6, 3), (6,)]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_train_save_load_switch_and_share_a_batch(fields, mode, rng, tmp_path):
    network, x = Small(), ids(rng)
    base = numbers(network, x)
    model = get_peft_model(network, config(**fields))
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), nn.Adam(model.trainable_params(), 0.1))
    labels = Tensor(np.arange(4, dtype=np.int32) % 3)
    before = [param.asnumpy().copy() for param in model.trainable_params()]
    losses = [float(step.set_train()(x, labels).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(np.abs(param.asnumpy() - old).max() > 0 for param, old in zip(model.trainable_params(), before))
    trained = numbers(model.set_train(False), x)
    with model.disable_adapter():
        same(numbers(model, x), base)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    same(numbers(network, x), trained)
    with pytest.raises(MergeError, match="cannot be folded"):
        loaded.merge_adapter()
    loaded.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "query"], init_lora_weights=False))
    loaded.set_adapter("lora")
    lora = numbers(loaded, x)
    names = ["lora", "default", "__base__", "default"]
    mixed = loaded(x, adapter_names=names).asnumpy()
    expected = np.stack([{"lora": lora, "default": trained, "__base__": base}[name][i] for i, name in enumerate(names)])
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_what_carries_no_delta_of_a_block():
    with pytest.raises(ConfigError, match=r"of a type that cannot carry it: \['blocks.0.norm \(LayerNorm\)'"):
        plan_targets(Small(), config(target_modules=["norm"]))
    with pytest.raises(ConfigError, match=r"cannot carry it: \['embed \(Embedding\)'\]"):
        plan_targets(Small(), config(target_modules=["embed"], form="parallel"))
    with pytest.raises(ConfigError, match=r"cannot carry it: \['mlp \(SequentialCell\)'\]"):
        plan_targets(Small(), LoraConfig(target_modules=["mlp"]))
    network = nn.SequentialCell(Feed(cut=False)).to_float(ms.float16)
    network[0].up.weight.set_dtype(ms.float16)
    with pytest.raises(ConfigError, match="0: the scale, 1e-09, must be a number of Float16"):
        plan_targets(network, config(target_modules=["0"], form="parallel", scale=1e-9))
    with pytest.raises(ValueError, match=r"'form' must be one of .*'scale' .* got 0"):
        config(form="beside", scale=0)
    assert [type(target.kind).__name__ for target in plan_targets(Small(), config()).targets] == ["BlockKind"]


class Feed(nn.Cell):
    """A feed-forward block with strategies: the inner features are cut."""

    def __init__(self, cut=True):
        super().__init__()
        self.up, self.down = nn.Dense(8, 16), nn.Dense(16, 8)
        if cut:
            self.up.matmul.shard(((2, 1), (4, 1)))
            self.down.matmul.shard(((2, 4), (1, 4)))

    def construct(self, x):
        return self.down(self.up(x))


def test_the_strategies_of_a_block_are_those_of_its_first_and_last_layer():
    network = nn.SequentialCell(Feed(), Feed(cut=False))
    get_peft_model(network, config(target_modules=["0", "1"], form="parallel", scale="learned"))
    adapter = network[0].mindpet_delta.mindpet_delta_adapter
    strategies = {slot: getattr(one, "in_strategy", None) for slot, (one, _) in adapter.operators.items()}
    assert strategies["strategy_matmul_down_sampler"] == ((2, 1), (1, 1))
    assert strategies["strategy_matmul_up_sampler"] == ((2, 1), (1, 1))
    assert strategies["strategy_scale_mul"] == ((2, 1), (1,))
    assert not hasattr(network[1].mindpet_delta.mindpet_delta_adapter.scale_mul, "in_strategy")
    uneven = nn.SequentialCell(Feed())
    uneven[0].down = nn.Dense(16, 8)
    with pytest.raises(ConfigError, match="from its first and its last linear layer, .*; they are .* and None"):
        get_peft_model(uneven, config(target_modules=["0"]))


def test_a_block_in_float16(rng):
    network = nn.SequentialCell(Feed(cut=False)).to_float(ms.float16)
    model = get_peft_model(network, config(target_modules=["0"], form="parallel"))
    assert numbers(model, Tensor(rng.normal(size=(2, 8)).astype(np.float16))).dtype == np.float16

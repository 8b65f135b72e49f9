"""What a layer with LoRA keeps for the backward pass: its input, which others share, and r numbers a token."""

import json
import math

import mindspore as ms
import numpy as np
import pytest
from compiled import kept_bytes
from mindspore import Tensor, nn, ops

from mindpet.errors import ConfigError
from mindpet.peft import BitFitConfig, LoraConfig, PeftModel, get_peft_model

TOKENS, WIDTH, INNER, RANK = 24, 16, 20, 2
TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]


class Block(nn.Cell):
    """The linear layers of a transformer's block, and what is between them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Dense(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Dense(WIDTH, INNER), nn.Dense(WIDTH, INNER), nn.Dense(INNER, WIDTH)

    def construct(self, x):
        x = ops.sin(x)  # in place of a norm
        mixed = ops.matmul(ops.matmul(self.q(x), self.k(x).T), self.v(x))
        hidden = ops.sin(self.o(mixed))
        return self.down(ops.tanh(self.gate(hidden)) * self.up(hidden))


# Configuration -> numbers a token beside those of BitFit: the inputs of q, k and v, of o, of gate and up, and of down,
# and A x of each layer.
KEPT = {
    "bitfit": (BitFitConfig(), 0),
    "lora": (LoraConfig(r=RANK, target_modules=TARGETS), WIDTH + WIDTH + WIDTH + INNER + 7 * RANK),
    "lora_fa": (LoraConfig(r=RANK, target_modules=TARGETS, freeze_a=True), 7 * RANK),
}


def make(name):
    ms.set_seed(3)
    return get_peft_model(Block(), KEPT[name][0])


class Step(nn.Cell):
    """The gradients of the input and of what trains."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network, self.params = network.set_train(), ms.ParameterTuple(network.trainable_params())
        self.gradients = ops.GradOperation(get_all=True, get_by_list=True)

    def construct(self, x):
        return self.gradients(self.network, self.params)(x)


def example():
    return Tensor(np.random.default_rng(7).normal(size=(TOKENS, WIDTH)).astype(np.float32))


def graph_bytes(name):
    step = Step(make(name))
    step(example())
    return sum(kept_bytes(step).values())


def pynative_bytes(name):
    """What MindSpore saves while the model runs, without Parameters; a Tensor that is saved twice counts once."""
    model, saved = make(name).set_train(), {}
    parameters = {param.data_ptr() for param in model.get_parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = (tensor, tensor.itemsize * math.prod(tensor.shape))
        return tensor

    def run(x):
        with ms.saved_tensors_hooks(pack, lambda tensor: tensor):
            return model(x).sum()

    ms.value_and_grad(run, 0, model.trainable_params())(example())
    return sum(size for _, size in saved.values())


# `saved_tensors_hooks` is new in MindSpore 2.10.
COUNTS = {
    ms.GRAPH_MODE: graph_bytes,
    **({ms.PYNATIVE_MODE: pynative_bytes} if hasattr(ms, "saved_tensors_hooks") else {}),
}


@pytest.mark.parametrize("mode", COUNTS, ids=lambda mode: {ms.GRAPH_MODE: "graph"}.get(mode, "pynative"))
def test_a_step_keeps_what_the_formula_says(mode):
    ms.set_context(mode=mode)
    floor = COUNTS[mode]("bitfit")
    for name, (_, numbers) in KEPT.items():
        assert COUNTS[mode](name) - floor == 4 * TOKENS * numbers, name


def test_a_frozen_a_stays_what_it_is_and_b_trains(mode):
    model = get_peft_model(Block(), LoraConfig(r=RANK, target_modules=["q", "down"], freeze_a=True))
    before = {name: value.copy() for name, value in model.adapters["default"].values.items()}
    assert {param.name.split(".")[-1] for param in model.trainable_params()} == {"mindpet_delta_lora_b"}
    step = nn.TrainOneStepCell(model, nn.SGD(model.trainable_params(), 0.1)).set_train()
    step(example())
    after = model.adapters["default"].values
    assert {name.split("_")[-1] for name in after if not np.array_equal(after[name], before[name])} == {"b"}


def test_it_is_saved_under_its_own_name_and_only_if_it_is_set(tmp_path):
    for given in (None, True):
        config = LoraConfig(r=RANK, target_modules=["q"], freeze_a=given)
        model = get_peft_model(Block(), config)
        model.save_pretrained(tmp_path / str(given))
        content = json.loads((tmp_path / str(given) / "adapter_config.json").read_text())
        assert content.get("freeze_a") is given and ("freeze_a" in content) is (given is not None)
        again = PeftModel.from_pretrained(Block(), tmp_path / str(given), is_trainable=True, force=True)
        assert len(again.trainable_params()) == (1 if given else 2)


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(TypeError, match="'freeze_a' must be a bool or None, but got 'yes'"):
        LoraConfig(freeze_a="yes")
    network = nn.SequentialCell(nn.Embedding(4, 4))
    with pytest.raises(ConfigError, match="no freeze_a with an embedding, whose A starts as zeros"):
        get_peft_model(network, LoraConfig(target_modules=["0"], freeze_a=True))

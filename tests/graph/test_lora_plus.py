"""LoRA+: the groups, and what an optimizer makes of them."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn
from small import Small, Tiny, config, move
from toy import Toy, batch, lora

from mindpet.errors import NoMatchError
from mindpet.graph import freeze_delta, lora_plus_groups
from mindpet.peft import IA3Config, LoraConfig, get_peft_model


def names(groups):
    return [[param.name for param in group["params"]] for group in groups]


def test_groups_of_hand_made_layers():
    groups = lora_plus_groups(lora(), 0.5, 4, weight_decay=0.1)
    assert names(groups) == [["fc.mindpet_delta_lora_a", "head.weight"], ["fc.mindpet_delta_lora_b"], ["head.bias"]]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5, 0.1), (2.0, 0.1), (2.0, 0.0)]


def test_groups_of_a_network_with_adapters():
    model = get_peft_model(Small(), config(use_dora=True, target_modules=["embed", "query"], modules_to_save=["norm"]))
    groups = lora_plus_groups(model, 0.5, 4, embedding_learning_rate=0.01)
    start = "mindpet_delta_lora_"
    assert names(groups) == [
        [f"query.{start}a"],
        [f"embed.{start}a", f"embed.{start}b"],
        [f"embed.{start}magnitude", f"query.{start}b", f"query.{start}magnitude"],
        [f"blocks.{index}.norm.mindpet_trained_{leaf}" for index in (0, 1) for leaf in ("gamma", "beta")],
    ]
    assert [group["lr"] for group in groups] == [0.5, 0.01, 2.0, 2.0]
    grouped = [id(param) for group in groups for param in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.trainable_params()))  # each is in one group


def test_only_the_active_adapter_is_grouped_and_a_training_cell_is_a_network():
    model = get_peft_model(Tiny(), LoraConfig(target_modules=["query"]))
    model.add_adapter("other", LoraConfig(target_modules=["classifier"]))
    model.set_adapter("other")
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.MSELoss()), nn.Adam(model.trainable_params()))
    for network in (model, step):
        start = "classifier.mindpet_delta_lora_"
        assert names(lora_plus_groups(network, 0.5, 4)) == [[f"{start}a"], [f"{start}b"]]


STEPS = [0.5, 0.25, 0.125]
RATES = {
    "a number": (0.5, [0.5] * 3),
    "a Tensor": (Tensor(0.5, ms.float32), [0.5] * 3),
    "one a step": (STEPS, STEPS),
    "a Tensor, one a step": (Tensor(STEPS, ms.float32), STEPS),
    "a schedule": (nn.ExponentialDecayLR(0.5, 0.5, 1), STEPS),
}


@pytest.mark.parametrize("rate", RATES)
def test_every_kind_of_rate_is_multiplied_at_every_step(rate, mode, rng):
    network, (given, expected) = lora(), RATES[rate]
    optimizer = nn.SGD(lora_plus_groups(network, given, 8))
    gradients = tuple(Tensor(np.ones(param.shape, np.float32)) for param in optimizer.parameters)
    factors = {"fc.mindpet_delta_lora_a": 1, "head.weight": 1, "fc.mindpet_delta_lora_b": 8, "head.bias": 8}
    before = [param.asnumpy().copy() for param in optimizer.parameters]
    for total in np.cumsum(expected):
        optimizer(gradients)
        for param, start in zip(optimizer.parameters, before):
            np.testing.assert_allclose(start - param.asnumpy(), factors[param.name] * total, rtol=1e-5)


def test_decay_is_of_matrices_alone(rng):
    network = lora()
    move(network, 0)
    before = {param.name: param.asnumpy().copy() for param in network.trainable_params()}
    optimizer = nn.SGD(lora_plus_groups(network, 0.5, 4, weight_decay=0.1))
    optimizer(tuple(Tensor(np.zeros(param.shape, np.float32)) for param in optimizer.parameters))
    rates = {"fc.mindpet_delta_lora_a": 0.05, "head.weight": 0.05, "fc.mindpet_delta_lora_b": 0.2, "head.bias": 0}
    for param in network.trainable_params():
        np.testing.assert_allclose(param.asnumpy(), before[param.name] * (1 - rates[param.name]), rtol=1e-5)


def test_optimizers_of_nn_and_of_mint_take_the_groups(mode, rng):
    network = lora()
    x, labels = batch(rng)
    groups = lora_plus_groups(network, nn.CosineDecayLR(0.001, 0.02, 20), 4, weight_decay=0.01)
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.CrossEntropyLoss()), nn.AdamWeightDecay(groups)).set_train()
    losses = [float(step(x, labels).asnumpy()) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    optimizer = mint.optim.AdamW(lora_plus_groups(network, 0.5, 4))
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 2.0, 2.0]


def test_a_network_without_lora_is_refused():
    for network, trained in ((Toy("ia3"), "fc.weight"), (Toy(), "fc.weight")):
        with pytest.raises(NoMatchError, match=f"no A or B of LoRA trains in Toy; what trains is .'{trained}'"):
            lora_plus_groups(network, 0.1, 2)
    frozen = Toy("lora")
    freeze_delta(frozen, "lora", include=["*lora*"], exclude=["head.*"], strict=False)
    for param in frozen.get_parameters():
        param.requires_grad = "head" in param.name
    with pytest.raises(NoMatchError, match=r"what trains is \['head.weight', 'head.bias'\]"):
        lora_plus_groups(frozen, 0.1, 2)
    with pytest.raises(NoMatchError, match="no A or B of LoRA trains in PeftModel"):
        lora_plus_groups(get_peft_model(Tiny(), IA3Config(target_modules=["query"], feedforward_modules=[])), 0.1, 2)


def test_wrong_arguments_are_all_told():
    with pytest.raises(TypeError, match="'network' must be a Cell.*'learning_rate' must be a number.*'ratio' must be"):
        lora_plus_groups([1], "0.1", "16")
    message = "'learning_rate' .* at least 0, but got -.*'embedding_learning_rate'.*'ratio' .* positive.*'weight_decay'"
    with pytest.raises(ValueError, match=message):
        lora_plus_groups(lora(), -1, -2, embedding_learning_rate=[0.1, -0.1], weight_decay=-0.1)
    for wrong in ([], [0.1, "a"], True, None):
        with pytest.raises(TypeError, match="'learning_rate' must be a number, numbers, a Tensor or a Learning"):
            lora_plus_groups(lora(), wrong, 2)

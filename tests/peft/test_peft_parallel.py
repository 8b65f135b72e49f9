"""Deltas beside layers with strategies, in MindSpore's real parallel front end."""

import numpy as np
import pytest
from mindspore import Tensor, nn
from models.llama import CausalLoss, LlamaConfig

from mindpet.errors import ConfigError
from mindpet.graph import freeze_delta
from mindpet.parallel import dry_run_many
from mindpet.peft import AdapterConfig, LoraConfig, get_peft_model

SHAPE = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(peft_config, **by_hand):
    """A LLaMA on 8 ranks, with its loss, its inputs and an optimizer."""
    loss = CausalLoss(LlamaConfig(**SHAPE, data_parallel=2, model_parallel=4, **by_hand))
    if peft_config is None:
        freeze_delta(loss, "lora")
    else:
        get_peft_model(loss.network, peft_config)
    ids = Tensor(np.zeros((4, 16), np.int32))
    return loss, (ids, ids), nn.Adam(loss.trainable_params(), 1e-3)


def by_hand():
    return make(None, lora_rank=4, lora_alpha=8)


def by_peft():
    return make(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))


def first_layer():
    return make(LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0]))


def adapter():
    return make(AdapterConfig(target_modules=["o_proj"], bottleneck_size=8))


def strategies(report):
    """(Cell of the base, slot, strategy) of the LoRA operators."""
    return {
        (plan.cell.replace(".mindpet_delta", ""), plan.slot, plan.strategy)
        for plan in report.operators
        if plan.slot.startswith("strategy_lora")
    }


def test_strategies_are_those_of_layers_made_by_hand():
    hand, peft, first, behind = dry_run_many([by_hand, by_peft, first_layer, adapter], 8)
    assert strategies(peft) == strategies(hand) and len(strategies(peft)) == 7 * 4  # the layers are compiled once
    assert {collective_bytes(report) for report in (hand, peft)} == {collective_bytes(hand)}
    assert {(plan.cell, plan.count) for plan in first.operators if "mindpet_delta" in plan.cell} == {
        ("network.model.layers.0.self_attn.q_proj.mindpet_delta", 1)  # but not where their deltas differ
    }
    found = {plan.slot: plan.strategy for plan in behind.operators if "self_attn.o_proj.mindpet" in plan.cell}
    assert found["strategy_matmul_down_sampler"] == ((2, 1), (1, 1)) and "strategy_residual_add" in found


def collective_bytes(report):
    """Bytes that a rank communicates in a step."""
    return sum(plan.bytes * plan.count for plan in report.collectives)


def test_dora_beside_a_layer_with_strategies_is_refused():
    loss = CausalLoss(LlamaConfig(**SHAPE, data_parallel=2, model_parallel=4))
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj: no DoRA beside a layer with strategies"):
        get_peft_model(loss.network, LoraConfig(target_modules=["q_proj"], use_dora=True))

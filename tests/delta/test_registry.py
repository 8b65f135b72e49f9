"""Finding a method by its mode."""

import pytest

from mindpet.delta.registry import METHODS, find_method
from mindpet.network.parameters import matches


@pytest.mark.parametrize(
    "mode, name",
    [
        ("lora", "lora"),
        ("LoRA", "lora"),
        ("prefix", "prefixtuning"),
        ("PrefixTuning", "prefixtuning"),
        ("PTuning2", "ptuning2"),
        ("LayerNorm", "ln_tuning"),
    ],
)
def test_find_method(mode, name):
    assert find_method(mode) is METHODS[name]


@pytest.mark.parametrize("mode", ["", "lo ra", "rdrop", 123, None])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=f"'mode' must be one of .*, but got {mode!r}"):
        find_method(mode)


NAMES = {
    "lora": ["fc.mindpet_delta_lora_a", "mindpet_delta_lora_B", "blocks.0.mindpet_delta_lora.weight"],
    "ia3": ["fc.mindpet_delta_ia3"],
    "vera": ["fc.mindpet_delta_vera_lambda_b", "mindpet_delta_vera_lambda_d"],
    "hira": ["fc.mindpet_delta_hira_a", "mindpet_delta_hira_b"],
    "miss": ["fc.mindpet_delta_miss", "mindpet_delta_miss"],
    "adalora": [f"fc.mindpet_delta_adalora_{name}" for name in "abe"],
    "oft": ["fc.mindpet_delta_oft"],
    "loha": ["fc.mindpet_delta_loha_w1_a", "mindpet_delta_loha_t2"],
    "lokr": ["fc.mindpet_delta_lokr_w1", "mindpet_delta_lokr_w2_b"],
    "adaption_prompt": ["attn.mindpet_delta_adaption_prompt", "mindpet_delta_adaption_prompt_gate"],
    "prompt_tuning": ["model.mindpet_delta_prompt"],
    "trainable_tokens": ["embed.mindpet_delta_trainable_tokens"],
    "ln_tuning": ["norm.gamma", "layers.0.ln_1.beta", "layers.0.input_layernorm.weight", "LayerNorm.bias"],
    "p_tuning": ["model.mindpet_delta_p_tuning_table", "mindpet_delta_p_tuning_mlp.0.weight"],
    "prefixtuning": ["prefix.mindpet_delta_prefixtuning_wte.embedding_table", "mindpet_delta_prefixtuning.0.weight"],
    "adapter": ["fc.mindpet_delta_adapter.mindpet_delta_adapter_block.weight", "fc.mindpet_delta_adapter.scale"],
    "low_rank_adapter": ["fc.mindpet_delta_low_rank_adapter.bias", "fc.mindpet_delta_low_rank_adapter_up.bias"],
    "compacter": ["fc.mindpet_delta_compacter.mindpet_delta_compacter_rule", "mindpet_delta_compacter_up.left"],
    "bitfit": ["fc.bias"],
    "ptuning2": [
        "mindpet_delta_ptuning2_embedding.embedding_table",
        "mindpet_delta_ptuning2_dense_in.weight",
        "fc.mindpet_delta_ptuning2.weight",
        "fc.mindpet_delta_ptuning2",
    ],
}
EVERY = [name for names in NAMES.values() for name in names]
NEVER = [
    "fc.weight",
    "fc.mindpet_lora_scaling",
    "fc.mindpet_lora_start_a",
    "fc.mindpet_vera_a",
    "mindpet_adalora_sensitivity.fc.mindpet_delta_adalora_a.x",
    "fc.mindpet_trainable_tokens_slots",
    "mindpet_delta_ptuning2_prefix",
]


@pytest.mark.parametrize("method", METHODS)
def test_patterns_fit_the_parameters_of_their_own_method_alone(method):
    expected = [name for name in EVERY if name.endswith("bias")] if method == "bitfit" else NAMES[method]
    assert [name for name in [*EVERY, *NEVER] if matches(name, METHODS[method].trainable)] == expected

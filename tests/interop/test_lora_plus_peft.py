"""LoRA+: the groups are those of Hugging Face PEFT."""

import pytest

from mindpet.files.names import to_torch
from mindpet.graph import lora_plus_groups
from mindpet.peft import PeftModel

pytestmark = pytest.mark.interop

EMBEDDING = ["query", "word_embeddings"]
CASES = {
    "embedding": ("bert", {"target_modules": EMBEDDING, "task_type": "SEQ_CLS"}),
    "biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "dora": ("bert", {"target_modules": EMBEDDING, "use_dora": True, "modules_to_save": ["LayerNorm", "classifier"]}),
    "lora_bias": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["wpe"]}),
}
LEAVES = {
    "mindpet_delta_lora_a": "lora_A",
    "mindpet_delta_lora_b": "lora_B",
    "mindpet_delta_lora_bias": "lora_B.bias",
    "mindpet_delta_lora_magnitude": "lora_magnitude_vector",
}
THEIRS = dict.fromkeys((".default", ".modules_to_save", ".base_layer", "base_model.model."), "")
THEIRS["lora_embedding_"] = "lora_"


def of_ours(name):
    """A parameter's name here as `of_theirs` has it."""
    path, _, leaf = name.rpartition(".")
    return f"{to_torch(path)}.{LEAVES[leaf]}" if leaf in LEAVES else to_torch(name.replace("mindpet_trained_", ""))


def of_theirs(name):
    """A parameter's name there without what tells adapters apart."""
    for part, instead in THEIRS.items():
        name = name.replace(part, instead)
    return name[: -len(".weight")] if "lora_" in name and name.endswith(".weight") else name


@pytest.mark.parametrize("case", CASES)
def test_groups(case, tmp_path):
    import peft
    import torch
    from pairs import make_pair
    from peft.optimizers import create_loraplus_optimizer

    kind, fields = CASES[case]
    theirs, ours = make_pair(kind, tmp_path / "base")
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**fields))
    wrapped.save_pretrained(tmp_path / "adapter")
    more = {"loraplus_lr_embedding": 0.3, "loraplus_weight_decay": 0.1}
    optimizer = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=16, **more)
    called = {id(param): name for name, param in wrapped.named_parameters()}
    expected = {
        of_theirs(called[id(param)]): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for param in group["params"]
    }
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter", is_trainable=True)
    groups = lora_plus_groups(model, 0.5, 16, embedding_learning_rate=0.3, weight_decay=0.1)
    found = {of_ours(param.name): (group["lr"], group["weight_decay"]) for group in groups for param in group["params"]}
    assert found == expected

"""The example LLaMA against transformers, run in the same process."""

import numpy as np
import pytest
from mindspore import Tensor
from models.llama import LlamaConfig, LlamaForCausalLM, load_folder

pytestmark = pytest.mark.interop


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 16, "rope_theta": 500.0},
    ],
    ids=["grouped", "tied", "biased"],
)
def test_any_llama_folder_gives_the_same_logits(changes, mode, rng, tmp_path):
    import torch
    import transformers

    torch.manual_seed(1)
    settings = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "initializer_range": 0.1,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).eval()
    theirs.save_pretrained(tmp_path)
    ours = LlamaForCausalLM(LlamaConfig.from_folder(tmp_path))
    load_folder(ours, tmp_path)
    ids = rng.integers(0, 60, (4, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    logits = ours.set_train(False)(Tensor(ids.astype(np.int32))).asnumpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_bfloat16_weights_load(rng, tmp_path):
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = LlamaForCausalLM(LlamaConfig.from_folder(tmp_path))
    load_folder(ours, tmp_path)
    weights = {name: param.asnumpy() for name, param in ours.parameters_and_names()}
    for name, value in theirs.state_dict().items():
        name = name.replace("embed_tokens.weight", "embed_tokens.embedding_table")
        np.testing.assert_array_equal(weights[name], value.float().numpy())

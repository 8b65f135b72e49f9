"""Makes `llama/`: a tiny random Hugging Face LLaMA folder, and what transformers computes with it.

Run it where torch 2.13 and transformers are installed: `python tests/golden/make_llama.py`. The weights are in several
files, as those of large models are; key and value heads are grouped. `llama/expected.npz` holds `input_ids` and the
outputs `logits` and `loss`, the mean over next tokens.
"""

import pathlib

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = pathlib.Path(__file__).parent / "llama"

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():  # norms too, which start as ones
        parameter.add_(0.1 * torch.randn_like(parameter))
model.save_pretrained(FOLDER, max_shard_size="40KB")

ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 10))
with torch.no_grad():
    out = model(torch.tensor(ids), labels=torch.tensor(ids))
np.savez(FOLDER / "expected.npz", input_ids=ids.astype(np.int32), logits=out.logits.numpy(), loss=out.loss.numpy())

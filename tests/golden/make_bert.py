"""Makes `bert/`: a tiny random Hugging Face BERT folder, and what transformers computes with it.

Run it where torch 2.13 and transformers are installed: `python tests/golden/make_bert.py`. `bert/expected.safetensors`
holds the inputs, with padding and both token types, and the outputs `hidden` and `pooled`.
"""

import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import BertConfig, BertModel

FOLDER = pathlib.Path(__file__).parent / "bert"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a of and to matrix signal random value image train ##s ##ing ##ed".split()

torch.manual_seed(0)
config = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=16,
    initializer_range=0.3,
)
model = BertModel(config).eval()
with torch.no_grad():
    for parameter in model.parameters():  # biases and norms too, which start as zeros and ones
        parameter.add_(0.1 * torch.randn_like(parameter))
model.save_pretrained(FOLDER)
(FOLDER / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")

rng = np.random.default_rng(0)
ids = rng.integers(0, len(WORDS), (3, 8))
mask = (np.arange(8) < np.array([[8], [5], [1]])).astype(np.int64)
types = (np.arange(8) > 3).astype(np.int64)[None].repeat(3, 0)
with torch.no_grad():
    out = model(torch.tensor(ids), torch.tensor(mask), torch.tensor(types))
save_file(
    {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "token_type_ids": types.astype(np.int32),
        "hidden": out.last_hidden_state.numpy(),
        "pooled": out.pooler_output.numpy(),
    },
    FOLDER / "expected.safetensors",
)

"""A GPT-2, whose linear layers store their weights as `(in, out)`, and query, key and value in one.

The names follow Hugging Face's GPT-2, so that a checkpoint of it loads by a few renamings. Nothing is replaced by hand
here: deltas come from `mindpet.peft.get_peft_model`.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import math
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindpet.peft import register_base_model, register_layer
from models.config import make_config, read_config
from models.masks import MASKED, Padding, Prompt, check_length, seen_by_all
from models.weights import load_weights, read_folder

UNDERSTOOD = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
NORMS = ("ln_1", "ln_2", "ln_f")
RENAMED = (
    *((f"{norm}.weight", f"{norm}.gamma") for norm in NORMS),
    *((f"{norm}.bias", f"{norm}.beta") for norm in NORMS),
    ("wte.weight", "wte.embedding_table"),
    ("wpe.weight", "wpe.embedding_table"),
)


@dataclass
class Gpt2Config:
    """The fields of a Hugging Face `config.json` that a GPT-2 depends on."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = None
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_embd % self.n_head:
            raise ValueError(f"Gpt2Config: 'n_embd', {self.n_embd}, must be a multiple of 'n_head', {self.n_head}")

    @classmethod
    def from_folder(cls, folder, **overrides):
        """The config of a Hugging Face model folder.

        Raises:
            OSError: there is no readable `config.json`.
            ValueError: it is not JSON, or not the config of a GPT-2.
        """
        path, content = read_config(folder)
        return make_config(cls, path, content, UNDERSTOOD, overrides)


class Conv1D(nn.Cell):
    """`x W + b` with `W (in, out)`."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.weight = Parameter(initializer(Normal(0.02), (in_channels, out_channels), ms.float32), name="weight")
        self.bias = Parameter(initializer("zeros", (out_channels,), ms.float32), name="bias")
        self.matmul = ops.MatMul()

    def construct(self, x):
        rows = self.matmul(x.reshape(-1, x.shape[-1]), self.weight) + self.bias
        return rows.reshape(*x.shape[:-1], rows.shape[-1])


register_layer(Conv1D, fan_in_fan_out=True)


class Attention(nn.Cell):
    """Causal self-attention: `(batch, seq, hidden) -> (batch, seq, hidden)`."""

    def __init__(self, config):
        super().__init__()
        self.heads = self.kv_heads = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.prefix_source = self.context_source = self.output_source = None  # where mindpet.peft puts deltas
        self.key_value_layers = ("c_attn",)
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def construct(self, hidden, padding):
        query, key, value = (self.split_heads(part) for part in ops.split(self.c_attn(hidden), hidden.shape[-1], -1))
        if self.prefix_source is not None:
            key, value = self.prefix_source(key, value)
        mask = seen_by_all(causal_mask(query.shape[2]) + padding, key.shape[2])
        scores = ops.matmul(query, key.swapaxes(2, 3)) / math.sqrt(self.head_dim) + mask
        context = ops.matmul(ops.softmax(scores, -1), value)
        if self.context_source is not None:
            context = self.context_source(hidden, query, context)
        out = self.c_proj(context.swapaxes(1, 2).reshape(hidden.shape))
        return out if self.output_source is None else self.output_source(hidden, query, out)

    def split_heads(self, x):
        """`(batch, seq, hidden) -> (batch, heads, seq, head_dim)`."""
        return x.reshape(x.shape[0], x.shape[1], self.kv_heads, self.head_dim).swapaxes(1, 2)


@ops.constexpr
def causal_mask(length):
    """What is added to the scores, `(1, 1, seq, seq)`: a token sees what is not after it."""
    return Tensor(np.triu(np.full((length, length), MASKED, np.float32), 1)[None, None])


class MLP(nn.Cell):
    """`c_proj(gelu(c_fc(x)))`, with `gelu(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))`, the tanh form."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.c_proj = Conv1D(config.n_inner, config.n_embd)

    def construct(self, hidden):
        x = self.c_fc(hidden)
        return self.c_proj(x * ops.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


class Block(nn.Cell):
    """A transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = Attention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)

    def construct(self, hidden, padding):
        hidden = hidden + self.attn(self.ln_1(hidden), padding)
        return hidden + self.mlp(self.ln_2(hidden))


def layer_norm(config):
    """A LayerNorm over the hidden features."""
    return nn.LayerNorm((config.n_embd,), epsilon=config.layer_norm_epsilon)


class Gpt2Model(nn.Cell):
    """The decoder without its head: ids and mask `(batch, seq)` to `(batch, seq, hidden)`.

    Padding has no position, but after a prompt it has, as with Hugging Face PEFT: pad on the side that it was trained
    with.
    """

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, embedding_table=Normal(0.02))
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, embedding_table=Normal(0.01))
        self.h = nn.CellList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = layer_norm(config)
        self.positions = Tensor(list(range(config.n_positions)), ms.int32)
        self.position_offset = 0  # prefix adapters of mindpet.peft count their tokens as positions
        self.prompt_source, self.token_dim = None, config.n_embd  # where mindpet.peft puts a prompt
        self.prompt_table = "wte"
        self.padding, self.prompt = Padding(), Prompt()

    def construct(self, input_ids, attention_mask=None):
        embeddings, padding = self.wte(input_ids), 0.0
        if self.prompt_source is not None:
            embeddings = self.prompt_source(embeddings)
        length = embeddings.shape[1]
        tokens = length - input_ids.shape[1]  # of a prompt
        if attention_mask is None or tokens:
            check_length(length + self.position_offset, self.positions.shape[0], "n_positions")
        places = self.positions[:length]
        if tokens and attention_mask is not None:
            _, padding = self.padding(self.prompt.see(attention_mask, tokens))
        elif attention_mask is not None:
            places, padding = self.padding(attention_mask)
        hidden = embeddings + self.wpe(places + self.position_offset)
        for block in self.h:
            hidden = block(hidden, padding)
        return self.prompt.drop(self.ln_f(hidden), tokens)


@register_base_model
class Gpt2ForCausalLM(nn.Cell):
    """GPT-2 with its language model head, which has the weight of the token embedding.

    Args:
        config (Gpt2Config): its shape.

    Inputs:
        input_ids: `(batch, seq)`, int32.
        attention_mask: `(batch, seq)`, int32; 0 where there is padding, on either side, else 1. None if there is none.

    Outputs:
        logits `(batch, seq, vocab)`, float32.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Gpt2Model(config)
        self.lm_head = nn.Dense(config.n_embd, config.vocab_size, has_bias=False)
        self.lm_head.weight = self.transformer.wte.embedding_table

    def construct(self, input_ids, attention_mask=None):
        return self.lm_head(self.transformer(input_ids, attention_mask))

    @classmethod
    def from_pretrained(cls, folder):
        """The model of a Hugging Face folder, with its weights.

        Raises:
            OSError, ValueError: see `Gpt2Config.from_folder`, `read_folder` and `load_weights`.
        """
        model = cls(Gpt2Config.from_folder(folder))
        weights = {}
        for name, value in read_folder(folder).items():
            for old, new in RENAMED:
                name = name.replace(old, new)
            weights[name if name.startswith("transformer.") else f"transformer.{name}"] = value
        load_weights(model, weights)
        return model

"""A LLaMA-shaped decoder with strategies for data and tensor parallelism, and LoRA on its linear layers.

The names follow Hugging Face's LLaMA, so that a checkpoint of it loads by one renaming. `linear` is the place where
layers are replaced by hand; `shard` of each Cell is where its strategies are.

Source: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", arXiv:2302.13971; grouped key and
value heads: Ainslie et al. 2023, arXiv:2305.13245.
"""

import functools
import math
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, lazy_inline, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindpet.delta import LoRADense
from mindpet.layers import Dense
from mindpet.network.kinds import register_layer
from mindpet.parallel import shard_like
from mindpet.peft import register_base_model
from models.config import make_config, read_config
from models.masks import MASKED, Padding, Prompt, seen_by_all
from models.weights import load_weights, read_folder

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNDERSTOOD = {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False, "rope_scaling": None}
RENAMED = {"embed_tokens.weight": "embed_tokens.embedding_table"}


@dataclass
class LlamaConfig:
    """The fields of a Hugging Face `config.json` that a LLaMA depends on, its delta and its strategies.

    Attributes beyond Hugging Face's:
        lora_rank (int): of every layer in `lora_targets`; 0: no LoRA.
        lora_alpha (float): scale of the update.
        lora_dropout (float): probability of zeroing an input of the update.
        lora_targets (tuple): which of `LORA_TARGETS` carry LoRA.
        param_dtype (mindspore.dtype): type of the base weights.
        compute_dtype (mindspore.dtype): type of the linear layers' computation.
        data_parallel (int): slices of the batch.
        model_parallel (int): slices of the heads, of the feed-forward features and of the vocabulary.
        pipeline_stages (int): groups of layers, each on ranks of its own.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None
    head_dim: int = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_targets: tuple = LORA_TARGETS
    param_dtype: object = ms.float32
    compute_dtype: object = ms.float32
    data_parallel: int = 1
    model_parallel: int = 1
    pipeline_stages: int = 1

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        problems = [
            f"'{name}', {getattr(self, name)}, must be a multiple of '{by}', {getattr(self, by)}"
            for name, by in (
                ("num_attention_heads", "num_key_value_heads"),
                ("num_key_value_heads", "model_parallel"),
                ("intermediate_size", "model_parallel"),
                ("vocab_size", "model_parallel"),
            )
            if getattr(self, name) % getattr(self, by)
        ]
        unknown = sorted(set(self.lora_targets) - set(LORA_TARGETS))
        if unknown:
            problems.append(f"'lora_targets' must be among {LORA_TARGETS}, but has {unknown}")
        if problems:
            raise ValueError("LlamaConfig: " + "; ".join(problems))

    @property
    def is_sharded(self):
        """Whether there are strategies to set."""
        return self.data_parallel * self.model_parallel * self.pipeline_stages > 1

    @classmethod
    def from_folder(cls, folder, **overrides):
        """The config of a Hugging Face model folder.

        Raises:
            OSError: there is no readable `config.json`.
            ValueError: it is not JSON, or not the config of a LLaMA with plain rotary positions.
        """
        path, content = read_config(folder)
        rope = content.pop("rope_parameters", None) or {}  # newer files keep all about rotary positions here
        if rope.get("rope_type", "default") != "default":
            content["rope_scaling"] = rope
        content.update({key: value for key, value in rope.items() if key == "rope_theta"})
        return make_config(cls, path, content, UNDERSTOOD, overrides)


def shared(init):
    """`lazy_inline` where it can be: such a Cell is compiled once however often it occurs.

    A CPU cannot run it, and with pipeline stages MindSpore 2.7 and 2.10 compile it wrongly.
    """
    lazy = lazy_inline(init)

    @functools.wraps(init)
    def either(self, config):
        (lazy if config.is_sharded and config.pipeline_stages == 1 else init)(self, config)

    return either


def linear(config, name, in_channels, out_channels, has_bias=False):
    """A linear layer of a block; with LoRA if the config says so."""
    common = dict(has_bias=has_bias, weight_init=Normal(0.02), compute_dtype=config.compute_dtype)
    if not config.lora_rank or name not in config.lora_targets:
        return Dense(in_channels, out_channels, dtype=config.param_dtype, **common)
    layer = LoRADense(
        in_channels, out_channels, config.lora_rank, config.lora_alpha, lora_dropout=config.lora_dropout, **common
    )
    if config.param_dtype != layer.weight.dtype:
        layer.weight = Parameter(initializer(Normal(0.02), layer.weight.shape, config.param_dtype), name="weight")
    return layer


def shard_linear(layer, rows, inputs, outputs):
    """Cut a linear layer: its rows, and its input features or its output features."""
    strategy = ((rows, inputs), (outputs, inputs))
    if isinstance(layer, LoRADense):
        shard_like(layer, strategy)
        return
    layer.matmul.shard(strategy)
    if layer.has_bias:
        layer.bias_add.shard(((rows, outputs), (outputs,)))


class RMSNorm(nn.Cell):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, in float32.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = Parameter(initializer("ones", (config.hidden_size,), ms.float32), name="weight")
        self.eps = config.rms_norm_eps
        self.square = ops.Square()
        self.mean = ops.ReduceMean(keep_dims=True)
        self.add = ops.Add()
        self.rsqrt = ops.Rsqrt()
        self.scale = ops.Mul()
        self.mul = ops.Mul()

    def construct(self, x):
        wide = ops.cast(x, ms.float32)
        factor = self.rsqrt(self.add(self.mean(self.square(wide), -1), self.eps))
        return ops.cast(self.mul(self.scale(wide, factor), self.weight), x.dtype)

    def shard(self, data_parallel):
        """Cut the batch."""
        layout = (data_parallel, 1, 1)
        for primitive in (self.square, self.mean, self.rsqrt):
            primitive.shard((layout,))
        self.add.shard((layout, ()))
        self.scale.shard((layout, layout))
        self.mul.shard((layout, (1,)))


class EachRow(nn.Cell):
    """A primitive of x `(batch, ...)` and of y, one for all rows, `(1, ...)`, or one for each; cut as x is."""

    def __init__(self, primitive):
        super().__init__()
        self.one, self.each = primitive(), primitive()

    def construct(self, x, y):
        return self.one(x, y) if y.shape[0] == 1 else self.each(x, y)

    def shard(self, layout):
        """Cut the batch and the heads."""
        self.one.shard((layout, (1, 1, 1, 1)))
        self.each.shard((layout, (layout[0], 1, 1, 1)))


class Rotary(nn.Cell):
    """Rotary positions, Su et al. 2021, arXiv:2104.09864: `x cos + [-x_2, x_1] sin` with x = [x_1, x_2].

    Inputs:
        x: `(batch, heads, seq, head_dim)`.
        cos, sin: `(1, 1, seq, head_dim)`, or `(batch, 1, seq, head_dim)`.
    """

    def __init__(self):
        super().__init__()
        self.split = ops.Split(axis=-1, output_num=2)
        self.neg = ops.Neg()
        self.concat = ops.Concat(axis=-1)
        self.mul_cos = EachRow(ops.Mul)
        self.mul_sin = EachRow(ops.Mul)
        self.add = ops.Add()

    def construct(self, x, cos, sin):
        first, second = self.split(x)
        turned = self.concat((self.neg(second), first))
        return self.add(self.mul_cos(x, cos), self.mul_sin(turned, sin))

    def shard(self, layout):
        """Cut the batch and the heads."""
        for primitive in (self.split, self.neg):
            primitive.shard((layout,))
        self.concat.shard((layout, layout))
        self.add.shard((layout, layout))
        for cell in (self.mul_cos, self.mul_sin):
            cell.shard(layout)


class Attention(nn.Cell):
    """Causal self-attention with grouped key and value heads: `(batch, seq, hidden) -> (batch, seq, hidden)`."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.groups = self.heads // self.kv_heads
        self.prefix_source = self.context_source = None  # where mindpet.peft puts deltas
        self.key_value_layers = ("k_proj", "v_proj")
        width, kv_width, bias = self.heads * self.head_dim, self.kv_heads * self.head_dim, config.attention_bias
        self.q_proj = linear(config, "q_proj", config.hidden_size, width, bias)
        self.k_proj = linear(config, "k_proj", config.hidden_size, kv_width, bias)
        self.v_proj = linear(config, "v_proj", config.hidden_size, kv_width, bias)
        self.o_proj = linear(config, "o_proj", width, config.hidden_size, bias)
        self.rotary = Rotary()
        self.transpose = ops.Transpose()
        self.merge_heads = ops.Transpose()
        self.tile = ops.Tile()
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.scale = ops.Mul()
        self.add_mask = EachRow(ops.Add)
        self.softmax = ops.Softmax(axis=-1)
        self.context = ops.BatchMatMul()
        if config.is_sharded:
            self.shard(config.data_parallel, config.model_parallel)

    def construct(self, hidden, cos, sin, mask):
        query = self.rotary(self.split_heads(self.q_proj(hidden), self.heads), cos, sin)
        key = self.rotary(self.split_heads(self.k_proj(hidden), self.kv_heads), cos, sin)
        value = self.split_heads(self.v_proj(hidden), self.kv_heads)
        if self.prefix_source is not None:
            key, value = self.prefix_source(key, value)
            mask = seen_by_all(mask, key.shape[2])
        key, value = self.repeat(key), self.repeat(value)
        scores = ops.cast(self.scores(query, key), ms.float32)
        scores = self.add_mask(self.scale(scores, 1 / math.sqrt(self.head_dim)), mask)
        weights = ops.cast(self.softmax(scores), hidden.dtype)
        context = self.context(weights, value)
        if self.context_source is not None:
            context = self.context_source(hidden, query, context)
        context = self.merge_heads(context, (0, 2, 1, 3))
        return self.o_proj(ops.reshape(context, (hidden.shape[0], hidden.shape[1], self.heads * self.head_dim)))

    def split_heads(self, x, heads):
        """`(batch, seq, heads * head_dim) -> (batch, heads, seq, head_dim)`."""
        return self.transpose(ops.reshape(x, (x.shape[0], x.shape[1], heads, self.head_dim)), (0, 2, 1, 3))

    def repeat(self, x):
        """Each key or value head as often as there are query heads in its group."""
        if self.groups == 1:
            return x
        batch, heads, seq, width = x.shape
        x = self.tile(ops.reshape(x, (batch, heads, 1, seq * width)), (1, 1, self.groups, 1))
        return ops.reshape(x, (batch, heads * self.groups, seq, width))

    def shard(self, data_parallel, model_parallel):
        """Cut the batch and the heads."""
        dp, mp = data_parallel, model_parallel
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            shard_linear(layer, dp, 1, mp)
        shard_linear(self.o_proj, dp, mp, 1)
        layout = (dp, mp, 1, 1)
        self.rotary.shard(layout)
        self.transpose.shard(((dp, 1, mp, 1),))
        for primitive in (self.merge_heads, self.tile, self.softmax):
            primitive.shard((layout,))
        for primitive in (self.scores, self.context):
            primitive.shard((layout, layout))
        self.scale.shard((layout, ()))
        self.add_mask.shard(layout)


class MLP(nn.Cell):
    """SwiGLU, Shazeer 2020, arXiv:2002.05202: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = linear(config, "gate_proj", config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config, "up_proj", config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config, "down_proj", config.intermediate_size, config.hidden_size)
        self.sigmoid = ops.Sigmoid()
        self.silu = ops.Mul()
        self.mul = ops.Mul()
        if config.is_sharded:
            self.shard(config.data_parallel, config.model_parallel)

    def construct(self, hidden):
        gate = self.gate_proj(hidden)
        return self.down_proj(self.mul(self.silu(gate, self.sigmoid(gate)), self.up_proj(hidden)))

    def shard(self, data_parallel, model_parallel):
        """Cut the batch and the inner features."""
        layout = (data_parallel, 1, model_parallel)
        shard_linear(self.gate_proj, data_parallel, 1, model_parallel)
        shard_linear(self.up_proj, data_parallel, 1, model_parallel)
        shard_linear(self.down_proj, data_parallel, model_parallel, 1)
        self.sigmoid.shard((layout,))
        self.silu.shard((layout, layout))
        self.mul.shard((layout, layout))


class DecoderLayer(nn.Cell):
    """A transformer layer: `(batch, seq, hidden) -> (batch, seq, hidden)`."""

    @shared
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        self.add_attention = ops.Add()
        self.add_mlp = ops.Add()
        if config.is_sharded:
            layout = (config.data_parallel, 1, 1)
            self.input_layernorm.shard(config.data_parallel)
            self.post_attention_layernorm.shard(config.data_parallel)
            self.add_attention.shard((layout, layout))
            self.add_mlp.shard((layout, layout))

    def construct(self, hidden, cos, sin, mask):
        hidden = self.add_attention(hidden, self.self_attn(self.input_layernorm(hidden), cos, sin, mask))
        return self.add_mlp(hidden, self.mlp(self.post_attention_layernorm(hidden)))


class Embedding(nn.Cell):
    """Rows of a table: `(batch, seq) -> (batch, seq, hidden)`."""

    def __init__(self, config):
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.embedding_table = Parameter(initializer(Normal(0.02), shape, config.param_dtype), name="embedding_table")
        self.gather = ops.Gather()
        if config.is_sharded:
            self.gather.shard(((config.model_parallel, 1), (config.data_parallel, 1)))

    def construct(self, ids):
        return self.gather(self.embedding_table, ids, 0)


register_layer(Embedding, "embedding", weight="embedding_table")  # so that it can carry LoRA


class LlamaModel(nn.Cell):
    """The decoder without its head.

    Padding has no position, but after a prompt it has, as with Hugging Face PEFT: pad on the side that it was trained
    with.

    Args:
        config (LlamaConfig): its shape.

    Inputs:
        input_ids: `(batch, seq)`, int32.
        attention_mask: `(batch, seq)`, int32; 0 where there is padding, on either side, else 1. None if there is none.

    Outputs:
        hidden `(batch, seq, hidden)`, in the compute type.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.layers = nn.CellList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config)
        self.position_offset = 0  # prefix adapters of mindpet.peft count their tokens as positions
        self.prompt_source, self.token_dim = None, config.hidden_size  # where mindpet.peft puts a prompt
        self.prompt_table = "embed_tokens"
        self.padding, self.prompt = Padding(), Prompt()
        self.pick = ops.Gather()
        self.hide = ops.Add()
        if config.is_sharded:
            self.norm.shard(config.data_parallel)
            self.prompt_strategy = (config.data_parallel,)
            self.padding.shard(config.data_parallel)
            self.prompt.shard(config.data_parallel)
            self.pick.shard(((1, 1), (config.data_parallel, 1)))
            self.hide.shard(((1, 1, 1, 1), (config.data_parallel, 1, 1, 1)))

    def construct(self, input_ids, attention_mask=None):
        hidden = ops.cast(self.embed_tokens(input_ids), self.config.compute_dtype)
        if self.prompt_source is not None:
            hidden = self.prompt_source(hidden)
        tokens = hidden.shape[1] - input_ids.shape[1]  # of a prompt
        cos, sin, mask = positions(hidden.shape[1], self.position_offset, self.config)
        if tokens and attention_mask is not None:
            _, padding = self.padding(self.prompt.see(attention_mask, tokens))
            mask = self.hide(mask, padding)
        elif attention_mask is not None:
            places, padding = self.padding(attention_mask)
            cos, sin = (self.at(part, places) for part in (cos, sin))
            mask = self.hide(mask, padding)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask)
        return self.prompt.drop(self.norm(hidden), tokens)

    def at(self, table, places):
        """The rows of a table `(1, 1, seq, head_dim)` at places `(batch, seq)`: `(batch, 1, seq, head_dim)`."""
        width = table.shape[3]
        rows = self.pick(ops.reshape(table, (-1, width)), places, 0)
        return ops.reshape(rows, (places.shape[0], 1, places.shape[1], width))


@ops.constexpr
def positions(length, offset, config):
    """cos and sin of the rotary angles, and the causal mask, for `length` tokens from position `offset` on."""
    rates = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.tile(np.outer(np.arange(offset, offset + length), rates), 2)[None, None]
    mask = np.triu(np.full((length, length), MASKED, np.float32), 1)[None, None]
    cos, sin = (Tensor(part.astype(np.float32), config.compute_dtype) for part in (np.cos(angles), np.sin(angles)))
    return cos, sin, Tensor(mask)


@register_base_model
class LlamaForCausalLM(nn.Cell):
    """LLaMA with its language model head.

    Args:
        config (LlamaConfig): its shape.

    Inputs:
        input_ids: `(batch, seq)`, int32.
        attention_mask: `(batch, seq)`, int32; 0 where there is padding, on either side, else 1. None if there is none.

    Outputs:
        logits `(batch, seq, vocab)`, float32.
    """

    def __init__(self, config):
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = Dense(
            config.hidden_size,
            config.vocab_size,
            Normal(0.02),
            has_bias=False,
            dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.embedding_table
        if config.is_sharded:
            shard_linear(self.lm_head, config.data_parallel, 1, config.model_parallel)

    def construct(self, input_ids, attention_mask=None):
        return ops.cast(self.lm_head(self.model(input_ids, attention_mask)), ms.float32)

    @classmethod
    def from_pretrained(cls, folder, **overrides):
        """The model of a Hugging Face folder, with its weights; see `LlamaConfig.from_folder` and `load_folder`."""
        model = cls(LlamaConfig.from_folder(folder, **overrides))
        load_folder(model, folder)
        return model


class CrossEntropy(nn.Cell):
    """Mean cross entropy of the tokens that are asked for; the logits may be cut along the vocabulary.

    Args:
        config (LlamaConfig): of the network.

    Inputs:
        logits: `(batch, seq, vocab)`, float32.
        labels: `(batch, seq)`, int32; a negative number where nothing is asked for.

    Outputs:
        loss, float32.
    """

    def __init__(self, config):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.max = ops.ReduceMax(keep_dims=True)
        self.shift = ops.Sub()
        self.exp = ops.Exp()
        self.sum = ops.ReduceSum(keep_dims=True)
        self.log = ops.Log()
        self.onehot = ops.OneHot()
        self.pick = ops.Mul()
        self.picked = ops.ReduceSum(keep_dims=True)
        self.nll = ops.Sub()
        self.asked = ops.GreaterEqual()
        self.weigh = ops.Mul()
        self.total = ops.ReduceSum()
        self.count = ops.ReduceSum()
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
        if config.is_sharded:
            self.shard(config.data_parallel, config.model_parallel)

    def construct(self, logits, labels):
        logits = ops.reshape(logits, (-1, self.vocab_size))
        labels = ops.reshape(labels, (-1,))
        shifted = self.shift(logits, ops.stop_gradient(self.max(logits, 1)))
        normaliser = self.log(self.sum(self.exp(shifted), 1))
        chosen = self.picked(self.pick(shifted, self.onehot(labels, self.vocab_size, self.on, self.off)), 1)
        asked = ops.reshape(ops.cast(self.asked(labels, 0), ms.float32), (-1, 1))
        return self.total(self.weigh(self.nll(normaliser, chosen), asked)) / self.count(asked)

    def shard(self, data_parallel, model_parallel):
        """Cut the rows and the vocabulary."""
        layout, rows = (data_parallel, model_parallel), (data_parallel, 1)
        for primitive in (self.max, self.exp, self.sum, self.picked):
            primitive.shard((layout,))
        self.shift.shard((layout, rows))
        self.pick.shard((layout, layout))
        self.log.shard((rows,))
        self.onehot.shard((layout, (), ()))
        for primitive in (self.nll, self.weigh):
            primitive.shard((rows, rows))
        self.asked.shard(((data_parallel,), ()))
        for primitive in (self.total, self.count):
            primitive.shard((rows,))


class CausalLoss(nn.Cell):
    """A network with its loss; parameters keep the network's names.

    Args:
        config (LlamaConfig): of the network.

    Inputs:
        input_ids, labels: `(batch, seq)`, int32; the label of a token is the next token, or negative.
        attention_mask: `(batch, seq)`, int32, or None; see LlamaForCausalLM. The label of padding is negative.

    Outputs:
        loss, float32.
    """

    def __init__(self, config):
        super().__init__(auto_prefix=False)
        self.network = LlamaForCausalLM(config)
        self.loss = CrossEntropy(config)
        if config.pipeline_stages > 1:
            self.network.model.embed_tokens.pipeline_stage = 0
            for index, layer in enumerate(self.network.model.layers):
                layer.pipeline_stage = index * config.pipeline_stages // config.num_hidden_layers
            for cell in (self.network.model.norm, self.network.lm_head, self.loss):
                cell.pipeline_stage = config.pipeline_stages - 1

    def construct(self, input_ids, labels, attention_mask=None):
        return self.loss(self.network(input_ids, attention_mask), labels)


def load_folder(model, folder):
    """Load the weights of a Hugging Face folder into a LlamaForCausalLM. What a delta has added keeps its values.

    Raises:
        OSError, ValueError: see `read_folder` and `load_weights`.
    """
    weights = read_folder(folder)
    for old, new in RENAMED.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    load_weights(model, weights)

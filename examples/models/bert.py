"""A plain BERT, and where each delta goes into it.

The names follow Hugging Face's BERT, so that a checkpoint of it loads by three renamings. `query_or_value`,
`block_output` and `SelfAttention` are the places where layers are replaced by hand. With the method 'full' nothing is
replaced: that is the network for `mindpet.peft.get_peft_model`.

Source: Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv:1810.04805.
"""

import math
import warnings
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from mindpet.delta import AdapterDense, LoRADense, LowRankAdapterDense, PrefixEncoder, PrefixLayer
from mindpet.peft import register_base_model
from models.config import make_config, read_config
from models.masks import MASKED, Prompt, check_length, seen_by_all
from models.weights import load_weights, read_folder

METHODS = ("lora", "adapter", "low_rank_adapter", "prefixtuning", "ptuning2", "bitfit", "full", "head")
RENAMED = (
    ("LayerNorm.weight", "LayerNorm.gamma"),
    ("LayerNorm.bias", "LayerNorm.beta"),
    ("_embeddings.weight", "_embeddings.embedding_table"),
)
UNDERSTOOD = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass
class BertConfig:
    """The fields of a Hugging Face `config.json` that a BERT depends on, and the delta that it gets.

    Attributes beyond Hugging Face's:
        method (str): one of `METHODS`; decides which layers are replaced.
        lora_rank, lora_alpha, bottleneck_size, reduction_factor, prefix_tokens, prefix_dim: sizes of the deltas.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    num_labels: int = 2
    method: str = "full"
    lora_rank: int = 8
    lora_alpha: int = 16
    bottleneck_size: int = 64
    reduction_factor: int = 32
    prefix_tokens: int = 8
    prefix_dim: int = 64

    def __post_init__(self):
        problems = [
            f"'{name}' must be one of {sorted(known)}, but got {value!r}"
            for name, value, known in (("method", self.method, METHODS), ("hidden_act", self.hidden_act, ACTIVATIONS))
            if value not in known
        ]
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"'hidden_size', {self.hidden_size}, must be a multiple of 'num_attention_heads', "
                f"{self.num_attention_heads}"
            )
        if problems:
            raise ValueError("BertConfig: " + "; ".join(problems))

    @classmethod
    def from_folder(cls, folder, **overrides):
        """The config of a Hugging Face model folder.

        Raises:
            OSError: there is no readable `config.json`.
            ValueError: it is not JSON, or not the config of a BERT.
        """
        path, content = read_config(folder)
        if "id2label" in content:  # a config with two labels, which are the default, may leave them out
            content["num_labels"] = len(content["id2label"])
        return make_config(cls, path, content, UNDERSTOOD, overrides)


def query_or_value(config):
    """The query and value projection: where LoRA goes."""
    hidden = config.hidden_size
    if config.method == "lora":
        return LoRADense(
            hidden,
            hidden,
            config.lora_rank,
            config.lora_alpha,
            compute_dtype=ms.float32,
            weight_init=Normal(0.02),
        )
    return dense(hidden, hidden)


def block_output(config, in_channels):
    """The last Dense layer of an attention or feed-forward block: where the adapters go."""
    if config.method == "adapter":
        return AdapterDense(
            in_channels,
            config.hidden_size,
            weight_init=Normal(0.02),
            bottleneck_size=config.bottleneck_size,
            compute_dtype=ms.float32,
        )
    if config.method == "low_rank_adapter":
        return LowRankAdapterDense(
            in_channels,
            config.hidden_size,
            weight_init=Normal(0.02),
            reduction_factor=config.reduction_factor,
            compute_dtype=ms.float32,
        )
    return dense(in_channels, config.hidden_size)


def dense(in_channels, out_channels):
    """A Dense layer that starts as BERT's do."""
    return nn.Dense(in_channels, out_channels, weight_init=Normal(0.02), bias_init="zeros")


def layer_norm(config):
    """A LayerNorm over the hidden features."""
    return nn.LayerNorm((config.hidden_size,), epsilon=config.layer_norm_eps)


class Embeddings(nn.Cell):
    """Sum of word, position and token type embeddings: `(batch, seq) -> (batch, tokens + seq, hidden)`.

    The tokens are those of a prompt, if there is one; their token type is 0.
    """

    def __init__(self, config):
        super().__init__()
        init = Normal(0.02)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, embedding_table=init)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, embedding_table=init
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size, embedding_table=init)
        self.LayerNorm = layer_norm(config)
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)
        self.positions = Tensor(list(range(config.max_position_embeddings)), ms.int32)
        self.position_offset = 0  # prefix adapters of mindpet.peft count their tokens as positions
        self.prompt_source, self.token_dim = None, config.hidden_size  # where mindpet.peft puts a prompt
        self.prompt_table = "word_embeddings"

    def construct(self, input_ids, token_type_ids):
        words = self.word_embeddings(input_ids)
        if self.prompt_source is not None:
            words = self.prompt_source(words)
            of_prompt = ops.zeros((words.shape[0], words.shape[1] - input_ids.shape[1]), token_type_ids.dtype)
            token_type_ids = ops.concat((of_prompt, token_type_ids), 1)
        end = self.position_offset + words.shape[1]
        check_length(end, self.positions.shape[0], "max_position_embeddings")
        positions = self.position_embeddings(self.positions[self.position_offset : end])
        summed = words + positions + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(summed))


class SelfAttention(nn.Cell):
    """Multi-head attention: `(batch, seq, hidden) -> (batch, seq, hidden)`, before the output projection."""

    def __init__(self, config):
        super().__init__()
        self.heads = self.kv_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.prefix_source = self.context_source = None  # where mindpet.peft puts deltas
        self.key_value_layers = ("key", "value")
        self.query = query_or_value(config)
        self.key = dense(config.hidden_size, config.hidden_size)
        self.value = query_or_value(config)
        self.dropout = nn.Dropout(p=config.attention_probs_dropout_prob)
        self.has_prefix = config.method == "prefixtuning"
        if self.has_prefix:
            self.prefix = PrefixLayer(
                config.prefix_tokens,
                1,
                self.heads,
                config.hidden_size,
                embed_dim=config.prefix_dim,
                mid_dim=config.prefix_dim,
            )

    def construct(self, hidden, mask, past):
        query, key, value = (
            self.split_heads(part) for part in (self.query(hidden), self.key(hidden), self.value(hidden))
        )
        if self.has_prefix:
            shape = (hidden.shape[0], -1, -1, -1)
            past = [self.split_heads(part.expand_dims(0)).broadcast_to(shape) for part in self.prefix()]
        if past is not None:
            key = ops.concat((past[0], key), 2)
            value = ops.concat((past[1], value), 2)
        if self.prefix_source is not None:
            key, value = self.prefix_source(key, value)
        scores = ops.matmul(query, key.swapaxes(2, 3)) / math.sqrt(self.head_dim) + seen_by_all(mask, key.shape[2])
        context = ops.matmul(self.dropout(ops.softmax(scores, -1)), value)
        if self.context_source is not None:
            context = self.context_source(hidden, query, context)
        return context.swapaxes(1, 2).reshape(hidden.shape)

    def split_heads(self, x):
        """`(batch, seq, hidden) -> (batch, heads, seq, head_dim)`."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, self.head_dim).swapaxes(1, 2)


class BlockOutput(nn.Cell):
    """Dense, dropout, residual and LayerNorm: the end of an attention or feed-forward block."""

    def __init__(self, config, in_channels):
        super().__init__()
        self.dense = block_output(config, in_channels)
        self.LayerNorm = layer_norm(config)
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)

    def construct(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Cell):
    """Self-attention with its output block."""

    def __init__(self, config):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = BlockOutput(config, config.hidden_size)

    def construct(self, hidden, mask, past):
        return self.output(self.self(hidden, mask, past), hidden)


class Intermediate(nn.Cell):
    """The first half of the feed-forward block."""

    def __init__(self, config):
        super().__init__()
        self.dense = dense(config.hidden_size, config.intermediate_size)
        self.approximate = ACTIVATIONS[config.hidden_act]

    def construct(self, hidden):
        return ops.gelu(self.dense(hidden), approximate=self.approximate)


class Layer(nn.Cell):
    """A transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = BlockOutput(config, config.intermediate_size)

    def construct(self, hidden, mask, past):
        attended = self.attention(hidden, mask, past)
        return self.output(self.intermediate(attended), attended)


class Encoder(nn.Cell):
    """All layers; with P-Tuning v2 each gets the prefix that is its own."""

    def __init__(self, config):
        super().__init__()
        self.layer = nn.CellList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.has_prefix = config.method == "ptuning2"
        if self.has_prefix:
            self.prefix_encoder = PrefixEncoder(
                config.prefix_tokens,
                config.num_hidden_layers,
                config.num_attention_heads,
                config.hidden_size // config.num_attention_heads,
            )

    def construct(self, hidden, mask):
        pasts = self.prefix_encoder(hidden.shape[0], hidden.dtype) if self.has_prefix else None
        for index, layer in enumerate(self.layer):
            hidden = layer(hidden, mask, pasts[index] if self.has_prefix else None)
        return hidden


class Pooler(nn.Cell):
    """`tanh(W h_0 + b)` of the first token; by sigmoid, since MindSpore's tanh is off by up to 1e-4 on a CPU."""

    def __init__(self, config):
        super().__init__()
        self.dense = dense(config.hidden_size, config.hidden_size)

    def construct(self, hidden):
        return 2 * ops.sigmoid(2 * self.dense(hidden[:, 0])) - 1


class BertModel(nn.Cell):
    """The encoder.

    Args:
        config (BertConfig): its shape.
        add_pooler (bool): whether there is a pooler. Default: True.

    Inputs:
        input_ids, attention_mask, token_type_ids: `(batch, seq)`, int32; the last is zeros if None.

    Outputs:
        hidden `(batch, seq, hidden)`, and pooled `(batch, hidden)`, of the first token or that of a prompt, or None.
    """

    def __init__(self, config, add_pooler=True):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooler else None
        self.prompt = Prompt()

    def construct(self, input_ids, attention_mask, token_type_ids=None):
        if token_type_ids is None:
            token_type_ids = ops.zeros_like(input_ids)
        hidden = self.embeddings(input_ids, token_type_ids)
        tokens = hidden.shape[1] - input_ids.shape[1]  # of a prompt
        if tokens:
            attention_mask = self.prompt.see(attention_mask, tokens)
        mask = (1.0 - attention_mask.astype(hidden.dtype)).expand_dims(1).expand_dims(1) * MASKED
        hidden = self.encoder(hidden, mask)
        pooled = self.pooler(hidden) if self.pooler is not None else None
        return self.prompt.drop(hidden, tokens), pooled


@register_base_model
class BertClassifier(nn.Cell):
    """BERT with a classification head.

    Args:
        config (BertConfig): its shape.
        num_labels (int): classes. Default: None, for `config.num_labels`.
        pooling (str): 'cls', the pooler's output, or 'mean', the mean of the unmasked tokens. Default: 'cls'.

    Inputs:
        input_ids, attention_mask: `(batch, seq)`, int32.

    Outputs:
        logits `(batch, num_labels)`.
    """

    def __init__(self, config, num_labels=None, pooling="cls"):
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"BertClassifier: 'pooling' must be 'cls' or 'mean', but got {pooling!r}")
        self.mean = pooling == "mean"
        self.bert = BertModel(config, add_pooler=not self.mean)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p=dropout)
        self.classifier = dense(config.hidden_size, config.num_labels if num_labels is None else num_labels)

    def construct(self, input_ids, attention_mask):
        hidden, pooled = self.bert(input_ids, attention_mask)
        if self.mean:
            weight = attention_mask.astype(hidden.dtype).expand_dims(2)
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        return self.classifier(self.dropout(pooled))

    @classmethod
    def from_pretrained(cls, folder, num_labels=None, pooling="cls", **overrides):
        """The model of a Hugging Face folder, with its weights.

        A pooler or a head that the folder does not have stays as it starts, and a warning says so.

        Args:
            folder (str): of any BERT.
            num_labels (int): classes. Default: None, for as many as the folder's configuration has.
            pooling (str): see above. Default: 'cls'.
            overrides: fields of BertConfig, say `method`.

        Raises:
            OSError, ValueError: see `BertConfig.from_folder`, `read_folder` and `load_weights`.
        """
        model = cls(BertConfig.from_folder(folder, **overrides), num_labels, pooling)
        weights = {
            name if name.startswith("classifier.") else f"bert.{name}": value
            for name, value in read_weights(folder).items()
        }
        fresh = {
            name: param.asnumpy()
            for name, param in model.parameters_and_names()
            if name.startswith(("bert.pooler.", "classifier.")) and name not in weights
        }
        load_weights(model, {**weights, **fresh})
        if fresh:
            warnings.warn(f"{folder} does not have, and so not trained are: {', '.join(fresh)}", stacklevel=2)
        return model


def read_weights(folder):
    """The weights of a Hugging Face BERT folder under this model's names.

    Returns:
        dict of str -> numpy.ndarray.

    Raises:
        OSError, ValueError: see `read_folder`.
    """
    weights = {}
    for name, value in read_folder(folder).items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        weights[name[len("bert.") :] if name.startswith("bert.") else name] = value
    return weights

"""A small network that can carry every delta method, and how to train it."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet.delta import (
    AdaLoRADense,
    AdapterDense,
    AdaptionPrompt,
    CompacterDense,
    HiraDense,
    IA3Dense,
    LoHaDense,
    LoKrDense,
    LoRADense,
    LowRankAdapterDense,
    MissDense,
    OFTDense,
    PrefixEncoder,
    PrefixLayer,
    PromptEmbedding,
    PromptEncoder,
    TrainableTokensEmbedding,
    VeraDense,
)
from mindpet.graph import freeze_delta

WIDTH, HEADS, LABELS = 8, 2, 3
DENSE = {
    "lora": lambda **kw: LoRADense(WIDTH, WIDTH, 2, 4, **kw),
    "ia3": lambda **kw: IA3Dense(WIDTH, WIDTH, **kw),
    "vera": lambda **kw: VeraDense(WIDTH, WIDTH, 4, **kw),
    "hira": lambda **kw: HiraDense(WIDTH, WIDTH, 2, **kw),
    "miss": lambda **kw: MissDense(WIDTH, WIDTH, 2, **kw),
    "adalora": lambda **kw: AdaLoRADense(WIDTH, WIDTH, 4, 8, **kw),
    "oft": lambda **kw: OFTDense(WIDTH, WIDTH, 4, **kw),
    "loha": lambda **kw: LoHaDense(WIDTH, WIDTH, 2, 4, **kw),
    "lokr": lambda **kw: LoKrDense(WIDTH, WIDTH, 1, 4, **kw),
    "adapter": lambda **kw: AdapterDense(WIDTH, WIDTH, bottleneck_size=4, **kw),
    "compacter": lambda **kw: CompacterDense(WIDTH, WIDTH, 2, phm_dim=2, **kw),
    "low_rank_adapter": lambda **kw: LowRankAdapterDense(WIDTH, WIDTH, reduction_factor=2, **kw),
}
PROMPTS = {
    "prompt_tuning": lambda: PromptEmbedding(4, WIDTH),
    "p_tuning": lambda: PromptEncoder(4, WIDTH, "LSTM", hidden_size=5, num_layers=1),
}
DELTA_SHAPES = {
    "lora": {"fc.mindpet_delta_lora_a": (2, 8), "fc.mindpet_delta_lora_b": (8, 2)},
    "ia3": {"fc.mindpet_delta_ia3": (8, 1)},
    "vera": {
        "fc.mindpet_vera_a": (4, 8),
        "fc.mindpet_vera_b": (8, 4),
        "fc.mindpet_delta_vera_lambda_b": (8,),
        "fc.mindpet_delta_vera_lambda_d": (4,),
    },
    "hira": {"fc.mindpet_delta_hira_a": (2, 8), "fc.mindpet_delta_hira_b": (8, 2)},
    "miss": {"fc.mindpet_delta_miss": (2, 8)},
    "adalora": {
        "fc.mindpet_delta_adalora_a": (4, 8),
        "fc.mindpet_delta_adalora_b": (8, 4),
        "fc.mindpet_delta_adalora_e": (4, 1),
    },
    "oft": {"fc.mindpet_delta_oft": (2, 6)},
    "loha": {
        "fc.mindpet_delta_loha_w1_a": (8, 2),
        "fc.mindpet_delta_loha_w1_b": (2, 8),
        "fc.mindpet_delta_loha_w2_a": (8, 2),
        "fc.mindpet_delta_loha_w2_b": (2, 8),
    },
    "lokr": {
        "fc.mindpet_delta_lokr_w1": (2, 2),
        "fc.mindpet_delta_lokr_w2_a": (4, 1),
        "fc.mindpet_delta_lokr_w2_b": (1, 4),
    },
    "adaption_prompt": {
        "prefix.mindpet_delta_adaption_prompt": (1, 4, 8),
        "prefix.mindpet_delta_adaption_prompt_gate": (1,),
    },
    "prompt_tuning": {"prefix.mindpet_delta_prompt": (4, 8)},
    "trainable_tokens": {
        "extra.embedding_table": (5, 8),
        "extra.mindpet_delta_trainable_tokens": (2, 8),
        "extra.mindpet_trainable_tokens_slots": (5,),
    },
    "ln_tuning": {"extra.gamma": (8,), "extra.beta": (8,)},
    "p_tuning": {
        "prefix.mindpet_delta_p_tuning_table": (4, 8),
        **{
            f"prefix.mindpet_delta_p_tuning_lstm.0.{name}{way}": shape
            for name, shape in {
                "weight_ih": (20, 8),
                "bias_ih": (1, 20),
                "weight_hh": (20, 5),
                "bias_hh": (1, 20),
            }.items()
            for way in ("", "_reverse")
        },
        "prefix.mindpet_delta_p_tuning_mlp.0.weight": (10, 10),
        "prefix.mindpet_delta_p_tuning_mlp.0.bias": (10,),
        "prefix.mindpet_delta_p_tuning_mlp.2.weight": (8, 10),
        "prefix.mindpet_delta_p_tuning_mlp.2.bias": (8,),
    },
    "prefixtuning": {
        "prefix.mindpet_delta_prefixtuning_wte.embedding_table": (4, 6),
        "prefix.mindpet_delta_prefixtuning_control_trans.0.weight": (5, 6),
        "prefix.mindpet_delta_prefixtuning_control_trans.0.bias": (5,),
        "prefix.mindpet_delta_prefixtuning_control_trans.2.weight": (16, 5),
        "prefix.mindpet_delta_prefixtuning_control_trans.2.bias": (16,),
    },
    "adapter": {
        "fc.mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter_down_sampler.weight": (4, 8),
        "fc.mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter_down_sampler.bias": (4,),
        "fc.mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter_up_sampler.weight": (8, 4),
        "fc.mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter_up_sampler.bias": (8,),
    },
    "low_rank_adapter": {
        f"fc.mindpet_delta_low_rank_adapter.mindpet_delta_low_rank_adapter_{name}": shape
        for name, shape in {
            "down_sampler.mindpet_delta_low_rank_adapter_weight_left": (8, 1),
            "down_sampler.mindpet_delta_low_rank_adapter_weight_right": (1, 4),
            "down_sampler.bias": (4,),
            "up_sampler.mindpet_delta_low_rank_adapter_weight_left": (4, 1),
            "up_sampler.mindpet_delta_low_rank_adapter_weight_right": (1, 8),
            "up_sampler.bias": (8,),
        }.items()
    },
    "compacter": {
        f"fc.mindpet_delta_compacter.mindpet_delta_compacter_{name}": shape
        for name, shape in {
            "rule": (2, 2, 2),
            "down.left": (2, 1, 4),
            "down.right": (2, 1, 2),
            "down.bias": (4,),
            "up.left": (2, 1, 2),
            "up.right": (2, 1, 4),
            "up.bias": (8,),
        }.items()
    },
    "bitfit": {},
    "ptuning2": {
        "prefix.mindpet_delta_ptuning2_prefix": (4,),
        "prefix.mindpet_delta_ptuning2_embedding.embedding_table": (4, 16),
        "prefix.mindpet_delta_ptuning2_dense_in.weight": (5, 16),
        "prefix.mindpet_delta_ptuning2_dense_in.bias": (5,),
        "prefix.mindpet_delta_ptuning2_dense_out.weight": (16, 5),
        "prefix.mindpet_delta_ptuning2_dense_out.bias": (16,),
    },
}
BASE_SHAPES = {"fc.weight": (8, 8), "fc.bias": (8,), "head.weight": (3, 8), "head.bias": (3,)}


def table():
    """An embedding of positions."""
    return Tensor(np.random.default_rng(5).normal(size=(5, WIDTH)).astype(np.float32))


# What a method needs beside a Dense layer and an attention: with its delta, and without.
EXTRA = {
    "trainable_tokens": (
        lambda: TrainableTokensEmbedding(5, WIDTH, [3, 1], embedding_table=table()),
        lambda: nn.Embedding(5, WIDTH, embedding_table=table()),
    ),
    "ln_tuning": (lambda: nn.LayerNorm((WIDTH,)),) * 2,
}


class Toy(nn.Cell):
    """A Dense layer, attention of one layer, and a head; `method` says which delta it has.

    With `base`, it is the network of that method without the delta.

    Inputs:
        x: `(batch, seq, WIDTH)`.

    Outputs:
        logits `(batch, LABELS)`.
    """

    def __init__(self, method=None, compute_dtype=ms.float32, base=False):
        super().__init__()
        self.extra_of, self.extra = method, EXTRA[method][base]() if method in EXTRA else None
        method = None if base else method
        self.fc = DENSE[method](compute_dtype=compute_dtype) if method in DENSE else nn.Dense(WIDTH, WIDTH, "normal")
        self.method = method if method in ("prefixtuning", "ptuning2", "adaption_prompt") else "none"
        if self.method == "adaption_prompt":
            layers = (self.fc, self.fc)
            self.prefix = AdaptionPrompt(layers, HEADS, WIDTH // HEADS, adapter_len=4, compute_dtype=compute_dtype)
        self.has_prompt = method in PROMPTS
        if self.has_prompt:
            self.prefix = PROMPTS[method]()
        if self.method == "prefixtuning":
            self.prefix = PrefixLayer(4, 1, HEADS, WIDTH, embed_dim=6, mid_dim=5, dropout_rate=0.0)
        if self.method == "ptuning2":
            self.prefix = PrefixEncoder(4, 1, HEADS, WIDTH // HEADS, prefix_projection=True, projection_dim=5)
        self.head = nn.Dense(WIDTH, LABELS, "xavier_uniform")

    def construct(self, x):
        batch = x.shape[0]
        if self.extra_of == "trainable_tokens":
            x = x + self.extra(ops.arange(5))
        if self.extra_of == "ln_tuning":
            x = self.extra(x)
        query = self.heads(self.fc(x))
        key, value = self.heads(x), self.heads(x)
        if self.has_prompt:
            key, value = self.heads(self.prefix(x)), self.heads(self.prefix(x))
        if self.method == "prefixtuning":
            past_key, past_value = self.prefix()
            shape = (batch, HEADS, 4, WIDTH // HEADS)
            key = ops.concat((self.heads(past_key.expand_dims(0)).broadcast_to(shape), key), 2)
            value = ops.concat((self.heads(past_value.expand_dims(0)).broadcast_to(shape), value), 2)
        if self.method == "ptuning2":
            past = self.prefix(batch, ms.float32)[0]
            key, value = ops.concat((past[0], key), 2), ops.concat((past[1], value), 2)
        weights = ops.softmax(ops.matmul(query, key.swapaxes(2, 3)), -1)
        context = ops.matmul(weights, value)
        if self.method == "adaption_prompt":
            context = self.prefix(x, query, context)
        mixed = context.swapaxes(1, 2).reshape(x.shape)
        return self.head((self.fc(x) + mixed).mean(1))

    def heads(self, x):
        """`(batch, seq, WIDTH) -> (batch, HEADS, seq, WIDTH / HEADS)`."""
        return x.reshape(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).swapaxes(1, 2)


DELTA = {"fc.mindpet_delta_lora_a", "fc.mindpet_delta_lora_b", "head.weight", "head.bias"}  # what lora() trains


def lora():
    """A Toy with LoRA, frozen but for its delta and its head."""
    network = Toy("lora")
    freeze_delta(network, "lora", exclude=["head.*"])
    return network


def batch(rng, rows=6):
    """Inputs and labels of a learnable task."""
    x = rng.normal(size=(rows, 5, WIDTH)).astype(np.float32)
    return Tensor(x), Tensor(x.mean((1, 2)).argsort().argsort() * LABELS // rows, ms.int32)


def train(network, x, labels, steps=8, learning_rate=0.05):
    """Train with Adam what is trainable; returns the losses."""
    optimizer = nn.Adam(network.trainable_params(), learning_rate)
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.CrossEntropyLoss()), optimizer).set_train()
    return [float(step(x, labels).asnumpy()) for _ in range(steps)]


def values(network):
    """The bytes of every parameter by name."""
    return {param.name: param.asnumpy().tobytes() for param in network.get_parameters()}

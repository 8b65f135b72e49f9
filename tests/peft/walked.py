"""What random walks go through: a network that `oracle.forward` computes, and configurations of every method."""

from mindspore import lazy_inline, nn, ops

from mindpet.delta._config import PromptLearningConfig, TargetConfig
from mindpet.delta.registry import METHODS
from mindpet.peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LowRankAdapterConfig,
    MissConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    Ptuning2Config,
    TrainableTokensConfig,
    UnionConfig,
    VeraConfig,
    mam_config,
)

VOCAB = LABELS = 5
WIDTH, HEADS = 4, 2
# The head's weight is the table; the blocks have one layer; they are compiled once; Cells compute twice for a gradient;
# there are attentions, norms and places for prompts.
KINDS = ("plain", "tied", "shared", "lazy", "recompute", "attention", "attention, tied")


class Block(nn.Cell):
    """The path of its layer ends as that of another one, `fc`."""

    def __init__(self, fc):
        super().__init__()
        self.fc = fc

    def construct(self, x):
        return self.fc(x)


class LazyBlock(nn.Cell):
    """A block that is compiled once for all."""

    @lazy_inline(policy="front")
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Dense(width, width)

    def construct(self, x):
        return self.fc(x)


class Attention(nn.Cell):
    """An attention with places for deltas."""

    def __init__(self):
        super().__init__()
        self.heads = self.kv_heads = HEADS
        self.head_dim = WIDTH // HEADS
        self.prefix_source = self.context_source = None
        self.key_value_layers = ("key", "value")
        self.key, self.value = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, WIDTH)
        self.scores, self.softmax, self.attend = ops.BatchMatMul(transpose_b=True), ops.Softmax(), ops.BatchMatMul()
        self.turn = ops.Transpose()

    def construct(self, x):
        query, key, value = self.split(x), self.split(self.key(x)), self.split(self.value(x))
        if self.prefix_source is not None:
            key, value = self.prefix_source(key, value)
        context = self.attend(self.softmax(self.scores(query, key)), value)
        if self.context_source is not None:
            context = self.context_source(x, query, context)
        return self.turn(context, (0, 2, 1, 3)).reshape(x.shape)

    def split(self, x):
        """`(batch, seq, features) -> (batch, heads, seq, head_dim)`."""
        return self.turn(x.reshape(x.shape[0], x.shape[1], self.heads, self.head_dim), (0, 2, 1, 3))


class AttentionBlock(nn.Cell):
    """A block that attends first."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.fc = Attention(), nn.LayerNorm((WIDTH,), epsilon=1e-5), nn.Dense(WIDTH, WIDTH)

    def construct(self, x):
        return self.fc(self.norm(x + self.attention(x)))


class Network(nn.Cell):
    """What `oracle.forward` computes.

    Args:
        kind (str): one of `KINDS`.
    """

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.fc = nn.Dense(WIDTH, WIDTH, activation="sigmoid")
        layers = [nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, WIDTH)]
        layers = layers[:1] * 2 if kind == "shared" else layers
        blocks = [LazyBlock(WIDTH) if kind == "lazy" else Block(layer) for layer in layers]
        self.blocks = nn.CellList([blocks[0], AttentionBlock() if "attention" in kind else blocks[1]])
        self.classifier = nn.Dense(WIDTH, LABELS)
        if "tied" in kind:
            self.classifier.weight = self.embed.embedding_table
        if kind == "recompute":
            self.fc.recompute()
            self.blocks[0].recompute()
        self.embed.embedding_table.requires_grad = False

    def construct(self, ids):
        hidden = self.fc(self.words(ids))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.classifier(hidden.mean(1))

    def words(self, ids):
        """What the first layer takes."""
        return self.embed(ids)


class Prompted(Network):
    """A network that takes a prompt, and counts positions."""

    def __init__(self, kind):
        super().__init__(kind)
        self.prompt_source, self.prompt_table, self.token_dim = None, "embed", WIDTH
        self.position_offset = 0

    def words(self, ids):
        words = self.embed(ids)
        if self.prompt_source is not None:
            words = self.prompt_source(words)
        return words + 0.1 * self.position_offset


def make_network(kind):
    """A network of a kind, its weights by chance."""
    return (Prompted if "attention" in kind else Network)(kind)


class Holder(nn.Cell):
    """A Cell that a network comes into, so that its Parameters have other names."""

    def __init__(self, network):
        super().__init__()
        self.inner = network

    def construct(self, ids):
        return self.inner(ids)


class Loss(nn.Cell):
    """Squared error."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, ids):
        return ops.square(self.model(ids) - 1.0).mean()


def lora(**fields):
    return lambda dropout: LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": ["fc"], **fields}, lora_dropout=dropout
    )


def on_fc(cls, dropout_field=None, **fields):
    """Of a method that changes layers, on all layers of that name."""
    fields = {"target_modules": ["fc"], **fields}
    return lambda dropout: cls(**fields, **({dropout_field: dropout} if dropout_field else {}))


def tokens(cls, **fields):
    """Of a method that adds tokens, keys or values."""
    return lambda dropout: cls(num_virtual_tokens=2, **fields)


def union(**fields):
    """Methods that are folded into weights."""
    parts = [LoraConfig(r=2, target_modules="fc"), IA3Config(target_modules=r"blocks\..\.fc", feedforward_modules=[])]
    return lambda dropout: UnionConfig(configs=parts, **fields)


HEAD = {"modules_to_save": ["classifier"]}
BLOCKS = {"target_modules": ["blocks.0", "blocks.1"]}
CONFIGS = {
    "lora": lora(),
    "one layer": lora(target_modules="fc", lora_alpha=5),  # a regular expression: not blocks.0.fc
    "one block": lora(target_modules=r"blocks\.1\.fc"),
    "rslora": lora(use_rslora=True, r=3, target_modules=["embed", "fc"]),
    "random": lora(init_lora_weights=False),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa, dora": lora(init_lora_weights="pissa", use_dora=True, bias="lora_only", **HEAD),
    "head": lora(**HEAD),
    "biases": lora(bias="all"),
    "lora_bias": lora(lora_bias=True),
    "on the head": lora(target_modules=["classifier"]),
    "bitfit": lambda dropout: BitFitConfig(),
    "bitfit, head": lambda dropout: BitFitConfig(**HEAD),
    "adapter": on_fc(BottleneckConfig, bottleneck_size=3, non_linearity="sigmoid"),
    "adapter, block": lambda dropout: BottleneckConfig(**BLOCKS, bottleneck_size=3, form="parallel", scale="learned"),
    "adapter, heads": on_fc(BottleneckConfig, target_modules=["attention"], bottleneck_size=2, form="multi_head"),
    "low_rank_adapter": on_fc(LowRankAdapterConfig, reduction_factor=2, non_linearity="tanh"),
    "compacter": on_fc(CompacterConfig, reduction_factor=2, phm_dim=2, **HEAD),
    "compacter, block": lambda dropout: CompacterConfig(**BLOCKS, reduction_factor=2, phm_dim=2),
    "ia3": on_fc(IA3Config, feedforward_modules=[]),
    "ia3, inputs": on_fc(IA3Config, target_modules=["fc", "classifier"], feedforward_modules=r"blocks\..\.fc"),
    "vera": on_fc(VeraConfig, "vera_dropout", r=3),
    "vera, biases": on_fc(VeraConfig, r=2, target_modules=["fc", "classifier"], bias="vera_only"),
    "hira": on_fc(HiraConfig, "hira_dropout", r=2),
    "hira, embed": on_fc(HiraConfig, r=2, target_modules=["embed", "fc"]),
    "miss": on_fc(MissConfig, "miss_dropout", r=2),
    "bat": on_fc(MissConfig, r=2, init_weights="bat", **HEAD),
    "mini": on_fc(MissConfig, r=2, init_weights="mini", mini_r=2),
    "adalora": on_fc(AdaLoraConfig, "lora_dropout", init_r=3, target_r=2, total_step=9),
    "oft": on_fc(OFTConfig, "module_dropout", oft_block_size=2, use_cayley_neumann=False),
    "oft, embed": on_fc(
        OFTConfig,
        target_modules=["embed", "fc"],
        oft_block_size=2,
        block_share=True,
        use_cayley_neumann=False,
        bias="all",
    ),
    "loha": on_fc(LoHaConfig, "rank_dropout", r=2, alpha=3),
    "lokr": on_fc(LoKrConfig, "module_dropout", r=1, alpha=3, decompose_factor=2),
    "trainable_tokens": on_fc(TrainableTokensConfig, target_modules=["embed"], token_indices=[2, 4]),
    "ln_tuning": on_fc(LNTuningConfig, target_modules=["norm"]),
    "prefix": tokens(PrefixTuningConfig),
    "prefix, projection": tokens(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=3, **HEAD),
    "ptuning2": tokens(Ptuning2Config),
    "ptuning2, projection": tokens(Ptuning2Config, prefix_projection=True, encoder_hidden_size=3),
    "adaption_prompt": on_fc(AdaptionPromptConfig, target_modules=["attention"], adapter_len=2, adapter_layers=1),
    "prompt_tuning": tokens(PromptTuningConfig),
    "prompt of words": tokens(PromptTuningConfig, prompt_tuning_init="SAMPLE_VOCAB"),
    "p_tuning": tokens(PromptEncoderConfig),
    "mam": lambda dropout: mam_config(["blocks.0", "blocks.1"], 2, 3, scale=2.0, **HEAD),
    "union": union(),
    "union, head": union(**HEAD),
}
ATTENTIVE = (  # what a network without attentions and places for prompts refuses
    "adapter, heads",
    "ln_tuning",
    "prefix",
    "prefix, projection",
    "ptuning2",
    "ptuning2, projection",
    "adaption_prompt",
    "prompt_tuning",
    "prompt of words",
    "p_tuning",
    "mam",
)


def covered():
    """Names of the methods in `CONFIGS`."""
    return {part.method_name for make in CONFIGS.values() for part in make(0.0).parts}


for _name in sorted(set(METHODS) - covered()):
    _cls = METHODS[_name].config
    if issubclass(_cls, (TargetConfig, PromptLearningConfig)):  # with its defaults, if these are a configuration
        CONFIGS[_name] = on_fc(_cls) if issubclass(_cls, TargetConfig) else tokens(_cls)
    else:
        CONFIGS[_name] = lambda dropout, cls=_cls: cls()

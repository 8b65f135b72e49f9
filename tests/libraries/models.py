"""Small models with random weights of released libraries."""

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Callable, Optional

import numpy as np
from mindspore import Tensor

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass
class Model:
    """A model and what the checks need to know of it.

    Attributes:
        library (str): that it is of.
        make (callable): gives the network.
        inputs (callable): gives its inputs, of two samples, as a tuple.
        targets (list): names of layers for LoRA.
        keywords (dict): further arguments of its call. Default: {}.
        training_inputs (callable): the same while it trains. Default: None, for `inputs`.
    """

    library: str
    make: Callable
    inputs: Callable
    targets: list
    keywords: dict = field(default_factory=dict)
    training_inputs: Optional[Callable] = None


def image(size, channels=3):
    return Tensor(np.random.default_rng(0).normal(size=(2, channels, size, size)).astype(np.float32))


def tokens():
    return Tensor(np.random.default_rng(0).integers(2, 50, (2, 6)).astype(np.int32))


def mask():
    return Tensor(np.ones((2, 6), np.int32))


def of(module, name, *arguments, **keywords):
    """A function that imports a class and makes one."""

    def make():
        return getattr(importlib.import_module(module), name)(*arguments, **keywords)

    return make


def causal(name, **more):
    """A causal language model of mindone, with a configuration of transformers."""
    sizes = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation="eager",
        **more,
    )

    def make():
        config = getattr(importlib.import_module("transformers"), f"{name}Config")(**sizes)
        return getattr(importlib.import_module("mindone.transformers"), f"{name}ForCausalLM")(config)

    return make


def transformers(model, config, **sizes):
    """A model of mindone, with a configuration of transformers."""

    def make():
        made = getattr(importlib.import_module("transformers"), config)(**sizes)
        return getattr(importlib.import_module("mindone.transformers"), model)(made)

    return make


def resnet(name, module):
    def make():
        found = importlib.import_module(f"mindcv.models.{module}")
        return getattr(found, name)(found.Bottleneck, [1, 1, 1, 1], num_classes=5)

    return make


def mindformers_llama(**more):
    def make():
        import mindspore as ms
        from mindformers import LlamaConfig, LlamaForCausalLM
        from mindformers.modules.layers import RotaryEmbedding

        RotaryEmbedding.cast = ms.ops.Cast()  # which Cells of older versions of MindSpore had
        return LlamaForCausalLM(
            LlamaConfig(
                batch_size=2,
                seq_length=6,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                vocab_size=50,
                multiple_of=8,
                compute_dtype=ms.float32,
                layernorm_compute_type=ms.float32,
                softmax_compute_type=ms.float32,
                rotary_dtype=ms.float32,
                param_init_type=ms.float32,
                use_flash_attention=False,
                fused_rms_norm=False,
                use_rope_slice=True,
                use_past=False,
                checkpoint_name_or_path="",
                **more,
            )
        )

    return make


def parallel_layers():
    """The linear layers of mindformers whose weights the compiler cuts. In later versions the batch comes second."""
    import mindspore as ms
    from mindformers.modules.layers import Linear

    if importlib.util.find_spec("mindformers.parallel_core") is None:
        layers = importlib.import_module("mindformers.experimental.graph.tensor_parallel.layers")
        config = importlib.import_module("mindformers.experimental.graph.transformer.transformer_config")
        config, more, order = config.TransformerConfig(), {"compute_dtype": ms.float32}, (0, 1, 2)
    else:
        layers = importlib.import_module("mindformers.parallel_core.training_graph.tensor_parallel.layers")
        config = importlib.import_module("mindformers.parallel_core.transformer_config")
        sizes = {"num_layers": 1, "hidden_size": 12, "num_attention_heads": 2, "compute_dtype": "fp32"}
        config, more, order = config.TransformerConfig(**sizes), {}, (1, 0, 2)

    def init(like):
        return Tensor(np.random.normal(size=getattr(like, "shape", like)).astype(np.float32))

    class Layers(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            same = {"config": config, "init_method": init, "bias": True, **more}
            self.column = layers.ColumnParallelLinear(12, 16, skip_bias_add=True, **same)
            self.row = layers.RowParallelLinear(16, 12, **same)
            self.linear = Linear(12, 12, transpose_b=False, activation="relu", compute_dtype=ms.float32)

        def construct(self, x):
            x, bias = self.column(x.transpose(order))
            x, _ = self.row(x + bias)
            return self.linear(x.transpose(order))

    return Layers()


def more_tokens():
    """With one more: what comes next is taken off the end."""
    return Tensor(np.random.default_rng(0).integers(2, 50, (2, 7)).astype(np.int32))


SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TUPLE = {"return_dict": False}
UNET = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
)

MODELS = {
    "ViT": Model(
        "mindcv",
        of("mindcv.models.vit", "VisionTransformer", 16, 8, num_classes=5, embed_dim=32, depth=2, num_heads=4),
        lambda: (image(16),),
        ["qkv", "fc1", "patch_embed.proj"],
    ),
    "Swin": Model(
        "mindcv",
        of(
            "mindcv.models.swintransformer",
            "SwinTransformer",
            image_size=32,
            num_classes=5,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        lambda: (image(32),),
        ["q", "k", "v", "fc1"],
    ),
    "ConvNeXt": Model(
        "mindcv",
        of("mindcv.models.convnext", "ConvNeXt", 3, 5, [1, 1, 1, 1], [8, 16, 16, 32], layer_scale_init_value=1.0),
        lambda: (image(32),),
        ["pwconv1", "pwconv2"],
    ),
    "ResNet": Model("mindcv", resnet("ResNet", "resnet"), lambda: (image(32),), ["conv1", "conv2", "classifier"]),
    "BiT-ResNet": Model("mindcv", resnet("BiT_ResNet", "bit"), lambda: (image(32),), ["classifier"]),
    "LLaMA": Model("mindone", causal("Llama"), lambda: (tokens(),), ATTENTION, TUPLE),
    "Qwen2": Model("mindone", causal("Qwen2"), lambda: (tokens(), mask()), ATTENTION, TUPLE),
    "Qwen3": Model("mindone", causal("Qwen3", head_dim=8), lambda: (tokens(),), ATTENTION, TUPLE),
    "Mistral": Model("mindone", causal("Mistral"), lambda: (tokens(),), ATTENTION, TUPLE),
    "BERT": Model(
        "mindone",
        transformers("BertModel", "BertConfig", **SMALL, attn_implementation="eager"),
        lambda: (tokens(), mask()),
        ["query", "value", "word_embeddings"],
        TUPLE,
    ),
    "GPT-2": Model(
        "mindone",
        transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=50,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            use_cache=False,
            attn_implementation="eager",
        ),
        lambda: (tokens(),),
        ["c_attn", "c_fc"],
        TUPLE,
    ),
    "T5": Model(
        "mindone",
        transformers(
            "T5EncoderModel", "T5Config", vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        ),
        lambda: (tokens(), mask()),
        ["q", "v", "wi"],
        TUPLE,
    ),
    "UNet": Model(
        "mindone",
        of("mindone.diffusers", "UNet2DModel", **UNET),
        lambda: (image(8), Tensor(np.array([1, 2], np.int32))),
        ["to_q", "to_v", "conv1"],
        TUPLE,
    ),
    "LLaMA of mindformers": Model(
        "mindformers",
        mindformers_llama(),
        lambda: (tokens(),),
        ["wq", "wk", "wv", "wo", "w1", "tok_embeddings"],
        training_inputs=lambda: (more_tokens(),),
    ),
    "Linear, ColumnParallelLinear, RowParallelLinear": Model(
        "mindformers",
        parallel_layers,
        lambda: (Tensor(np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)),),
        ["column", "row", "linear"],
    ),
}

"""LLaMA-Adapter: trained vectors that an attention attends to beside its input, behind a gate that starts closed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import Normal

from mindpet.delta._base import Delta, delta_parameter
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.errors import ConfigError
from mindpet.layers.linear import cast
from mindpet.network.kinds import LayerKind, layer_kind, why_not
from mindpet.network.match import ends_with
from mindpet.utils.hints import Arrays, Operators, Shape
from mindpet.utils.layouts import Cut, slices
from mindpet.utils.sharding import apply_strategies, cut_axes
from mindpet.utils.validate import Checker

PROMPT, GATE = "mindpet_delta_adaption_prompt", "mindpet_delta_adaption_prompt_gate"
PLACES = "key_value_layers"  # attribute of an attention that names its layers of keys and values


@dataclass
class AdaptionPromptConfig(TargetConfig):
    """LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199.

    `target_modules` names attentions that have a `context_source`, or an `output_source`, and `key_value_layers`, see
    docs/peft.md; the str of one name without dots is a name, as in Hugging Face PEFT, and no regular expression.

    Args beyond those of PeftConfig and TargetConfig:
        adapter_len: vectors for each attention. Default: None; it must be given before the adapter is made.
        adapter_layers: how many of the attentions have them, the last ones. Default: None; it must be given, too.
    """

    peft_type, method_name = "ADAPTION_PROMPT", "adaption_prompt"
    usual_targets = (("self_attn",), ("attn",), ("self",))
    told_by_tensors = ("adapter_len", "adapter_layers")
    not_in_peft = ("modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern")

    adapter_len: Optional[int] = None
    adapter_layers: Optional[int] = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target_modules, str) and self.target_modules.isidentifier():
            self.target_modules = [self.target_modules]

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        sizes = {"adapter_len": self.adapter_len, "adapter_layers": self.adapter_layers}
        check.positive_int(**{name: size for name, size in sizes.items() if size is not None})

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {"tokens": self.adapter_len or 0}

    def choose(self, layers: Sequence[Any]) -> list:
        missing = [f"'{name}' must be given" for name in self.told_by_tensors if getattr(self, name) is None]
        if not missing and self.adapter_layers > len(layers):
            missing = [f"'adapter_layers' is {self.adapter_layers}, but there are {len(layers)} attentions"]
        if missing:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(missing) + ".")
        return layers[-self.adapter_layers :]

    def with_targets(self, pairs: Sequence[tuple[str, str]], known: Sequence[str]) -> "AdaptionPromptConfig":
        """By the one name that they have, where the last attentions of that name are these, for Hugging Face PEFT."""
        config, paths = super().with_targets(pairs, known), [new for _, new in pairs]
        ends = {path.rpartition(".")[2] for path in paths}
        alike = [path for path in known if len(ends) == 1 and ends_with(path, *ends)]
        is_told = bool(paths) and sorted(alike[-len(paths) :]) == sorted(paths)
        targets = [*ends] if is_told else config.target_modules
        return replace(config, target_modules=targets, adapter_layers=len(paths) or None)

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        names = content["target_modules"]
        if isinstance(names, list) and len(names) == 1 and names[0].isidentifier():
            content["target_modules"] = names[0]
        return content

    def of_delta_file(
        self, shapes: dict[str, dict[str, Shape]], tensors: Arrays
    ) -> tuple["AdaptionPromptConfig", Arrays]:
        config, tensors = super().of_delta_file(shapes, tensors)
        lengths = {path: names[PROMPT][1] for path, names in shapes.items() if len(names.get(PROMPT, ())) > 1}
        told = {"adapter_len": max(lengths.values(), default=None), "adapter_layers": len(lengths) or None}
        wrong = [
            f"{name!r} is {getattr(self, name)}, but {size} in the tensors"
            for name, size in told.items()
            if getattr(self, name) not in (None, size)
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))
        ends = {path.rpartition(".")[2] for path in lengths}
        told["target_modules"] = self.target_modules or ([*ends] if len(ends) == 1 else None)
        return replace(config, **told), tensors


class AdaptionPrompt(nn.Cell):
    """Trained vectors that the queries of an attention see beside its tokens, through a softmax of their own.

    .. math::
        c \\mapsto c + g \\, softmax(q K_p^T / \\sqrt{d}) V_p, \\quad K_p = P W_k^T + b_k, \\quad V_p = P W_v^T + b_v

    for each head, with the attention's own W_k and W_v, and without positions in K_p. The softmax is in float32. The
    gate g starts as zero, so a fresh one is the identity.

    Source: Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
    arXiv:2303.16199, equations 4 to 8; the gate is one number, without tanh, as in Hugging Face PEFT.

    Args:
        layers: the attention's linear layers of key and of value, or one layer of query, key and value.
        heads: query heads.
        head_dim: features of a head.
        kv_heads: key and value heads. Default: None, for `heads`.
        adapter_len: vectors. Default: 10.
        param_init_type: type of the parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type that keys and values are computed in: float16, float32 or bfloat16. Default: float16.

    Parameters:
        mindpet_delta_adaption_prompt: P, `(1, adapter_len, features)`; mindpet_delta_adaption_prompt_gate: g, `(1,)`.
        The weights of `layers` are the layers' own.

    Inputs:
        hidden: of no effect, `(batch, seq, features)`.
        query: q, with positions, `(batch, heads, seq, head_dim)`.
        context: c, what the heads put out, `(batch, heads, seq, head_dim)`, or, side by side,
            `(batch, seq, heads * head_dim)`.

    Outputs:
        Tensor like `context`.

    Raises:
        TypeError: a size is not an int, a type is none of the three.
        ValueError: a size below 1; `layers` are no linear layers, or do not have the features of the heads.
    """

    def __init__(
        self,
        layers: Sequence[nn.Cell],
        heads: int,
        head_dim: int,
        kv_heads: Optional[int] = None,
        adapter_len: int = 10,
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        check = Checker(type(self).__name__)
        check.positive_int(heads=heads, head_dim=head_dim, kv_heads=kv_heads, adapter_len=adapter_len)
        check.float_type(param_init_type=param_init_type, compute_dtype=compute_dtype)
        check.done()
        wrong = layer_problems(layers, heads, kv_heads, head_dim)
        check.require(not wrong, ValueError, "layers", layers, "; ".join(wrong))
        check.done()
        super().__init__(auto_prefix=False)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.adapter_len, self.compute_dtype = adapter_len, compute_dtype
        self.groups, self.width = heads // kv_heads, kv_heads * head_dim
        (key, key_kind), (value, value_kind) = ((layer, layer_kind(layer)) for layer in (layers[0], layers[-1]))
        self.features = key_kind.in_features(key)
        # Where keys and values begin in what the layers put out; None if it is nothing else.
        self.starts = (heads * head_dim, heads * head_dim + self.width) if len(layers) == 1 else None
        self.base_key_weight, self.base_key_bias = key_kind.kept_weight(key), own_bias(key, key_kind)
        self.base_value_weight, self.base_value_bias = value_kind.kept_weight(value), own_bias(value, value_kind)
        self.computes_key, self.computes_value = (
            isinstance(weight, nn.Cell) for weight in (self.base_key_weight, self.base_value_weight)
        )
        shape = (1, adapter_len, self.features)
        self.mindpet_delta_adaption_prompt = delta_parameter(Normal(1.0), shape, param_init_type, PROMPT)
        self.mindpet_delta_adaption_prompt_gate = delta_parameter("zeros", (1,), param_init_type, GATE)
        self.tile, self.repeat, self.heads_first, self.merge = ops.Tile(), ops.Tile(), ops.Transpose(), ops.Transpose()
        self.key_matmul = ops.MatMul(transpose_b=not key_kind.transposed)
        self.value_matmul = ops.MatMul(transpose_b=not value_kind.transposed)
        self.key_bias_add, self.value_bias_add = ops.Add(), ops.Add()
        self.scores, self.attend = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.scale, self.softmax, self.gate_mul, self.add = ops.Mul(), ops.Softmax(-1), ops.Mul(), ops.Add()

    def update_parameters_name(self, prefix: str = "", recurse: bool = True) -> None:
        """Name the own parameters; the base's keep their names."""
        before = [(param, param.name) for name, param in self.parameters_and_names() if name.startswith("base_")]
        super().update_parameters_name(prefix, recurse)
        for param, name in before:
            param.name = name

    def key_weight(self):
        """The weight of the keys' layer."""
        return self.base_key_weight() if self.computes_key else self.base_key_weight

    def value_weight(self):
        """The weight of the values' layer."""
        return self.base_value_weight() if self.computes_value else self.base_value_weight

    def construct(self, hidden, query, context):
        batch, seq = query.shape[0], query.shape[2]
        prompt = self.tile(cast(self.mindpet_delta_adaption_prompt, self.compute_dtype), (batch, 1, 1))
        rows = ops.reshape(prompt, (batch * self.adapter_len, self.features))
        key = self.key_matmul(rows, cast(self.key_weight(), self.compute_dtype))
        if self.base_key_bias is not None:
            key = self.key_bias_add(key, cast(self.base_key_bias, self.compute_dtype))
        value = self.value_matmul(rows, cast(self.value_weight(), self.compute_dtype))
        if self.base_value_bias is not None:
            value = self.value_bias_add(value, cast(self.base_value_bias, self.compute_dtype))
        if self.starts is not None:
            key = key[:, self.starts[0] : self.starts[0] + self.width]
            value = value[:, self.starts[1] : self.starts[1] + self.width]
        key, value = cast(self.split_heads(key, batch), query.dtype), cast(self.split_heads(value, batch), query.dtype)
        scores = self.scale(cast(self.scores(query, key), ms.float32), 1 / math.sqrt(self.head_dim))
        seen = self.attend(cast(self.softmax(scores), query.dtype), value)
        delta = self.gate_mul(seen, cast(self.mindpet_delta_adaption_prompt_gate, query.dtype))
        if context.ndim == 3:
            delta = ops.reshape(self.merge(delta, (0, 2, 1, 3)), (batch, seq, self.heads * self.head_dim))
        return self.add(context, cast(delta, context.dtype))

    def split_heads(self, rows, batch):
        """`(batch * adapter_len, kv_heads * head_dim) -> (batch, heads, adapter_len, head_dim)`."""
        x = ops.reshape(rows, (batch, self.adapter_len, self.kv_heads, self.head_dim))
        x = self.heads_first(x, (0, 2, 1, 3))
        if self.groups == 1:
            return x
        x = ops.reshape(x, (batch, self.kv_heads, 1, self.adapter_len * self.head_dim))
        return ops.reshape(self.repeat(x, (1, 1, self.groups, 1)), (batch, self.heads, self.adapter_len, self.head_dim))

    def shard(self, batch: Cut, heads: Cut) -> "AdaptionPrompt":
        """Cut the result over the batch and the heads.

        Args:
            batch: slices of the batch, or a cut of a Layout.
            heads: the same of the heads, and of the key and value heads.

        Returns:
            AdaptionPrompt, itself.

        Raises:
            ConfigError: the key and value heads cannot be cut so; the layer is one of query, key and value.
        """
        if self.kv_heads % slices(heads):
            raise ConfigError(f"{self.kv_heads} key and value heads cannot be cut in {slices(heads)} slices")
        if self.starts is not None:
            raise ConfigError("no adaption prompt where one layer of query and key has strategies")
        return apply_strategies(self, cut_axes(self, {"n": batch, "o": heads}))

    @property
    def operators(self) -> Operators:
        """The operator behind each slot, and the axes of its inputs; see `mindpet.utils.sharding`."""
        products = ["ni,oi" if operator.transpose_b else "ni,io" for operator in (self.key_matmul, self.value_matmul)]
        return {
            "strategy_tile": (self.tile, "nki"),
            "strategy_key_matmul": (self.key_matmul, products[0]),
            "strategy_key_bias_add": (self.key_bias_add, "no,o"),
            "strategy_value_matmul": (self.value_matmul, products[1]),
            "strategy_value_bias_add": (self.value_bias_add, "no,o"),
            "strategy_heads_first": (self.heads_first, "nkol"),
            "strategy_repeat": (self.repeat, "nokl"),
            "strategy_scores": (self.scores, "nokl,nofl"),
            "strategy_scale": (self.scale, "nokf,"),
            "strategy_softmax": (self.softmax, "nokf"),
            "strategy_attend": (self.attend, "nokf,nofl"),
            "strategy_gate_mul": (self.gate_mul, "nokl,k"),
            "strategy_add": (self.add, "nokl,nokl"),
        }

    def extend_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, kv_heads={self.kv_heads}, adapter_len={self.adapter_len}"


class AdaptionPromptDelta(AdaptionPrompt, Delta):
    """An `AdaptionPrompt` that an attention calls as its attribute `context_source` or `output_source`.

    Delta arguments:
        tokens (int): vectors.
    """

    file_names = {PROMPT: "adaption_prompt", GATE: "adaption_gate"}

    @classmethod
    def create(cls, cell: nn.Cell, kind: LayerKind, tokens: int) -> "AdaptionPromptDelta":
        layers = key_value_layers(cell)
        dtype = layer_kind(layers[0]).compute_dtype
        return cls(layers, kind.heads, kind.head_dim, kind.kv_heads, tokens, compute_dtype=dtype)

    @classmethod
    def problems(cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, **arguments: Any) -> list[str]:
        layers = key_value_layers(cell)
        if not layers:
            return [f"its {PLACES!r} must name its layers of key and value, but is {getattr(cell, PLACES, None)!r}"]
        if is_sharded and (kind.name == "output" or len(layers) == 1):
            return ["no adaption prompt where an 'output_source', or one layer of query and key, has strategies"]
        return layer_problems(layers, kind.heads, kind.kv_heads, kind.head_dim)

    def base_places(self, cell: nn.Cell) -> dict[str, tuple[nn.Cell, str]]:
        layers, places = key_value_layers(cell), {}
        for name, layer in (("key", layers[0]), ("value", layers[-1])):
            kind = layer_kind(layer)
            places[f"base_{name}_weight"] = (layer, kind.weight)
            if own_bias(layer, kind) is not None:
                places[f"base_{name}_bias"] = (layer, kind.bias)
        return places

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], tokens: int, **others: Any) -> dict[str, Shape]:
        return {PROMPT: (1, tokens, *(shapes.get(PROMPT, ())[2:] or ("features",))), GATE: (1,)}


def own_bias(layer: nn.Cell, kind: LayerKind) -> Any:
    """The bias that is in what a layer puts out, or None."""
    return kind.bias_of(layer) if kind.adds_bias else None


def key_value_layers(attention: nn.Cell) -> list:
    """The layers that an attention names in `key_value_layers`, a list; empty if it does not name one or two."""
    names = getattr(attention, PLACES, None)
    named = isinstance(names, tuple) and len(names) in (1, 2)
    layers = [getattr(attention, name, None) if isinstance(name, str) else None for name in names] if named else []
    return layers if all(isinstance(layer, nn.Cell) for layer in layers) else []


def layer_problems(layers: Sequence[Any], heads: int, kv_heads: int, head_dim: int) -> list[str]:
    """Why layers cannot be those of key and value, or one of query, key and value: list of str."""
    if not (isinstance(layers, (list, tuple)) and len(layers) in (1, 2)):
        return ["the layers of key and value, or one of query, key and value"]
    if heads % kv_heads:
        return [f"{heads} heads are no multiple of {kv_heads} key and value heads"]
    kinds = [layer_kind(layer) if isinstance(layer, nn.Cell) else None for layer in layers]
    for layer, kind in zip(layers, kinds):
        if kind is None or kind.name != "linear":
            why = why_not(layer) if isinstance(layer, nn.Cell) else None
            return [f"the layers of key and value must be linear layers; {type(layer).__name__}: {why or 'it is none'}"]
    wanted = (kv_heads if len(layers) == 2 else heads + 2 * kv_heads) * head_dim
    sizes = [kind.out_features(layer) for layer, kind in zip(layers, kinds)]
    if set(sizes) != {wanted}:
        return [f"the layers of key and value must have {wanted} outputs, but have {sizes}"]
    inputs = [kind.in_features(layer) for layer, kind in zip(layers, kinds)]
    return [] if len(set(inputs)) == 1 else [f"the layers of key and value have other inputs, {inputs}"]


METHOD = Method(
    "adaption_prompt",
    AdaptionPromptConfig,
    ("*mindpet_delta_adaption_prompt*",),
    {"output": AdaptionPromptDelta, "context": AdaptionPromptDelta},
    (AdaptionPrompt,),
    identity=True,
)

"""Places for deltas: linear layers, embeddings, convolutions, blocks of layers, and Cells with a slot for a delta."""

import functools
import inspect
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn

from mindpet.errors import ConfigError
from mindpet.layers.linear import Dense
from mindpet.layers.quantized import KeptCodes, QuantizedDense
from mindpet.network.libraries import LIBRARIES
from mindpet.utils.hints import Shape
from mindpet.utils.validate import FLOAT_TYPES, Checker, is_int

# Name -> how many axes the weight can have; `nn.Conv1d` keeps an axis of length one.
NAMES = {"linear": (2,), "embedding": (2,), "conv1d": (3, 4), "conv2d": (4,), "conv3d": (5,)}


@dataclass(frozen=True)
class LayerKind:
    """How a Cell computes `weight * x + bias`.

    Attributes:
        name: 'linear', 'embedding', 'conv1d', 'conv2d' or 'conv3d'.
        weight: attribute of the weight: of a linear layer `(out, in)`, of an embedding `(vocab, features)`, of a
            convolution `(out, in / groups, *kernel)`.
        bias: attribute of the bias `(out,)`, which may be missing or None.
        fan_in_fan_out: whether a linear layer has its weight as `(in, out)`.
        compute_dtype: that the layer computes in.
        adds_bias: whether the bias is in the output.
        flattens: whether the layer's own activation takes `(rows, out)`.
        batch_axis: axis of the output that the batch is on.
    """

    name: str = "linear"
    weight: str = "weight"
    bias: str = "bias"
    fan_in_fan_out: Any = False
    compute_dtype: Any = None
    adds_bias: Any = True
    flattens: bool = True
    batch_axis: int = 0

    @property
    def transposed(self) -> bool:
        """Whether the weight has the features that come out on its last axis."""
        return self.fan_in_fan_out or self.name == "embedding"

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.name.startswith("conv")

    def weight_of(self, cell: nn.Cell) -> Parameter:
        """The Parameter of the weight."""
        return getattr(cell, self.weight)

    def bias_of(self, cell: nn.Cell) -> Optional[Parameter]:
        """The Parameter of the bias, or None."""
        return getattr(cell, self.bias, None)

    def in_features(self, cell: nn.Cell) -> int:
        """Features, or channels, of the input; of an embedding the rows of its table."""
        rows, columns = self.weight_of(cell).shape[:2]
        return rows if self.transposed else columns * self.groups_of(cell)

    def out_features(self, cell: nn.Cell) -> int:
        """Features, or channels, of the output."""
        return self.weight_of(cell).shape[-1 if self.transposed else 0]

    def groups_of(self, cell: nn.Cell) -> int:
        """The groups of a convolution; 1 for any other layer."""
        return getattr(cell, "group", getattr(cell, "groups", 1)) if self.is_convolution else 1

    def to_matrix(self, weight: Union[np.ndarray, Tensor]) -> Union[np.ndarray, Tensor]:
        """A weight as `(out, rest)`; NumPy array or Tensor."""
        return weight.T if self.transposed else weight.reshape(weight.shape[0], -1)

    def from_matrix(self, matrix: Union[np.ndarray, Tensor], shape: Shape) -> Union[np.ndarray, Tensor]:
        """The inverse of `to_matrix`."""
        return matrix.T if self.transposed else matrix.reshape(shape)

    def kept_weight(self, cell: nn.Cell) -> Union[Parameter, nn.Cell]:
        """What a delta keeps to compute with the weight: the Parameter, or a Cell that returns the weight."""
        return self.weight_of(cell)

    def of(self, cell: nn.Cell) -> "LayerKind":
        """The kind of this very Cell: what the class leaves to the object has its value."""
        values = {field.name: _value(getattr(self, field.name), cell) for field in fields(self) if field.type is Any}
        if values["compute_dtype"] is None:
            values["compute_dtype"] = getattr(cell, "compute_dtype", self.weight_of(cell).dtype)
        return replace(self, **values)


class QuantizedWeight:
    """The weight of a quantised layer, where a Parameter is read and not computed with.

    Args:
        cell: the layer.

    Attributes:
        shape, dtype: of the weight.
        has_init: whether its codes have no values yet.
        parts: the Parameters that it comes from.
    """

    def __init__(self, cell: QuantizedDense):
        self.cell, self.shape, self.dtype, self.ndim = cell, cell.shape, cell.compute_dtype, 2
        self.parts = [getattr(cell, name) for name in cell.form.shapes(cell.shape)]
        self.has_init, self.name = any(param.has_init for param in self.parts), self.parts[0].name

    def asnumpy(self) -> np.ndarray:
        """The weight `(out, in)`, float32."""
        return self.cell.dequantized()

    def init_data(self) -> None:
        """Do nothing: the codes are made when they are read."""


@dataclass(frozen=True)
class QuantizedKind(LayerKind):
    """A layer whose weight is quantised; once it is dequantised, any linear layer."""

    def weight_of(self, cell: nn.Cell) -> Union[Parameter, QuantizedWeight]:
        return QuantizedWeight(cell) if cell.is_quantized else super().weight_of(cell)

    def kept_weight(self, cell: nn.Cell) -> Union[Parameter, nn.Cell]:
        return KeptCodes(cell) if cell.is_quantized else super().weight_of(cell)


@dataclass(frozen=True)
class BlockKind:
    """A Cell that is no layer, but has linear layers: a feed-forward block, an attention, a whole transformer layer.

    It takes what its first linear layer takes, and returns, alone or first of several, what its last one returns.

    Attributes:
        inputs: features of the input.
        outputs: features of the output.
        compute_dtype: that its first linear layer computes in.
    """

    inputs: int
    outputs: int
    compute_dtype: Any

    name = "block"
    batch_axis, flattens = 0, True  # as a LayerKind has them

    @classmethod
    def of(cls, cell: nn.Cell) -> "Optional[BlockKind]":
        """The kind of this very Cell, or None: there is no linear layer."""
        layers = linear_layers(cell)
        if not layers:
            return None
        (first, entry), (last, leaving) = layers[0], layers[-1]
        return cls(entry.in_features(first), leaving.out_features(last), entry.compute_dtype)

    def in_features(self, cell: nn.Cell) -> int:
        """Features of the input."""
        return self.inputs

    def out_features(self, cell: nn.Cell) -> int:
        """Features of the output."""
        return self.outputs


def linear_layers(cell: nn.Cell) -> list[tuple[nn.Cell, LayerKind]]:
    """The linear layers below a Cell, in its order: list of (Cell, LayerKind). Those of deltas do not count."""
    layers = [(inner, layer_kind(inner)) for path, inner in cell.cells_and_names() if path and "mindpet" not in path]
    return [(inner, kind) for inner, kind in layers if kind is not None and kind.name == "linear"]


@dataclass(frozen=True)
class AttentionKind:
    """An attention that calls its attribute `prefix_source`, where that is not None, on its keys and values.

    Attributes:
        kv_heads: key and value heads.
        head_dim: features of a head.
    """

    kv_heads: int
    head_dim: int

    name = "attention"
    slot = "prefix_source"
    strategy = "prefix_strategy"

    @property
    def cut_heads(self) -> int:
        """The heads that the Cell's strategies cut."""
        return self.kv_heads


@dataclass(frozen=True)
class ContextKind:
    """An attention that calls its attribute `context_source`, where that is not None, on what its heads put out.

    `context = self.context_source(hidden, query, context)`: the attention's input `(batch, seq, features)`, its queries
    with their positions and the result, both `(batch, heads, seq, head_dim)`.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: features of a head.
    """

    heads: int
    kv_heads: int
    head_dim: int

    name = "context"
    slot = "context_source"
    strategy = "context_strategy"

    @property
    def cut_heads(self) -> int:
        """The heads that the Cell's strategies cut."""
        return self.heads


@dataclass(frozen=True)
class OutputKind(ContextKind):
    """An attention that calls its attribute `output_source`, where that is not None, on what it puts out.

    `out = self.output_source(hidden, query, out)`, as `context_source`, but with `out` `(batch, seq, features)`.
    """

    name = "output"
    slot = "output_source"
    strategy = "output_strategy"


@dataclass(frozen=True)
class InputEmbeddingKind:
    """A Cell that calls its attribute `prompt_source`, where that is not None, on the embeddings of its input.

    Attributes:
        token_dim: features of an embedding.
    """

    token_dim: int

    name = "input_embedding"
    slot = "prompt_source"
    strategy = "prompt_strategy"

    def weight_of(self, cell: nn.Cell) -> Parameter:
        """The Parameter of the table, `(vocab, token_dim)`, of the embedding that the Cell calls `prompt_table`.

        Raises:
            ConfigError: there is no such embedding.
        """
        path = getattr(cell, "prompt_table", None)
        embedding = dict(cell.cells_and_names()).get(str(path))
        kind = embedding and layer_kind(embedding)
        weight = kind.weight_of(embedding) if kind and kind.name == "embedding" else None
        if weight is None or weight.shape[1] != self.token_dim:
            raise ConfigError(
                "its attribute 'prompt_table' must be the path in it of the embedding of its tokens, of "
                f"{self.token_dim} features, but is {path!r}"
            )
        return weight

    def to_matrix(self, weight: np.ndarray) -> np.ndarray:
        """The table as deltas take it, a row for each token."""
        return weight


# Cells with an attribute that takes a delta, by the name of their kind; of several that fit, the first one counts.
SLOTS = {kind.name: kind for kind in (AttentionKind, OutputKind, ContextKind, InputEmbeddingKind)}


# Class, or its path for one of a library -> LayerKind.
KINDS = {
    nn.Dense: LayerKind(),
    Dense: LayerKind(),
    QuantizedDense: QuantizedKind(),
    mint.nn.Linear: LayerKind(),
    nn.Embedding: LayerKind("embedding", "embedding_table"),
    mint.nn.Embedding: LayerKind("embedding"),
    nn.Conv1d: LayerKind("conv1d"),
    mint.nn.Conv1d: LayerKind("conv1d"),
    nn.Conv2d: LayerKind("conv2d"),
    mint.nn.Conv2d: LayerKind("conv2d"),
    nn.Conv3d: LayerKind("conv3d"),
    mint.nn.Conv3d: LayerKind("conv3d"),
    **{path: LayerKind(**arguments) for path, arguments in LIBRARIES.items()},
}


def register_layer(
    cls: Union[type, str],
    name: str = "linear",
    weight: str = "weight",
    bias: str = "bias",
    fan_in_fan_out: Union[bool, str, Callable[[nn.Cell], bool]] = False,
    compute_dtype: Union[ms.Type, str, Callable[[nn.Cell], ms.Type], None] = None,
    adds_bias: Union[bool, str, Callable[[nn.Cell], bool]] = True,
    flattens: bool = True,
    batch_axis: int = 0,
) -> None:
    """Let Cells of a class carry deltas, and of its subclasses, as long as they compute as the class does.

    The Cell's `construct` takes the input first and returns one Tensor, or a tuple whose first entry is the output. If
    it has an activation of its own, it is called `activation` and is switched by `activation_flag`, as in
    `mindspore.nn.Dense`.

    Args:
        cls: subclass of `mindspore.nn.Cell`, or the path of one, 'package.module.Class'.
        name: 'linear', 'embedding', 'conv1d', 'conv2d' or 'conv3d'. Default: 'linear'.
        weight: attribute of the weight. Default: 'weight'.
        bias: attribute of the bias. Default: 'bias'.
        fan_in_fan_out: whether the weight of a linear layer is `(in, out)`; where the object decides, the attribute
            that says so, or a function of the Cell. Default: False.
        compute_dtype: type that the layer computes in, or the attribute that has it, or a function of the Cell.
            Default: None, for the attribute `compute_dtype`, else the weight's type.
        adds_bias: whether the bias is in the output, and not returned beside it, say; an attribute or a function of the
            Cell, too. Default: True.
        flattens: whether the activation takes `(rows, out)`, as in `mindspore.nn.Dense`. Default: True.
        batch_axis: axis of the output that the batch is on, for `adapter_names`. Default: 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `name` is unknown, `batch_axis` negative.
    """
    check = Checker("register_layer")
    is_class = isinstance(cls, str) or (isinstance(cls, type) and issubclass(cls, nn.Cell))
    check.require(is_class, TypeError, "cls", cls, "a subclass of Cell, or the path of one")
    check.choice("name", name, tuple(NAMES))
    for argument, value in (("weight", weight), ("bias", bias)):
        check.require(isinstance(value, str), TypeError, argument, value, "a str")
    for argument, value in (("fan_in_fan_out", fan_in_fan_out), ("adds_bias", adds_bias)):
        fits = isinstance(value, (bool, str)) or callable(value)
        check.require(fits, TypeError, argument, value, "a bool, an attribute's name or a function of the Cell")
    fits = compute_dtype is None or isinstance(compute_dtype, str) or callable(compute_dtype)
    fits = fits or compute_dtype in FLOAT_TYPES
    check.require(fits, TypeError, "compute_dtype", compute_dtype, "a type, an attribute's name or a function")
    check.boolean(flattens=flattens)
    if check.require(is_int(batch_axis), TypeError, "batch_axis", batch_axis, "an int"):
        check.require(batch_axis >= 0, ValueError, "batch_axis", batch_axis, "at least 0")
    check.done()
    KINDS[cls] = LayerKind(name, weight, bias, fan_in_fan_out, compute_dtype, adds_bias, flattens, batch_axis)


def slot_of(cell: nn.Cell, names: Collection[str]) -> Optional[type]:
    """The class of kind, one of `SLOTS`, whose attribute a Cell has; None if there is none among the names."""
    return next((kind for name, kind in SLOTS.items() if name in names and hasattr(cell, kind.slot)), None)


def place_kind(cell: nn.Cell, names: Collection[str]) -> Union[LayerKind, BlockKind, None]:
    """The kind of a Cell without a slot, a LayerKind or a BlockKind; None if it is not among the names."""
    kind = layer_kind(cell)
    if kind is None and "block" in names and why_not(cell) is None:
        kind = BlockKind.of(cell)
    return kind if kind is not None and kind.name in names else None


def layer_kind(cell: nn.Cell) -> Optional[LayerKind]:
    """The LayerKind of a Cell, or None: its class is unknown, or `why_not` says what is in the way."""
    _, record = _registered(cell)
    return None if record is None or why_not(cell) else record.of(cell)


def why_not(cell: nn.Cell) -> Optional[str]:
    """Why a Cell cannot carry a delta; None if nothing is in the way, or neither its class nor a base is registered."""
    cls, record = _registered(cell)
    if cls is None:
        return None
    changed = [name for name in _methods(cls) if getattr(type(cell), name, None) is not getattr(cls, name)]
    if changed:
        return (
            f"{type(cell).__name__} has {' and '.join(changed)} of its own, so it may compute something else than a "
            f"{cls.__name__}; if it does not, register_layer({type(cell).__name__}) says so"
        )
    weight = getattr(cell, record.weight, None)
    if not isinstance(weight, ms.Parameter):
        return f"it has no weight of its own: {record.weight!r} is {weight!r}"
    if weight.ndim not in NAMES[record.name]:
        wanted = " or ".join(map(str, NAMES[record.name]))
        return f"its weight must have {wanted} axes, but has the shape {weight.shape}"
    rules = (
        ("data_format", lambda value: value.startswith("NC"), "the channels must be the second axis"),
        ("max_norm", lambda value: value is None, "the layer rewrites its table"),
    )
    for attribute, fits, rule in rules:
        if hasattr(cell, attribute) and not fits(getattr(cell, attribute)):
            return f"{rule}, but {attribute!r} is {getattr(cell, attribute)!r}"
    return None


def compute_attribute(cell: nn.Cell) -> Optional[str]:
    """The attribute of a Cell that says which type it computes in; None for one that computes in that of its weight."""
    _, record = _registered(cell)
    name = record.compute_dtype if record and isinstance(record.compute_dtype, str) else "compute_dtype"
    return name if hasattr(cell, name) else None


def _registered(cell):
    """The nearest class of a Cell that is registered, and its LayerKind."""
    for cls in type(cell).__mro__:
        record = KINDS.get(cls) or KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if record is not None:
            return cls, record
    return None, None


@functools.cache
def _methods(cls):
    """Names of `construct` and of the methods that it calls, and so on: what an object of a class computes with."""
    methods, names = [], ["construct"]
    while names:
        name = names.pop()
        method = getattr(cls, name, None)
        if inspect.isfunction(method) and name not in methods:
            methods.append(name)
            names += inspect.unwrap(method).__code__.co_names
    return methods


def _value(value, cell):
    """A value that may be an attribute's name or a function of the Cell."""
    if isinstance(value, str):
        return getattr(cell, value)
    return value(cell) if callable(value) else value

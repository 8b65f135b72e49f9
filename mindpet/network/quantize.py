"""Quantising the linear layers of a network that is in memory."""

from dataclasses import dataclass
from typing import Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindpet.errors import ConfigError
from mindpet.layers.quantized import QuantizedDense, check_format
from mindpet.network.kinds import layer_kind
from mindpet.network.match import ALL_LINEAR, Layer, find_targets
from mindpet.network.recompute import renew_recompute
from mindpet.network.values import forget_graphs, value_of
from mindpet.utils.layouts import get_strategy, is_layout
from mindpet.utils.quantization import Format, quantize_rows
from mindpet.utils.validate import Checker


@dataclass(frozen=True)
class QuantizationConfig:
    """Which layers of a network are quantised, and how; the formats stand in `mindpet.utils.quantization`.

    Args:
        bits: 'int8' with a scale for each output; 'int4' or 'nf4' with a scale for each group. Default: 'nf4'.
        group_size: numbers of a row that share a scale, of 4 bits; even, and divides the inputs of each layer.
            Default: 64.
        double_quant: whether the scales of 4 bits are quantised, too. Default: True.
        target_modules: as in `TargetConfig`. Default: 'all-linear', every linear layer but output layers.
        exclude_modules: layers to leave out, matched alike. Default: None.
        compute_dtype: that the layers compute in: float16, float32 or bfloat16. Default: None, for that which each has.

    Raises:
        TypeError, ValueError: a field is wrong; all wrong ones are in the message.
    """

    bits: str = "nf4"
    group_size: int = 64
    double_quant: bool = True
    target_modules: Union[list[str], str] = ALL_LINEAR
    exclude_modules: Optional[Union[list[str], str]] = None
    compute_dtype: Optional[ms.Type] = None

    # What `find_targets` asks of a configuration, too.
    layers_to_transform, layers_pattern, usual_targets = None, None, ()

    def __post_init__(self):
        check = Checker(type(self).__name__)
        check_format(check, self.bits, self.group_size, self.double_quant)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            names = [value] if isinstance(value, str) else value
            listed = isinstance(names, (list, tuple, set)) and all(isinstance(entry, str) for entry in names)
            fits = listed or (value is None and name == "exclude_modules")
            check.require(fits, TypeError, name, value, "a str or a list of str")
        if self.compute_dtype is not None:
            check.float_type(compute_dtype=self.compute_dtype)
        check.done()

    @property
    def form(self) -> Format:
        """The format."""
        return Format(self.bits, self.group_size, self.double_quant)


@dataclass(frozen=True)
class QuantizedLayer:
    """What quantising a weight has saved, and what it costs.

    Attributes:
        path: of the layer.
        bits: of the format.
        bytes_before, bytes_after: of the weight.
        largest_error: largest absolute difference to the weight as it was.
        relative_error: root of the mean square difference, over that of the weight.
    """

    path: str
    bits: str
    bytes_before: int
    bytes_after: int
    largest_error: float
    relative_error: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bits}, {self.bytes_before:,} to {self.bytes_after:,} bytes, error up to "
            f"{self.largest_error:.3g}, {100 * self.relative_error:.2g} % of the weight"
        )


def quantize(network: nn.Cell, config: Optional[QuantizationConfig] = None) -> list[QuantizedLayer]:
    """Turn linear layers of a network into `QuantizedDense` layers, one weight after the other.

    A layer stays the object that it is, with its bias, its activation, and the strategies of its operators. Its float
    weight is gone, and its codes do not train.

    Args:
        network: with its values, and without adapters; it is changed.
        config: which layers, and how. Default: None, for a QuantizationConfig.

    Returns:
        For each layer what it costs.

    Raises:
        TypeError: an argument has the wrong type.
        NoMatchError, ConfigError: an entry of the configuration matches nothing; a layer cannot be quantised: its
            inputs are no whole groups, a number is not finite, another Cell has its weight, or it is no linear layer;
            all is in the message, and the network is unchanged.
    """
    config = QuantizationConfig() if config is None else config
    check = Checker("quantize")
    check.require(isinstance(network, nn.Cell), TypeError, "network", network, "a Cell")
    check.require(isinstance(config, QuantizationConfig), TypeError, "config", config, "a QuantizationConfig")
    check.done()
    layers = find_targets(network, config, _is_float_linear)
    _check(network, layers, config.form)
    report = [_quantize(layer, config) for layer in layers]
    forget_graphs()
    renew_recompute(network)
    return report


def _is_float_linear(cell):
    kind = layer_kind(cell)
    return kind is not None and kind.name == "linear" and not getattr(cell, "is_quantized", False)


def _check(network, layers, form):
    """Refuse layers that cannot be quantised."""
    problems, places = [], {}
    for path, cell in network.cells_and_names():
        if "mindpet_base_construct" in vars(cell):
            problems.append(f"{path} carries a delta of an adapter; quantise before get_peft_model")
        for name, param in cell._params.items():
            places.setdefault(id(param), []).append(f"{path}.{name}")
    for layer in layers:
        kind = layer_kind(layer.cell)
        weight = kind.weight_of(layer.cell)
        problem = form.problem(_shape(weight, kind))
        others = places[id(weight)][1:]
        if others:
            problems.append(f"{layer.path} has its weight in common with {others}")
        elif problem:
            problems.append(f"{layer.path} {problem}")
        elif layer.cell.mixed_precision_type is not None:
            problems.append(f"{layer.path} computes in another type by to_float; quantise before that")
        elif not kind.adds_bias:
            problems.append(f"{layer.path} returns its bias beside its output")
        elif not weight.has_init and not _is_finite(value_of(weight)):
            problems.append(f"{layer.path} has NaN or infinite numbers")
        elif any(is_layout(get_strategy(one) or ()) for one in layer.cell._primitives.values()):
            problems.append(f"{layer.path} has strategies that are a Layout: give tuples of ints")
    if problems:
        raise ConfigError("quantize: " + "; ".join(problems) + ".")


def _shape(weight, kind):
    """`(out, in)`."""
    return weight.shape[::-1] if kind.transposed else weight.shape


def _is_finite(value):
    return bool(np.isfinite(value.astype(np.float32)).all())


def _quantize(layer: Layer, config: QuantizationConfig) -> QuantizedLayer:
    """Quantise one layer."""
    cell, kind = layer.cell, layer_kind(layer.cell)
    weight, bias, form = kind.weight_of(cell), kind.bias_of(cell), config.form
    outs, ins = shape = _shape(weight, kind)
    made = QuantizedDense(
        ins,
        outs,
        form.bits,
        form.group_size,
        form.double_quant,
        has_bias=bias is not None,
        activation=cell.activation if getattr(cell, "activation_flag", False) else None,
        dtype=weight.dtype,
        compute_dtype=config.compute_dtype or kind.compute_dtype,
    )
    errors = (0.0, 0.0)
    if not weight.has_init:  # in a dry run weights have no values
        matrix = kind.to_matrix(value_of(weight))
        arrays, *errors = quantize_rows(lambda begin, end: matrix[begin:end], shape, form, errors=True)
        for name, value in arrays.items():
            getattr(made, name).set_data(Tensor(value))
    start = weight.name[: -len(kind.weight)] if weight.name.endswith(kind.weight) else ""
    for name in form.shapes(shape):
        getattr(made, name).name = f"{start}{name}"
    if bias is not None:
        bias.name = f"{start}bias"
        made._params["bias"] = bias
    _shard_like(made, cell)
    _become(cell, made)
    size = weight.size * weight.itemsize
    return QuantizedLayer(layer.path, form.bits, size, form.nbytes(shape), *errors)


def _shard_like(made, cell):
    """Set the strategies of a layer's operators, as `mindspore.nn.Dense` names them."""
    matmul, bias_add = (getattr(getattr(cell, name, None), "in_strategy", None) for name in ("matmul", "bias_add"))
    if matmul is not None:
        rows, weight = matmul
        matmul = (rows[::-1] if cell.matmul.transpose_a else rows, weight if cell.matmul.transpose_b else weight[::-1])
    made.shard(matmul, bias_add)


def _become(cell, other):
    """Have a Cell be what another one is, wherever it stands: the object stays."""
    other.set_train(cell.training)
    cell.__class__ = type(other)
    vars(cell).clear()
    vars(cell).update(vars(other))

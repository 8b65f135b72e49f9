"""Whether a layer with a merged weight computes what it computes with its deltas: tried on a small input."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet.network.kinds import LayerKind
from mindpet.utils.hints import Arrays
from mindpet.utils.sharding import PARALLEL_MODES

INPUTS = 4
# Relative error of an operation. Accelerators compute products of float32 with a shorter mantissa (HF32, TF32).
ERRORS = {ms.float16: 2.0**-11, ms.bfloat16: 2.0**-8, ms.float32: 2.0**-23}
ACCELERATOR = 2.0**-11
SAFETY = 4  # a random sum is smaller than the sum of magnitudes that it stands for
UNUSABLE = (TypeError, ValueError, RuntimeError, AttributeError)  # what a layer raises for an input that it cannot take


class Probe(NamedTuple):
    """What a probe has found; both are None if the outputs are equal.

    Attributes:
        problem: how the outputs differ, to go behind the layer's name, or None.
        skipped: why no probe could be made, or None.
    """

    problem: Optional[str] = None
    skipped: Optional[str] = None


def probe_merge(cell: nn.Cell, kind: LayerKind, deltas: Sequence[Any], merged: Arrays) -> Probe:
    """Compare a layer with its deltas with the layer that has the merged weight, on a small input.

    That finds layers whose output is not linear in the weight, or whose weight is not what the kind says: the other way
    round, standardised, scaled or quantised. The input has few numbers that are not zero, so that rounding hides
    nothing. All is computed eagerly, in either mode, and without the layer's activation; the layer, its parameters and
    the compiled graphs stay what they are. Deltas that the layer carries are passed over.

    Args:
        cell: the layer.
        kind: of the layer.
        deltas (list of FoldedDelta): what is merged.
        merged: by attribute what merging would set: the weight, and perhaps the bias.
    """
    if ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES:
        return Probe(skipped="a layer cannot be run by itself in this parallel mode")
    if kind.weight_of(cell).sliced:  # AutoParallel sets the mode only while it trains
        return Probe(skipped="its weight is the slice of one rank")
    if kind.weight_of(cell).has_init:
        return Probe(skipped="its weight has no values yet")
    steps = [kind.to_matrix(_float32(kind.weight_of(cell)))]  # the weight after each delta
    for delta in deltas:
        steps.append(delta.cls.fold(steps[-1], delta.values, **delta.arguments))
    inputs, columns = _inputs(cell, kind, np.abs(steps[-1] - steps[0]).sum(0))
    cells = [_delta_cell(cell, kind, delta, before) for delta, before in zip(deltas, steps)]
    refused = None
    for x in inputs:
        try:
            with _eagerly(cell):
                entering = x
                for delta in cells[::-1]:
                    entering = delta.before(entering)
                expected, beside = _run(cell, kind, entering)
                for delta in cells:
                    expected = delta(x, expected)
                expected, dtype = _float32(expected + beside), expected.dtype
                with _attributes(cell, {name: Parameter(Tensor(value)) for name, value in merged.items()}):
                    got = _float32(sum(_run(cell, kind, x)))
        except UNUSABLE as error:
            refused = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        difference = float(np.abs(got - expected).max())
        allowed = 4 * _error(kind, dtype, merged) * _size(cell, kind, deltas, steps, columns)
        if difference <= allowed:  # False for NaN, too
            return Probe()
        return Probe(
            f"computes something else with the merged weight than beside its delta: a probe's output is off by "
            f"{difference:.3g}, where rounding explains {allowed:.3g}"
        )
    return Probe(skipped=f"it does not take the probe's input ({refused})")


def _inputs(cell, kind, changes):
    """Inputs to try, of which the layer takes one, and the columns of the matrix that they multiply.

    Args:
        cell (Cell): the layer.
        kind (LayerKind): of the layer.
        changes (numpy.ndarray): how much merging changes each column.
    """
    weight = kind.weight_of(cell)
    if not kind.is_convolution:
        columns = np.argsort(changes)[-INPUTS:]
        if kind.name == "embedding":
            return [Tensor(columns[None].astype(np.int32))], columns
        rows = np.zeros((len(columns), len(changes)), np.float32)
        rows[np.arange(len(columns)), columns] = 1
        return [Tensor(rows).astype(weight.dtype), Tensor(rows[None]).astype(weight.dtype)], columns
    in_channels, kernel = weight.shape[1], weight.shape[2:]
    channel = int(changes.reshape(in_channels, -1).sum(1).argmax())
    kernel = kernel[-1:] if kind.name == "conv1d" else kernel
    sizes = [
        2 * size * dilation + stride
        for size, dilation, stride in zip(kernel, _of_axes(cell, "dilation", kernel), _of_axes(cell, "stride", kernel))
    ]
    image = np.zeros((1, in_channels * kind.groups_of(cell), *sizes), np.float32)
    values = np.random.default_rng(0).choice([-1, 1], size=image[:, channel::in_channels].shape)
    image[:, channel::in_channels] = values
    taps = int(np.prod(kernel))
    return [Tensor(image).astype(weight.dtype)], np.arange(channel * taps, (channel + 1) * taps)


def _of_axes(cell, attribute, kernel):
    """A convolution's attribute for each axis of the kernel."""
    value = getattr(cell, attribute, 1)
    return value[-len(kernel) :] if isinstance(value, tuple) else (value,) * len(kernel)


def _delta_cell(cell, kind, delta, matrix):
    """The Cell of a delta that stands beside the layer with the weight `matrix`, which has those before it merged."""
    made = delta.cls.create(cell, kind, **delta.arguments)
    for name, param in list(made.parameters_and_names()):
        if name in delta.values:
            param.set_data(Tensor(delta.values[name]), slice_shape=True)
    if "base_weight" in made._params:
        weight = kind.from_matrix(matrix, kind.weight_of(cell).shape)
        made.base_weight = Parameter(Tensor(np.ascontiguousarray(weight)), name="base_weight")
    return made


def _run(cell, kind, x):
    """The layer's output, and what the caller adds to it."""
    result = vars(cell).get("mindpet_base_construct", cell.construct)(x)
    if not isinstance(result, tuple):
        return result, 0
    return result[0], result[1] if not kind.adds_bias and isinstance(result[1], Tensor) else 0


@contextlib.contextmanager
def _eagerly(cell):
    """A context in which the layer can be called as Python code, without its activation and dropout."""
    mode = ms.get_context("mode")
    with contextlib.ExitStack() as stack:
        stack.callback(ms.set_context, mode=mode)
        ms.set_context(mode=ms.PYNATIVE_MODE)
        for _, inner in cell.cells_and_names():
            stack.enter_context(_attributes(inner, {"training": False}))
        if hasattr(cell, "activation_flag"):
            stack.enter_context(_attributes(cell, {"activation_flag": False}))
        yield


@contextlib.contextmanager
def _attributes(cell, values):
    """A context in which attributes of the object have other values; those of a Parameter hide it.

    Python looks there before it asks `Cell.__getattr__` (MindSpore 2.7 to 2.10).
    """
    held = vars(cell)
    before = {name: held[name] for name in values if name in held}
    held.update(values)
    try:
        yield
    finally:
        for name in values:
            del held[name]
        held.update(before)


def _error(kind, dtype, merged):
    """The relative error of the layer's coarsest type."""
    stored = Tensor(merged[kind.weight].ravel()[:1]).dtype
    return max(
        ERRORS[ms.float32] if ms.get_context("device_target") == "CPU" else ACCELERATOR,
        *(ERRORS.get(each, 0.0) for each in (dtype, kind.compute_dtype, stored)),
    )


def _size(cell, kind, deltas, steps, columns):
    """How large the numbers are that a number of the output is summed from.

    What they are in a delta is found by varying its values by a small part at random: what cancels out in the sum does
    not in this.
    """
    part, rng = 2.0**-8, np.random.default_rng(0)
    size = sum(np.abs(step[:, columns]).max() for step in (steps[0], steps[-1]))
    for delta, before, after in zip(deltas, steps, steps[1:]):
        shifts = {}
        for name, value in delta.values.items():
            shifts[name] = value * (1 + part * rng.choice(np.float32([-1, 1]), size=value.shape))
        size += SAFETY * np.abs(delta.cls.fold(before, shifts, **delta.arguments) - after)[:, columns].max() / part
    bias = kind.bias_of(cell)
    shift = np.zeros(len(steps[0]), np.float32) if bias is None else np.abs(_float32(bias))
    largest = [shift.max()]
    for delta in deltas:
        largest.append(np.abs(delta.cls.fold_bias(shift, delta.values, **delta.arguments)).max())
    return (len(columns) if kind.is_convolution else 1) * float(size) + float(sum(largest))


def _float32(value):
    return value.astype(np.float32) if isinstance(value, np.ndarray) else value.astype(ms.float32).asnumpy()

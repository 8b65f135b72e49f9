"""Cells that compute again in the backward pass what they do not keep."""

import inspect
import warnings

import mindspore as ms
from mindspore import nn
from mindspore.common._register_for_recompute import recompute_registry


def renew_recompute(network: nn.Cell) -> None:
    """Have Cells that recompute do so with the `construct` and the trainable parameters that they have now.

    In PyNative mode `Cell.recompute()` keeps both as they are when it is called (MindSpore 2.7 to 2.10, attribute
    `_recompute_cell`): what is put in or trains later would get no gradient. It warns of dropout in them.
    """
    for _, cell in list(network.cells_and_names()):
        old = cell._recompute_cell
        if isinstance(old, nn.Cell):
            cell._recompute_cell = recompute_registry.get()(cell.construct)
        elif old is not None:  # use_reentrant=False, MindSpore 2.10: a function that has its options in its closure
            options = {**inspect.getclosurevars(old).nonlocals, "block": cell.construct, "use_reentrant": False}
            cell._recompute_cell = recompute_registry.get()(**options)
    warn_of_dropout(network)


def warn_of_dropout(network: nn.Cell) -> None:
    """Warn of dropout in Cells that recompute: its gradients are wrong.

    On a CPU MindSpore (2.7 to 2.10) takes the mask from the clock, so the backward pass has another one than the
    forward pass: nearly always in PyNative mode, now and then in graph mode.
    """
    if ms.get_context("device_target") != "CPU":
        return
    outer = [(path, cell) for path, cell in network.cells_and_names() if cell._recompute_cell is not None]
    wrong = [
        ".".join(filter(None, (path, name)))
        for path, cell in outer
        for name, inner in cell.cells_and_names()
        if isinstance(inner, nn.Dropout) and not (inner.p == 0 or inner.keep_prob == 1)
    ]
    if wrong:
        warnings.warn(
            f"recompute() draws other numbers for dropout than the forward pass did, so gradients are wrong: {wrong}; "
            "set dropout to 0, or do not recompute these.",
            stacklevel=3,
        )

"""Several adapters in one batch."""

import contextlib

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindpet.errors import ConfigError
from mindpet.peft.overlay import Overlay, by_rows


class Rows:
    """Several adapters in one batch: every layer computes the delta of each, and every row takes its own.

    Args:
        network (Cell): the network; no frame is in place.
        frames (list of Frame): one for each adapter, each with Cells of its own.
    """

    def __init__(self, network, frames):
        self.frames = frames
        self.rows = ms.Parameter(Tensor(np.zeros(1, np.int32)), name="mindpet_rows", requires_grad=False)
        paths = dict.fromkeys(path for frame in frames for path in frame.deltas)
        layers = {layer.path: layer for frame in frames for layer in frame.plan.targets}
        self.places = []
        for path in paths:
            deltas = ms.nn.CellList([frame.deltas.get(path, Unchanged()) for frame in frames], auto_prefix=False)
            before = {frame.plan.method.before_activation for frame in frames if path in frame.deltas}
            if len(before) > 1 and getattr(layers[path].cell, "activation_flag", False):
                raise ConfigError(f"adapter_names: {path} has deltas before and behind its activation.")
            cells, params = {"mindpet_deltas": deltas}, {"mindpet_rows": self.rows}
            self.places.append(Overlay(layers[path].cell, by_rows, True in before, cells, params))
        self.root = Root(network)

    def __call__(self, rows, inputs, keywords):
        """The network's output with adapter `rows[i]` for row i of the batch; -1 is the base."""
        self.rows.set_data(Tensor(np.array(rows, np.int32)), slice_shape=True)
        with contextlib.ExitStack() as stack:
            for place in self.places:
                place.put()
                stack.callback(place.remove)
            return self.root(*inputs, **keywords)


class Root(ms.nn.Cell):
    """A Cell around a network, with compiled graphs of its own."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, *inputs, **keywords):
        return self.network(*inputs, **keywords)


class Unchanged(ms.nn.Cell):
    """The delta of a layer that an adapter leaves alone."""

    def construct(self, x, out):
        return out

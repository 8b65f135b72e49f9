"""What the callbacks of this package share."""

from typing import Any

from mindspore import nn
from mindspore.parallel.auto_parallel import AutoParallel
from mindspore.train import Callback, RunContext


class TrainCallback(Callback):
    """A callback for training only: `Model.fit` and `Model.eval` do not reach its methods while they evaluate.

    MindSpore passes the events of an evaluation on to `begin`, `step_end`, `end` and the like, where a step number is
    that of the evaluation.
    """

    def on_eval_begin(self, run_context: RunContext) -> None:
        """Nothing."""

    def on_eval_epoch_begin(self, run_context: RunContext) -> None:
        """Nothing."""

    def on_eval_step_begin(self, run_context: RunContext) -> None:
        """Nothing."""

    def on_eval_step_end(self, run_context: RunContext) -> None:
        """Nothing."""

    def on_eval_epoch_end(self, run_context: RunContext) -> None:
        """Nothing."""

    def on_eval_end(self, run_context: RunContext) -> None:
        """Nothing."""


def model_of(callback_params: dict[str, Any]) -> nn.Cell:
    """The user's model in the parameters of a callback: without training cells and AutoParallel around it."""
    network = callback_params.get("network") or callback_params["train_network"]
    while isinstance(network, (nn.TrainOneStepCell, AutoParallel)) and isinstance(network.network, nn.Cell):
        network = network.network
    return network

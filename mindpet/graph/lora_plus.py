"""LoRA+: A and B of LoRA train with two learning rates."""

from typing import Any, Union

import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.learning_rate_schedule import LearningRateSchedule

from mindpet.delta.lora import MAGNITUDE, A, B, LoraDelta, LoraEmbedding
from mindpet.errors import NoMatchError
from mindpet.network.parameters import trainable_parameters
from mindpet.utils.validate import Checker, is_number

Rate = Union[float, int, list[float], Tensor, LearningRateSchedule]


def lora_plus_groups(
    network: nn.Cell,
    learning_rate: Rate,
    ratio: Union[int, float],
    embedding_learning_rate: Rate = 1e-6,
    weight_decay: Union[float, int, nn.Cell] = 0.0,
) -> list[dict[str, Any]]:
    """Group what trains in a network for LoRA+, as any optimizer of MindSpore takes it.

    .. math::
        \\eta_B = ratio \\cdot \\eta_A

    A has `learning_rate`, and so has what else is a matrix, a head say. B has `ratio` times that, and so have the
    vectors: biases, norms and DoRA's magnitude. A and B of embeddings have a rate of their own. Biases and norms have
    no weight decay. These are the groups of Hugging Face PEFT's `create_loraplus_optimizer`.

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354, section 4.

    Args:
        network: a network with LoRA, by hand or by `get_peft_model`, frozen but for what trains.
        learning_rate: of A, as the optimizer takes it.
        ratio: of the learning rates of B and A; the paper's is 16 for its large models.
        embedding_learning_rate: of A and B of embeddings. Default: 1e-6.
        weight_decay: of all but biases and norms. Default: 0.0.

    Returns:
        The groups that have a parameter, each with `params`, `lr` and `weight_decay`.

    Raises:
        TypeError, ValueError: an argument is wrong; all wrong ones are in the message.
        NoMatchError: no A or B of LoRA trains.
    """
    check = Checker("lora_plus_groups")
    check.require(isinstance(network, nn.Cell), TypeError, "network", network, "a Cell")
    for name, rate in (("learning_rate", learning_rate), ("embedding_learning_rate", embedding_learning_rate)):
        _check_rate(check, name, rate)
    check.nonzero_number(ratio=ratio)
    check.require(not is_number(ratio) or ratio >= 0, ValueError, "ratio", ratio, "positive")
    known = is_number(weight_decay) or isinstance(weight_decay, nn.Cell)
    if check.require(known, TypeError, "weight_decay", weight_decay, "a number or a Cell") and is_number(weight_decay):
        check.require(weight_decay >= 0, ValueError, "weight_decay", weight_decay, "at least 0")
    check.done()

    kinds = _kinds(network)
    groups = {"slow": [], "embedding": [], "fast": [], "vector": []}
    for name, param in trainable_parameters(network).items():
        usual = "vector" if param.ndim < 2 and not name.endswith(MAGNITUDE) else "fast" if param.ndim < 2 else "slow"
        groups[kinds.get(id(param), usual)].append(param)
    params = [param for group in groups.values() for param in group]
    if not any(id(param) in kinds for param in params):
        raise NoMatchError(
            f"lora_plus_groups: no A or B of LoRA trains in {type(network).__name__}; what trains is "
            f"{[param.name for param in params][:3]}."
        )
    fast = _times(learning_rate, ratio)
    settings = {
        "slow": (learning_rate, weight_decay),
        "embedding": (embedding_learning_rate, weight_decay),
        "fast": (fast, weight_decay),
        "vector": (fast, 0.0),
    }
    return [
        {"params": group, "lr": settings[name][0], "weight_decay": settings[name][1]}
        for name, group in groups.items()
        if group
    ]


class TimesRate(LearningRateSchedule):
    """A multiple of another schedule.

    Args:
        schedule: the other one.
        factor: what it is multiplied by.

    Inputs:
        global_step: Tensor, the number of the step.

    Outputs:
        Tensor, the learning rate.
    """

    def __init__(self, schedule: LearningRateSchedule, factor: Union[int, float]):
        super().__init__()
        self.schedule, self.factor = schedule, float(factor)

    def construct(self, global_step):
        return self.schedule(global_step) * self.factor


def _kinds(network):
    """id of a Parameter -> its group, of every A and B in a network."""
    kinds = {}
    for _, cell in network.cells_and_names():
        for name, group in ((A, "slow"), (B, "fast")) if isinstance(cell, LoraDelta) else ():
            kinds[id(cell._params[name])] = "embedding" if isinstance(cell, LoraEmbedding) else group
    return kinds


def _times(rate, factor):
    """A learning rate, of any type that an optimizer takes, times a factor."""
    if isinstance(rate, LearningRateSchedule):
        return TimesRate(rate, factor)
    if isinstance(rate, Tensor):
        return Tensor(rate.asnumpy() * np.float32(factor))
    return [one * factor for one in rate] if isinstance(rate, (list, tuple)) else rate * factor


def _check_rate(check, name, rate):
    listed = [rate] if is_number(rate) else rate if isinstance(rate, (list, tuple)) else []
    known = isinstance(rate, (Tensor, LearningRateSchedule)) or (bool(listed) and all(map(is_number, listed)))
    if check.require(known, TypeError, name, rate, "a number, numbers, a Tensor or a LearningRateSchedule"):
        check.require(all(one >= 0 for one in listed), ValueError, name, rate, "at least 0")

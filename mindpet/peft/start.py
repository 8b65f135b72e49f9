"""What of an adapter starts from the values of the base, and follows when other ones are loaded into it."""

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
from mindspore import Parameter

from mindpet.errors import ConfigError
from mindpet.network.values import value_of
from mindpet.peft.plan import Plan
from mindpet.peft.slot import AdapterSlot
from mindpet.utils.hints import Arrays


@dataclass(frozen=True)
class Start:
    """Values of an adapter that come from one Parameter of the base.

    Attributes:
        base: the Parameter, or a QuantizedWeight.
        paths: of the values.
        inputs: paths of further values of the adapter that they are computed with.
        compute: from the values of `paths` and `inputs` to those of `paths`, by path.
        is_lasting: whether some are not in the adapter's file, and computed from the base again. Default: False.
    """

    base: Any
    paths: tuple[str, ...]
    inputs: tuple[str, ...]
    compute: Callable[[Arrays], Arrays]
    is_lasting: bool = False

    def comes_from(self, param: Parameter) -> bool:
        """Whether a Parameter is the base, or a part of a base that is quantised."""
        return any(part is param for part in getattr(self.base, "parts", (self.base,)))


def starts(plan: Plan, slot: AdapterSlot) -> list[Start]:
    """The Starts of an adapter.

    Args:
        plan: of the adapter.
        slot: of the adapter; it may have been made for another one.
    """
    copies = [_of_copy(path, plan.trained[base]) for path, base in slot.copies.items()]
    targets = [target for target in plan.targets if target.delta.start_names(**target.arguments)]
    return copies + [_of_target(target, slot) for target in targets]


def _of_copy(path, base):
    return Start(base, (path,), (), lambda values: {path: value_of(base)})


def _of_target(target, slot):
    names, delta = slot.names[target.path], target.delta
    started = delta.start_names(**target.arguments)
    weight = target.kind.weight_of(target.cell)

    def compute(values):
        matrix = target.kind.to_matrix(value_of(weight).astype(np.float32))
        try:
            fresh = delta.start(matrix, slot.values_of(target.path, values), **target.arguments)
        except ConfigError as error:
            raise ConfigError(f"{target.path}: {error}") from error
        return {names[name]: np.ascontiguousarray(value, np.float32) for name, value in fresh.items()}

    # Without names of its own all values of a delta are in the file, perhaps those of all places as one tensor.
    is_lasting = bool(delta.file_names) and any(name not in delta.file_names for name in started)
    return Start(weight, tuple(names[name] for name in started), tuple(names.values()), compute, is_lasting)

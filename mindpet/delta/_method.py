"""What generic code needs to know about a method."""

from dataclasses import dataclass, field

from mindpet.delta._base import Delta
from mindpet.delta._config import PeftConfig


@dataclass(frozen=True)
class Method:
    """A method; each file of one ends with its own, `METHOD`.

    Attributes:
        name: of the method, a mode of `freeze_delta`.
        config: its PeftConfig.
        trainable: patterns (fnmatch) of the parameters that it trains.
        deltas: kind of a place, see `mindpet.network.kinds` -> Delta for it; empty for a method that only chooses base
            parameters.
        cells: its hand-made Cells.
        constants: patterns of its parameters that are fixed by construction and need not be in a checkpoint.
        saved: patterns of its parameters that do not train, but belong in a checkpoint of what was trained.
        aliases: further names of the mode.
        identity: whether a fresh delta leaves the network's output as it was.
    """

    name: str
    config: type[PeftConfig]
    trainable: tuple[str, ...]
    deltas: dict[str, type[Delta]] = field(default_factory=dict)
    cells: tuple[type, ...] = ()
    constants: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    identity: bool = False

    @property
    def mergeable(self) -> bool:
        """Whether its deltas, if it has any, can be folded into the weights of their layers."""
        return not self.deltas or any(delta.fold for delta in self.deltas.values())

"""The exceptions of mindpet. Each is a `MindPetError`; where a built-in type fits, it is that too."""

from typing import Any, Optional

from mindpet.utils.quote import printable


class MindPetError(Exception):
    """Base of every exception that only mindpet raises.

    Its message can be shown on a terminal, whatever the names and values of a file are that it quotes.
    """

    def __init__(self, message: str = "", *rest: Any):
        super().__init__(printable(message), *rest)


class UnexpectedError(MindPetError):
    """A state that should not be reachable."""


class AbsolutePathError(MindPetError, ValueError):
    """A path that must be absolute is not."""


class LinkPathError(MindPetError, ValueError):
    """A path that must be real is a symbolic link."""


class ReadYamlFileError(MindPetError, ValueError):
    """A YAML file cannot be read; the cause is chained."""


class ModelConfigFreezeInfoError(MindPetError, ValueError):
    """A YAML file was read, but does not hold `freeze: {include, exclude}`."""


class NoMatchError(MindPetError, ValueError):
    """A freeze mode or a name pattern finds no parameter in the network."""


class CheckpointError(MindPetError, ValueError):
    """A checkpoint cannot be read, or does not fit the network."""


class ConfigError(MindPetError, ValueError):
    """The configuration of an adapter cannot be read, or asks for what is not supported."""


class AdapterError(MindPetError, ValueError):
    """An adapter's name is unknown or taken, or an operation does not fit the state that the adapters are in."""


class MergeError(MindPetError, ValueError):
    """An adapter cannot be merged; the network is unchanged."""


class NotLearningError(MindPetError, RuntimeError):
    """A parameter that should train has not moved, one that should be frozen has, or ranks have different copies."""


class NotPositiveIntError(MindPetError, TypeError, ValueError):
    """An integer is not positive where the API reference calls that a `TypeError` (the prefix Cells)."""


class DryRunError(MindPetError, RuntimeError):
    """A network cannot be compiled for a shard plan: no compiler, the wrong platform, a child that died, and so on."""


class BuildError(DryRunError):
    """The function that builds the network for a dry run raised an error, or returned something else."""


class ShardError(DryRunError, ValueError):
    """MindSpore's parallel front end refuses a strategy.

    Attributes:
        cell: path of the Cell; empty if it is not known.
        slot: argument of the Cell's `shard()`, or the attribute that holds the operator.
        operator: type of the operator.
        strategy: what was set, or None.
        reason: what the front end says.
    """

    def __init__(
        self,
        message: str,
        cell: str = "",
        slot: str = "",
        operator: str = "",
        strategy: Optional[tuple] = None,
        reason: str = "",
    ):
        super().__init__(message)
        self.cell, self.slot, self.operator, self.strategy, self.reason = cell, slot, operator, strategy, reason

"""The exceptions of mindpet. Each is a `MindPetError`; where a built-in type fits, it is that too."""


class MindPetError(Exception):
    """Base of every exception that only mindpet raises."""


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


class NotLearningError(MindPetError, RuntimeError):
    """A parameter that should train has not moved, or one that should be frozen has."""


class NotPositiveIntError(MindPetError, TypeError, ValueError):
    """An integer is not positive where the API reference calls that a `TypeError` (the prefix Cells)."""

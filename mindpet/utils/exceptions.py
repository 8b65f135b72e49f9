"""The historical import path of the exceptions; they live in `mindpet.errors`."""

from mindpet.errors import (
    AbsolutePathError,
    LinkPathError,
    MindPetError,
    ModelConfigFreezeInfoError,
    ReadYamlFileError,
    UnexpectedError,
)

__all__ = [
    "AbsolutePathError",
    "LinkPathError",
    "MindPetError",
    "ModelConfigFreezeInfoError",
    "ReadYamlFileError",
    "UnexpectedError",
]

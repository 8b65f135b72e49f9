"""Finding a method by its mode."""

import pytest

from mindpet.delta.registry import METHODS, find_method


@pytest.mark.parametrize(
    "mode, name",
    [
        ("lora", "lora"),
        ("LoRA", "lora"),
        ("prefix", "prefixtuning"),
        ("PrefixTuning", "prefixtuning"),
        ("PTuning2", "ptuning2"),
    ],
)
def test_find_method(mode, name):
    assert find_method(mode) is METHODS[name]


@pytest.mark.parametrize("mode", ["", "lo ra", "rdrop"])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=f"'mode' must be one of .*, but got '{mode}'"):
        find_method(mode)

"""The script that measures frozen weights in fewer bits."""

import re

import mindspore as ms
import pytest
import quantized_step


def test_sizes(capsys):
    quantized_step.main(["--width", "64", "--rows", "8", "--rounds", "1"])
    rows = dict(re.findall(r"^\| ([\w, ]+) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE))
    assert list(rows) == list(quantized_step.VARIANTS)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    width = 64
    weights, others = 2 * 4 * width * width, 5 * width * 4
    trained = 4 * (2 * 8 * 5 * width)  # rank 8, A and B of both layers
    for name, bits in {"float32": 32, "int8": 8, "nf4, scales in float32": 4.5}.items():
        _, size, _ = quantized_step.make(width, **quantized_step.VARIANTS[name])
        scales = 5 * width * 4 if name == "int8" else 0
        expected = weights * bits / 8 + scales + others + 4 * trained
        assert size == pytest.approx(expected, abs=40)  # the optimizer's counters, and LoRA's scales

"""What the benchmarks count."""

import re

import mindspore as ms
import pytest

from benchmarks import frozen_bits, measure


def test_frozen_weights_in_fewer_bits(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "OUTPUT", tmp_path)
    frozen_bits.run(short=True)
    rows = dict(re.findall(r"^\| ([\w, ]+) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE))
    assert list(rows) == list(frozen_bits.VARIANTS)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    width = 64
    weights, others = 2 * 4 * width * width, 5 * width * 4
    trained = 4 * (2 * 8 * 5 * width)  # rank 8, A and B of both layers
    for name, bits in {"float32": 32, "int8": 8, "nf4, scales in float32": 4.5}.items():
        _, size, _ = frozen_bits.make(width, **frozen_bits.VARIANTS[name])
        scales = 5 * width * 4 if name == "int8" else 0
        expected = weights * bits / 8 + scales + others + 4 * trained
        assert size == pytest.approx(expected, abs=40)  # the optimizer's counters, and LoRA's scales

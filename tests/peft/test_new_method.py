"""A method comes in by a registry line and a configuration; this one multiplies, as IA3 does."""

import enum
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn
from small import Small, ids, move, numbers, same

from mindpet.delta.registry import METHODS, Method
from mindpet.graph import freeze_delta
from mindpet.peft import PeftModel, get_peft_model
from mindpet.peft.config import CONFIGS, TargetConfig
from mindpet.utils.values import assign


class Scale(nn.Cell):
    """`out * (1 + scale)`."""

    def __init__(self, cell, kind, start):
        super().__init__(auto_prefix=False)
        features = kind.weight_of(cell).shape[0]
        self.mindpet_delta_scale = Parameter(Tensor(np.full(features, start, np.float32)), name="mindpet_delta_scale")

    def construct(self, x, out):
        return out * (1 + self.mindpet_delta_scale)

    def reset(self):
        assign(self.mindpet_delta_scale, Tensor(np.zeros(self.mindpet_delta_scale.shape, np.float32)))


METHOD = Method("scale", (), ("*mindpet_delta_scale",), identity=True, peft_type="SCALE", kinds=("linear",), make=Scale)


class Extra(str, enum.Enum):
    SCALE = "SCALE"


def test_a_method_from_outside(mode, rng, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "scale", METHOD)
    monkeypatch.setattr("mindpet.peft.config.CONFIGS", dict(CONFIGS))

    @dataclass
    class ScaleConfig(TargetConfig, peft_type=Extra.SCALE):
        start: float = 0.0

        def sizes(self, path):
            return {"start": self.start}

    network, x = Small(), ids(rng)
    base = numbers(network, x)
    model = get_peft_model(network, ScaleConfig(target_modules=["query", "mlp.0"]))
    same(numbers(model, x), base)
    freeze_delta(model, "scale")
    assert [param.name for param in model.trainable_params()] == [
        "query.mindpet_delta_scale",
        "mlp.0.mindpet_delta_scale",
    ]
    move(model, 0)
    expected = numbers(model, x)
    with model.disable_adapter():
        same(numbers(model, x), base)
    model.save_pretrained(tmp_path)
    network = model.unload()
    same(numbers(network, x), base)
    same(numbers(PeftModel.from_pretrained(network, tmp_path), x), expected)

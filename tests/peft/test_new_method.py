"""A method comes in by a registry line and a configuration; this one multiplies, as IA3 does."""

from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor
from small import Small, ids, move, numbers, same

from mindpet.delta._base import Delta
from mindpet.delta._config import CONFIGS, TargetConfig
from mindpet.delta.registry import METHODS, Method
from mindpet.graph import freeze_delta
from mindpet.peft import PeftModel, get_peft_model


class Scale(Delta):
    """`out * (1 + scale)`."""

    def setup(self, cell, start):
        features = self.kind.weight_of(cell).shape[0]
        self.mindpet_delta_scale = Parameter(Tensor(np.full(features, start, np.float32)), name="mindpet_delta_scale")

    def after(self, x, out):
        return out * (1 + self.mindpet_delta_scale)


def test_a_method_from_outside(mode, rng, tmp_path, monkeypatch):
    monkeypatch.setattr("mindpet.delta._config.CONFIGS", dict(CONFIGS))

    @dataclass
    class ScaleConfig(TargetConfig):
        peft_type, method_name = "SCALE", "scale"

        start: float = 0.0

        def delta_arguments(self, path):
            return {"start": self.start}

    method = Method("scale", ScaleConfig, ("*mindpet_delta_scale",), {"linear": Scale}, identity=True)
    monkeypatch.setitem(METHODS, "scale", method)
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

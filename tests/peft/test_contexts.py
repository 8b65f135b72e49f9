"""Deltas of what the heads of an attention put out."""

import pathlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from models.bert import BertClassifier
from models.gpt2 import Gpt2ForCausalLM
from models.llama import LlamaForCausalLM
from small import Small, contents, move, numbers, same

from mindpet.delta import MultiHeadAdapterLayer
from mindpet.errors import ConfigError, MergeError
from mindpet.peft import (
    AdaptionPromptConfig,
    BottleneckConfig,
    PeftModel,
    drop_adapter_layers,
    get_peft_model,
    plan_targets,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NETWORKS = {
    "bert": (BertClassifier, "self"),
    "gpt2": (Gpt2ForCausalLM, "attn"),
    "llama": (LlamaForCausalLM, "self_attn"),
}
SIZES = {"hidden_size": 6, "heads": 3, "head_dim": 4, "bottleneck_size": 2}


class Logits(nn.Cell):
    """A model of ids alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, ids):
        return self.model(ids, ops.ones_like(ids))


def config(target, **fields):
    return BottleneckConfig(
        target_modules=[target], form="multi_head", bottleneck_size=2, non_linearity="tanh", **fields
    )


def randomise(cell, rng):
    for param in cell.get_parameters():
        param.set_data(Tensor(rng.normal(0, 0.5, param.shape).astype(np.float32), param.dtype))
    down = cell.mindpet_delta_adapter_down
    params = (down.weight, down.bias, cell.mindpet_delta_adapter_up, cell.mindpet_delta_adapter_up_bias)
    return [param.asnumpy() for param in params]


@pytest.mark.parametrize("scale", [1.0, "learned"])
def test_each_head_has_a_bottleneck_of_its_own(scale, mode, rng):
    cell = MultiHeadAdapterLayer(**SIZES, non_linearity="tanh", scale=scale, compute_dtype=ms.float32)
    x = rng.normal(size=(2, 5, 6)).astype(np.float32)
    context = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    same(cell(Tensor(x), None, Tensor(context)).asnumpy(), context)
    weight, bias, up, up_bias = randomise(cell, rng)
    factor = cell.mindpet_delta_adapter_scale.asnumpy()[0] if scale == "learned" else scale
    expected = context + factor * np.stack(
        [np.tanh(x @ weight[2 * i : 2 * i + 2].T + bias[2 * i : 2 * i + 2]) @ up[0, i] + up_bias[i] for i in range(3)],
        1,
    )
    np.testing.assert_allclose(cell(Tensor(x), None, Tensor(context)).asnumpy(), expected, atol=1e-4)
    assert sum(param.size for param in cell.trainable_params()) == 3 * (6 * 2 + 2 + 2 * 4 + 4) + (scale == "learned")


CONFIGS = {
    "multi_head": lambda target: config(target, scale=2.0),
    "adaption_prompt": lambda target: AdaptionPromptConfig(target_modules=target, adapter_len=3, adapter_layers=1),
}


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("name", list(NETWORKS))
def test_train_save_load_and_disable(name, method, mode, rng, tmp_path):
    cls, target = NETWORKS[name]
    network, x = Logits(cls.from_pretrained(GOLDEN / name)), Tensor(rng.integers(0, 19, (2, 6)).astype(np.int32))
    network.set_train(False)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, CONFIGS[method](target))
    same(numbers(model, x), base)
    move(model, 1)
    trained = numbers(model, x)
    assert np.abs(trained - base).max() > 1e-4
    with model.disable_adapter():
        same(numbers(model, x), base)
    same(numbers(model, x), trained)
    with pytest.raises(MergeError, match="cannot be folded"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert contents(model.unload()) == before
    loaded = PeftModel.from_pretrained(network, tmp_path, is_trainable=True)
    same(numbers(loaded, x), trained)

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__()
            self.network = loaded

        def construct(self, x):
            return self.network(x).square().mean()

    params = loaded.trainable_params()
    start = [param.asnumpy().copy() for param in params]
    nn.TrainOneStepCell(Loss(), nn.Adam(params, 0.01)).set_train()(x)
    assert all(np.abs(param.asnumpy() - old).max() > 0 for param, old in zip(params, start))


def test_a_llama_adapter_without_its_lowest_layers(tmp_path):
    network = LlamaForCausalLM.from_pretrained(GOLDEN / "llama")
    model = get_peft_model(network, AdaptionPromptConfig(target_modules="self_attn", adapter_len=3, adapter_layers=2))
    drop_adapter_layers(model, 1, "upper")
    config = model.peft_config["upper"]
    assert config.adapter_layers == 1
    paths = [path for path in model.adapter_tensors("upper") if path.endswith("adaption_prompt")]
    assert paths == ["base_model.model.model.layers.1.self_attn.adaption_prompt"]


def test_what_has_no_such_place():
    with pytest.raises(ConfigError, match=r"cannot carry it: \['query \(Dense\)'\]"):
        plan_targets(Small(), config("query"))
    network = LlamaForCausalLM.from_pretrained(GOLDEN / "llama")
    network.model.layers[0].self_attn.heads = None
    with pytest.raises(ConfigError, match="layers.0.self_attn: 'heads' and 'kv_heads' and 'head_dim' must be positive"):
        plan_targets(network, config("self_attn"))

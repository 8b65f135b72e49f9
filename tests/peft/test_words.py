"""A prefix that starts as real words computes what the words in front of the input do."""

import pathlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from models.bert import BertClassifier, BertConfig
from models.generate import generate
from models.gpt2 import Gpt2ForCausalLM
from models.llama import LlamaForCausalLM

from mindpet.errors import AdapterError, ConfigError
from mindpet.peft import (
    BitFitConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Ptuning2Config,
    UnionConfig,
    get_peft_model,
    start_prefix,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODELS = {"gpt2": Gpt2ForCausalLM, "llama": LlamaForCausalLM}
KINDS = pytest.mark.parametrize("kind", list(MODELS))
WORDS = [7, 3, 11]
CONFIG = PrefixTuningConfig(num_virtual_tokens=3)


def make(kind):
    return MODELS[kind].from_pretrained(GOLDEN / kind).set_train(False)


def in_front(ids):
    return np.concatenate([np.broadcast_to(WORDS, (len(ids), 3)), ids], 1).astype(np.int32)


@pytest.mark.parametrize(
    "kind, config", [("gpt2", CONFIG), ("llama", Ptuning2Config(num_virtual_tokens=3))], ids=MODELS
)
def test_a_decoder_computes_what_it_does_after_the_words(kind, config, mode, rng, tmp_path):
    network, ids = make(kind), rng.integers(0, 48, (2, 5)).astype(np.int32)
    base = network(Tensor(ids)).asnumpy()
    expected = network(Tensor(in_front(ids))).asnumpy()[:, 3:]
    model = get_peft_model(network, config)
    before = model(Tensor(ids)).asnumpy()
    start_prefix(model, WORDS)
    np.testing.assert_allclose(model(Tensor(ids)).asnumpy(), expected, atol=1e-5)
    assert np.abs(expected - before).max() > 1e-3 and np.abs(expected - base).max() > 1e-3
    with model.disable_adapter():
        np.testing.assert_array_equal(model(Tensor(ids)).asnumpy(), base)
        words_then_input = generate(model, in_front(ids), 2)[:, 3:]
    np.testing.assert_array_equal(generate(model, ids, 2), words_then_input)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    np.testing.assert_allclose(loaded(Tensor(ids)).asnumpy(), expected, atol=1e-5)


@KINDS
def test_padding_behind_the_input_changes_nothing(kind, rng):
    model, ids = get_peft_model(make(kind), CONFIG), rng.integers(0, 48, (2, 5)).astype(np.int32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.int32)
    start_prefix(model, Tensor(WORDS, ms.int32), Tensor(np.ones((1, 3)), ms.int32))
    got = model(Tensor(ids), Tensor(mask)).asnumpy()
    with model.disable_adapter():
        whole = np.concatenate([np.ones((2, 3), np.int32), mask], 1)
        expected = model(Tensor(in_front(ids)), Tensor(whole)).asnumpy()[:, 3:]
    np.testing.assert_allclose(got[mask == 1], expected[mask == 1], atol=1e-5)


def bert(layers):
    config = BertConfig(20, 8, layers, 2, 12, max_position_embeddings=12, method="full")
    return BertClassifier(config, 3, pooling="mean").set_train(False)


def test_the_words_of_a_bert_do_not_see_the_input(mode, rng):
    """So it is exact in the first layer, whose keys and values are of the embeddings; words look back in the next."""
    ids, mask = rng.integers(0, 20, (2, 5)).astype(np.int32), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.int32)
    model = get_peft_model(bert(1), CONFIG)
    start_prefix(model, WORDS, Tensor(np.ones((1, 3)), ms.int32))
    got = model(Tensor(ids), Tensor(mask)).asnumpy()
    with model.disable_adapter():
        network, whole = model.network, np.concatenate([np.ones((2, 3), np.int32), mask], 1)
        hidden, _ = network.bert(Tensor(in_front(ids)), Tensor(whole))
        weights = whole[..., None] * (np.arange(8) >= 3)[:, None]
        pooled = (hidden.asnumpy() * weights).sum(1) / mask.sum(1, keepdims=True)
        expected = network.classifier(Tensor(pooled.astype(np.float32))).asnumpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)
    model = get_peft_model(bert(2), CONFIG)
    start_prefix(model, WORDS, Tensor(np.ones((1, 3)), ms.int32))
    assert np.isfinite(model(Tensor(ids), Tensor(mask)).asnumpy()).all()


def test_it_trains_on_and_leaves_all_else_as_it_was(mode, rng):
    network, ids = make("llama"), rng.integers(0, 48, (2, 5)).astype(np.int32)
    base = [(param.name, param.asnumpy().tobytes()) for param in network.get_parameters()]
    model = get_peft_model(network, CONFIG, "words")
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("other", CONFIG)
    model.set_adapter("lora")
    lora = model(Tensor(ids)).asnumpy()
    names = [param.name for param in model.get_parameters()]
    model.network.model.norm.set_train(True)
    start_prefix(model, WORDS, adapter_name="words")  # the one that waits
    start_prefix(model, WORDS, adapter_name="words")
    assert [param.name for param in model.get_parameters()] == names
    assert model.network.model.norm.training and not model.network.training
    np.testing.assert_array_equal(model(Tensor(ids)).asnumpy(), lora)
    model.set_adapter("words")

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.model = model

        def construct(self, ids):
            return self.model(ids).square().mean()

    step = nn.TrainOneStepCell(Loss(), nn.Adam(model.trainable_params(), 0.1)).set_train()
    losses = [float(step(Tensor(ids)).asnumpy()) for _ in range(3)]
    assert losses[-1] < losses[0]
    start_prefix(model, WORDS)  # while it is in training mode
    assert model.network.training
    np.testing.assert_allclose(float(step(Tensor(ids)).asnumpy()), losses[0], rtol=1e-4)
    model.unload()
    assert [(param.name, param.asnumpy().tobytes()) for param in network.get_parameters()] == base


def test_what_cannot_be(rng):
    model = get_peft_model(make("gpt2"), CONFIG)
    before = model.trainable_params()[0].asnumpy().copy()
    for ids in ([1, 2], [[1, 2, 3]], [0.5, 1.0, 2.0], "one"):
        with pytest.raises(ValueError, match="'token_ids' must be the ids of 3 tokens, but are"):
            start_prefix(model, ids)
    with pytest.raises(TypeError, match="'model' must be a PeftModel"):
        start_prefix(model.network, WORDS)
    with pytest.raises(AdapterError, match="there is no adapter 'nobody'"):
        start_prefix(model, WORDS, adapter_name="nobody")
    with model.disable_adapter(), pytest.raises(AdapterError, match="not inside of disable_adapter"):
        start_prefix(model, WORDS)
    with pytest.raises(TypeError):
        start_prefix(model, WORDS, "surplus", "inputs")
    np.testing.assert_array_equal(model.trainable_params()[0].asnumpy(), before)
    assert np.isfinite(model(Tensor([WORDS], ms.int32)).asnumpy()).all()
    for config, match in (
        (PromptTuningConfig(num_virtual_tokens=3), "is of PROMPT_TUNING, which is no prefix alone"),
        (BitFitConfig(), "is of BITFIT, which is no prefix alone"),
        (UnionConfig(configs=[CONFIG, BitFitConfig()]), "is of UNION, which is no prefix alone"),
        (PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True), "'default' is computed by a projection"),
    ):
        with pytest.raises(ConfigError, match=match):
            start_prefix(get_peft_model(make("gpt2"), config), WORDS)

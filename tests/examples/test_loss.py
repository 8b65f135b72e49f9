"""The loss of a causal language model, some words at a time."""

import mindspore as ms
import numpy as np
import pytest
from compiled import kept_bytes, largest_result
from mindspore import Parameter, Tensor, nn
from models.llama import CrossEntropy, LlamaConfig, LlamaForCausalLM
from models.loss import ChunkedCrossEntropy, ChunkedLoss

from mindpet.peft import LoraConfig, get_peft_model

TOKENS, FEATURES, WORDS, CHUNK = 7, 5, 11, 4


class Net(nn.Cell):
    """The loss of hidden states, in a type."""

    def __init__(self, weight, trains, dtype=ms.float32):
        super().__init__()
        self.weight = Parameter(Tensor(weight), requires_grad=trains)
        self.loss, self.dtype = ChunkedCrossEntropy(WORDS, CHUNK, trains), dtype

    def construct(self, hidden, labels):
        return self.loss(hidden.astype(self.dtype), self.weight, labels)


def reference(hidden, weight, labels):
    """Loss, and the gradients of hidden states and weight."""
    asked = (labels >= 0)[:, None] / (labels >= 0).sum()
    logits, words = hidden @ weight.T, np.arange(WORDS) == labels[:, None]
    loss = (asked * (np.log(np.exp(logits).sum(1, keepdims=True)) - (logits * words).sum(1, keepdims=True))).sum()
    change = asked * (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - words)
    return loss, change @ weight, change.T @ hidden


@pytest.mark.parametrize("dtype, tolerance", [(ms.float32, 1e-6), (ms.float16, 2e-3)])
def test_loss_and_gradients_are_those_of_the_formula(dtype, tolerance, mode, rng):
    hidden, weight = (rng.normal(size=(size, FEATURES)).astype(np.float32) for size in (TOKENS, WORDS))
    labels = np.array([0, 3, 10, -1, 5, 4, -100], np.int32)  # the first and last word of a chunk, and nothing
    expected = reference(hidden, weight, labels)
    network = Net(weight, True, dtype)
    loss, (back, (outer,)) = ms.value_and_grad(network, 0, [network.weight])(Tensor(hidden), Tensor(labels))
    for actual, value in zip((loss, back, outer), expected):
        np.testing.assert_allclose(actual.asnumpy(), value, rtol=0, atol=tolerance)
    loss, back = ms.value_and_grad(Net(weight, False, dtype), 0)(Tensor(hidden), Tensor(labels))
    np.testing.assert_allclose(back.asnumpy(), expected[1], rtol=0, atol=tolerance)


def test_large_logits_stay_finite(mode):
    hidden, weight = np.full((1, FEATURES), 100, np.float32), np.diag(np.full(WORDS, 20.0, np.float32))[:, :FEATURES]
    loss, back = ms.value_and_grad(Net(weight, False), 0)(Tensor(hidden), Tensor(np.array([0], np.int32)))
    np.testing.assert_allclose(loss.asnumpy(), np.log(FEATURES), rtol=1e-4)  # of five logits of 2000
    np.testing.assert_allclose(back.asnumpy(), [[-16, 4, 4, 4, 4]], rtol=1e-3)


def network():
    ms.set_seed(3)
    np.random.seed(3)
    return LlamaForCausalLM(LlamaConfig(40, 8, 16, num_hidden_layers=1, num_attention_heads=2))


class Plain(nn.Cell):
    """The loss from all logits."""

    def __init__(self, base):
        super().__init__(auto_prefix=False)
        self.base, self.loss = base, CrossEntropy(base.model.config)

    def construct(self, ids, labels):
        return self.loss(self.base(ids), labels)


@pytest.mark.parametrize("modules", [None, ["lm_head"]], ids=["frozen", "trained"])
def test_an_adapter_gets_the_gradients_that_all_logits_give(modules, mode, rng):
    ids = rng.integers(0, 40, (2, 6)).astype(np.int32)
    ids, labels = Tensor(ids[:, :-1]), Tensor(np.where(ids[:, 1:] % 5, ids[:, 1:], -1))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules, init_lora_weights=False)
    results = []
    for make in (Plain, lambda base: ChunkedLoss(base.model, base.lm_head, 16)):
        base = network()
        params = get_peft_model(base, config).trainable_params()
        assert len(params) == (3 if modules else 2)
        results.append(ms.value_and_grad(make(base).set_train(), None, params)(ids, labels))
    (loss, gradients), (expected, others) = results[1], results[0]
    np.testing.assert_allclose(loss.asnumpy(), expected.asnumpy(), rtol=1e-6)
    for gradient, other in zip(gradients, others):
        np.testing.assert_allclose(gradient.asnumpy(), other.asnumpy(), rtol=0, atol=1e-6)


def test_no_tensor_of_the_compiled_step_has_all_logits(rng):
    ms.set_context(mode=ms.GRAPH_MODE)
    tokens, words = 64, 128
    hidden, labels = Tensor(np.ones((tokens, 4), np.float32)), Tensor(np.zeros(tokens, np.int32))

    class Step(nn.Cell):
        def __init__(self):
            super().__init__()
            self.weight = Parameter(Tensor(np.ones((words, 4), np.float32)), requires_grad=False)
            self.loss = ChunkedCrossEntropy(words, 16)
            self.gradient = ms.ops.GradOperation()

        def construct(self, hidden):
            return self.gradient(self.value)(hidden)

        def value(self, hidden):
            return self.loss(hidden, self.weight, labels)

    step = Step()
    step(hidden)
    assert largest_result(step) == tokens * 16 * 4
    kept = kept_bytes(step).values()
    assert max(kept) < tokens * 16 * 4, sorted(kept)


@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_a_head_with_a_delta_or_a_bias_is_refused(target):
    base = network()
    get_peft_model(base, LoraConfig(r=2, target_modules=[target]))
    if target != "lm_head":
        ChunkedLoss(base.model, base.lm_head)
        return
    with pytest.raises(ValueError, match="the head has \\['mindpet_delta'\\], which logits of some words do not see"):
        ChunkedLoss(base.model, base.lm_head)
    with pytest.raises(ValueError, match="the head has \\['bias'\\]"):
        ChunkedLoss(base.model, nn.Dense(8, 40))
